"""What a running gateway exposes after traffic."""

from __future__ import annotations

from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from tests.monitoring.exposition import exposed_names
from tests.serving.conftest import Served
from tests.serving.talk import CHAT, QUESTION, STREAM
from tests.serving.waiting import eventually

GATEWAY_SERIES = {
    "pawl_requests_total",
    "pawl_request_duration_seconds_bucket",
    "pawl_time_to_first_token_seconds_bucket",
    "pawl_inter_token_seconds_bucket",
    "pawl_gateway_overhead_seconds_bucket",
    "pawl_requests_in_flight",
    "pawl_tokens_total",
    "pawl_upstream_errors_total",
    "pawl_engine_ejected",
    "pawl_rate_limited_total",
    "pawl_feedback_total",
    "pawl_spool_rows",
    "pawl_spool_oldest_seconds",
    "pawl_dead_letters_total",
    "pawl_rollout_weight",
    "pawl_event_loop_lag_seconds_bucket",
    "pawl_build_info",
}


def samples(served: Served) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    text = served.client.get("/metrics").text
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_the_series_of_the_contract_are_there(served: Served) -> None:
    completion_id = served.client.post(CHAT, json=QUESTION).json()["id"]
    served.stored(completion_id)
    served.engine.behaviour.gap_s = 0.05  # Chunks that come together have no time between them.
    served.client.post(CHAT, json=STREAM)
    served.client.post("/v1/feedback", json={"completion_id": completion_id, "type": "thumbs", "value": "up"})
    response = served.client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    assert exposed_names(response.text) >= GATEWAY_SERIES
    names = {name for name, _ in samples(served)}
    assert names >= GATEWAY_SERIES - {"pawl_upstream_errors_total", "pawl_rate_limited_total"}


def test_traffic_is_counted(served: Served) -> None:
    labels = {"route": "chat.completions", "model": "assistant", "variant": "control", "outcome": "ok"}
    ok = ("pawl_requests_total", frozenset(labels.items()))
    before = samples(served)

    def counted(now: dict[tuple[str, frozenset[tuple[str, str]]], float]) -> dict[Any, float] | None:
        return now if now.get(ok, 0) - before.get(ok, 0) == 2 else None

    served.client.post(CHAT, json=QUESTION)
    served.client.post(CHAT, json=STREAM)
    served.client.post(CHAT, json={**QUESTION, "model": "a name that a client made up"})
    after = eventually(lambda: counted(samples(served)))  # A call is counted after its last byte.
    assert after["pawl_requests_in_flight", frozenset()] == 0
    assert not any("made up" in str(labels) for _, labels in after)
