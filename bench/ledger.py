"""What clients, engine and database each say about the same requests, found again by their nonces."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import sqlalchemy as sa

from bench.native_tools import NONCE_START
from pawl.database import Database
from pawl.schema import interactions

NONCE = re.compile(r"nonce-[0-9a-zA-Z]{16}")
BATCH_ROWS = 2000
SETTLE_POLL_S = 1.0


class Ended(NamedTuple):
    """How a client's request ended."""

    at_ns: int
    how: str
    """`ok`, or where it was given up: `upload`, `waiting`, `stream`."""


class Worked(NamedTuple):
    """What the engine did for a request."""

    began_ns: int
    ended_ns: int
    is_done: bool
    """Answered whole; else its connection was closed meanwhile."""


@dataclass(frozen=True, slots=True)
class Stored:
    """What the database holds, by nonce of the question."""

    rows: Mapping[str, int]
    n_mixed: int
    """Rows whose answer holds the nonce of another question."""

    @property
    def doubled(self) -> int:
        return sum(n - 1 for n in self.rows.values())


def read_client_logs(paths: Iterable[Path]) -> dict[str, Ended]:
    """What load generators logged, by nonce."""
    lines = (line.split() for path in paths for line in path.read_text().splitlines())
    return {NONCE_START + number: Ended(int(at_ns), how) for number, at_ns, how in lines}


def read_engine_log(path: Path) -> dict[str, Worked]:
    """The fake engine's log, by nonce; of a request that was tried twice, the last try."""
    worked: dict[str, Worked] = {}
    for line in path.read_text().splitlines():
        nonce, began_ns, ended_ns, how = line.split()
        worked[nonce] = Worked(int(began_ns), int(ended_ns), how == "done")
    return worked


def read_stored(database: Database) -> Stored:
    """Every interaction's nonces."""
    found: Counter[str] = Counter()
    n_mixed = 0
    query = sa.select(interactions.c.prompt, interactions.c.completion)
    with database.read() as connection:
        rows = connection.execution_options(stream_results=True, yield_per=BATCH_ROWS).execute(query)
        for prompt, completion in rows:
            nonce = own_nonce(prompt or "")
            if nonce is None:
                continue
            found[nonce] += 1
            n_mixed += is_mixed(nonce, completion or "")
    return Stored(found, n_mixed)


def own_nonce(prompt: str) -> str | None:
    """The nonce of a question.

    >>> own_nonce('[{"role": "user", "content": "nonce-0000000000000012 My fern"}]')
    'nonce-0000000000000012'
    """
    found = NONCE.search(prompt)
    return found[0] if found else None


def is_mixed(nonce: str, completion: str) -> bool:
    """Whether an answer holds another question's nonce.

    >>> is_mixed("nonce-0000000000000012", "nonce-0000000000000012 nonce-0000000000000012")
    False
    >>> is_mixed("nonce-0000000000000012", "nonce-0000000000000013")
    True
    """
    return any(found != nonce for found in NONCE.findall(completion))


def settle(database: Database, wanted: Callable[[int], bool], *, within_s: float) -> int:
    """Wait until the number of interactions is as wanted, or stops being worth waiting for; returns the last number."""
    deadline, n = time.monotonic() + within_s, -1
    while time.monotonic() < deadline and not wanted(n):
        with suppress(sa.exc.OperationalError), database.read() as connection:
            n = int(connection.execute(sa.select(sa.func.count()).select_from(interactions)).scalar_one())
        time.sleep(SETTLE_POLL_S)
    return n


def lost(acknowledged: Iterable[str], stored: Stored) -> list[str]:
    """What clients got whole and the database does not have."""
    return sorted(set(acknowledged) - stored.rows.keys())


def stop_delays_s(ended: Mapping[str, Ended], worked: Mapping[str, Worked]) -> list[float]:
    """How long the engine went on with each request after its client had gone; those it had finished before count 0.

    >>> stop_delays_s({"a": Ended(5_000_000_000, "stream")}, {"a": Worked(0, 5_250_000_000, False)})
    [0.25]
    """
    gone = ((nonce, end) for nonce, end in ended.items() if end.how != "ok")
    return [max(0.0, (worked[nonce].ended_ns - end.at_ns) / 1e9) for nonce, end in gone if nonce in worked]
