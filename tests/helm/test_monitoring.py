"""Scraping, alerts and dashboards of the chart."""

from __future__ import annotations

import json

import yaml

from tests.helm.chart import ROOT, Manifest, named, of_kind, pods, render
from tests.helm.value_sets import MONITORING

RULES = ROOT / "monitoring" / "pawl-rules.yml"
DASHBOARD = ROOT / "monitoring" / "pawl-dashboard.json"


def scraped_ports(objects: list[Manifest]) -> dict[str, str]:
    """Component to the name of the port that is scraped."""
    monitors = of_kind(objects, "ServiceMonitor") + of_kind(objects, "PodMonitor")
    return {
        item["spec"]["selector"]["matchLabels"]["app.kubernetes.io/component"]: endpoint["port"]
        for item in monitors
        for endpoint in item["spec"].get("endpoints", []) + item["spec"].get("podMetricsEndpoints", [])
    }


def test_nothing_needs_the_operator_by_default() -> None:
    assert not {item["apiVersion"] for item in render()} & {"monitoring.coreos.com/v1"}


def test_every_process_is_scraped_on_a_port_it_has() -> None:
    objects = render(MONITORING)
    ports = scraped_ports(objects)
    assert ports == {"gateway": "http", "engine": "http", "worker": "metrics"}
    for component, port in ports.items():
        (only,) = pods(objects)[component]["containers"]
        assert port in {item["name"] for item in only["ports"]}


def test_monitors_carry_the_labels_the_operator_selects_by() -> None:
    for kind in ("ServiceMonitor", "PodMonitor"):
        for item in of_kind(render(MONITORING), kind):
            assert item["metadata"]["labels"]["release"] == "kube-prometheus"
            assert item["apiVersion"] == "monitoring.coreos.com/v1"


def test_the_scrape_key_comes_by_reference() -> None:
    (endpoint,) = named(render(MONITORING), "ServiceMonitor", "pawl-gateway")["spec"]["endpoints"]
    assert endpoint["authorization"] == {"type": "Bearer", "credentials": {"name": "scrape", "key": "key"}}


def test_alert_rules_arrive_as_they_are_written() -> None:
    rule = named(render(MONITORING), "PrometheusRule", "pawl")
    assert rule["apiVersion"] == "monitoring.coreos.com/v1"
    assert rule["spec"] == yaml.safe_load(RULES.read_text())
    assert all({"name", "rules"} <= set(group) for group in rule["spec"]["groups"])


def test_the_dashboard_arrives_as_it_is_written() -> None:
    found = named(render(MONITORING), "ConfigMap", "pawl-dashboard")
    assert found["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert json.loads(found["data"]["pawl-dashboard.json"]) == json.loads(DASHBOARD.read_text())
