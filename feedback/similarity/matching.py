"""Thumbs on nearly the same question, matched: an answer that was liked over one that was disliked.

What comes here are thumbs that found no partner in their own conversation, so of one conversation all are up or all are
down. The nearest conversations are matched first, one thumb with one, so that no thumb is in two pairs; who of a
conversation, and which of two that are equally near, is drawn by hash. Who is left over stays alone.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from feedback.candidates import MARGINS, Ballot, Claim, Skipped, Source
from feedback.judging import Decisions, count_reasons
from feedback.messages import digest
from feedback.similarity.embedding import Similarity
from feedback.similarity.neighbours import NO_EDGES, Edges, Halves, Places, near
from feedback.similarity.questions import Question

BATCH: Final = 1000
"""Questions of which the texts are held at once."""

ReadSettings = Callable[[Sequence[str]], Mapping[str, bytes]]
"""`Question.setting` of what was asked in all of these interactions, as far as it can be compared, by their ids."""
ReadQuestions = Callable[[Sequence[str]], Mapping[str, Question]]
"""What was asked in these interactions, as far as it can be compared, by their ids."""


class Matched(NamedTuple):
    """What became of thumbs that were alone: `2 * len(claims) + len(alone)` is their number."""

    claims: tuple[Claim, ...]
    alone: tuple[Ballot, ...]


def add_similar(decisions: Decisions, settings: ReadSettings, read: ReadQuestions, similarity: Similarity) -> Decisions:
    """What was decided, and of the thumbs that were left alone those pairs that nearly the same question makes.

    Args:
        settings: called once, with all ids.
        read: called with at most a thousand ids at a time.
    """
    claims, alone = match_similar(decisions.alone, settings, read, similarity)
    skipped = Counter({**decisions.skipped, Skipped.UNPAIRED: len(alone)})
    return Decisions(decisions.settled + claims, alone, count_reasons(skipped.elements()))


class _Asked(NamedTuple):
    """Thumbs of one conversation, all up or all down."""

    ballots: Sequence[Ballot]

    @property
    def is_up(self) -> bool:
        return self.ballots[0].is_up

    @property
    def name(self) -> str:
        """An interaction that has the question; the same whatever order the thumbs came in."""
        return self.ballots[0].answer.id


def match_similar(
    alone: Iterable[Ballot], settings: ReadSettings, read: ReadQuestions, similarity: Similarity
) -> Matched:
    """Match thumbs that are alone in their conversations.

    Args:
        alone: in any order.
    """
    ballots = tuple(alone)
    asked = _by_conversation(ballots)
    edges = _sorted(_edges(asked, settings, read, similarity))
    partners = [_Partners(one.ballots) for one in asked]
    claims = tuple(
        claim
        for up, down in zip(edges.ones.tolist(), edges.others.tolist(), strict=True)
        for claim in _claims(partners[up], partners[down])
    )
    taken = {side for claim in claims for side in (claim.chosen, claim.rejected)}
    return Matched(claims, tuple(ballot for ballot in ballots if ballot.answer.id not in taken))


def _by_conversation(ballots: Iterable[Ballot]) -> list[_Asked]:
    """In the order of the conversations' fingerprints, which is as good as drawn by lot."""
    found: defaultdict[bytes, list[Ballot]] = defaultdict(list)
    for ballot in ballots:
        found[ballot.answer.conversation].append(ballot)
    return [_Asked(_in_drawn_order(found[conversation])) for conversation in sorted(found)]


def _in_drawn_order(ballots: list[Ballot]) -> list[Ballot]:
    if len(ballots) == 1:  # As most are, and a draw takes longer than all the rest.
        return ballots
    return sorted(ballots, key=lambda ballot: digest("match", ballot.answer.id))


def _edges(asked: Sequence[_Asked], settings: ReadSettings, read: ReadQuestions, similarity: Similarity) -> Edges:
    """Places of liked and of disliked conversations that are near each other."""
    is_up = np.array([one.is_up for one in asked], np.bool_)
    rivals = _rivals(_column(asked, settings), is_up)
    if not rivals:
        return NO_EDGES
    wanted = np.unique(np.concatenate(rivals))
    vectors, lengths = _vectors([asked[place].name for place in wanted.tolist()], read, similarity)
    found = [_edges_of(np.searchsorted(wanted, group), is_up[group], vectors, lengths, similarity) for group in rivals]
    edges = Edges(*(np.concatenate(column) for column in zip(*found, strict=True)))
    return edges._replace(ones=wanted[edges.ones], others=wanted[edges.others])


def _column(asked: Sequence[_Asked], settings: ReadSettings) -> NDArray[np.bytes_]:
    """What the questions must have in common, as hexadecimal; empty where one can be compared with no other."""
    found = settings([one.name for one in asked])
    return np.array([found.get(one.name, b"").hex() for one in asked], "S32")


def _rivals(settings: NDArray[np.bytes_], is_up: NDArray[np.bool_]) -> list[Places]:
    """The places of each setting in which something was liked and something disliked."""
    order = np.argsort(settings, kind="stable")
    order = order[settings[order] != b""]
    groups = np.split(order, np.flatnonzero(settings[order][1:] != settings[order][:-1]) + 1)
    return [group for group in groups if is_up[group].any() and not is_up[group].all()]


def _vectors(names: Sequence[str], read: ReadQuestions, similarity: Similarity) -> tuple[Halves, Places]:
    """The questions as vectors, and their lengths; what was erased since is near nothing."""
    lots: list[Halves] = []
    lengths: list[int] = []
    for start in range(0, len(names), BATCH):
        batch = names[start : start + BATCH]
        found = read(batch)
        texts = [found[name].text if name in found else "" for name in batch]
        lots.append(similarity.embedder.embed(texts).astype(np.float16))
        lengths += [len(text) for text in texts]
    return np.concatenate(lots), np.array(lengths, np.int64)


def _edges_of(
    group: Places, is_up: NDArray[np.bool_], vectors: Halves, lengths: Places, similarity: Similarity
) -> Edges:
    """Those within one setting."""
    ups, downs = group[is_up], group[~is_up]
    edges = near(vectors[ups], vectors[downs], similarity.min_similarity, similarity.neighbours)
    edges = edges._replace(ones=ups[edges.ones], others=downs[edges.others])
    if similarity.max_changed_chars is None:
        return edges
    length = np.maximum(lengths[edges.ones], lengths[edges.others])
    is_small = (1.0 - edges.similarities) * length <= similarity.max_changed_chars
    return edges.where(is_small)


def _sorted(edges: Edges) -> Edges:
    order = np.lexsort((edges.others, edges.ones, -edges.similarities))
    return Edges(edges.ones[order], edges.others[order], edges.similarities[order])


class _Partners:
    """Thumbs of one conversation that are still alone, by what their answers say, for equal answers are no pair."""

    def __init__(self, ballots: Iterable[Ballot]) -> None:
        self._by_substance: dict[bytes, list[Ballot]] = {}
        for ballot in ballots:
            self._by_substance.setdefault(ballot.answer.substance, []).append(ballot)

    def substances(self) -> list[bytes]:
        return list(self._by_substance)

    def other_than(self, substance: bytes) -> bytes | None:
        return next((each for each in self._by_substance if each != substance), None)

    def have(self, substance: bytes) -> bool:
        return substance in self._by_substance

    def take(self, substance: bytes) -> Ballot:
        ballots = self._by_substance[substance]
        if len(ballots) == 1:
            del self._by_substance[substance]
        return ballots.pop()


def _claims(ups: _Partners, downs: _Partners) -> Iterator[Claim]:
    """As many as both have answers for."""
    for liked in ups.substances():
        while ups.have(liked) and (disliked := downs.other_than(liked)) is not None:
            yield _claim(ups.take(liked), downs.take(disliked))


def _claim(up: Ballot, down: Ballot) -> Claim:
    source, everyone = Source.SIMILAR_THUMBS, up.principals | down.principals
    at = max(up.at, down.at, up.answer.created_at, down.answer.created_at)
    return Claim(source, up.answer.id, down.answer.id, everyone, at, MARGINS[source])
