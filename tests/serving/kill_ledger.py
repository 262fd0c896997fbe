"""A ledger of everything a gateway acknowledged while it was killed again and again, held against what it stored.

Fate picks who dies, each as often as the others: one worker, and the others go on while the parent replaces it; the
process that brings the journals to the database; the parent, and the kernel tells its children; or all of them at once.

SIGKILL leaves the page cache alone, so this proves that nothing acknowledged waits in the process's own memory; that
a commit also reaches the disk is the business of `synchronous=FULL`.
"""

from __future__ import annotations

import asyncio
import random
import signal
import sqlite3
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from itertools import islice
from pathlib import Path
from typing import Any

import httpx2
import orjson
import sqlalchemy as sa

from feedback.journal_reader import JournalReader
from pawl.database import Database, open_database, upgrade
from pawl.schema import dead_letters, feedback_events, interactions
from pawl.settings import DatabaseSettings
from tests.fake_vllm import FakeVLLM
from tests.gateway_configuration import configuration_of
from tests.servers import running
from tests.serving.gateway_process import GatewayProcess, children_of, command_of, send

DRAIN = b"serving.drain_process"
N_CLIENTS = 8
N_WORKERS = 2
ATTEMPTS = 30
"""At a vote, each under the same key: of one that was kept, and whose answer was cut off, the next one tells."""
UPTIME_S = (0.1, 0.8)
"""Between a gateway becoming ready and its end."""
SETTLE_S = 240.0
TEXT = "Water it in the morning."


class Victim(StrEnum):
    """Who is killed."""

    WORKER = "worker"
    DRAIN = "drain"
    PARENT = "parent"
    ALL = "all"


@dataclass
class Ledger:
    """What was acknowledged, as the clients wrote it down."""

    completions: dict[str, str] = field(default_factory=dict)
    """Nonce of the question to the completion's id."""
    streams: set[str] = field(default_factory=set)
    """Nonces of those that were streamed."""
    feedback: dict[str, str] = field(default_factory=dict)
    """Feedback id to the text that was sent with it."""
    n_attempts: int = 0


@dataclass(frozen=True)
class Outcome:
    """What the comparison found."""

    database: str
    kills: int
    attempts: int
    acknowledged_whole: int
    acknowledged_streams: int
    acknowledged_feedback: int
    lost_completions: int
    lost_feedback: int
    doubled_completions: int
    doubled_feedback: int
    altered: int
    left_in_spool: int
    left_in_journals: int
    dead_letters: int
    restart_s: float
    """The median restart."""
    seconds: float

    @property
    def is_faultless(self) -> bool:
        """Whether nothing acknowledged was lost, doubled or changed."""
        faults = (self.lost_completions, self.lost_feedback, self.doubled_completions, self.doubled_feedback)
        return not any((*faults, self.altered, self.left_in_spool, self.left_in_journals, self.dead_letters))

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "is_faultless": self.is_faultless}


def run_ledger(directory: Path, database_url: str, *, kills: int, seed: int) -> Outcome:
    """Kill a gateway `kills` times under load; return what became of what it had acknowledged."""
    started = time.monotonic()
    database = open_database(DatabaseSettings(url=database_url))
    upgrade(database)
    engine = FakeVLLM("base-model")
    engine.behaviour.text = TEXT
    engine.behaviour.gap_s = 0.005
    spool = directory / "state" / "spool"
    with running(engine.app) as engine_url:
        configuration = _configuration(directory, database_url, engine_url)
        gateway = GatewayProcess(directory, configuration)
        try:
            ledger, restarts = asyncio.run(_under_fire(gateway, kills, random.Random(seed)))
            _settle(database, ledger, spool)
            gateway.terminate()
            gateway.wait(90)
        finally:
            gateway.close()
    outcome = _compare(database, ledger, spool, kills, sorted(restarts)[len(restarts) // 2], started)
    database.close()
    return outcome


def _configuration(directory: Path, database_url: str, engine_url: str) -> dict[str, Any]:
    configuration = configuration_of(directory, engine_url, drain_grace_s=2, workers=N_WORKERS)
    return {**configuration, "database": {"url": database_url}, "log": {"level": "warning"}}


async def _under_fire(gateway: GatewayProcess, kills: int, rng: random.Random) -> tuple[Ledger, list[float]]:
    ledger = Ledger()
    restarts = [await asyncio.to_thread(gateway.start)]
    is_over = asyncio.Event()
    clients = [asyncio.ensure_future(_client(gateway.url, number, ledger, is_over)) for number in range(N_CLIENTS)]
    try:
        for victim in islice(_victims(rng), kills):
            await asyncio.sleep(rng.uniform(*UPTIME_S))
            restart_s = await asyncio.to_thread(_strike, gateway, victim, rng)
            restarts += [restart_s] if restart_s is not None else []
        await asyncio.sleep(UPTIME_S[1])
    finally:
        is_over.set()
        await asyncio.gather(*clients)
    return ledger, restarts


def _victims(rng: random.Random) -> Iterator[Victim]:
    """Each once in every four, in any order."""
    while True:
        yield from rng.sample(list(Victim), len(Victim))


def _strike(gateway: GatewayProcess, victim: Victim, rng: random.Random) -> float | None:
    """Kill somebody; how long the gateway then took to be ready, if somebody had to start it."""
    children = {Victim.WORKER: gateway.workers(), Victim.DRAIN: _drains(gateway)}.get(victim)
    if children:
        send(rng.choice(children), signal.SIGKILL)
        return None
    if victim is Victim.PARENT:
        gateway.kill()
    else:
        gateway.kill_all()
    return gateway.start()


def _drains(gateway: GatewayProcess) -> list[int]:
    """The process that brings the journals to the database; none while it is being replaced."""
    assert gateway._process is not None
    return [pid for pid in children_of(gateway._process.pid) if DRAIN in command_of(pid)]


async def _client(url: str, number: int, ledger: Ledger, is_over: asyncio.Event) -> None:
    """Ask and rate until it is over; what is not acknowledged is not written down."""
    async with httpx2.AsyncClient(base_url=url, timeout=10, headers={"x-pawl-user": f"user {number}"}) as client:
        turn = 0
        while not is_over.is_set():
            turn += 1
            try:
                await _turn(client, f"{number}/{turn}", turn % 2 == 0, ledger)
            except httpx2.HTTPError:
                await asyncio.sleep(0.1)


async def _turn(client: httpx2.AsyncClient, nonce: str, is_stream: bool, ledger: Ledger) -> None:
    ledger.n_attempts += 1
    body = {"model": "assistant", "messages": [{"role": "user", "content": nonce}], "stream": is_stream}
    response = await client.post("/v1/chat/completions", json=body)
    if response.status_code != 200 or (is_stream and not response.content.endswith(b"data: [DONE]\n\n")):
        return
    completion_id = _id_of(response.content, is_stream)
    ledger.completions[nonce] = completion_id
    if is_stream:
        ledger.streams.add(nonce)
    rating = {"completion_id": completion_id, "type": "comment", "value": f"on {nonce}"}
    if (rated := await _rate(client, nonce, rating)) is not None:
        ledger.feedback[rated] = f"on {nonce}"


async def _rate(client: httpx2.AsyncClient, nonce: str, rating: dict[str, Any]) -> str | None:
    """Send one vote under one key until it is acknowledged, by whomever, and now and then once more; its id."""
    headers = {"idempotency-key": nonce}
    for _ in range(ATTEMPTS):
        with suppress(httpx2.HTTPError):
            rated = await client.post("/v1/feedback", json=rating, headers=headers)
            if rated.status_code in (200, 201, 202):
                if nonce.endswith("0"):
                    await client.post("/v1/feedback", json=rating, headers={**headers, "connection": "close"})
                return str(rated.json()["id"])
        await asyncio.sleep(0.1)
    return None


def _id_of(body: bytes, is_stream: bool) -> str:
    first = body.split(b"\n\n")[0].removeprefix(b"data: ") if is_stream else body
    return str(orjson.loads(first)["id"])


def _settle(database: Database, ledger: Ledger, spool: Path) -> None:
    """Wait until what was acknowledged is in the database and nothing is left on the disk, or clearly will not be.

    Of the worker killed last, that is when another has come and taken over its files.
    """
    deadline = time.monotonic() + SETTLE_S
    while time.monotonic() < deadline:
        with suppress(sa.exc.OperationalError), database.read() as connection:
            stored = set(connection.execute(sa.select(interactions.c.completion_id)).scalars())
            rated = set(connection.execute(sa.select(feedback_events.c.feedback_id)).scalars())
            is_stored = stored >= set(ledger.completions.values()) and rated >= ledger.feedback.keys()
            if is_stored and _is_empty(spool):
                return
        time.sleep(0.1)


def _compare(database: Database, ledger: Ledger, spool: Path, kills: int, restart_s: float, started: float) -> Outcome:
    with database.read() as connection:
        answers = connection.execute(sa.select(interactions)).mappings().all()
        ratings = connection.execute(sa.select(feedback_events)).mappings().all()
        n_dead = connection.execute(sa.select(sa.func.count()).select_from(dead_letters)).scalar_one()
    by_nonce = Counter(orjson.loads(row["prompt"])[0]["content"] for row in answers)
    by_rating = Counter(row["feedback_id"] for row in ratings)
    stored = {row["completion_id"] for row in answers}
    return Outcome(
        database=database.engine.dialect.name,
        kills=kills,
        attempts=ledger.n_attempts,
        acknowledged_whole=len(ledger.completions) - len(ledger.streams),
        acknowledged_streams=len(ledger.streams),
        acknowledged_feedback=len(ledger.feedback),
        lost_completions=len(set(ledger.completions.values()) - stored),
        lost_feedback=len(ledger.feedback.keys() - by_rating.keys()),
        doubled_completions=sum(n - 1 for n in by_nonce.values()),
        doubled_feedback=sum(n - 1 for n in by_rating.values()),
        altered=_n_altered(answers, ratings, ledger),
        left_in_spool=sum(map(_rows_in, spool.glob("gateway-*.db"))),
        left_in_journals=sum(map(_records_in, _journals_in(spool))),
        dead_letters=n_dead,
        restart_s=restart_s,
        seconds=time.monotonic() - started,
    )


def _n_altered(answers: Sequence[Any], ratings: Sequence[Any], ledger: Ledger) -> int:
    """Acknowledged rows whose text is not what went over the wire."""
    nonces = {completion_id: nonce for nonce, completion_id in ledger.completions.items()}
    wrong_answers = [
        row
        for row in answers
        if (nonce := nonces.get(row["completion_id"])) is not None
        and (
            orjson.loads(row["prompt"])[0]["content"] != nonce
            or orjson.loads(row["completion"])["content"] != TEXT
            or not row["is_complete"]
        )
    ]
    wrong_ratings = [
        row
        for row in ratings
        if row["feedback_id"] in ledger.feedback and orjson.loads(row["value"]) != ledger.feedback[row["feedback_id"]]
    ]
    return len(wrong_answers) + len(wrong_ratings)


def _is_empty(spool: Path) -> bool:
    """Whether no record waits, as far as can be told while others write."""
    try:
        return not sum(map(_rows_in, spool.glob("gateway-*.db"))) + sum(map(_records_in, _journals_in(spool)))
    except (sqlite3.Error, OSError):
        return False


def _journals_in(spool: Path) -> list[Path]:
    return [each for each in spool.iterdir() if each.is_dir()]


def _rows_in(spool: Path) -> int:
    connection = sqlite3.connect(spool)
    try:
        return int(connection.execute("SELECT count(*) FROM records").fetchone()[0])
    finally:
        connection.close()


def _records_in(journal: Path) -> int:
    """Records that the database has not been given."""
    reader = JournalReader(journal)
    n_records = 0
    while frames := reader.take(1_000):
        n_records += len(frames)
    return n_records
