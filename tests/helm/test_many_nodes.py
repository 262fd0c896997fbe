"""Training on several GPUs and nodes: pods that find one another, of which the first one leads."""

from __future__ import annotations

import re
from pathlib import Path

import kubernetes_validate
import pytest

from pawl.settings import DistributedSettings, load_settings
from tests.helm.chart import CHART, ChartError, Manifest, Values, container, helm, named, of_kind, pods, render
from tests.helm.test_network import policies

TWO_NODES: Values = {"retrain": {"nodes": 2, "gpus": 8}}
ONE_NODE: Values = {"retrain": {"gpus": 4}}
FIRST_WITH_SUCCESS_POLICY, NEWEST = "1.31", "1.37"
JOB = "pawl-retrain-29000000"
FIELDS = {
    "metadata.annotations['batch.kubernetes.io/job-completion-index']": "1",
    "metadata.labels['batch.kubernetes.io/job-name']": JOB,
}
"""What the pod of the second node reads of itself."""


def variables(of: Manifest) -> dict[str, str]:
    """The container's variables as Kubernetes makes them; what comes from secrets is left out."""
    found: dict[str, str] = {}
    for item in of["env"]:
        field = item.get("valueFrom", {}).get("fieldRef")
        if field or "value" in item:
            text = FIELDS[field["fieldPath"]] if field else item["value"]
            found[item["name"]] = re.sub(r"\$\((\w+)\)", lambda match: found[match[1]], text)
    return found


def distributed_settings(values: Values, tmp_path: Path) -> DistributedSettings:
    objects = render(values)
    path = tmp_path / "pawl.yaml"
    path.write_text(named(objects, "ConfigMap", "pawl")["data"]["pawl.yaml"])
    return load_settings(path, variables(container(pods(objects)["retrain"]))).retrain.distributed


def job_of(values: Values) -> Manifest:
    job: Manifest = named(render(values), "CronJob", "pawl-retrain")["spec"]["jobTemplate"]["spec"]
    return job


@pytest.mark.parametrize("version", [FIRST_WITH_SUCCESS_POLICY, NEWEST])
@pytest.mark.parametrize("values", [TWO_NODES, ONE_NODE])
def test_what_is_rendered_is_valid(values: Values, version: str) -> None:
    assert "0 chart(s) failed" in helm("lint", "--strict", str(CHART), values=values)
    for item in render(values):
        kubernetes_validate.validate(item, version, strict=True)


def test_the_second_pod_joins_the_first_by_name(tmp_path: Path) -> None:
    settings = distributed_settings(TWO_NODES, tmp_path)
    assert (settings.processes, settings.nodes, settings.node_rank) == (8, 2, 1)
    service = named(render(TWO_NODES), "Service", "pawl-retrain")["spec"]
    assert settings.leader == f"{JOB}-0.pawl-retrain"
    assert pods(render(TWO_NODES))["retrain"]["subdomain"] == "pawl-retrain"
    assert (service["clusterIP"], service["publishNotReadyAddresses"]) == ("None", True)
    assert service["ports"] == [{"name": "training", "port": settings.port}]
    labels = named(render(TWO_NODES), "CronJob", "pawl-retrain")["spec"]["jobTemplate"]["spec"]["template"]["metadata"]
    assert service["selector"].items() <= labels["labels"].items()


def test_the_round_is_done_when_the_first_pod_is() -> None:
    job = job_of(TWO_NODES)
    assert (job["completionMode"], job["completions"], job["parallelism"]) == ("Indexed", 2, 2)
    assert job["successPolicy"] == {"rules": [{"succeededIndexes": "0"}]}
    assert job["backoffLimit"] == 2 * job_of({})["backoffLimit"]


def test_all_pods_write_to_one_volume() -> None:
    for values, mode in ((TWO_NODES, "ReadWriteMany"), ({}, "ReadWriteOnce")):
        claim = named(render(values), "PersistentVolumeClaim", "pawl-retrain")
        assert claim["spec"]["accessModes"] == [mode]


def test_training_pods_may_talk_to_one_another_and_nobody_else_to_them() -> None:
    (allowed,) = [policy for policy in policies(render(TWO_NODES), "retrain") if policy.get("ingress")]
    selector = {"podSelector": {"matchLabels": allowed["podSelector"]["matchLabels"]}}
    assert allowed["ingress"] == [{"from": [selector]}]
    assert allowed["egress"] == [{"to": [selector]}]
    assert selector["podSelector"]["matchLabels"]["app.kubernetes.io/component"] == "retrain"


def test_one_pod_with_several_gpus_trains_in_as_many_processes(tmp_path: Path) -> None:
    settings = distributed_settings(ONE_NODE, tmp_path)
    assert (settings.processes, settings.nodes, settings.leader) == (4, 1, "127.0.0.1")
    assert "completionMode" not in job_of(ONE_NODE)


def test_one_node_is_as_it_was(tmp_path: Path) -> None:
    assert distributed_settings({}, tmp_path) == DistributedSettings()
    assert [item for item in of_kind(render(), "Service") if "retrain" in item["metadata"]["name"]] == []


def test_no_nodes_are_refused() -> None:
    with pytest.raises(ChartError, match="nodes"):
        render({"retrain": {"nodes": 0}})
