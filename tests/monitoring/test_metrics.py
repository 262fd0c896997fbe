"""The series of the contract, by their exact names and labels."""

import subprocess
import sys

import pytest
from prometheus_client.parser import text_string_to_metric_families

from monitoring import metrics

CONTRACT = {
    "pawl_requests_total": {"route", "model", "variant", "outcome"},
    "pawl_request_duration_seconds": None,
    "pawl_time_to_first_token_seconds": None,
    "pawl_inter_token_seconds": None,
    "pawl_gateway_overhead_seconds": None,
    "pawl_requests_in_flight": None,
    "pawl_tokens_total": {"direction"},
    "pawl_upstream_errors_total": {"reason"},
    "pawl_engine_ejected": None,
    "pawl_rate_limited_total": None,
    "pawl_feedback_total": {"type", "value", "model", "variant"},
    "pawl_toxic_responses_total": {"model", "variant"},
    "pawl_scored_responses_total": {"model", "variant"},
    "pawl_refusals_total": {"kind", "model", "variant"},
    "pawl_harmful_requests_total": {"model", "variant"},
    "pawl_benign_requests_total": {"model", "variant"},
    "pawl_pairs_total": {"source"},
    "pawl_pairs_rejected_total": {"reason"},
    "pawl_spool_rows": None,
    "pawl_spool_oldest_seconds": None,
    "pawl_dead_letters_total": None,
    "pawl_retrain_runs_total": {"outcome"},
    "pawl_retrain_skips_total": {"reason"},
    "pawl_retrain_last_success_timestamp_seconds": None,
    "pawl_gate_verdicts_total": {"verdict"},
    "pawl_rollout_weight": {"model", "variant"},
    "pawl_rollout_blind": {"model"},
    "pawl_rollout_state": {"model", "state"},
    "pawl_rollbacks_total": {"metric"},
    "pawl_event_loop_lag_seconds": None,
    "pawl_build_info": {"version"},
}
BOUNDED = {"route", "model", "variant", "outcome", "reason", "kind", "direction", "type", "value", "source", "verdict",
           "state", "metric", "version", "replica", "guard", "action"}  # fmt: skip


def declared() -> dict[str, set[str]]:
    """Return each family's exposed name and labels."""
    return {
        family.name + ("_total" if family.type == "counter" else ""): set(getattr(collector, "_labelnames", ()))
        for collector in metrics.REGISTRY._collector_to_names
        for family in collector.describe()  # type: ignore[attr-defined]
    }


@pytest.mark.parametrize("name", CONTRACT)
def test_series_of_the_contract_is_declared_with_its_labels(name: str) -> None:
    labels = CONTRACT[name]
    assert name in declared()
    assert labels is None or declared()[name] == labels


def test_every_label_is_a_bounded_one() -> None:
    assert set().union(*declared().values()) <= BOUNDED


def test_exposition_parses_and_names_its_type() -> None:
    metrics.REQUESTS.labels("chat", "m", "control", metrics.Outcome.OK).inc()
    body, content_type = metrics.render()
    families = {family.name for family in text_string_to_metric_families(body.decode())}
    assert content_type.startswith("text/plain")
    assert {name.removesuffix("_total") for name in CONTRACT} <= families
    assert b'outcome="ok"' in body


@pytest.mark.parametrize(
    ("buckets", "first", "last"),
    [
        (metrics.FIRST_TOKEN_BUCKETS, 0.005, 60),
        (metrics.INTER_TOKEN_BUCKETS, 0.001, 2.5),
        (metrics.DURATION_BUCKETS, 0.01, 300),
        (metrics.OVERHEAD_BUCKETS, 5e-5, 0.1),
    ],
)
def test_buckets_cover_what_models_do(buckets: tuple[float, ...], first: float, last: float) -> None:
    assert (buckets[0], buckets[-1]) == (first, last)
    assert list(buckets) == sorted(set(buckets))


def test_a_process_that_only_counts_does_not_load_torch() -> None:
    code = (
        "import sys, monitoring.metrics, monitoring.toxicity, monitoring.refusal, monitoring.harm, monitoring.alerts;"
        "sys.exit(bool({'torch', 'transformers', 'detoxify'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
