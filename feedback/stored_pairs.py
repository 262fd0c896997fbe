"""The pairs in the store follow what mining finds, in small transactions.

Feedback can be replaced or retracted, so a pair that is no longer given goes, unless a promoted run trained on it:
such a pair stays for lineage, and the same two answers are not added again. Others may come to say the same: then a
pair keeps its id, and its voters, margin and age are those of today, unless a promoted run trained on it as it was.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from operator import itemgetter
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import sqlalchemy as sa

from feedback.batches import columns, stream
from feedback.candidates import Answer, Claim
from feedback.history import ID, StoredTexts, hold_texts, known_events, read_edits, read_stored_texts
from feedback.messages import digest, edited
from feedback.pairs import Texts, pair_of
from feedback.partitions import Ids
from feedback.store import pair_row
from feedback.stored_json import read_json
from pawl.database import Database
from pawl.schema import pairs

PAIR_ID, SOURCE, FACTS = "S32", "S32", "S32"
WRITTEN_PAIRS = 1000
"""In one transaction: SQLite keeps other writers out meanwhile."""

Row = dict[str, Any]
Drafts = Mapping[str, Row] | Callable[[Iterable[Claim]], Mapping[str, Row]]
NO_TEXTS = Texts((), {})
NO_STORED_TEXTS: Final[Mapping[str, StoredTexts]] = MappingProxyType({})


class StoredPair(NamedTuple):
    """What tells a pair from others."""

    id: str
    chosen: str
    """The interaction that was preferred; empty for an edit."""
    rejected: str
    first_run: str
    """The promoted run that trained on it first; empty while none did."""
    source: str
    facts: str
    """`facts_of` what it was made from."""


class StoredPairs(NamedTuple):
    """An alias's pairs by column, in the order of the interaction that was rejected."""

    ids: Ids
    chosen: Ids
    rejected: Ids
    first_run: Ids
    source: Ids
    facts: Ids

    def made_of(self, *sources: str) -> StoredPairs:
        """Those that these sources made: what is mined in a second stage follows them alone."""
        return self._where(np.isin(self.source, np.array(sources, SOURCE)))

    def not_made_of(self, *sources: str) -> StoredPairs:
        """All the others."""
        return self._where(~np.isin(self.source, np.array(sources, SOURCE)))

    def about(self, interactions: Sequence[str]) -> list[StoredPair]:
        """Those in which one of these was rejected."""
        wanted = np.array(interactions, ID)
        starts = np.searchsorted(self.rejected, wanted, "left").tolist()
        ends = np.searchsorted(self.rejected, wanted, "right").tolist()
        return [self._pair(row) for start, end in zip(starts, ends, strict=True) for row in range(start, end)]

    def about_others(self, interactions: Ids) -> list[StoredPair]:
        """Those in which none of these was rejected."""
        return [self._pair(row) for row in np.flatnonzero(~np.isin(self.rejected, interactions)).tolist()]

    def all(self) -> list[StoredPair]:
        return [self._pair(row) for row in range(len(self.ids))]

    def _where(self, is_wanted: npt.NDArray[np.bool_]) -> StoredPairs:
        return StoredPairs(*(column[is_wanted] for column in self))

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
    facts = (p.principals, p.created_at, p.margin)
    query = sa.select(p.id, chosen, p.rejected_interaction, first_run, p.source, *facts).where(p.alias == alias)
    with database.read() as connection:
        found = columns(stream(connection, query), (PAIR_ID, ID, ID, PAIR_ID, SOURCE, FACTS), _with_facts)
    order = np.argsort(found[2], kind="stable")
    return StoredPairs(*(column[order] for column in found))


def _with_facts(row: Sequence[Any]) -> tuple[str, ...]:
    *names, principals, created_at, margin = row
    return (*names, facts_of(json.loads(principals), created_at, margin))


def facts_of(principals: Iterable[str], at: float, margin: float) -> str:
    """What of a pair may change while it is the same two answers, as one short text."""
    return digest(*sorted(principals), repr(float(at)), repr(float(margin)))


def draft(
    database: Database,
    claims: Iterable[Claim],
    answers: Mapping[str, Answer],
    mined_at: float,
    known: Mapping[str, StoredTexts] = NO_STORED_TEXTS,
) -> dict[str, Row]:
    """The rows of these pairs, by id.

    Of a claim whose texts are gone there is none. Nothing holds the texts: `follow` looks again before it adds a row.

    Args:
        known: texts that were read already.
    """
    rows: dict[str, Row] = {}
    with database.read() as connection:
        for lot in _lots({claim.pair_id: claim for claim in claims}):
            sides = sides_of(lot.values())
            texts = read_stored_texts(connection, sorted(sides - known.keys()))
            texts |= {side: known[side] for side in sides & known.keys()}
            edits = read_edits(connection, [claim.edit.event_id for claim in lot.values() if claim.edit])
            whole = [pair_id for pair_id, claim in lot.items() if _is_whole(claim, texts, edits)]
            rows |= {one: _row(one, lot[one], answers, texts, edits, mined_at) for one in whole}
    return rows


def _row(
    pair_id: str,
    claim: Claim,
    answers: Mapping[str, Answer],
    texts: Mapping[str, StoredTexts],
    edits: Mapping[str, str],
    mined_at: float,
) -> Row:
    """A pair as the store keeps it. Texts are copied as they lie there: to read them takes longer than all the rest."""
    pair = pair_of(pair_id, claim, answers, defaultdict(lambda: NO_TEXTS), edits)
    rejected = texts[claim.rejected].completion
    asked = texts[claim.served or claim.rejected]
    if claim.edit:
        chosen = json.dumps(edited(read_json(rejected), edits[claim.edit.event_id]))
    else:
        chosen = texts[claim.chosen].completion
    told = {"prompt": asked.prompt, "tools": asked.tools, "chosen": chosen, "rejected": rejected}
    return {**pair_row(pair, mined_at), **told}


def follow(
    database: Database, stored: Iterable[StoredPair], claims: Iterable[Claim], drafts: Drafts, since: float = 0.0
) -> Changes:
    """Make the stored pairs of some answers those that were settled.

    Args:
        stored: all that the store has in which one of those answers was rejected.
        claims: all that was settled between them.
        drafts: of those `claims` that the store did not have; or what makes them for some of these at a time.
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
    revise(database, [settled[pair.id] for pair in known.values() if pair.id in settled and _is_stale(pair, settled)])
    lots = [_add(database, lot, drafts(lot.values()) if callable(drafts) else drafts, since) for lot in _lots(new)]
    erased = tuple(claim for lot in lots for claim in lot.erased)
    return Changes(sum(lot.added for lot in lots), n_withdrawn, erased)


def _is_stale(pair: StoredPair, settled: Mapping[str, Claim]) -> bool:
    claim = settled[pair.id]
    return not pair.first_run and pair.facts != facts_of(claim.principals, claim.at, claim.margin)


def revise(database: Database, claims: Iterable[Claim]) -> None:
    """Let stored pairs that no promoted run trained on say who stands for them now, and since when."""
    p = pairs.c
    one = sa.and_(p.id == sa.bindparam("pair_id"), p.first_run.is_(None))
    for lot in _lots({claim.pair_id: claim for claim in claims}):
        with database.write() as connection:
            connection.execute(pairs.update().where(one), [_revised(pair_id, claim) for pair_id, claim in lot.items()])


def _revised(pair_id: str, claim: Claim) -> Row:
    principals = json.dumps(sorted(claim.principals))
    return {
        "pair_id": pair_id,
        "principals": principals,
        "n_voters": len(claim.principals),
        "margin": claim.margin,
        "created_at": claim.at,
    }


def _lots(claims: Mapping[str, Claim]) -> Iterator[dict[str, Claim]]:
    """In the order of ids: of two miners that meet at a row, neither holds one that the other has yet to come to."""
    rest = iter(sorted(claims.items(), key=itemgetter(0)))
    while lot := dict(islice(rest, WRITTEN_PAIRS)):
        yield lot


def _add(database: Database, claims: Mapping[str, Claim], drafts: Mapping[str, Row], since: float) -> Changes:
    """Add the pairs of those claims of which the texts are still there; no text goes before the transaction ends."""
    wanted = {one: claim for one, claim in claims.items() if one in drafts and drafts[one]["created_at"] >= since}
    with database.write() as connection:
        texts = hold_texts(connection, sorted(sides_of(wanted.values())))
        edits = known_events(connection, [claim.edit.event_id for claim in wanted.values() if claim.edit])
        rows = [drafts[pair_id] for pair_id, claim in wanted.items() if _is_whole(claim, texts, edits)]
        added = database.insert_new(connection, pairs, rows) if rows else 0
    whole = {row["id"] for row in rows}
    return Changes(added, 0, tuple(claim for pair_id, claim in claims.items() if pair_id not in whole))


def sides_of(claims: Iterable[Claim]) -> set[str]:
    """The interactions that were compared."""
    return {side for claim in claims for side in (claim.served, claim.rejected) if side}


def _is_whole(claim: Claim, texts: Container[str], edits: Container[str]) -> bool:
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
