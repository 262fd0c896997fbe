"""What Helm renders is valid Kubernetes, for every set of values."""

from __future__ import annotations

import re

import kubernetes_validate
import pytest
import yaml

from tests.helm.chart import CHART, Manifest, helm, of_kind, render
from tests.helm.value_sets import VALUE_SETS

KUBERNETES_VERSIONS = ("1.29", "1.37")
FROM_PROMETHEUS_OPERATOR = {"ServiceMonitor", "PodMonitor", "PrometheusRule"}
SECRET_LOOKING = re.compile(r"(?i)(password|secret|token|api_?key)\s*[:=]\s*['\"]?[^\s'\"{]{6,}")

every_value_set = pytest.mark.parametrize("name", VALUE_SETS)


@every_value_set
def test_lints_without_a_warning(name: str) -> None:
    assert "0 chart(s) failed" in helm("lint", "--strict", str(CHART), values=VALUE_SETS[name])


@every_value_set
@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
def test_every_object_is_valid_kubernetes(name: str, version: str) -> None:
    objects = [item for item in render(VALUE_SETS[name]) if item["kind"] not in FROM_PROMETHEUS_OPERATOR]
    assert len(objects) >= 8
    for item in objects:
        kubernetes_validate.validate(item, version, strict=True)


@every_value_set
def test_names_are_unique_and_labels_identify_the_release(name: str) -> None:
    objects = render(VALUE_SETS[name])
    identities = [(item["kind"], item["metadata"]["name"]) for item in objects]
    assert len(set(identities)) == len(identities)
    for item in objects:
        assert item["metadata"]["labels"]["app.kubernetes.io/instance"] == "pawl"
        assert item["metadata"]["labels"]["app.kubernetes.io/managed-by"] == "Helm"


@every_value_set
def test_no_secret_is_rendered(name: str) -> None:
    objects = render(VALUE_SETS[name])
    assert of_kind(objects, "Secret") == []
    for item in of_kind(objects, "ConfigMap"):
        if "pawl.yaml" in item["data"]:
            assert not SECRET_LOOKING.search(item["data"]["pawl.yaml"])
    assert "PRIVATE KEY" not in yaml.safe_dump_all(objects)


def test_a_long_release_name_leaves_room_for_suffixes() -> None:
    text = helm("template", "a" * 53, str(CHART))
    objects: list[Manifest] = [item for item in yaml.safe_load_all(text) if item]
    for item in objects:
        kubernetes_validate.validate(item, KUBERNETES_VERSIONS[-1], strict=True)
        # A CronJob adds 11 characters to its name for each job.
        assert len(item["metadata"]["name"]) <= (52 if item["kind"] == "CronJob" else 63)


def test_selectors_match_their_own_pods_only() -> None:
    objects = render()
    workloads = of_kind(objects, "StatefulSet") + of_kind(objects, "Deployment")
    labels = {item["metadata"]["name"]: item["spec"]["template"]["metadata"]["labels"] for item in workloads}
    for item in workloads:
        selector = item["spec"]["selector"]["matchLabels"].items()
        assert [name for name, pod in labels.items() if selector <= pod.items()] == [item["metadata"]["name"]]


def test_a_new_chart_version_alone_restarts_no_engine() -> None:
    for item in of_kind(render(), "StatefulSet"):
        pod_labels = item["spec"]["template"]["metadata"]["labels"]
        assert "helm.sh/chart" not in pod_labels
        assert "app.kubernetes.io/version" not in pod_labels
