"""The pairs in the store follow what mining finds, in small transactions.

Feedback can be replaced or retracted, so a pair that is no longer given goes, unless a promoted run trained on it:
such a pair stays for lineage, and the same two answers are not added again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from operator import itemgetter
from typing import NamedTuple

import numpy as np
import sqlalchemy as sa

from feedback.batches import columns, stream
from feedback.candidates import Answer, Claim
from feedback.history import ID, read_edits, read_texts
from feedback.pairs import Texts, made_at, pair_of
from feedback.partitions import Ids
from feedback.store import pair_row
from pawl.database import Database
from pawl.schema import pairs

PAIR_ID = "S32"
WRITTEN_PAIRS = 500
"""In one transaction: SQLite keeps other writers out meanwhile."""


class StoredPair(NamedTuple):
    """What tells a pair from others."""

    id: str
    chosen: str
    """The interaction that was preferred; empty for an edit."""
    rejected: str
    first_run: str
    """The promoted run that trained on it first; empty while none did."""


class StoredPairs(NamedTuple):
    """An alias's pairs by column, in the order of the interaction that was rejected."""

    ids: Ids
    chosen: Ids
    rejected: Ids
    first_run: Ids

    def about(self, interactions: Sequence[str]) -> list[StoredPair]:
        """Those in which one of these was rejected."""
        wanted = np.array(interactions, ID)
        starts = np.searchsorted(self.rejected, wanted, "left").tolist()
        ends = np.searchsorted(self.rejected, wanted, "right").tolist()
        return [self._pair(row) for start, end in zip(starts, ends, strict=True) for row in range(start, end)]

    def about_others(self, interactions: Ids) -> list[StoredPair]:
        """Those in which none of these was rejected."""
        return [self._pair(row) for row in np.flatnonzero(~np.isin(self.rejected, interactions)).tolist()]

    def _pair(self, row: int) -> StoredPair:
        return StoredPair(*(column[row].decode() for column in self))


class Changes(NamedTuple):
    """What became of the pairs in the store."""

    added: int
    withdrawn: int
    erased: tuple[Claim, ...]
    """These cannot become pairs any more: a text was erased after it was judged, or pairs so old are not kept."""


def read_stored_pairs(database: Database, alias: str) -> StoredPairs:
    """What the store has of an alias."""
    p = pairs.c
    chosen, first_run = sa.func.coalesce(p.chosen_interaction, ""), sa.func.coalesce(p.first_run, "")
    query = sa.select(p.id, chosen, p.rejected_interaction, first_run).where(p.alias == alias)
    with database.read() as connection:
        found = columns(stream(connection, query), (PAIR_ID, ID, ID, PAIR_ID))
    order = np.argsort(found[2], kind="stable")
    return StoredPairs(*(column[order] for column in found))


def follow(
    database: Database,
    stored: Iterable[StoredPair],
    claims: Iterable[Claim],
    answers: Mapping[str, Answer],
    mined_at: float,
    since: float = 0.0,
) -> Changes:
    """Make the stored pairs of some answers those that were settled.

    Args:
        stored: all that the store has in which one of `answers` was rejected.
        claims: all that was settled between `answers`.
        since: older pairs are not added, for retention has deleted them, or would.
    """
    known = {pair.id: pair for pair in stored}
    used = {(pair.chosen, pair.rejected) for pair in known.values() if pair.first_run}
    settled = {claim.pair_id: claim for claim in claims}
    gone = [pair.id for pair in known.values() if not pair.first_run and pair.id not in settled]
    new = {
        pair_id: claim
        for pair_id, claim in settled.items()
        if pair_id not in known and (claim.served or "", claim.rejected) not in used
    }
    n_withdrawn = withdraw(database, gone)
    kept = {pair_id: claim for pair_id, claim in new.items() if made_at(claim, answers) >= since}
    lots = [_add(database, lot, answers, mined_at) for lot in _lots(kept)]
    erased = tuple(claim for lot in lots for claim in lot.erased)
    too_old = tuple(claim for pair_id, claim in new.items() if pair_id not in kept)
    return Changes(sum(lot.added for lot in lots), n_withdrawn, erased + too_old)


def _lots(claims: Mapping[str, Claim]) -> Iterator[dict[str, Claim]]:
    """In the order of ids: of two miners that meet at a row, neither holds one that the other has yet to come to."""
    rest = iter(sorted(claims.items(), key=itemgetter(0)))
    while lot := dict(islice(rest, WRITTEN_PAIRS)):
        yield lot


def _add(database: Database, claims: Mapping[str, Claim], answers: Mapping[str, Answer], mined_at: float) -> Changes:
    """Add the pairs of those claims of which the texts are still there; no text goes before the transaction ends."""
    with database.write() as connection:
        sides = {side for claim in claims.values() for side in (claim.served, claim.rejected) if side}
        texts = read_texts(connection, sorted(sides), hold=True)
        edits = read_edits(connection, [claim.edit.event_id for claim in claims.values() if claim.edit])
        whole = {pair_id: claim for pair_id, claim in claims.items() if _is_whole(claim, texts, edits)}
        rows = [pair_row(pair_of(pair_id, whole[pair_id], answers, texts, edits), mined_at) for pair_id in whole]
        added = database.insert_new(connection, pairs, rows) if rows else 0
    return Changes(added, 0, tuple(claim for pair_id, claim in claims.items() if pair_id not in whole))


def _is_whole(claim: Claim, texts: Mapping[str, Texts], edits: Mapping[str, str]) -> bool:
    chosen = claim.edit.event_id in edits if claim.edit else claim.chosen in texts
    return chosen and claim.rejected in texts


def withdraw(database: Database, pair_ids: Sequence[str]) -> int:
    """Remove pairs that no promoted run trained on; returns how many."""
    ordered = sorted(pair_ids)
    lots = [ordered[start : start + WRITTEN_PAIRS] for start in range(0, len(ordered), WRITTEN_PAIRS)]
    return sum(_withdraw_lot(database, lot) for lot in lots)


def _withdraw_lot(database: Database, pair_ids: Sequence[str]) -> int:
    """A deletion locks rows in whatever order it comes to them, so they are locked in the order of ids before."""
    is_unused = sa.and_(pairs.c.id.in_(pair_ids), pairs.c.first_run.is_(None))
    with database.write() as connection:
        connection.execute(sa.select(pairs.c.id).where(is_unused).order_by(pairs.c.id).with_for_update()).all()
        return connection.execute(pairs.delete().where(is_unused)).rowcount
