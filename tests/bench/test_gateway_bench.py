"""The gateway's benchmark: its tools notice what goes wrong, a tiny round runs, its tables say what was measured."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import httpx2
import pytest

from bench.gateway import _names, line_of, parse, to_json
from bench.gateway_tables import added_us, checks_of, ratio, report, rows_of
from bench.ledger import Stored, lost, read_client_logs, read_engine_log, stop_delays_s
from bench.measures import Bench, Measure, Sample, Suite, Use, measure_suite
from bench.native_tools import (
    NONCE_START,
    EngineOptions,
    Load,
    LoadResult,
    Times,
    ToolFailed,
    Tools,
    compile_tools,
    write_bodies,
)
from bench.processes import ANYWHERE, cost_of, prefer
from bench.targets import RECORDS_OFF, RECORDS_ON, Direct, Pawl, Target

SECONDS = 0.3
NEEDS_COMPILER = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")


KERNEL_THREADS = 2
"""Linux's kthreadd: of no session, so it is in the group whose weight cannot be changed."""


def test_a_process_that_cannot_be_preferred_stays_as_it_is() -> None:
    prefer(KERNEL_THREADS, 0)


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Tools:
    return compile_tools(tmp_path_factory.mktemp("tools"))


def load_on(port: int, directory: Path, *, is_stream: bool = False) -> Load:
    """A short run of four connections."""
    bodies = write_bodies(directory)
    body, n_events = (bodies.stream, 8) if is_stream else (bodies.whole, None)
    return Load(port, 4, SECONDS, warmup_s=0.1, body=body, n_events=n_events, min_bytes=700, is_nonce_checked=True)


# ---- the tools ----


@NEEDS_COMPILER
@pytest.mark.parametrize("is_stream", [False, True])
def test_whole_answers_are_counted_without_errors(tools: Tools, tmp_path: Path, is_stream: bool) -> None:
    with tools.running_engine(EngineOptions(n_chunks=8)) as port:
        result = tools.run_load(load_on(port, tmp_path, is_stream=is_stream))
        seen = httpx2.get(f"http://127.0.0.1:{port}/stats").json()
    assert result.ok > 0
    assert result.errors == 0
    assert result.statuses == {"200": result.ok}
    assert result.latency.n == result.ok
    assert result.latency.p50_us <= result.latency.p99_us <= result.latency.max_us
    assert result.events == (8 * result.ok if is_stream else 0)
    assert seen["answered"] >= result.ok
    assert seen["running"] == 0


@NEEDS_COMPILER
def test_failures_of_the_engine_are_noticed(tools: Tools, tmp_path: Path) -> None:
    with tools.running_engine(EngineOptions(n_chunks=8, fail_every=2)) as port:
        whole = tools.run_load(load_on(port, tmp_path))
        streams = tools.run_load(load_on(port, tmp_path, is_stream=True))
    assert whole.bad_status > 0
    assert whole.statuses["500"] == whole.bad_status
    assert (
        min(streams.bad_status, streams.cut, streams.bad_body) > 0
    )  # refused, cut in the middle, ended by an error event


@NEEDS_COMPILER
def test_short_answers_and_missing_chunks_are_errors(tools: Tools, tmp_path: Path) -> None:
    with tools.running_engine(EngineOptions(n_chunks=8)) as port:
        load = load_on(port, tmp_path)
        short = tools.run_load(replace(load, min_bytes=5000))
        few = tools.run_load(replace(load, body=write_bodies(tmp_path).stream, n_events=9))
        other = tools.run_load(replace(load, expect="no such words"))
    for result in (short, few, other):
        assert result.ok == 0
        assert result.bad_body > 0


@NEEDS_COMPILER
def test_an_answer_to_another_request_is_noticed(tools: Tools, tmp_path: Path) -> None:
    body = tmp_path / "foreign.json"
    body.write_text(f'{{"messages": "{NONCE_START}00000007", "user": "@@@@@@@@"}}')
    with tools.running_engine(EngineOptions()) as port:
        result = tools.run_load(replace(load_on(port, tmp_path), body=body, n_numbers=10**8, first_number=8))
    assert result.ok == 0
    assert result.foreign > 0


@NEEDS_COMPILER
def test_clients_that_leave_are_logged_by_both_sides(tools: Tools, tmp_path: Path) -> None:
    options = EngineOptions(gap_us=2_000, service_us=2_000, n_chunks=8, log=tmp_path / "engine.log")
    with tools.running_engine(options) as port:
        load = load_on(port, tmp_path, is_stream=True)
        leaving = replace(
            load,
            connections=16,
            seconds=1.0,
            abandon_share=0.8,
            abandon_within_s=0.03,
            upload_share=0.3,
            log=tmp_path / "client.log",
            n_numbers=10**8,
        )
        result = tools.run_load(leaving)
        httpx2.get(f"http://127.0.0.1:{port}/stats")
    ended, worked = read_client_logs([tmp_path / "client.log"]), read_engine_log(tmp_path / "engine.log")
    assert result.abandoned > 0
    assert result.errors == 0
    assert {end.how for end in ended.values()} == {"ok", "upload", "waiting", "stream"}
    assert any(not work.is_done for work in worked.values())
    assert max(stop_delays_s(ended, worked)) < 5.0


@NEEDS_COMPILER
def test_an_open_loop_asks_at_its_rate_and_the_engine_keeps_its_limit(tools: Tools, tmp_path: Path) -> None:
    with tools.running_engine(EngineOptions(service_us=20_000, limit=2)) as port:
        load = replace(load_on(port, tmp_path), connections=500, seconds=1.0, rate=300.0)
        result = tools.run_load(load)
    assert 200 < result.started < 400  # Poisson with mean 300
    assert result.ok <= 105  # two at once, 20 ms each
    assert result.unsent == 0


def test_a_source_that_does_not_compile_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ToolFailed, match="C compiler"):
        compile_tools(tmp_path)


def test_cost_of_a_family_holds_this_process() -> None:
    cost = cost_of(os.getpid())
    assert cost.cpu_s > 0
    assert 0 < cost.resident_bytes <= cost.resident_bytes_of_all


# ---- a tiny round ----


@NEEDS_COMPILER
def test_a_tiny_round_against_the_real_gateway(tools: Tools, tmp_path: Path) -> None:
    whole = Measure("whole_32", "whole", "throughput", 4, warmup_s=0.1)
    stream = Measure("streams_32", "streams", "throughput", 4, is_stream=True, warmup_s=0.1)
    suite = Suite("tiny", EngineOptions(), (whole, stream))
    bench = Bench(tools, write_bodies(tmp_path / "bodies"), tmp_path, ANYWHERE, 0, SECONDS)
    targets: Sequence[Target] = (Direct(), Pawl(RECORDS_ON, {}))
    samples = [sample for target in targets for sample in measure_suite(bench, suite, target, 0)]
    rows = rows_of(samples)
    assert [sample.problem for sample in samples] == [None] * 4
    assert [sample.load.errors for sample in samples if sample.load] == [0] * 4
    ours = rows["whole_32", RECORDS_ON]
    assert ours.per_s > 0
    assert ours.idle_mb > 10
    assert "pawl" in report(rows, {"machine": "a test"})
    assert line_of(samples[-1], 1.0)
    assert to_json(samples[-1])["target"] == RECORDS_ON


# ---- tables ----


def times(p50_us: float, p99_us: float) -> Times:
    return Times(100, p50_us, p50_us, p50_us, p99_us, p99_us, p99_us)


def sample(
    target: str,
    measure: str,
    per_s: float,
    *,
    p50_us: float = 1000,
    p99_us: float = 2000,
    bad: int = 0,
    refused: int = 0,
) -> Sample:
    """One measurement with these figures."""
    seen = times(p50_us, p99_us)
    load = LoadResult(
        seconds=1.0, ok=int(per_s), per_s=per_s, started=int(per_s) + refused, refused=refused, bad_status=bad, cut=0,
        bad_body=0, foreign=0, timed_out=0, not_connected=0, unsent=0, abandoned=0, stray=0, unfinished=0, events=0,
        bytes=0, statuses={}, latency=seen, first_byte=seen, gap=seen, refusal=seen,
    )  # fmt: skip
    use = Use(0.5, 0.0, others_share=0.1, resident_mb=130.0, resident_all_mb=200.0, idle_mb=100.0)
    return Sample(0, target, measure, load, use)


def test_medians_and_ratios_are_of_the_medians() -> None:
    rates = {"pawl": (100.0, 300.0, 200.0), "vllm-router": (50.0, 80.0, 20.0)}
    rows = rows_of(sample(target, "whole_32", rate) for target, found in rates.items() for rate in found)
    row = rows["whole_32", "pawl"]
    assert (row.lowest_per_s, row.per_s, row.highest_per_s) == (100.0, 200.0, 300.0)
    assert row.per_cpu_s == 400.0
    assert ratio(rows, "whole_32", "pawl", "vllm-router") == 4.0


def test_a_gateway_with_errors_gets_no_ratio() -> None:
    sound = [sample("pawl", "whole_32", 100.0), sample("vllm-router", "whole_32", 50.0)]
    assert ratio(rows_of(sound), "whole_32", "pawl", "vllm-router") == 2.0
    for broken in (sample("vllm-router", "whole_32", 50.0, bad=1), sample("vllm-router", "whole_32", 50.0, refused=1)):
        assert ratio(rows_of([sound[0], broken]), "whole_32", "pawl", "vllm-router") is None
    missing = Sample(0, "vllm-router", "whole_32", None, problem="did not start")
    assert ratio(rows_of([*sound, missing]), "whole_32", "pawl", "vllm-router") is None


def test_refusals_are_no_errors_where_the_load_is_too_much() -> None:
    rows = rows_of([sample("pawl", "overload_3", 640.0, refused=1280)])
    assert rows["overload_3", "pawl"].errors == 0
    assert rows["overload_3", "pawl"].refused_share == pytest.approx(2 / 3)


def test_added_latency_is_what_the_engine_alone_does_not_take() -> None:
    rows = rows_of([sample("direct", "latency", 1.0, p50_us=20), sample("pawl", "latency", 1.0, p50_us=70)])
    assert added_us(rows, "pawl", lambda row: row.latency_p50_us) == 50


def verdicts(samples: Sequence[Sample]) -> dict[str, bool | None]:
    return {check.text: check.is_met for check in checks_of(rows_of(samples))}


def test_thresholds_take_the_least_favourable_ratio() -> None:
    rates = {"vllm-router": 100.0, "litellm": 1.0}
    peers = [sample(peer, f"whole_{n}", rate) for n in (32, 128) for peer, rate in rates.items()]
    on = [sample(RECORDS_ON, "whole_32", 200.0), sample(RECORDS_ON, "whole_128", 130.0)]
    off = [sample(RECORDS_OFF, "whole_32", 300.0), sample(RECORDS_OFF, "whole_128", 190.0)]
    found = verdicts([*peers, *on, *off])
    assert found["whole answers, records on, against vllm-router: the least ratio"] is True
    assert found["whole answers, records on, against LiteLLM: the least ratio"] is False
    assert found["whole answers, records off, against vllm-router: the least ratio"] is False
    assert found["streams, records on, against vllm-router: the least ratio"] is None


def test_memory_latency_and_overload_are_judged() -> None:
    samples = [
        sample("direct", "latency", 1.0, p50_us=20, p99_us=40),
        sample("vllm-router", "latency", 1.0, p50_us=200, p99_us=700),
        sample(RECORDS_ON, "latency", 1.0, p50_us=150, p99_us=900),
        sample("vllm-router", "paced", 780.0),
        sample(RECORDS_ON, "paced", 780.0),
        sample(RECORDS_ON, "overload_1", 640.0),
        sample(RECORDS_ON, "overload_3", 600.0, p99_us=99_000, refused=1000),
    ]
    found = verdicts(samples)
    assert found["added latency at one connection, p50: no more than vllm-router's"] is True
    assert found["added latency at one connection, p99: no more than vllm-router's"] is False
    assert found["paced streams, gap between chunks, p99: no more than vllm-router's"] is True
    assert found["resident memory of a worker, idle"] is True
    assert found["more per open stream, at 1000"] is True  # (130 - 100) MB over 1,000 streams
    assert found["goodput at 3 x capacity, of the peak"] is True
    assert found["refusals at 3 x capacity, p99"] is True


def test_the_report_shows_why_a_gateway_is_missing() -> None:
    text = report(rows_of([Sample(0, "litellm", "whole_32", None, problem="log\nno port")]), {"machine": "a test"})
    assert "litellm: no port" in text
    assert "- machine: a test" in text


# ---- the command line and the ledger ----


def test_names_may_hold_commas() -> None:
    assert _names("saturation,streams") == ["saturation", "streams"]
    assert parse(["--targets", f"{RECORDS_ON};{RECORDS_OFF}"]).targets == [RECORDS_ON, RECORDS_OFF]


@pytest.mark.parametrize("arguments", [["--only", "nothing"], ["--targets", "nobody"]])
def test_unknown_parts_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(arguments)
    assert "no such" in capsys.readouterr().err


def test_what_was_answered_and_is_not_stored_is_lost() -> None:
    stored = Stored({"nonce-1": 1, "nonce-2": 3}, n_mixed=0)
    assert lost(["nonce-1", "nonce-3"], stored) == ["nonce-3"]
    assert stored.doubled == 2
