"""Hold the rules and the dashboard against what a process exposes."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

import yaml
from prometheus_client.parser import text_string_to_metric_families

from monitoring.alerts import SeriesUse, dashboard_expressions, referenced_series, rule_expressions

MONITORING: Final = Path(__file__).parents[2] / "monitoring"
RULES: Final = MONITORING / "pawl-rules.yml"
DASHBOARD: Final = MONITORING / "pawl-dashboard.json"

_SUFFIXES: Final = {"counter": ("_total",), "histogram": ("_bucket", "_count", "_sum"), "gauge": ("",)}

SCRAPE_LABELS: Final = frozenset({"job", "instance"})
"""Prometheus puts these on every series it scrapes."""


def parsed_rules() -> dict[str, object]:
    rules: object = yaml.safe_load(RULES.read_text())
    assert isinstance(rules, dict)
    return rules


def pawl_uses(expressions: Iterable[str]) -> set[SeriesUse]:
    """Return the uses of series that Pawl's own processes emit."""
    uses = {use for expr in expressions for use in referenced_series(expr)}
    return {use for use in uses if use.name.startswith("pawl_")}


def all_expressions(dashboard: Mapping[str, object]) -> list[str]:
    panels = dashboard_expressions(dashboard).values()
    return [*rule_expressions(parsed_rules()).values(), *(expr for panel in panels for expr in panel)]


def exposed_names(exposition_text: str) -> set[str]:
    """Return every series name a scrape may give, from its TYPE lines: a series with labels may have no sample yet."""
    return {
        family.name + suffix
        for family in text_string_to_metric_families(exposition_text)
        for suffix in _SUFFIXES.get(family.type, ("",))
    }


def exposed_labels(exposition_text: str) -> dict[str, set[frozenset[str]]]:
    """Return the label names of every sample, by series."""
    labels: dict[str, set[frozenset[str]]] = {}
    for family in text_string_to_metric_families(exposition_text):
        for sample in family.samples:
            labels.setdefault(sample.name, set()).add(frozenset(sample.labels))
    return labels


def assert_series_exist(exposition_text: str, uses: Iterable[SeriesUse] | None = None) -> None:
    """Fail unless the scrape declares every series that rules and dashboard read, with the labels they name.

    Args:
        uses: what to look for; by default every `pawl_` series of the rules and the dashboard.
    """
    wanted = pawl_uses(all_expressions(json.loads(DASHBOARD.read_text()))) if uses is None else set(uses)
    names, labels = exposed_names(exposition_text), exposed_labels(exposition_text)
    missing = sorted(use.name for use in wanted if use.name not in names)
    assert not missing, f"rules or dashboard read series that are not exposed: {missing}"
    wrong = [
        (use.name, sorted(use.labels - has))
        for use in sorted(wanted)
        for has in labels.get(use.name, ())
        if use.labels - has - SCRAPE_LABELS
    ]
    assert not wrong, f"rules or dashboard use labels these series do not have: {wrong}"
