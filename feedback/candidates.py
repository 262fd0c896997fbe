"""What mining reasons about: answers and live feedback, both without their texts, and what may become of them.

A *candidate* is something that could make a pair:

- choice, regeneration: each distinct (kind, preferred completion, other completion) that live feedback names or, for
  a regeneration, that an interaction's `regenerate_of` names;
- edit: each distinct (completion, text the user wanted);
- thumbs, and ratings that say as much: each completion with a thumb whose answer cannot be used or whose thumbs
  disagree is one candidate. The others are sorted by conversation (alias and prompt messages): with u up and d down,
  min(u, d) are matched one to one, in an order drawn by hash, and every one left over is a candidate of its own. So a
  conversation gives max(u, d) candidates, and a popular prompt never u * d pairs.
- similar thumbs: of those left over in conversations that end in nearly the same question after the same messages, one
  up and one down are matched (`feedback/similarity/`), and are one candidate together.
- judge: each verdict on two answers to one conversation. Whatever people said of the two counts for more.

Every candidate becomes one pair or is counted under one reason. Several candidates that prefer the same completion
over the same other one become the pair of the strongest source, with everyone's voters.

Texts take part only as digests, so a history is judged in a few hundred bytes per answer, however long the answers are.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from feedback.interactions import FeedbackEvent, Interaction, Message, Status
from feedback.messages import canonical_bytes, digest, fingerprint, is_nothing, substance, wording
from feedback.signals import Signal, thumb_of


class Source(StrEnum):
    """What a pair was made from, strongest first."""

    CHOICE = "choice"
    EDIT = "edit"
    REGENERATION = "regeneration"
    THUMBS = "thumbs"
    SIMILAR_THUMBS = "similar_thumbs"
    """A thumb up and a thumb down on nearly the same question."""
    JUDGE = "judge"
    """A model that goes by a constitution."""


STRENGTH = {source: rank for rank, source in enumerate(Source)}
"""Smaller is stronger."""

MARGINS = {
    Source.CHOICE: 1.0,
    Source.EDIT: 1.0,
    Source.REGENERATION: 0.5,
    Source.THUMBS: 1.0,
    Source.SIMILAR_THUMBS: 0.7,
}
"""A regeneration is half a vote: people also ask again out of curiosity. A similar question is still another one."""
CONFIRMED_REGENERATION_MARGIN = 0.8
"""The replaced answer was disliked as well, or the later one thumbed up."""

MINED_SIGNALS = (Signal.THUMBS, Signal.RATING, Signal.EDIT, Signal.CHOICE, Signal.REGENERATE, Signal.REPORT)
"""Other kinds of feedback neither make a pair nor speak against one."""
NAMING_SIGNALS = (Signal.CHOICE, Signal.REGENERATE)
"""Their value is the id of another completion."""


class Skipped(StrEnum):
    """Why a candidate gave no pair: the first reason found, sides before their comparison, signals against it last."""

    MISSING_INTERACTION = "missing_interaction"
    """A completion it names is not among the interactions given: late, erased, or never ours."""
    NOT_STORED = "not_stored"
    """The client asked for `store: false`."""
    INCOMPLETE = "incomplete"
    """An answer failed, was cut, or its reader left."""
    EMPTY = "empty"
    """An answer or an edit says nothing and calls no tool, or there is no prompt."""
    FOREIGN = "foreign"
    """The two completions belong to different API keys, so nobody can have compared them."""
    DIFFERENT_ALIAS = "different_alias"
    DIFFERENT_PROMPT = "different_prompt"
    IDENTICAL = "identical"
    """Both sides say the same."""
    CONTRADICTION = "contradiction"
    """Another signal says the opposite."""
    UNDECIDED = "undecided"
    """The judge preferred neither answer, or another one when they changed places."""
    MARGIN_TOO_SMALL = "margin_too_small"
    DUPLICATE = "duplicate"
    """A stronger source made this very pair, or a pair already speaks for this thumb's completion."""
    UNPAIRED = "unpaired"
    """A thumb with no partner; returned as an `UnpairedExample`."""


class Served(NamedTuple):
    """The part of an interaction that mining reads."""

    id: str
    completion_id: str
    alias: str
    key_id: str
    user_id: str | None
    created_at: float
    model: str
    probability: float
    regenerate_of: str | None
    prompt_sha: str | None
    status: str
    is_complete: bool
    is_stored: bool
    prompt: tuple[Message, ...] | None
    completion: Message | None


class Said(NamedTuple):
    """The part of a feedback event that mining reads."""

    id: str
    interaction_id: str
    type: str
    value: str | float | bool | None
    key_id: str
    user_id: str | None
    created_at: float


class Verdict(NamedTuple):
    """What a judge said of two answers to one conversation."""

    first: str
    """An interaction id, the smaller one of the two."""
    second: str
    winner: str | None
    """One of the two; None when it is undecided."""
    margin: float
    """How much better the winner is, 0 to 1."""


class Answer(NamedTuple):
    """What mining remembers of an interaction: facts, and digests in place of the texts."""

    id: str
    completion_id: str
    alias: str
    key_id: str
    user_id: str | None
    created_at: float
    model: str
    probability: float
    regenerate_of: str | None
    problem: Skipped | None
    """Why it can be no side of a pair."""
    conversation: bytes
    """What two answers must share to be compared. The messages themselves count, not only their recorded hash."""
    substance: bytes
    """What it says and does."""
    wording: bytes | None
    """Of the text that would change nothing if it were an edit; None when no text is."""


class Opinion(NamedTuple):
    """A signal that counts, an edit's text by its digests, a rating as the thumb that it amounts to."""

    event_id: str
    interaction_id: str
    type: str
    value: str
    """Of an edit, the id that its pair would have, which also stands for the text."""
    wording: bytes | None
    """Of an edit's text; None when there is none but space."""
    principal: str
    at: float


@dataclass(frozen=True, slots=True)
class Claim:
    """A candidate with two sides: `chosen` is said to be better than `rejected`."""

    source: Source
    chosen: str
    """An interaction id; for an edit, the pair's id."""
    rejected: str
    principals: frozenset[str]
    at: float
    """When the last signal behind it was given; of one that was settled, when the last thing it is made from was."""
    margin: float
    edit: Opinion | None = None

    @property
    def pair_id(self) -> str:
        return self.chosen if self.edit else digest(self.source, self.chosen, self.rejected)

    @property
    def sides(self) -> frozenset[str]:
        return frozenset((self.chosen, self.rejected))

    @property
    def served(self) -> str | None:
        """The interaction that was preferred; nobody served an edit."""
        return None if self.edit else self.chosen


class Ballot(NamedTuple):
    """A usable answer whose thumbs agree."""

    answer: Answer
    is_up: bool
    principals: frozenset[str]
    at: float


def served(interaction: Interaction) -> Served:
    """The part of `interaction` that is mined."""
    return Served._make(getattr(interaction, name) for name in Served._fields)


def answer_of(given: Served) -> Answer:
    """What to remember of an answer."""
    is_whole = given.is_complete and given.status == Status.OK
    if not given.is_stored or not is_whole or given.prompt is None or given.completion is None:
        return _answer(given, Skipped.INCOMPLETE if given.is_stored else Skipped.NOT_STORED)
    substance_, words = substance(given.completion), wording(given.completion)
    return _answer(
        given,
        Skipped.EMPTY if not given.prompt or is_nothing(substance_) else None,
        fingerprint(canonical_bytes([given.alias, given.prompt_sha, *given.prompt])),
        fingerprint(substance_),
        None if words is None else fingerprint(canonical_bytes(words)),
    )


def _answer(
    given: Served, problem: Skipped | None, conversation: bytes = b"", said: bytes = b"", words: bytes | None = None
) -> Answer:
    return Answer(
        given.id,
        given.completion_id,
        given.alias,
        given.key_id,
        given.user_id,
        given.created_at,
        given.model,
        given.probability,
        given.regenerate_of,
        problem,
        conversation,
        said,
        words,
    )


def said(event: FeedbackEvent) -> Said:
    """The part of `event` that is mined."""
    return Said._make(getattr(event, name) for name in Said._fields)


def opinion_of(given: Said) -> Opinion:
    """What to remember of a signal that counts."""
    who = principal_of(given.key_id, given.user_id)
    value, words = str(given.value), None
    if given.type == Signal.EDIT:
        value, words = digest(Source.EDIT, value, given.interaction_id), value.strip() or None
    wanted = None if words is None else fingerprint(canonical_bytes(words))
    thumb = thumb_of(given.type, given.value)
    kind, value = (given.type, value) if thumb is None else (Signal.THUMBS.value, thumb.value)
    return Opinion(given.id, given.interaction_id, kind, value, wanted, who, given.created_at)


def principal_of(key_id: str, user_id: str | None) -> str:
    return f"{key_id}/{user_id or ''}"


NOBODY = principal_of("", None)


def voters(opinions: Iterable[Opinion]) -> frozenset[str]:
    """Whose opinions these are."""
    return frozenset(opinion.principal for opinion in opinions)
