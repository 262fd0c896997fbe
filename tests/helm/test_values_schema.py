"""Wrong values are refused by Helm, with the key's name, before anything reaches a cluster."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from tests.helm.chart import CHART, ChartError, helm
from tests.helm.config_schema import read_schema_file, with_config

WRONG_VALUES: dict[str, tuple[dict[str, Any], str]] = {
    "unknown key": ({"replicas": 3}, "replicas"),
    "unknown key below": ({"gateway": {"replica": 3}}, "replica"),
    "unknown setting": ({"config": {"serving": {"prot": 8080}}}, "prot"),
    "unknown section": ({"config": {"canary": {}}}, "canary"),
    "text for a number": ({"gateway": {"replicas": "three"}}, "gateway.replicas"),
    "text for a setting": ({"config": {"serving": {"port": "http"}}}, "config.serving.port"),
    "number for a switch": ({"networkPolicy": {"enabled": 1}}, "networkPolicy.enabled"),
    "no engine pod": ({"engine": {"replicas": 0}}, "engine.replicas"),
    "rank vLLM does not know": ({"config": {"engine": {"max_lora_rank": 24}}}, "max_lora_rank"),
    "password in the file": ({"config": {"database": {"password": "hunter2"}}}, "password"),
    "password in the address": (
        {"config": {"database": {"url": "postgresql://pawl:pw@db/pawl"}}},
        "config.database.url",
    ),
    "one machine's database": ({"config": {"database": {"url": "sqlite:///var/pawl.db"}}}, "config.database.url"),
    "signing secret in the file": ({"config": {"auth": {"secret": "x" * 16}}}, "secret"),
    "literal secret": ({"secrets": {"auth": {"value": "x" * 16}}}, "value"),
    "schedule": ({"retrain": {"schedule": "weekly"}}, "retrain.schedule"),
    "size": ({"gateway": {"spool": {"size": "ten gigabytes"}}}, "gateway.spool.size"),
    "model without a champion": ({"config": {"serving": {"models": {"chat": {}}}}}, "champion"),
}


@pytest.mark.parametrize("case", WRONG_VALUES)
def test_wrong_values_are_refused_by_name(case: str) -> None:
    values, mentioned = WRONG_VALUES[case]
    with pytest.raises(ChartError) as refusal:
        helm("template", "pawl", str(CHART), values=values)
    assert "values don't meet the specifications" in str(refusal.value)
    assert mentioned in str(refusal.value)


@pytest.mark.parametrize(
    "url", ["postgresql://pawl@db.example.org:5432/pawl?sslmode=verify-full", "postgresql+psycopg://db/pawl"]
)
def test_addresses_without_a_password_are_accepted(url: str) -> None:
    assert url in helm("template", "pawl", str(CHART), values={"config": {"database": {"url": url}}})


def test_engine_off_asks_for_addresses() -> None:
    with pytest.raises(ChartError, match=r"set config\.serving\.models\.assistant\.engines"):
        helm("template", "pawl", str(CHART), values={"engine": {"enabled": False}})


@pytest.mark.parametrize(
    ("workers", "max_bytes", "size"), [(2, 8 * 1024**3, "10Gi"), (1, 1024**3 + 1, "1024Mi"), (3, 10**9, "2.5G")]
)
def test_spools_that_outgrow_their_volume_are_refused(workers: int, max_bytes: int, size: str) -> None:
    with pytest.raises(ChartError, match=r"spool\.max_bytes .* is more than gateway\.spool\.size"):
        helm("template", "pawl", str(CHART), values=spools(workers, max_bytes, size))


@pytest.mark.parametrize(
    ("workers", "max_bytes", "size"), [(4, 1024**3, "4Gi"), (2, 10**12, "2T"), (1, 65536, "65536")]
)
def test_spools_that_just_fit_are_accepted(workers: int, max_bytes: int, size: str) -> None:
    assert f"max_bytes: {max_bytes}" in helm("template", "pawl", str(CHART), values=spools(workers, max_bytes, size))


def spools(workers: int, max_bytes: int, size: str) -> dict[str, Any]:
    """The values that say how much may be spooled, and where."""
    serving = {"workers": workers, "spool": {"max_bytes": max_bytes}}
    return {"config": {"serving": serving}, "gateway": {"spool": {"size": size}}}


def test_the_worker_is_not_told_to_train() -> None:
    with pytest.raises(ChartError, match=r"config\.retrain\.schedule: the worker's pod cannot train"):
        helm("template", "pawl", str(CHART), values={"config": {"retrain": {"schedule": "17 3 * * 0"}}})


def test_ingress_asks_for_a_host() -> None:
    with pytest.raises(ChartError, match=r"gateway\.ingress\.host"):
        helm("template", "pawl", str(CHART), values={"gateway": {"ingress": {"enabled": True}}})


def test_schema_of_the_configuration_is_that_of_the_settings() -> None:
    schema = read_schema_file()
    assert schema == with_config(schema), "settings changed: run python -m tests.helm.config_schema"


def test_every_default_value_is_in_the_schema_and_the_other_way_round() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    schema = read_schema_file()
    assert set(values) | {"global"} == set(schema["properties"])
    for key in set(values) - {"config", "podSecurityContext", "containerSecurityContext", "imagePullSecrets"}:
        node = schema["properties"][key]
        if node["type"] == "object":
            assert set(values[key]) == set(node["properties"]), key
