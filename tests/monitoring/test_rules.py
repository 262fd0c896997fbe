"""The alert rules and the dashboard, held against promtool, the declared series and the runbook."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from monitoring import metrics
from monitoring.alerts import SeriesUse, dashboard_expressions, referenced_series, rule_expressions
from tests.monitoring.exposition import (
    DASHBOARD,
    RULES,
    all_expressions,
    assert_series_exist,
    parsed_rules,
    pawl_uses,
)

HERE = Path(__file__).parent
RUNBOOK = HERE.parents[1] / "docs" / "runbook.md"

# vLLM 0.32 and 0.33, labels model_name and engine; counters and histograms by the names they are exposed under.
VLLM_SERIES = {
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "vllm:num_preemptions_total",
    "vllm:prefix_cache_queries_total",
    "vllm:prefix_cache_hits_total",
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
    "vllm:request_queue_time_seconds_bucket",
}
VLLM_LABELS = {"model_name", "engine", "le"}


def promtool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    binary = shutil.which("promtool")
    assert binary, "promtool is missing: install Debian's `prometheus` package (scripts/install_tools.sh does)"
    return subprocess.run([binary, *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False)


def dashboard() -> dict[str, object]:
    loaded: object = json.loads(DASHBOARD.read_text())
    assert isinstance(loaded, dict)
    return loaded


def rules() -> list[dict[str, object]]:
    groups = parsed_rules()["groups"]
    assert isinstance(groups, list)
    return [rule for group in groups for rule in group["rules"]]


def alerts() -> list[dict[str, object]]:
    return [rule for rule in rules() if "alert" in rule]


def test_promtool_accepts_the_rules() -> None:
    checked = promtool("check", "rules", RULES)
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.parametrize("name", ["rules_test.yml", "rules_hours_test.yml", "rules_days_test.yml"])
def test_alerts_fire_when_they_should_and_only_then(name: str) -> None:
    tested = promtool("test", "rules", HERE / name)
    assert tested.returncode == 0, tested.stdout + tested.stderr


def test_every_alert_is_fired_by_a_unit_test() -> None:
    fired = "".join(path.read_text() for path in HERE.glob("rules*_test.yml"))
    names = {str(rule["alert"]) for rule in alerts()}
    assert {
        name for name in names if f'"{name}", alertstate="firing"' not in fired and f"alertname: {name}\n" not in fired
    } == set()


@pytest.mark.parametrize("rule", alerts(), ids=lambda rule: str(rule["alert"]))
def test_alert_tells_people_what_to_do(rule: dict[str, object]) -> None:
    annotations, labels, name = rule["annotations"], rule["labels"], str(rule["alert"])
    assert isinstance(annotations, dict)
    assert isinstance(labels, dict)
    assert labels["severity"] in {"page", "ticket"}
    assert annotations["summary"]
    assert re.search(r"\d|\$value", annotations["description"]), "a description gives numbers"
    assert annotations["runbook_url"] == f"docs/runbook.md#{name.lower()}"
    assert f"## {name}\n\n*{str(labels['severity']).capitalize()}.*" in RUNBOOK.read_text()


@pytest.mark.usefixtures("_sampled")
def test_rules_and_dashboard_read_only_series_that_are_declared() -> None:
    uses = pawl_uses(all_expressions(dashboard()))
    assert len({use.name for use in uses}) > 25
    assert_series_exist(metrics.render()[0].decode())


@pytest.fixture
def _sampled() -> Iterator[None]:
    """Give each series a sample for a while, so that its labels show in the exposition."""
    labelled: list[Any] = [c for c in metrics.REGISTRY._collector_to_names if getattr(c, "_labelnames", ())]
    for collector in labelled:
        collector.labels(*["test"] * len(collector._labelnames))
    yield
    for collector in labelled:
        collector.remove(*["test"] * len(collector._labelnames))


@pytest.mark.usefixtures("_sampled")
@pytest.mark.parametrize(
    "expr",
    ["sum(pawl_no_such_total)", 'pawl_tokens_total{variant="x"}', "sum by (user) (rate(pawl_requests_total[5m]))"],
)
def test_a_series_or_label_that_does_not_exist_is_found(expr: str) -> None:
    with pytest.raises(AssertionError, match=r"not exposed|do not have"):
        assert_series_exist(metrics.render()[0].decode(), pawl_uses([expr]))


def test_engine_series_are_ones_vllm_exposes() -> None:
    uses = {use for expr in all_expressions(dashboard()) for use in referenced_series(expr)}
    engine = {use for use in uses if use.name.startswith("vllm:")}
    assert engine
    assert {use.name for use in engine} <= VLLM_SERIES
    assert {label for use in engine for label in use.labels} <= VLLM_LABELS


def test_recorded_shares_are_recorded() -> None:
    recorded = {str(rule["record"]) for rule in rules() if "record" in rule}
    used = {use.name for expr in all_expressions(dashboard()) for use in referenced_series(expr)}
    assert {name for name in used if name.startswith("pawl:")} == recorded


def test_every_expression_reads_a_known_kind_of_series() -> None:
    expressions = all_expressions(dashboard())
    prefixes = ("pawl_", "pawl:", "vllm:")
    names = {use.name for expr in expressions for use in referenced_series(expr)}
    assert {name for name in names if not name.startswith(prefixes)} == {"up"}


def test_panel_expressions_parse_in_promtool(tmp_path: Path) -> None:
    """Grafana's variables are put in as Grafana would; promtool then reads each expression as a recording rule."""
    expressions = [expr for panel in dashboard_expressions(dashboard()).values() for expr in panel]
    filled = [re.sub(r"\$(model|variant)", ".*", expr.replace("$__rate_interval", "5m")) for expr in expressions]
    records = [{"record": f"panel:{index}", "expr": expr} for index, expr in enumerate(filled)]
    path = tmp_path / "panels.yml"
    path.write_text(json.dumps({"groups": [{"name": "panels", "rules": records}]}))
    checked = promtool("check", "rules", path)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_dashboard_is_one_grafana_can_load() -> None:
    board = dashboard()
    panels, templating = board["panels"], board["templating"]
    assert isinstance(panels, list)
    assert isinstance(templating, dict)
    schema = board["schemaVersion"]
    assert isinstance(schema, int)
    assert schema >= 39
    assert {variable["name"] for variable in templating["list"]} == {"datasource", "model", "variant"}
    identifiers = [panel["id"] for panel in panels]
    assert len(set(identifiers)) == len(identifiers)
    rows = [panel["title"] for panel in panels if panel["type"] == "row"]
    assert rows == [
        "Traffic",
        "Latency",
        "Quality",
        "Pairs and training",
        "Rollout",
        "Records",
        "Queue, guards and keys",
        "Engine",
    ]
    assert {panel["datasource"]["uid"] for panel in panels if panel["type"] != "row"} == {"${datasource}"}


def test_rule_expressions_are_all_read() -> None:
    assert len(rule_expressions(parsed_rules())) == len(rules())


@pytest.mark.parametrize(
    ("expr", "uses"),
    [
        ("up == 0", {SeriesUse("up", frozenset())}),
        ('a{b="}", c=~"x(y"} > 1', {SeriesUse("a", frozenset({"b", "c"}))}),
        ("sum(rate(a_total[5m])) by (m)", {SeriesUse("a_total", frozenset({"m"}))}),
        ("a unless on (m) max by (m, n) (b offset 1h)", {SeriesUse("a", frozenset()), SeriesUse("b", frozenset("mn"))}),
        ("time() - max(a) > 9 * 86400", {SeriesUse("a", frozenset())}),
        (
            'sum by (le) (rate(a_bucket{m="$model"}[$__rate_interval]))',
            {SeriesUse("a_bucket", frozenset({"le", "m"}))},
        ),
        ("a * on (m) group_left (n) b", {SeriesUse("a", frozenset()), SeriesUse("b", frozenset())}),
    ],
)
def test_expressions_are_read(expr: str, uses: set[SeriesUse]) -> None:
    assert referenced_series(expr) == uses
