"""An alias's stored pairs, some at a time: ids in columns first, then texts by id, so that few are ever held at once.

No statement runs longer than it takes to read ids: on SQLite readers hold up whoever writes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import fields
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray

from feedback.batches import columns, look_up, names, stream
from feedback.pairs import PreferencePair
from feedback.partitions import Ids
from feedback.store import NO_PAIR_TEXT
from feedback.stored_json import read_json
from pawl.database import Database
from pawl.schema import pairs

BATCH_PAIRS = 500


class PairIds(NamedTuple):
    """All pairs of an alias."""

    ids: Ids
    """In ascending order."""
    is_used: NDArray[np.bool_]
    """Of each, whether a promoted run has trained on it."""


def read_pair_ids(database: Database, alias: str) -> PairIds:
    """Which pairs an alias has, those without texts included."""
    p = pairs.c
    query = sa.select(p.id, sa.case((p.first_run.is_(None), ""), else_="1")).where(p.alias == alias)
    with database.read() as connection:
        ids, used = columns(stream(connection, query), ("S32", "S1"))
    order = np.argsort(ids)
    return PairIds(ids[order], used[order] == b"1")


def read_pairs(database: Database, ids: Sequence[str] | Ids) -> Iterator[list[PreferencePair]]:
    """These pairs in the order of their ids, in batches; those that have no texts or are gone are left out."""
    wanted = sorted(names(ids) if isinstance(ids, np.ndarray) else ids)
    query = sa.select(*(pairs.c[field.name] for field in fields(PreferencePair)))
    query = query.where(pairs.c.chosen != NO_PAIR_TEXT["chosen"])
    for start in range(0, len(wanted), BATCH_PAIRS):
        with database.read() as connection:
            found = look_up(connection, query, pairs.c.id, wanted[start : start + BATCH_PAIRS])
            batch = [_pair(row) for rows in found for row in rows]
        yield sorted(batch, key=attrgetter("id"))


class PairsById(Collection[PreferencePair]):
    """Stored pairs that are read anew whenever somebody goes through them."""

    def __init__(self, database: Database, ids: Collection[str]) -> None:
        self._database = database
        self._ids = frozenset(ids)

    def __len__(self) -> int:
        """How many there were when they were named; those that are erased since do not come."""
        return len(self._ids)

    def __contains__(self, pair: object) -> bool:
        return isinstance(pair, PreferencePair) and pair.id in self._ids

    def __iter__(self) -> Iterator[PreferencePair]:
        """By id."""
        return (pair for batch in read_pairs(self._database, sorted(self._ids)) for pair in batch)


def _pair(row: Sequence[Any]) -> PreferencePair:
    named = dict(zip(_NAMES, row, strict=True))
    for name in ("prompt", "principals", "models", *(["tools"] if named["tools"] is not None else [])):
        named[name] = tuple(read_json(named[name]))
    for name in ("chosen", "rejected"):
        named[name] = read_json(named[name])
    return PreferencePair(**named)


_NAMES = tuple(field.name for field in fields(PreferencePair))
