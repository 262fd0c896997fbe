"""Mining as a duty: read what feedback touches part by part, judge it, make the stored pairs follow.

Memory is bounded by the largest part: about 1 KB for each of its answers, `KEPT_CHARS` of their texts, and the texts
of some pairs that are written at once. Of the whole history only ids are held, in columns, and the single thumbs, at
about 1 KB each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import NamedTuple

from feedback.candidates import Ballot, Claim, Skipped, Source
from feedback.history import Heard, count_events, read_answers, read_history, read_opinions, read_texts
from feedback.judged.verdict_store import read_verdicts
from feedback.judging import Decisions, decide
from feedback.pairs import UnpairedExample, example_of
from feedback.part_work import Here, Workplace
from feedback.partitions import Part, cut
from feedback.similarity.embedding import Similarity
from feedback.similarity.matching import add_similar
from feedback.similarity.stored import reader, settings_reader
from feedback.stored_pairs import Changes, StoredPair, draft, follow, read_stored_pairs, withdraw
from pawl.database import Database

PART_ROWS = 5000
"""Interactions and events that are judged at once."""
KEPT_CHARS = 1 << 25
"""Of a part's texts, kept from judging to drafting; the rest is read again."""


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


class PartTask(NamedTuple):
    """A part, and the pairs that the store has of it."""

    part: Part
    stored: list[StoredPair]


class Lone(NamedTuple):
    """A thumb without a partner in its part of the history."""

    ballot: Ballot
    example: UnpairedExample


class Tally(NamedTuple):
    """What became of the candidates of a part, and of its pairs in the store."""

    by_source: Counter[Source]
    skipped: Counter[Skipped]
    added: int
    withdrawn: int


class MinedPart(NamedTuple):
    """What is left to be done with a part, as it travels from where it was mined: no texts."""

    tally: Tally
    alone: tuple[Ballot, ...]
    """Thumbs that found no partner in the part."""


def mine_alias(
    database: Database,
    alias: str,
    mined_at: float,
    *,
    since: float = 0.0,
    min_judged_margin: float = 0.0,
    part_rows: int = PART_ROWS,
    place: Workplace | None = None,
    similarity: Similarity | None = None,
) -> Mined:
    """Mine one alias's feedback into the store.

    Args:
        since: before that no pair is added; those that are there stay.
        min_judged_margin: of a judge's verdicts those with a smaller margin make no pair.
        place: where parts are judged and their pairs written; in this process unless told otherwise.
        similarity: what counts as nearly the same question; without it thumbs on such questions stay alone.
    """
    place = place or Here(database)
    work = partial(mine_part, mined_at=mined_at, since=since, min_judged_margin=min_judged_margin)
    place.expect(work, count_events(database) // part_rows)
    everything = read_stored_pairs(database, alias)
    stored, similar = everything.not_made_of(Source.SIMILAR_THUMBS), everything.made_of(Source.SIMILAR_THUMBS)
    history = read_history(database, alias, place)
    tasks = (PartTask(part, stored.about(part.interactions)) for part in cut(history, part_rows))
    mined = list(place.each(work, tasks))
    alone = [ballot for one in mined for ballot in one.alone]
    rest = stored.about_others(history.interactions)
    n_withdrawn = withdraw(database, [pair.id for pair in rest if not pair.first_run])
    matched = _match(database, place, alone, similarity)
    answers = {ballot.answer.id: ballot.answer for ballot in alone}
    draft_similar = partial(draft, database, answers=answers, mined_at=mined_at)
    last = _tally(matched, follow(database, similar.all(), matched.settled, draft_similar, since))
    gone = Tally(Counter(), Counter(), 0, n_withdrawn)
    return _sum([*(one.tally for one in mined), last, gone], n_unpaired=len(matched.alone))


def _match(database: Database, place: Workplace, alone: Iterable[Ballot], similarity: Similarity | None) -> Decisions:
    """What becomes of the thumbs that found no partner in their parts of the history."""
    unmatched = Decisions((), tuple(alone), Counter())
    if similarity is None:
        return unmatched
    return add_similar(unmatched, settings_reader(place), reader(database), similarity)


def unpaired_examples(
    database: Database,
    alias: str,
    *,
    part_rows: int = PART_ROWS,
    place: Workplace | None = None,
    similarity: Similarity | None = None,
) -> tuple[UnpairedExample, ...]:
    """Thumbs without a partner, for training on single ratings; by id."""
    place = place or Here(database)
    parts = cut(read_history(database, alias, place), part_rows)
    found = list(chain.from_iterable(place.each(unpaired_in_part, parts)))
    alone = {ballot.answer.id for ballot in _match(database, place, [one.ballot for one in found], similarity).alone}
    examples = [one.example for one in found if one.ballot.answer.id in alone]
    return tuple(sorted(examples, key=lambda example: example.id))


def mine_part(
    database: Database, task: PartTask, *, mined_at: float, since: float = 0.0, min_judged_margin: float = 0.0
) -> MinedPart:
    """Judge the candidates of a part, and make its stored pairs follow."""
    heard, decisions = _judge(database, task.part, min_judged_margin, most_chars=KEPT_CHARS)
    answers = {answer.id: answer for answer in heard.answers}
    drafting = partial(draft, database, answers=answers, mined_at=mined_at, known=heard.texts)
    changes = follow(database, task.stored, decisions.settled, drafting, since)
    return MinedPart(_tally(decisions, changes), decisions.alone)


def unpaired_in_part(database: Database, part: Part) -> list[Lone]:
    """The thumbs of a part that have no partner."""
    _, decisions = _judge(database, part)
    with database.read() as connection:
        texts = read_texts(connection, [ballot.answer.id for ballot in decisions.alone])
    alone = [ballot for ballot in decisions.alone if ballot.answer.id in texts]
    return [Lone(ballot, example_of(ballot, texts[ballot.answer.id])) for ballot in alone]


def _judge(
    database: Database, part: Part, min_judged_margin: float = 0.0, most_chars: int = 0
) -> tuple[Heard, Decisions]:
    """A part's answers, with some of their texts, and what becomes of its candidates."""
    heard = read_answers(database, part.interactions, most_chars)
    opinions, verdicts = read_opinions(database, part.events), read_verdicts(database, part.events)
    return heard, decide(heard.answers, opinions, verdicts, min_judged_margin=min_judged_margin)


def _tally(decisions: Decisions, changes: Changes) -> Tally:
    # Who is alone in a part may find a partner later, and is counted when that is known.
    skipped = decisions.skipped + Counter({Skipped.NOT_STORED: len(changes.erased)})
    del skipped[Skipped.UNPAIRED]
    by_source = _sources(decisions.settled) - _sources(changes.erased)
    return Tally(by_source, skipped, changes.added, changes.withdrawn)


def _sources(claims: tuple[Claim, ...]) -> Counter[Source]:
    return Counter(claim.source for claim in claims)


def _sum(tallies: list[Tally], n_unpaired: int) -> Mined:
    by_source = sum((tally.by_source for tally in tallies), Counter[Source]())
    skipped = sum((tally.skipped for tally in tallies), Counter[Skipped]({Skipped.UNPAIRED: n_unpaired}))
    return Mined(
        n_pairs=by_source.total(),
        n_added=sum(tally.added for tally in tallies),
        n_withdrawn=sum(tally.withdrawn for tally in tallies),
        n_unpaired=n_unpaired,
        by_source={source.value: by_source[source] for source in Source if by_source[source]},
        skipped={reason.value: skipped[reason] for reason in Skipped if skipped[reason]},
    )
