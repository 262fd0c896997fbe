"""Mining as a duty: read what feedback touches part by part, judge it, make the stored pairs follow.

Memory is bounded by the largest part: a few hundred bytes for each of its answers, and the texts of one batch. Of the
whole history only ids are held, in columns.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from feedback.candidates import Answer, Claim, Skipped, Source
from feedback.history import read_answers, read_history, read_opinions, read_texts
from feedback.judging import Decisions, decide
from feedback.pairs import UnpairedExample, example_of
from feedback.partitions import History, Part, cut
from feedback.stored_pairs import Changes, follow, read_stored_pairs, withdraw
from pawl.database import Database

PART_ROWS = 5000
"""Interactions and events that are judged at once."""


@dataclass(frozen=True)
class Mined:
    """What mining found and changed."""

    n_pairs: int
    n_added: int
    n_withdrawn: int
    n_unpaired: int
    by_source: Mapping[str, int]
    skipped: Mapping[str, int]
    """Groups that gave no pair, by reason."""


class _Judged(NamedTuple):
    part: Part
    answers: Mapping[str, Answer]
    decisions: Decisions


class _Tally(NamedTuple):
    """What became of the candidates of a part, and of its pairs in the store."""

    by_source: Counter[Source]
    skipped: Counter[Skipped]
    added: int
    withdrawn: int


def mine_alias(
    database: Database, alias: str, mined_at: float, *, since: float = 0.0, part_rows: int = PART_ROWS
) -> Mined:
    """Mine one alias's feedback into the store.

    Args:
        since: before that no pair is added; those that are there stay.
    """
    stored = read_stored_pairs(database, alias)
    history = read_history(database, alias)
    tallies = []
    for part, answers, decisions in _judge(database, history, part_rows):
        here = stored.about(part.interactions)
        tallies.append(_tally(decisions, follow(database, here, decisions.settled, answers, mined_at, since)))
    rest = stored.about_others(history.interactions)
    n_withdrawn = withdraw(database, [pair.id for pair in rest if not pair.first_run])
    return _sum([*tallies, _Tally(Counter(), Counter(), 0, n_withdrawn)])


def unpaired_examples(database: Database, alias: str, *, part_rows: int = PART_ROWS) -> tuple[UnpairedExample, ...]:
    """Thumbs without a partner, for training on single ratings; by id."""
    found: list[UnpairedExample] = []
    for _, _, decisions in _judge(database, read_history(database, alias), part_rows):
        ids = [ballot.answer.id for ballot in decisions.alone]
        with database.read() as connection:
            texts = read_texts(connection, ids)
        found += [example_of(one, texts[one.answer.id]) for one in decisions.alone if one.answer.id in texts]
    return tuple(sorted(found, key=lambda example: example.id))


def _judge(database: Database, history: History, part_rows: int) -> Iterator[_Judged]:
    """Each part of a history with what becomes of its candidates."""
    for part in cut(history, part_rows):
        answers = read_answers(database, part.interactions)
        decisions = decide(answers, read_opinions(database, part.events))
        yield _Judged(part, {answer.id: answer for answer in answers}, decisions)


def _tally(decisions: Decisions, changes: Changes) -> _Tally:
    skipped = decisions.skipped + Counter({Skipped.NOT_STORED: len(changes.erased)})
    by_source = _sources(decisions.settled) - _sources(changes.erased)
    return _Tally(by_source, skipped, changes.added, changes.withdrawn)


def _sources(claims: tuple[Claim, ...]) -> Counter[Source]:
    return Counter(claim.source for claim in claims)


def _sum(tallies: list[_Tally]) -> Mined:
    by_source = sum((tally.by_source for tally in tallies), Counter[Source]())
    skipped = sum((tally.skipped for tally in tallies), Counter[Skipped]())
    return Mined(
        n_pairs=by_source.total(),
        n_added=sum(tally.added for tally in tallies),
        n_withdrawn=sum(tally.withdrawn for tally in tallies),
        n_unpaired=skipped[Skipped.UNPAIRED],
        by_source={source.value: by_source[source] for source in Source if by_source[source]},
        skipped={reason.value: skipped[reason] for reason in Skipped if skipped[reason]},
    )
