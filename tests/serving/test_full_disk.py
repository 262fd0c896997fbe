"""A disk that takes no more records: refused or counted, as the configuration says, and over without a restart."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import psutil
import pytest

from feedback import segment_files, segment_writer
from feedback import spool as spool_module
from feedback.errors import SpoolUnavailable
from feedback.journal_drain import JournalDrain
from feedback.spool import Connection
from monitoring.metrics import RECORDS_DROPPED, REGISTRY, UNKNOWN_MODEL
from pawl.settings import Settings
from tests.fake_vllm import FakeVLLM
from tests.serving.conftest import Served, serving
from tests.serving.faulty_engine import stored_ids
from tests.serving.gateway_process import process_in
from tests.serving.talk import CHAT, QUESTION, STREAM, error_of, events_of
from tests.serving.waiting import eventually

MakeSettings = Callable[..., Settings]
LANES = pytest.mark.parametrize("fast_lane", [True, False], ids=["fast lane", "ASGI"])
MODELS = ("assistant", UNKNOWN_MODEL)
TINY = {"max_bytes": 256 * 1024, "segment_bytes": 32 * 1024}


def refuse(*_: object) -> None:
    """What a disk with bad blocks says to a write."""
    raise OSError(errno.EIO, os.strerror(errno.EIO))


@contextmanager
def bad_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No write of the journal succeeds."""
    with monkeypatch.context() as patch:
        patch.setattr(segment_writer, "write_durably", refuse)
        patch.setattr(segment_files, "write_durably", refuse)
        yield


@contextmanager
def full_spool(served: Served, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every connection of the spool may use no page more than the file has, which is how SQLite meets a full disk."""

    def limited(connection: Connection) -> Connection:
        connection.execute("PRAGMA max_page_count = 1")  # SQLite raises it to the pages in use.
        return connection

    open_unlimited = spool_module._open
    with monkeypatch.context() as patch:
        patch.setattr(spool_module, "_open", lambda path: limited(open_unlimited(path)))
        served.gateway.spool.submit(limited).exception(5)
        with pytest.raises(SpoolUnavailable):
            served.gateway.spool.probe().result(5)
        yield
    served.gateway.drain.wake()


def dropped() -> float:
    name = RECORDS_DROPPED._name + "_total"
    return REGISTRY.get_sample_value(name) or 0.0


def is_ready(served: Served) -> bool:
    return served.client.get("/health/ready").status_code == 200


def assert_refused_before_the_engine(served: Served) -> None:
    """Both kinds of requests are turned away, and no engine works for nothing."""
    n_seen, n_refused = len(served.engine.seen), n_turned_away(served)
    for body in (QUESTION, STREAM):
        refused = served.client.post(CHAT, json=body)
        assert (refused.status_code, error_of(refused)["code"]) == (503, "spool_unavailable")
        assert refused.headers["retry-after"]
    assert n_turned_away(served) - n_refused == 2
    assert len(served.engine.seen) == n_seen


def n_turned_away(served: Served) -> float:
    """Requests refused before they were understood or after; a scrape brings the counters up to date."""
    served.client.get("/metrics")
    labels = {"route": "chat.completions", "variant": "none", "outcome": "overloaded"}
    found = (REGISTRY.get_sample_value("pawl_requests_total", labels | {"model": name}) for name in MODELS)
    return sum(value or 0.0 for value in found)


@LANES
def test_after_a_failed_write_nothing_is_acknowledged_until_a_fresh_segment_works(
    make_settings: MakeSettings, engine: FakeVLLM, fast_lane: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(make_settings(fast_lane=fast_lane), engine) as served:
        answered = [served.client.post(CHAT, json=QUESTION).json()["id"]]
        with bad_disk(monkeypatch):
            surprised = served.client.post(CHAT, json=QUESTION)
            assert (surprised.status_code, error_of(surprised)["code"]) == (503, "spool_unavailable")
            assert_refused_before_the_engine(served)
            assert not is_ready(served)
            assert served.client.get("/health/live").status_code == 200
        eventually(lambda: is_ready(served))
        answered += [served.client.post(CHAT, json=QUESTION).json()["id"] for _ in range(3)]
        for completion_id in answered:
            served.stored(completion_id)
        assert set(stored_ids(served.gateway.settings.database.url)) == set(answered)


@LANES
def test_a_disk_that_fails_in_mid_stream_gives_no_done(
    make_settings: MakeSettings, engine: FakeVLLM, fast_lane: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(make_settings(fast_lane=fast_lane), engine) as served:
        engine.behaviour.gap_s = 0.7
        with served.client.stream("POST", CHAT, json=STREAM) as response:
            chunks = response.iter_raw()
            first = next(chunks)
            with bad_disk(monkeypatch):
                events = events_of(first + b"".join(chunks))
        assert b"[DONE]" not in events
        assert b'"code":"spool_unavailable"' in events[-1]


@LANES
def test_without_records_required_it_serves_and_counts(
    make_settings: MakeSettings, engine: FakeVLLM, fast_lane: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = make_settings(log_required=False, fast_lane=fast_lane)
    with serving(settings, engine) as served, bad_disk(monkeypatch):
        before = dropped()
        assert served.client.post(CHAT, json=QUESTION).status_code == 200
        assert served.client.post(CHAT, json=STREAM).content.endswith(b"data: [DONE]\n\n")
        eventually(lambda: dropped() == before + 2)
        assert is_ready(served)


@LANES
def test_a_journal_that_is_full_refuses_until_it_was_drained(
    make_settings: MakeSettings, engine: FakeVLLM, fast_lane: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {**QUESTION, "messages": [{"role": "user", "content": "x" * 2_000}]}
    with serving(make_settings(fast_lane=fast_lane, spool=TINY), engine) as served:
        answered = []
        with monkeypatch.context() as patch:
            patch.setattr(JournalDrain, "drain_once", lambda _: 0)
            while (response := served.client.post(CHAT, json=asked)).status_code == 200:
                answered.append(response.json()["id"])
                assert len(answered) < 1_000
            assert (response.status_code, error_of(response)["code"]) == (503, "spool_unavailable")
            assert len(answered) == len(engine.seen), "what was answered is all that the engine was asked"
            assert_refused_before_the_engine(served)
            assert not is_ready(served)
        eventually(lambda: is_ready(served), within_s=30)
        assert served.client.post(CHAT, json=QUESTION).status_code == 200
        for completion_id in answered:
            served.stored(completion_id)
    assert len(answered) > 20


def test_feedback_is_refused_while_the_spool_is_full(
    make_settings: MakeSettings, engine: FakeVLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(make_settings(), engine) as served:
        completion_id = served.client.post(CHAT, json=QUESTION).json()["id"]
        served.stored(completion_id)
        rating = {"completion_id": completion_id, "type": "edit", "value": "x" * 50_000}
        with full_spool(served, monkeypatch):
            assert served.client.post("/v1/feedback", json=rating).status_code == 503
            assert not is_ready(served)
        eventually(lambda: is_ready(served))
        assert served.client.post("/v1/feedback", json=rating).status_code == 201


def limit_files_of(pid: int, n_bytes: int) -> None:
    """How far into any file a process may write; beyond, writes fail as on a disk without room."""
    _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (n_bytes, hard))


def test_a_disk_without_room_is_survived_by_the_process(tmp_path: Path, engine: FakeVLLM, engine_url: str) -> None:
    """Real writes that fail, of the records as well as of the log that tells about it."""
    process = process_in(tmp_path, engine_url, spool={"segment_bytes": 1024 * 1024})
    answered = []
    try:
        process.start()
        with httpx2.Client(base_url=process.url, timeout=20) as client:
            (worker,) = process.workers()
            answered += [client.post(CHAT, json=QUESTION).json()["id"] for _ in range(3)]
            # Where there is a core for it, records are written by a process of their own.
            writers = [each.pid for each in psutil.Process(worker).children()]
            for pid in (worker, *writers):
                limit_files_of(pid, 1)
            refused = client.post(CHAT, json=QUESTION)
            assert (refused.status_code, error_of(refused)["code"]) == (503, "spool_unavailable")
            eventually(lambda: client.get("/health/ready").status_code == 503)
            n_seen = len(engine.seen)
            assert client.post(CHAT, json=STREAM).status_code == 503
            assert len(engine.seen) == n_seen
            for pid in (worker, *writers):
                limit_files_of(pid, resource.RLIM_INFINITY)
            eventually(lambda: client.get("/health/ready").status_code == 200, within_s=30)
            assert process.workers() == [worker], "it went on, and did not start anew"
            assert [each.pid for each in psutil.Process(worker).children()] == writers
            answered += [client.post(CHAT, json=QUESTION).json()["id"] for _ in range(3)]
        process.terminate()
        assert process.wait(60) == 0
    finally:
        process.close()
    url = f"sqlite:///{tmp_path}/shared.db"
    assert set(stored_ids(url, tmp_path / "state" / "spool")) == set(answered)
