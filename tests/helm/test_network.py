"""Who may talk to whom: vLLM's adapter routes have no authentication, so the network has to be the guard."""

from __future__ import annotations

from tests.helm.chart import Manifest, named, of_kind, render
from tests.helm.value_sets import CLOSED_NETWORK, MONITORING, OPEN_NETWORK, OUTSIDE_ENGINE, SCORED

PROCESSES = {"gateway", "worker", "retrain"}
COMPONENTS = PROCESSES | {"engine", "migration"}


def selects(selector: Manifest, component: str) -> bool:
    """Whether a pod selector picks this release's pods of `component`."""
    labels = {
        "app.kubernetes.io/name": "pawl",
        "app.kubernetes.io/instance": "pawl",
        "app.kubernetes.io/component": component,
        "app.kubernetes.io/part-of": "pawl",
    }
    exact = selector.get("matchLabels", {}).items() <= labels.items()
    return exact and all(labels[item["key"]] in item["values"] for item in selector.get("matchExpressions", []))


def policies(objects: list[Manifest], component: str) -> list[Manifest]:
    return [
        item["spec"] for item in of_kind(objects, "NetworkPolicy") if selects(item["spec"]["podSelector"], component)
    ]


def egress_ports(objects: list[Manifest], component: str) -> set[int]:
    rules = [rule for policy in policies(objects, component) for rule in policy.get("egress", [])]
    return {port["port"] for rule in rules for port in rule["ports"]}


def test_every_pod_is_denied_by_default() -> None:
    policy = named(render(), "NetworkPolicy", "pawl-default-deny")["spec"]
    assert all(selects(policy["podSelector"], component) for component in COMPONENTS)
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    assert "ingress" not in policy
    assert {port["port"] for rule in policy["egress"] for port in rule["ports"]} == {53}


def test_only_the_processes_reach_the_engine() -> None:
    rules = [rule for policy in policies(render(), "engine") for rule in policy.get("ingress", [])]
    (rule,) = rules
    (peer,) = rule["from"]
    assert {name for name in COMPONENTS if selects(peer["podSelector"], name)} == PROCESSES
    assert "namespaceSelector" not in peer
    assert rule["ports"] == [{"protocol": "TCP", "port": "http"}]


def test_scrapers_reach_the_engine_only_when_asked_for() -> None:
    (rule,) = named(render(MONITORING), "NetworkPolicy", "pawl-engine")["spec"]["ingress"]
    assert rule["from"][1:] == [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}]


def test_each_component_gets_out_only_where_it_needs_to() -> None:
    ports = {component: egress_ports(render(), component) for component in COMPONENTS}
    assert ports == {
        "gateway": {53, 5432, 8000},
        "worker": {53, 443, 5432, 8000},
        "retrain": {53, 443, 5432, 8000},
        "engine": {53, 443},
        "migration": {53, 5432},
    }


def test_gateways_reach_the_scorer_only_where_they_ask_it() -> None:
    assert named(render(SCORED), "Service", "pawl-worker")["spec"]["ports"] == [
        {"name": "metrics", "port": 9200, "targetPort": "metrics"}
    ]
    assert egress_ports(render(SCORED), "gateway") == {53, 5432, 8000, 9200}
    assert "pawl-worker" not in {item["metadata"]["name"] for item in of_kind(render(), "Service")}


def test_the_scorer_lets_gateways_and_scrapers_in() -> None:
    (rule,) = named(render(SCORED), "NetworkPolicy", "pawl-worker")["spec"]["ingress"]
    scrapers, gateways = rule["from"]
    assert "namespaceSelector" in scrapers
    assert {name for name in COMPONENTS if selects(gateways["podSelector"], name)} == {"gateway"}
    assert rule["ports"] == [{"protocol": "TCP", "port": "metrics"}]
    egress = named(render(SCORED), "NetworkPolicy", "pawl-to-scorer")["spec"]["egress"]
    assert {name for name in COMPONENTS if selects(egress[0]["to"][0]["podSelector"], name)} == {"worker"}


def test_the_scorer_needs_no_scrapers() -> None:
    (rule,) = named(render(SCORED | {"networkPolicy": {"metricsFrom": []}}), "NetworkPolicy", "pawl-worker")["spec"][
        "ingress"
    ]
    (gateways,) = rule["from"]
    assert selects(gateways["podSelector"], "gateway")


def test_a_closed_network() -> None:
    objects = render(CLOSED_NETWORK)
    assert egress_ports(objects, "engine") == {53}
    assert egress_ports(objects, "worker") == {53, 5432, 8000, 8443}
    database = named(objects, "NetworkPolicy", "pawl-database")["spec"]
    assert database["egress"][0]["to"] == [{"ipBlock": {"cidr": "10.1.2.0/24"}}]
    (rule,) = named(objects, "NetworkPolicy", "pawl-gateway")["spec"]["ingress"]
    namespaces = [peer["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"] for peer in rule["from"]]
    assert namespaces == ["ingress-nginx", "monitoring"]


def test_the_gateway_is_open_to_callers_by_default() -> None:
    (rule,) = named(render(), "NetworkPolicy", "pawl-gateway")["spec"]["ingress"]
    assert "from" not in rule


def test_no_policy_for_an_engine_that_is_elsewhere() -> None:
    names = {item["metadata"]["name"] for item in of_kind(render(OUTSIDE_ENGINE), "NetworkPolicy")}
    assert "pawl-engine" not in names
    assert "pawl-default-deny" in names


def test_policies_can_be_left_to_the_cluster() -> None:
    assert of_kind(render(OPEN_NETWORK), "NetworkPolicy") == []
