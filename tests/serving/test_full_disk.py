"""A disk that takes no more records: refused or counted, as the configuration says, and over without a restart."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from feedback.errors import SpoolUnavailable
from feedback.spool import Connection
from monitoring.metrics import RECORDS_DROPPED, REGISTRY
from pawl.settings import Settings
from tests.fake_vllm import FakeVLLM
from tests.serving.conftest import Served, serving
from tests.serving.talk import CHAT, QUESTION, STREAM, error_of, events_of
from tests.serving.test_completions import n_requests
from tests.serving.waiting import eventually

MakeSettings = Callable[..., Settings]


@contextmanager
def full_disk(served: Served, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every connection of the spool may use no page more than the file has, which is how SQLite meets a full disk."""
    from feedback import spool as module

    def limited(connection: Connection) -> Connection:
        connection.execute("PRAGMA max_page_count = 1")  # SQLite raises it to the pages in use.
        return connection

    open_unlimited = module._open
    with monkeypatch.context() as patch:
        patch.setattr(module, "_open", lambda path: limited(open_unlimited(path)))
        served.gateway.spool.submit(limited).exception(5)
        with pytest.raises(SpoolUnavailable):
            served.gateway.spool.probe().result(5)
        yield
    served.gateway.drain.wake()


def dropped() -> float:
    name = RECORDS_DROPPED._name + "_total"
    return REGISTRY.get_sample_value(name) or 0.0


def test_with_records_required_work_is_refused_until_there_is_room(
    make_settings: MakeSettings, engine: FakeVLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(make_settings(), engine) as served:
        completion_id = served.client.post(CHAT, json=QUESTION).json()["id"]
        served.stored(completion_id)
        rating = {"completion_id": completion_id, "type": "edit", "value": "x" * 50_000}
        n_refused = n_requests("overloaded", variant="none")
        with full_disk(served, monkeypatch):
            for body in (QUESTION, STREAM):
                refused = served.client.post(CHAT, json=body)
                assert (refused.status_code, error_of(refused)["code"]) == (503, "spool_unavailable")
                assert refused.headers["retry-after"]
            assert n_requests("overloaded", variant="none") - n_refused == 2
            assert served.client.post("/v1/feedback", json=rating).status_code == 503
            assert served.client.get("/health/ready").status_code == 503
            assert served.client.get("/health/live").status_code == 200
        eventually(lambda: served.client.get("/health/ready").status_code == 200)
        assert served.client.post(CHAT, json=QUESTION).status_code == 200
        assert served.client.post("/v1/feedback", json=rating).status_code == 201


def test_a_disk_that_fills_up_in_mid_stream_gives_no_done(
    make_settings: MakeSettings, engine: FakeVLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(make_settings(), engine) as served:
        engine.behaviour.gap_s = 0.1
        asked = {**STREAM, "messages": [{"role": "user", "content": "x" * 50_000}]}
        with served.client.stream("POST", CHAT, json=asked) as response:
            chunks = response.iter_raw()
            first = next(chunks)
            with full_disk(served, monkeypatch):
                events = events_of(first + b"".join(chunks))
        assert b"[DONE]" not in events
        assert b'"code":"spool_unavailable"' in events[-1]


def test_without_records_required_it_serves_and_counts(
    make_settings: MakeSettings, engine: FakeVLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(make_settings(log_required=False), engine) as served, full_disk(served, monkeypatch):
        before = dropped()
        asked = {**QUESTION, "messages": [{"role": "user", "content": "x" * 50_000}]}
        assert served.client.post(CHAT, json=asked).status_code == 200
        assert dropped() == before + 1
        assert served.client.get("/health/ready").status_code == 200
