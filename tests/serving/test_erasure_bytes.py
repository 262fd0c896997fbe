"""Erasure, proved on the bytes: the gateway as people run it, and then a search of every file that Pawl wrote.

The search is of names and texts that occur nowhere else, as they are and as JSON writes them. PostgreSQL's files are
searched after a checkpoint; its write-ahead log is not among them: it is recycled, and `docs/erasure.md` says what that
means.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx2
import pytest
import sqlalchemy as sa

from ab_testing.shadow import ShadowRules
from ab_testing.shadow_store import ShadowAnswer, ShadowRun, insert_run, save_answer
from feedback.erasure import spellings
from feedback.mining import mine_alias
from feedback.store import load_pairs, mark_pairs_used
from pawl import registry
from pawl.database import Database, open_database
from pawl.registry import Model, ModelState, RunStatus
from pawl.schema import dead_letters, feedback_events, interactions
from pawl.settings import DatabaseSettings
from retrain.dataset import Mixed, Origin, canonical_json, dataset_manifest, example_of
from retrain.steps import once
from tests.fake_vllm import FakeVLLM
from tests.feedback.people import Dump, dump, mentions, restore
from tests.gateway_configuration import configuration_of, make_schema
from tests.servers import PostgreSQL, free_port
from tests.serving.gateway_process import GatewayProcess
from tests.serving.talk import CHAT
from tests.serving.waiting import eventually

ROOT = Path(__file__).parents[2]
ADAPTER = "base-model--r0001-1a2b3c4d"
N_CHATS = 6
WAIT_S = 90.0
BLOCK = 1 << 20


class House:
    """Everything of one installation: a gateway, its database, its files."""

    def __init__(self, directory: Path, engine_url: str, database_url: str, files: list[Path]) -> None:
        self.directory = directory
        self.settings = configuration_of(directory, engine_url, route_poll_s=0.2)
        self.settings["database"]["url"] = database_url
        self.settings["retrain"] = {"runs_dir": str(directory / "runs")}
        self.settings["worker"] = {"metrics_port": free_port()}
        make_schema(DatabaseSettings(url=database_url))
        self.database = open_database(DatabaseSettings(url=database_url))
        self.gateway = GatewayProcess(directory / "gateway", self.settings)
        self.state = directory / "state"
        self._files = [directory, *files]

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """A `pawl` command as somebody types it."""
        return subprocess.run(self._line(*arguments), **self._place(), capture_output=True, timeout=180, check=False)

    @contextmanager
    def worker(self) -> Iterator[None]:
        with (self.directory / "worker.log").open("ab") as output:
            process = subprocess.Popen(self._line("worker"), **self._place(), stdout=output, stderr=output)
        try:
            yield
        finally:
            process.terminate()
            process.wait(60)

    def stop_gateway(self) -> None:
        self.gateway.terminate()
        assert self.gateway.wait(60) == 0

    def await_rows(self, table: sa.Table, one: Somebody, n_rows: int) -> None:
        """Until so many have been drained."""
        eventually(lambda: self.count(table, one.name) == n_rows, within_s=WAIT_S)

    def _line(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "pawl.cli.main", *arguments]

    def _place(self) -> dict[str, Any]:
        config = str(self.directory / "gateway" / "pawl.yaml")
        return {
            "cwd": self.directory,
            "env": {**os.environ, "PAWL_CONFIG": config, "PYTHONPATH": str(ROOT)},
            "text": True,
        }

    def files_with(self, *texts: str) -> list[str]:
        """Every file that holds one of these, in any spelling."""
        if not self.database.is_sqlite:
            with self.database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                connection.execute(sa.text("CHECKPOINT"))
        wanted = [spelling.encode() for text in texts for spelling in spellings(text)]
        every = [path for place in self._files for path in sorted(place.rglob("*")) if path.is_file()]
        return [str(path) for path in every if holds(path, wanted)]

    def count(self, table: sa.Table, user: str) -> int:
        with self.database.read() as connection:
            query = sa.select(sa.func.count()).select_from(table).where(table.c.user_id == user)
            return int(connection.execute(query).scalar_one())


def holds(path: Path, wanted: list[bytes]) -> bool:
    longest = max(map(len, wanted))
    tail = b""
    try:
        with path.open("rb") as file:
            while block := file.read(BLOCK):
                if any(one in tail + block for one in wanted):
                    return True
                tail = (tail + block)[-longest:]
    except FileNotFoundError:  # Handed back by the drain just now.
        pass
    return False


@pytest.fixture(params=["sqlite", "postgresql"])
def house(request: pytest.FixtureRequest, tmp_path: Path, engine_url: str) -> Iterator[House]:
    if request.param == "sqlite":
        built = House(tmp_path, engine_url, f"sqlite:///{tmp_path}/shared.db", [])
    else:
        server: PostgreSQL = request.getfixturevalue("own_postgresql")
        base = server.directory / "data" / "base"
        built = House(tmp_path, engine_url, server.create_database("pawl"), [base, server.directory / "log"])
    yield built
    built.gateway.close()
    built.database.close()


class Somebody:
    """A user whose name and words occur nowhere else."""

    def __init__(self, house: House, engine: FakeVLLM) -> None:
        self.name = f"zo\u00eb-{secrets.token_hex(16)}"
        self.words = f"na\u00efve \u2603 {secrets.token_hex(16)}"
        self._engine = engine
        self._url = house.gateway.url
        self.completions: list[str] = []

    def chat(self, n_times: int) -> None:
        """Half of the questions are short; the others are kept apart from their row, for they are long."""
        lengths = [4000 * (number % 2) for number in range(N_CHATS)]
        questions = [f"{self.words} {number} {secrets.token_hex(length)}" for number, length in enumerate(lengths)]
        for number in range(n_times):
            self._engine.behaviour.text = f"answer {number}: {self.words}"
            body = {
                "model": "assistant",
                "user": self.name,
                "messages": [{"role": "user", "content": questions[number // 2]}],
                "metadata": {"note": self.words},
                "stream": number % 3 == 0,
            }
            answer = httpx2.post(self._url + CHAT, json=body, timeout=30)
            assert answer.status_code == 200
            self.completions.append("chatcmpl-" + self._engine.seen_headers[-1]["x-request-id"])

    def rate_all(self) -> None:
        for number, completion in enumerate(self.completions):
            self.say(completion, "thumbs", "up" if number % 2 == 0 else "down")
        self.say(self.completions[0], "edit", f"better: {self.words}", comment=self.words, tags={"t": self.words})
        self.say(self.completions[1], "comment", self.words, reason=self.words)

    def say(self, completion: str, kind: str, value: str, **more: Any) -> None:
        body = {"completion_id": completion, "type": kind, "value": value, "user": self.name, **more}
        headers = {"idempotency-key": secrets.token_hex(8)}
        answer = httpx2.post(f"{self._url}/v1/feedback", json=body, headers=headers, timeout=30)
        assert answer.status_code in (200, 201, 202), answer.text


def train_on_everything(house: House) -> None:
    """What a round leaves in the database and in its files."""
    mine_alias(house.database, "assistant", 1.0)
    pairs = load_pairs(house.database, "assistant")
    run = registry.create_run(house.database, "assistant", "2026-W01", epoch=1, now=1.0)
    directory = house.directory / "runs" / run.id
    examples = tuple(example_of(pair, Origin.NEW) for pair in pairs)

    def mine(step: Path) -> dict[str, Any]:
        (step / "new.jsonl").write_text("".join(canonical_json(asdict(pair)) + "\n" for pair in pairs))
        return {"n_new": len(pairs)}

    def build(step: Path) -> dict[str, Any]:
        (step / "training.jsonl").write_text("".join(canonical_json(asdict(one)) + "\n" for one in examples))
        return dataset_manifest(Mixed(examples, {}, {}), (), seed=0, shares={}, is_swapped=False)

    once(directory / "mine", mine)
    once(directory / "build", build)
    pair_ids = [pair.id for pair in pairs]
    detail = {"new_pair_ids": pair_ids}
    registry.update_run(house.database, run, now=2.0, step="canary", status=RunStatus.PASSED, detail=detail)
    mark_pairs_used(house.database, pair_ids, run.id)
    model = Model(
        ADAPTER, "assistant", "base-model", "base-model", run.id, None, None, None, ModelState.RETIRED, {}, 1.0, 1.0
    )
    registry.register_model(house.database, model)


def answer_in_the_dark(database: Database, one: Somebody) -> None:
    """What a candidate says of the questions, beside the champion's answers."""
    rules = ShadowRules(1.0, "salt", 200, 60.0, 0.05, {}, False)
    run = ShadowRun("sh_1", "assistant", "base-model", ADAPTER, "running", "", rules, "tester", None, 1.0, 1.0)
    insert_run(database, run)
    for completion in one.completions:
        said = {"role": "assistant", "content": f"in the dark: {one.words}"}
        suffix = completion.removeprefix("chatcmpl-")
        assert save_answer(database, run, ShadowAnswer(suffix, said, "stop", None, 5, 5, 9.0, 1.0))


def put_aside(database: Database, one: Somebody) -> None:
    """A record of theirs that could not be stored."""
    meta = {"id": "x", "key_id": "", "user_id": one.name, "created_at": 1.0, "latency_ms": {}}
    row = {"id": "interact-x", "kind": "interaction", "reason": "TypeError", "created_at": 1.0}
    with database.write() as connection:
        connection.execute(dead_letters.insert(), row | {"payload": json.dumps(meta) + "\n" + one.words})


@pytest.mark.slow
@pytest.mark.timeout(900)  # Six processes are started; on a busy machine each takes long.
def test_not_a_byte_is_left_nor_comes_back(house: House, engine: FakeVLLM) -> None:
    house.gateway.start()
    ann, bob = Somebody(house, engine), Somebody(house, engine)
    for somebody in (ann, bob):
        somebody.chat(N_CHATS)
        somebody.rate_all()
    for somebody in (ann, bob):
        house.await_rows(interactions, somebody, N_CHATS)
        house.await_rows(feedback_events, somebody, N_CHATS + 2)
    put_aside(house.database, ann)
    answer_in_the_dark(house.database, ann)
    train_on_everything(house)
    old_spool = house.directory.parent / f"{house.directory.name}-spool"
    shutil.copytree(house.state / "spool", old_spool)
    backup = dump(house.database)

    # They are where they should be, so the search below can find them.
    found = house.files_with(ann.words)
    for part in ("runs/r0001/mine/new.jsonl", "runs/r0001/build/training.jsonl", ".segment"):
        assert any(part in name for name in found), (part, found)
    assert any("shared.db" in name or "/base/" in name for name in found)
    assert house.files_with(ann.name)
    assert mentions(backup, ann.name) == ["dead_letters", "feedback_events", "interactions", "pairs"]

    done = house.command("erase", "--user", ann.name, "--reason", "ticket 7", "--wait", "90", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["removed"]["interactions"] == N_CHATS
    assert report["removed"]["dead_letters"] == 1
    assert report["removed"]["shadow_answers"] == N_CHATS
    assert report["removed"]["pairs"] >= N_CHATS // 2
    assert report["models"] == [ADAPTER]
    assert "warning" not in report

    eventually(lambda: not house.files_with(ann.name, ann.words), within_s=WAIT_S)
    after = dump(house.database)
    assert mentions(after, ann.name) == []
    for table in ("interactions", "feedback_events"):
        assert [row for row in after[table] if row["user_id"] == bob.name] == [
            row for row in backup[table] if row["user_id"] == bob.name
        ]
    assert registry.get_model(house.database, ADAPTER).manifest["erased"]["pairs"] >= N_CHATS // 2
    assert bob.words in (house.directory / "runs" / "r0001" / "build" / "training.jsonl").read_text().encode().decode(
        "unicode_escape"
    )

    house.stop_gateway()
    if house.database.is_sqlite:  # The files are the same beside the other one, and tombstones are tested with both.
        bring_back(house, ann, old_spool, backup)
        assert house.count(interactions, bob.name) == N_CHATS


def bring_back(house: House, ann: Somebody, old_spool: Path, backup: Dump) -> None:
    """An old spool comes back, then an old database: a gateway and a worker take her out again."""
    for path in old_spool.rglob("position"):
        path.unlink()
    shutil.rmtree(house.state / "spool")
    shutil.move(old_spool, house.state / "spool")
    assert house.files_with(ann.words)
    restore(house.database, backup)
    assert mentions(dump(house.database), ann.name)
    house.gateway.start()
    with house.worker():
        eventually(lambda: mentions(dump(house.database), ann.name) == [], within_s=WAIT_S)
        eventually(lambda: not house.files_with(ann.name, ann.words), within_s=WAIT_S)
