"""The configuration that the pods get is one that Pawl itself accepts."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from pawl.errors import ConfigurationError
from pawl.settings import Settings, load_settings
from tests.helm.chart import Manifest, Values, container, named, pods, render
from tests.helm.value_sets import BIG_ENGINE, FIXED_SPLIT, OUTSIDE_ENGINE, VALUE_SETS

SECRET_VALUE = "a-secret-of-the-cluster"


def settings_of(values: Values, tmp_path: Path, component: str = "gateway") -> Settings:
    """Load the release's pawl.yaml under the environment of one component's container."""
    objects = render(values)
    name = "pawl-migration" if component == "migration" else "pawl"
    path = tmp_path / "pawl.yaml"
    path.write_text(named(objects, "ConfigMap", name)["data"]["pawl.yaml"])
    return load_settings(path, environment(container(pods(objects)[component])))


def environment(of: Manifest) -> dict[str, str]:
    """The container's variables, with a stand-in for what comes from secrets."""
    return {item["name"]: str(item.get("value", SECRET_VALUE)) for item in of.get("env", [])}


@pytest.mark.parametrize("name", VALUE_SETS)
def test_every_component_loads_its_settings(name: str, tmp_path: Path) -> None:
    for component in {"gateway", "worker", "retrain", "migration"} & set(pods(render(VALUE_SETS[name]))):
        settings = settings_of(VALUE_SETS[name], tmp_path, component)
        assert settings.database.password is not None
        assert settings.database.password.get_secret_value() == SECRET_VALUE
        assert settings.auth.secret is not None
        assert settings.auth.secret.get_secret_value() == SECRET_VALUE


def test_every_engine_pod_is_named(tmp_path: Path) -> None:
    settings = settings_of(BIG_ENGINE, tmp_path)
    assert settings.serving.models["assistant"].engines == [
        f"http://pawl-engine-{i}.pawl-engine.llm.svc:8000" for i in range(3)
    ]


def test_given_engines_are_kept(tmp_path: Path) -> None:
    settings = settings_of(OUTSIDE_ENGINE, tmp_path)
    assert settings.serving.models["assistant"].engines == ["https://vllm.example.org"]


def test_nested_and_large_values_arrive_unchanged(tmp_path: Path) -> None:
    settings = settings_of(FIXED_SPLIT, tmp_path)
    experiment = settings.serving.models["assistant"].experiment
    assert settings.serving.max_body_bytes == 16777216
    assert experiment is not None
    assert [variant.weight for variant in experiment.variants] == [0.9, 0.1]


def test_migration_reads_the_same_file_as_the_release() -> None:
    objects = render()
    assert (
        named(objects, "ConfigMap", "pawl-migration")["data"]["pawl.yaml"]
        == named(objects, "ConfigMap", "pawl")["data"]["pawl.yaml"]
    )


def test_processes_listen_on_their_pods_address(tmp_path: Path) -> None:
    settings = settings_of({}, tmp_path)
    assert settings.serving.host == settings.worker.host == "0.0.0.0"


def test_keys_are_asked_for_and_limits_hold_across_pods_by_default(tmp_path: Path) -> None:
    settings = settings_of({}, tmp_path)
    assert settings.auth.required
    assert settings.serving.limits.store == "database"


def test_several_workers_do_not_each_count_a_keys_limits(tmp_path: Path) -> None:
    counted_apart: Values = {"config": {"serving": {"limits": {"store": "memory"}}}}
    assert settings_of(counted_apart, tmp_path).serving.limits.store == "memory"
    several = {"workers": 3, "spool": {"max_bytes": 1024**3}, "limits": {"store": "memory"}}
    with pytest.raises(ConfigurationError, match=r"serving\.workers is 3 and serving\.limits\.store is memory"):
        settings_of({"config": {"serving": several}}, tmp_path)
    keyless: Values = {"config": {"serving": several, "auth": {"required": False}}}
    assert settings_of(keyless, tmp_path).serving.workers == 3


def test_paths_of_the_settings_are_on_volumes(tmp_path: Path) -> None:
    settings = settings_of({}, tmp_path)
    mounts = [mount["mountPath"] for mount in container(pods(render())["retrain"])["volumeMounts"]]
    for path in (settings.state_dir, settings.retrain.adapters_dir, settings.retrain.runs_dir):
        assert any(path.is_relative_to(mount) for mount in mounts), path


def test_a_change_of_configuration_restarts_gateway_and_worker() -> None:
    def checksums(values: Values) -> list[str]:
        objects = render(values)
        found = named(objects, "StatefulSet", "pawl-gateway"), named(objects, "Deployment", "pawl-worker")
        return [item["spec"]["template"]["metadata"]["annotations"]["checksum/config"] for item in found]

    before, after = checksums({}), checksums({"config": {"serving": {"max_in_flight": 64}}})
    assert all(old != new for old, new in zip(before, after, strict=True))


def test_changed_adapters_dir_moves_every_mount() -> None:
    all_pods = pods(render({"config": {"retrain": {"adapters_dir": "/srv/adapters"}}}))
    for component in ("engine", "worker", "retrain"):
        mounts = {mount["name"]: mount["mountPath"] for mount in container(all_pods[component])["volumeMounts"]}
        assert mounts["adapters"] == "/srv/adapters"


def test_pawl_yaml_is_plain_yaml() -> None:
    text = named(render(), "ConfigMap", "pawl")["data"]["pawl.yaml"]
    assert set(yaml.safe_load(text)) <= set(Settings.model_fields)
