"""The fake engine and the load generator, which are C: compiled when needed, started, and their figures read."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from bench.processes import ANYWHERE, Seat
from tests.servers import free_port

SOURCES = Path(__file__).parent / "native"
BUILT = Path("var/bench")
NONCE_START = "nonce-00000000"
"""And the request's number: the fake engine sends it back in every piece of its answer."""
GRACE_S = 60.0
"""How much longer than its plan a load generator may run before it is taken for stuck."""


class ToolFailed(Exception):
    """A tool could not be compiled, or ended without its figures."""


class Times(NamedTuple):
    """A distribution, in microseconds; everything zero where nothing was seen."""

    n: int
    mean_us: float
    p50_us: float
    p90_us: float
    p99_us: float
    p999_us: float
    max_us: float


@dataclass(frozen=True, slots=True)
class LoadResult:
    """What one run of the load generator saw inside its window."""

    seconds: float
    ok: int
    """Whole answers: right status, length and ending."""
    per_s: float
    started: int
    refused: int
    """Answers 408, 429 and 503."""
    bad_status: int
    cut: int
    """Connections that ended in the middle of an answer."""
    bad_body: int
    foreign: int
    """Answers that hold another request's nonce, or none."""
    timed_out: int
    not_connected: int
    unsent: int
    """Of an open loop: arrivals that found every connection in use."""
    abandoned: int
    """Requests this side gave up on purpose."""
    stray: int
    """Bytes that belong to no request."""
    unfinished: int
    events: int
    bytes: int
    statuses: Mapping[str, int]
    latency: Times
    first_byte: Times
    gap: Times
    refusal: Times

    @property
    def errors(self) -> int:
        """Everything that should not happen while nobody is overloaded, refusals left out."""
        failed = self.bad_status + self.cut + self.bad_body + self.foreign + self.timed_out + self.not_connected
        return failed + self.unsent + self.stray + self.unfinished


@dataclass(frozen=True, slots=True)
class Load:
    """A run of the load generator; `rate` makes it an open loop of Poisson arrivals."""

    port: int
    connections: int = 1
    seconds: float = 4.0
    warmup_s: float = 1.0
    body: Path | None = None
    bodies: Path | None = None
    """In place of `body`: a body per line, all equally long, sent in turn."""
    path: str = "/v1/chat/completions"
    headers: Sequence[str] = ()
    n_events: int | None = None
    """A stream with at least so many events and its terminator; None: a whole answer."""
    min_bytes: int = 0
    expect: str = ""
    rate: float | None = None
    ramp_s: float = 0.0
    """Over which the connections come, so that they do not ask in step."""
    timeout_s: float = 30.0
    linger_s: float = 10.0
    abandon_share: float = 0.0
    abandon_within_s: float = 1.0
    upload_share: float = 0.0
    """Of the abandoned, those that are given up before they are wholly sent."""
    is_nonce_checked: bool = False
    log: Path | None = None
    """Gets a line for each request that ended: number, time (nanoseconds, monotonic), and `ok`, `upload`, `waiting` or
    `stream`: answered, or at which point it was given up."""
    n_numbers: int = 1000
    """How many different numbers stand for `@@@@@@@@` in the body: users, mostly."""
    first_number: int = 0
    seed: int = 1

    def arguments(self) -> list[str]:
        """The command line."""
        values: dict[str, object] = {
            "port": self.port,
            "connections": self.connections,
            "seconds": self.seconds,
            "warmup": self.warmup_s,
            "path": self.path,
            "method": "GET" if self.body is None and self.bodies is None else "POST",
            "min-bytes": self.min_bytes,
            "expect": self.expect,
            "ramp": self.ramp_s,
            "timeout": self.timeout_s,
            "linger": self.linger_s,
            "abandon": self.abandon_share,
            "abandon-within": self.abandon_within_s,
            "abandon-upload": self.upload_share,
            "numbers": self.n_numbers,
            "first-number": self.first_number,
            "seed": self.seed,
        }
        optional: dict[str, object] = {"body": self.body, "bodies": self.bodies, "stream": self.n_events}
        optional |= {"rate": self.rate, "log": self.log}
        values |= {name: value for name, value in optional.items() if value is not None}
        flags = [text for name, value in values.items() for text in (f"--{name}", str(value))]
        flags += ["--check-nonce"] if self.is_nonce_checked else []
        return flags + [text for header in self.headers for text in ("--header", header)]


class RunningLoad:
    """A load generator at work."""

    def __init__(self, process: subprocess.Popen[str], load: Load) -> None:
        self._process = process
        self._load = load

    def wait_until_warm(self) -> None:
        """Return when the warm-up is over and counting has begun."""
        assert self._process.stdout is not None
        if self._process.stdout.readline().strip() != "ready":
            raise ToolFailed("the load generator ended before its window began")

    def result(self) -> LoadResult:
        """Wait for its end.

        Raises:
            ToolFailed: it did not say what it saw.
        """
        load = self._load
        limit_s = load.warmup_s + load.seconds + load.linger_s + GRACE_S
        try:
            output, _ = self._process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired as exc:
            self._process.kill()
            raise ToolFailed(f"the load generator was stuck for {limit_s:g} s") from exc
        if self._process.returncode != 0:
            raise ToolFailed(f"the load generator ended with {self._process.returncode}")
        return load_result(json.loads(output.strip().splitlines()[-1]))


def load_result(data: Mapping[str, Any]) -> LoadResult:
    """The line that the load generator prints."""
    times = {name: Times(**data[name]) for name in ("latency", "first_byte", "gap", "refusal")}
    return LoadResult(**{**data, **times})


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How the fake engine behaves."""

    gap_us: int = 0
    """Between two chunks of a stream; 0: all at once."""
    service_us: int = 0
    """Before the first byte."""
    limit: int | None = None
    """Requests at once; more wait in line."""
    n_chunks: int = 64
    is_written_singly: bool = False
    """One write per chunk; else a stream without gaps is one write."""
    fail_every: int | None = None
    """Each so many-th request fails: with status 500, by an error event, or by ending in the middle."""
    models: str = "base-model,second-model"
    log: Path | None = None
    """Gets a line for each request with a nonce: nonce, start, end (nanoseconds, monotonic), `done` or `gone`."""

    def arguments(self) -> list[str]:
        """The command line, without the port."""
        flags = ["--gap-us", str(self.gap_us), "--service-us", str(self.service_us), "--chunks", str(self.n_chunks)]
        flags += ["--models", self.models]
        optional = {"--limit": self.limit, "--fail-every": self.fail_every, "--log": self.log}
        flags += [text for name, value in optional.items() if value is not None for text in (name, str(value))]
        return [*flags, "--written-singly"] if self.is_written_singly else flags


@dataclass(frozen=True, slots=True)
class Tools:
    """The two programs, and where each runs."""

    engine: Path
    load: Path
    engine_seat: Seat = ANYWHERE
    load_seat: Seat = ANYWHERE

    @contextmanager
    def running_engine(self, options: EngineOptions, port: int = 0) -> Iterator[int]:
        """A fake engine for as long as it is needed; yields its port."""
        port = port or free_port()
        with self.start_engine(options, port) as process:
            try:
                yield port
            finally:
                process.kill()

    def start_engine(self, options: EngineOptions, port: int) -> subprocess.Popen[str]:
        """A fake engine that listens; the caller ends it.

        Raises:
            ToolFailed: it cannot listen.
        """
        command = self.engine_seat.before([str(self.engine), "--port", str(port), *options.arguments()])
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        if process.stdout.readline().strip() != "listening":
            raise ToolFailed("the fake engine did not start")
        return process

    def start_load(self, load: Load) -> RunningLoad:
        """Begin a run."""
        command = self.load_seat.before([str(self.load), *load.arguments()])
        return RunningLoad(subprocess.Popen(command, stdout=subprocess.PIPE, text=True), load)

    def run_load(self, load: Load) -> LoadResult:
        """A whole run."""
        return self.start_load(load).result()


@dataclass(frozen=True, slots=True)
class Bodies:
    """The requests, as files: about 1 KB each, from as many users as the load generator numbers."""

    whole: Path
    stream: Path


def compile_tools(directory: Path = BUILT) -> Tools:
    """Compile what is missing or older than its source.

    Raises:
        ToolFailed: there is no C compiler, or it does not like the sources.
    """
    directory.mkdir(parents=True, exist_ok=True)
    return Tools(_compiled(directory, "engine"), _compiled(directory, "load"))


def _compiled(directory: Path, name: str) -> Path:
    program, sources = directory.resolve() / name, [SOURCES / f"{name}.c", SOURCES / "common.h"]
    if program.exists() and program.stat().st_mtime > max(source.stat().st_mtime for source in sources):
        return program
    built = program.with_suffix(f".{os.getpid()}")
    command = ["cc", "-O2", "-Wall", "-o", str(built), str(sources[0]), "-lm"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as exc:
        raise ToolFailed("there is no C compiler (Debian and Ubuntu: apt-get install gcc libc6-dev)") from exc
    if done.returncode != 0:
        raise ToolFailed(done.stderr)
    built.rename(program)  # whole or not at all: two benchmarks may compile at once
    return program


def write_bodies(directory: Path, *, is_stored: bool = True) -> Bodies:
    """The request bodies; a number takes the place of `@@@@@@@@` in each request."""
    directory.mkdir(parents=True, exist_ok=True)
    suffix = "" if is_stored else "-unstored"
    bodies = Bodies(directory / f"whole{suffix}.json", directory / f"stream{suffix}.json")
    bodies.whole.write_text(json.dumps(request_body(is_stored=is_stored), separators=(",", ":")))
    bodies.stream.write_text(json.dumps(request_body(is_stored=is_stored) | {"stream": True}, separators=(",", ":")))
    return bodies


def request_body(*, is_stored: bool = True) -> dict[str, Any]:
    """A chat request of about 1 KB."""
    system = "You help people keep their plants alive. Answer in a few short sentences, and ask back when unsure. "
    question = "My fern has brown tips and its soil is dry although I water it twice a week. What am I doing wrong? "
    body: dict[str, Any] = {
        "model": "assistant",
        "messages": [
            {"role": "system", "content": system * 3},
            {"role": "user", "content": f"{NONCE_START}@@@@@@@@ " + question * 5},
        ],
        "temperature": 0.7,
        "max_tokens": 128,
        "user": "user-@@@@@@@@",
    }
    return body if is_stored else body | {"store": False}
