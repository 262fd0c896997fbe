"""The hot path compiled: the same answers from the same sources.

Compiled into a copy of the packages, so that nothing else runs on it, and without optimising, which would take longer.
What the same compiler made of the same sources in an earlier run is taken from there.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, NamedTuple

import httpx2
import pytest
import sqlalchemy as sa

from feedback.interactions import Interaction, Status
from feedback.store import get_interaction
from pawl import ids
from pawl.compiled import RECORD, compiled, digest_of
from pawl.database import Database, open_database, upgrade
from pawl.schema import feedback_events
from pawl.settings import DatabaseSettings
from practice.artifacts import Manifest, build_once, content_key
from scripts.compile_hot_path import LIBRARY, MODULES, ROOT, missing_for_building
from tests.fake_vllm import Behaviour, FakeVLLM
from tests.gateway_configuration import configuration_of
from tests.servers import running
from tests.serving.gateway_process import GatewayProcess
from tests.serving.talk import CHAT, QUESTION, STREAM, error_of, events_of, raw_request, text_of
from tests.serving.waiting import eventually

pytestmark = pytest.mark.timeout(1200)  # The build alone takes a minute, and several on a busy machine.

PACKAGES = ("ab_testing", "feedback", "monitoring", "pawl", "practice", "retrain", "serving")
SCRIPT = ROOT / "scripts" / "compile_hot_path.py"
BUILDS = ROOT / "var" / "compiled"
KEPT_S = 24 * 3600.0
ADA = {"x-pawl-user": "ada"}
N_EVENTS_OF_A_LONG_STREAM = 2_000


def run_script(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=900, check=False
    )


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of Pawl whose hot path is compiled."""
    missing = missing_for_building()
    if missing:
        pytest.skip(missing)
    built = BUILDS / content_key(sys.version, versions(), digests())
    build_once(built, build)
    for old in BUILDS.iterdir():
        if old != built and time.time() - old.stat().st_mtime > KEPT_S:
            shutil.rmtree(old, ignore_errors=True)
    return shutil.copytree(built, tmp_path_factory.mktemp("compiled") / "packages")


def versions() -> list[tuple[str, str]]:
    """Everything that is installed: the compiler reads the types of what the sources use."""
    return sorted((each.name, each.version) for each in distributions())


def digests() -> list[tuple[str, str]]:
    """Every source, and the script itself."""
    paths = [SCRIPT, *(path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py")))]
    return [(path.relative_to(ROOT).as_posix(), digest_of(path)) for path in paths]


def build(copy: Path) -> Manifest:
    """Compile."""
    for package in PACKAGES:
        shutil.copytree(ROOT / package, copy / package, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    done = run_script("--into", str(copy), "--optimisation", "0")
    assert done.returncode == 0, done.stdout + done.stderr
    return {"modules": len(MODULES)}


class Compiled(NamedTuple):
    """A gateway of the copy, in a process of its own, and what is behind it."""

    process: GatewayProcess
    engine: FakeVLLM
    database: Database
    client: httpx2.Client

    def stored(self, completion_id: str) -> Interaction:
        """The interaction, once the database has it."""
        suffix = ids.completion_suffix(completion_id)
        assert suffix is not None
        return eventually(lambda: get_interaction(self.database, suffix), within_s=30)

    def last_stored(self) -> Interaction:
        """The interaction of the request that the engine saw last."""
        return self.stored("chatcmpl-" + self.engine.seen_headers[-1]["x-request-id"])


@pytest.fixture(scope="module", params=[True, False], ids=["fast lane", "ASGI"])
def gateway(
    packages: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Compiled]:
    directory = tmp_path_factory.mktemp("gateway")
    database = open_database(DatabaseSettings(url=f"sqlite:///{directory}/shared.db"))
    upgrade(database)
    engine = FakeVLLM("base-model")
    with running(engine.app) as engine_url, pytest.MonkeyPatch.context() as patched:
        configuration = configuration_of(directory, engine_url, fast_lane=request.param)
        process = GatewayProcess(directory / "process", configuration)
        patched.chdir(packages)  # Where Python looks for modules first.
        try:
            process.start()
            with httpx2.Client(base_url=process.url, timeout=30, headers=ADA) as client:
                yield Compiled(process, engine, database, client)
        finally:
            process.close()
            database.close()


@pytest.fixture
def served(gateway: Compiled) -> Compiled:
    """The gateway, with an engine that behaves."""
    gateway.engine.behaviour = Behaviour()
    return gateway


def test_it_runs_compiled(served: Compiled, packages: Path) -> None:
    library = str(packages.joinpath(*LIBRARY.split(".")))
    (worker,) = served.process.workers()
    assert library in Path(f"/proc/{worker}/maps").read_text()


def test_a_whole_answer_and_its_record(served: Compiled) -> None:
    answer = served.client.post(CHAT, json=QUESTION)
    assert answer.status_code == 200
    assert answer.json()["choices"][0]["message"]["content"] == served.engine.behaviour.text
    kept = served.stored(answer.json()["id"])
    assert (kept.status, kept.user_id, kept.served_variant) == (Status.OK, "ada", "control")
    assert answer.headers["x-pawl-variant"] == "control"


def test_a_stream_and_its_record(served: Compiled) -> None:
    answer = served.client.post(CHAT, json=STREAM)
    events = events_of(answer.content)
    assert (events[-1], text_of(events)) == (b"[DONE]", served.engine.behaviour.text)
    kept = served.last_stored()
    assert (kept.status, kept.is_complete) == (Status.OK, True)


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b'{"model": "assistant", "messages": []', 400),
        (b'{"model": "assistant", "messages": "none"}', 400),
        (b'{"model": "nobody", "messages": [{"role": "user", "content": "?"}]}', 404),
        (b'{"model": "assistant", "messages": [{"role": "user", "content": "\\ud800"}], "n": 1e400}', 400),
    ],
)
def test_a_bad_request(served: Compiled, content: bytes, status: int) -> None:
    n_seen = len(served.engine.seen)
    answer = served.client.post(CHAT, content=content, headers={"content-type": "application/json"})
    assert answer.status_code == status
    error_of(answer)
    assert len(served.engine.seen) == n_seen


def test_an_engine_that_fails(served: Compiled) -> None:
    served.engine.behaviour = Behaviour(status=500)
    assert error_of(served.client.post(CHAT, json=QUESTION))["code"] == "engine_error"
    assert served.last_stored().status == Status.UPSTREAM_ERROR


def test_a_client_that_leaves(served: Compiled) -> None:
    n_aborted = served.engine.n_aborted
    served.engine.behaviour = Behaviour(gap_s=0.05, n_chunks=N_EVENTS_OF_A_LONG_STREAM, text="Water it. " * 1_000)
    with raw_request(served.process.url, STREAM) as connection:
        assert connection.recv(100)
    eventually(lambda: served.engine.n_aborted > n_aborted, within_s=30)
    assert served.last_stored().status == Status.CLIENT_DISCONNECTED


def test_feedback_reaches_the_database(served: Compiled) -> None:
    completion_id = served.client.post(CHAT, json=QUESTION).json()["id"]
    served.stored(completion_id)
    opinion: dict[str, Any] = {"completion_id": completion_id, "type": "thumbs", "value": "up"}
    assert served.client.post("/v1/feedback", json=opinion).status_code == 201
    query = sa.select(feedback_events.c.type).where(feedback_events.c.completion_id == completion_id)

    def look() -> list[str]:
        with served.database.read() as connection:
            return list(connection.scalars(query))

    assert eventually(look, within_s=30) == ["thumbs"]


def test_an_edited_source_is_noticed(packages: Path) -> None:
    assert compiled(packages) == (MODULES, ())
    source = packages / MODULES[0]
    text = source.read_text()
    source.write_text(text + "# Edited.\n")
    said = run_script("--check", "--into", str(packages))
    source.write_text(text)
    assert (said.returncode, MODULES[0] in said.stdout) == (1, True)
    assert compiled(packages).stale == ()


def test_what_was_compiled_can_be_removed(tmp_path: Path) -> None:
    modules = [tmp_path / Path(module).with_suffix(".cpython-311.so") for module in MODULES]
    others = [tmp_path / "pawl" / "settings.cpython-311.so", tmp_path / "serving" / "callers.cpython-311.so"]
    for path in (*modules, *others, tmp_path / RECORD):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    assert run_script("--clean", "--into", str(tmp_path)).returncode == 0
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == others


def test_these_tests_run_on_the_sources_as_they_are() -> None:
    assert compiled().stale == (), "run make compiled, or make interpreted"
