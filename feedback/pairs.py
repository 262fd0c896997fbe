"""From what users did to preference pairs, with a reason for every candidate that became none.

A *candidate* is something that could make a pair:

- choice, regeneration: each distinct (kind, preferred completion, other completion) that live feedback names or, for
  a regeneration, that an interaction's `regenerate_of` names;
- edit: each distinct (completion, text the user wanted);
- thumbs: each completion with a thumb whose answer cannot be used or whose thumbs disagree is one candidate. The
  others are sorted by conversation (alias and prompt messages): with u up and d down, min(u, d) are matched one to
  one, in an order drawn by hash, and every one left over is a candidate of its own. So a conversation gives
  max(u, d) candidates, and a popular prompt never u * d pairs.

Every candidate becomes one pair or is counted under one reason. Several candidates that prefer the same completion
over the same other one become the pair of the strongest source, with everyone's voters.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import zip_longest

from feedback.interactions import FeedbackEvent, Interaction, Message, Status
from feedback.signals import Signal, Thumbs, latest


class Source(StrEnum):
    """What a pair was made from, strongest first."""

    CHOICE = "choice"
    EDIT = "edit"
    REGENERATION = "regeneration"
    THUMBS = "thumbs"


STRENGTH = {source: rank for rank, source in enumerate(Source)}
"""Smaller is stronger."""

MARGINS = {Source.CHOICE: 1.0, Source.EDIT: 1.0, Source.REGENERATION: 0.5, Source.THUMBS: 1.0}
"""A regeneration is half a vote: people also ask again out of curiosity."""
CONFIRMED_REGENERATION_MARGIN = 0.8
"""The replaced answer was disliked as well, or the later one thumbed up."""


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
    MARGIN_TOO_SMALL = "margin_too_small"
    DUPLICATE = "duplicate"
    """A stronger source made this very pair, or a pair already speaks for this thumb's completion."""
    UNPAIRED = "unpaired"
    """A thumb with no partner; returned as an `UnpairedExample`."""


@dataclass(frozen=True)
class PreferencePair:
    """Two answers to one prompt, and which one people preferred."""

    id: str
    """32 hexadecimal digits, from the source and the two sides."""
    alias: str
    source: str
    """A `Source`, or "original" for pairs a model came with."""
    prompt: tuple[Message, ...]
    chosen: Message
    """One assistant message, whole: tool calls included."""
    rejected: Message
    margin: float
    """Strength of the preference, 0 to 1."""
    n_voters: int
    principals: tuple[str, ...]
    """Sorted, distinct `key_id/user` of those whose feedback made the pair."""
    chosen_interaction: str | None
    """None for an edit: nobody served that text."""
    rejected_interaction: str
    models: tuple[str, ...]
    """Sorted, distinct model versions that produced the two sides."""
    probability: float
    """Propensity of the chosen interaction's assignment; of the rejected one's for an edit."""
    created_at: float
    """Of the latest interaction or feedback behind it."""


@dataclass(frozen=True)
class UnpairedExample:
    """One answer that was liked or disliked on its own, for training on single thumbs (KTO)."""

    id: str
    alias: str
    prompt: tuple[Message, ...]
    completion: Message
    label: bool
    """True for a thumb up."""
    interaction: str
    model: str
    principals: tuple[str, ...]
    created_at: float


@dataclass(frozen=True)
class MinedPairs:
    """What a mining pass found: `len(pairs) + skipped.total()` is the number of candidates."""

    pairs: tuple[PreferencePair, ...]
    """By id."""
    skipped: Counter[Skipped]
    unpaired: tuple[UnpairedExample, ...]
    """By id; as many as `skipped[Skipped.UNPAIRED]`."""


def mine_pairs(
    interactions: Iterable[Interaction], events: Iterable[FeedbackEvent], *, min_margin: float = 0.0
) -> MinedPairs:
    """Turn interactions and feedback into preference pairs.

    A pure function of the two sets: neither order nor repetition changes the result.

    Args:
        interactions: what was served. Feedback on anything else is counted as `missing_interaction`.
        events: the whole history, retractions included.
        min_margin: pairs with a smaller margin are left out.
    """
    record = _read(interactions, events)
    ballots = _count_ballots(record)
    reasons = list(ballots.refused)
    sound: list[_Claim] = []
    for claim in [*_stated_claims(record), *ballots.matched]:
        problem = _problem(claim, record, min_margin)
        if problem is None:
            sound.append(claim)
        else:
            reasons.append(problem)
    settled, lost = _settle(sound)
    pairs = tuple(sorted((_pair(claim, record) for claim in settled), key=lambda pair: pair.id))
    unpaired, spoken_for = _unpaired(ballots.alone, pairs)
    reasons += [*lost, *[Skipped.DUPLICATE] * spoken_for, *[Skipped.UNPAIRED] * len(unpaired)]
    return MinedPairs(pairs, Counter(reasons), unpaired)


# Reading the record


@dataclass(frozen=True)
class _Record:
    """Interactions and live feedback, indexed."""

    interactions: Mapping[str, Interaction]
    events: tuple[FeedbackEvent, ...]
    aliases: Mapping[str, str]
    """Completion id to interaction id."""
    likes: Mapping[str, tuple[FeedbackEvent, ...]]
    """Thumbs up, by interaction id."""
    dislikes: Mapping[str, tuple[FeedbackEvent, ...]]
    """Thumbs down, by interaction id."""
    reports: frozenset[str]
    """Ids of interactions that were reported."""
    replacements: Mapping[str, tuple[str, ...]]
    """For each interaction id, the ids of those that replaced it, oldest first."""

    def is_liked(self, interaction_id: str) -> bool:
        return interaction_id in self.likes

    def is_disliked(self, interaction_id: str) -> bool:
        return interaction_id in self.dislikes or interaction_id in self.reports

    def opinion(self, interaction_id: str) -> int:
        """1 for liked, -1 for disliked, 0 for neither or both."""
        return self.is_liked(interaction_id) - self.is_disliked(interaction_id)


def _read(interactions: Iterable[Interaction], events: Iterable[FeedbackEvent]) -> _Record:
    by_id = {interaction.id: interaction for interaction in sorted(interactions, key=lambda each: each.id)}
    aliases = {interaction.completion_id: interaction.id for interaction in by_id.values()}
    live = tuple(latest(events).values())
    return _Record(
        interactions=by_id,
        events=live,
        aliases=aliases,
        likes=_thumbs(live, Thumbs.UP),
        dislikes=_thumbs(live, Thumbs.DOWN),
        reports=frozenset(event.interaction_id for event in live if event.type == Signal.REPORT),
        replacements=_replacements(by_id, _regenerations(by_id, live, aliases)),
    )


def _thumbs(events: Sequence[FeedbackEvent], value: Thumbs) -> dict[str, tuple[FeedbackEvent, ...]]:
    votes: defaultdict[str, tuple[FeedbackEvent, ...]] = defaultdict(tuple)
    for event in events:
        if event.type == Signal.THUMBS and event.value == value:
            votes[event.interaction_id] += (event,)
    return dict(votes)


def _regenerations(
    interactions: Mapping[str, Interaction], events: Sequence[FeedbackEvent], aliases: Mapping[str, str]
) -> list[tuple[str, str]]:
    """Every (later, earlier) that a request or a live feedback event names."""
    asked = [(each.id, each.regenerate_of) for each in interactions.values() if each.regenerate_of is not None]
    told = [
        (_interaction_id(event.value, aliases), event.interaction_id)
        for event in events
        if event.type == Signal.REGENERATE
    ]
    return [(new, old) for new, old in asked + told if new != old and not _is_foreign(new, old, interactions)]


def _is_foreign(one: str, other: str, interactions: Mapping[str, Interaction]) -> bool:
    """Whether two known interactions belong to different keys: nobody may call another's answer replaced."""
    keys = {interactions[each].key_id for each in (one, other) if each in interactions}
    return len(keys) > 1


def _replacements(
    interactions: Mapping[str, Interaction], regenerations: Iterable[tuple[str, str]]
) -> dict[str, tuple[str, ...]]:
    def age(interaction_id: str) -> tuple[float, str]:
        known = interactions.get(interaction_id)
        return (known.created_at if known else float("-inf"), interaction_id)

    later: defaultdict[str, set[str]] = defaultdict(set)
    for new, old in regenerations:
        later[old].add(new)
    return {old: tuple(sorted(new, key=age)) for old, new in later.items()}


def _interaction_id(value: str | float | bool | None, aliases: Mapping[str, str]) -> str:
    """The interaction a completion id stands for; the text itself when it is nobody's."""
    return aliases.get(str(value), str(value))


# Candidates


@dataclass(frozen=True)
class _Claim:
    """A candidate with two sides: `chosen` is said to be better than `rejected`."""

    source: Source
    chosen: str
    """An interaction id; for an edit, the text."""
    rejected: str
    principals: frozenset[str]
    at: float
    """When the last signal behind it was given."""
    margin: float


def _principal(key_id: str, user_id: str | None) -> str:
    return f"{key_id}/{user_id or ''}"


def _voters(events: Iterable[FeedbackEvent]) -> frozenset[str]:
    return frozenset(_principal(event.key_id, event.user_id) for event in events)


_STATED = {
    Signal.CHOICE.value: Source.CHOICE,
    Signal.EDIT.value: Source.EDIT,
    Signal.REGENERATE.value: Source.REGENERATION,
}


def _stated_claims(record: _Record) -> list[_Claim]:
    """Choices, edits and regenerations, each distinct one once with all who made it."""
    merged: dict[tuple[Source, str, str], _Claim] = {}
    for claim in _single_claims(record):
        key = (claim.source, claim.chosen, claim.rejected)
        merged[key] = _join(claim, merged.get(key, claim))
    return [_confirm(claim, record) for claim in merged.values()]


def _single_claims(record: _Record) -> Iterator[_Claim]:
    for event in record.events:
        if event.type not in _STATED:
            continue
        source = _STATED[event.type]
        chosen = str(event.value) if source is Source.EDIT else _interaction_id(event.value, record.aliases)
        yield _Claim(source, chosen, event.interaction_id, _voters([event]), event.created_at, MARGINS[source])
    for new in record.interactions.values():
        if new.regenerate_of is not None:
            asker = frozenset({_principal(new.key_id, new.user_id)})
            source = Source.REGENERATION
            yield _Claim(source, new.id, new.regenerate_of, asker, new.created_at, MARGINS[source])


def _join(claim: _Claim, other: _Claim) -> _Claim:
    """`claim` with the voters of `other` added."""
    return replace(claim, principals=claim.principals | other.principals, at=max(claim.at, other.at))


def _confirm(claim: _Claim, record: _Record) -> _Claim:
    """A regeneration that a thumb agrees with is worth more, and that thumb's giver is one of its voters."""
    if claim.source is not Source.REGENERATION:
        return claim
    votes = record.dislikes.get(claim.rejected, ()) + record.likes.get(claim.chosen, ())
    if not votes:
        return claim
    return replace(
        claim,
        margin=CONFIRMED_REGENERATION_MARGIN,
        principals=claim.principals | _voters(votes),
        at=max([claim.at, *(vote.created_at for vote in votes)]),
    )


@dataclass(frozen=True)
class _Ballot:
    """A usable completion whose thumbs agree."""

    interaction: Interaction
    prompt: tuple[Message, ...]
    completion: Message
    is_up: bool
    principals: frozenset[str]
    at: float


@dataclass(frozen=True)
class _Ballots:
    matched: tuple[_Claim, ...]
    alone: tuple[_Ballot, ...]
    refused: tuple[Skipped, ...]


def _count_ballots(record: _Record) -> _Ballots:
    """Sort every thumbed completion into matched, alone and refused."""
    conversations: defaultdict[_Conversation, list[_Ballot]] = defaultdict(list)
    refused = []
    for interaction_id in sorted(record.likes.keys() | record.dislikes.keys()):
        ballot = _ballot(interaction_id, record)
        if isinstance(ballot, Skipped):
            refused.append(ballot)
        else:
            conversations[_conversation(ballot.interaction)].append(ballot)
    matched: list[_Claim] = []
    alone: list[_Ballot] = []
    for ballots in conversations.values():
        _match(ballots, matched, alone)
    return _Ballots(tuple(matched), tuple(alone), tuple(refused))


def _ballot(interaction_id: str, record: _Record) -> _Ballot | Skipped:
    answer = _answer(record.interactions.get(interaction_id))
    if isinstance(answer, Skipped):
        return answer
    likes = record.likes.get(interaction_id, ())
    if likes and record.is_disliked(interaction_id):
        return Skipped.CONTRADICTION
    votes = likes or record.dislikes[interaction_id]
    at = max(vote.created_at for vote in votes)
    return _Ballot(answer.interaction, answer.prompt, answer.completion, bool(likes), _voters(votes), at)


def _match(ballots: Sequence[_Ballot], matched: list[_Claim], alone: list[_Ballot]) -> None:
    """Pair each disliked answer of one conversation with one liked answer, by hash, as far as both go."""
    shuffled = sorted(ballots, key=lambda ballot: _digest("match", ballot.interaction.id))
    ups = [ballot for ballot in shuffled if ballot.is_up]
    downs = [ballot for ballot in shuffled if not ballot.is_up]
    for up, down in zip_longest(ups, downs):
        if up is not None and down is not None:
            matched.append(_thumbs_claim(up, down))
        else:
            alone.append(up or down)


def _thumbs_claim(up: _Ballot, down: _Ballot) -> _Claim:
    voters = up.principals | down.principals
    at = max(up.at, down.at)
    return _Claim(Source.THUMBS, up.interaction.id, down.interaction.id, voters, at, MARGINS[Source.THUMBS])


# Judging


@dataclass(frozen=True)
class _Answer:
    """An interaction that may be one side of a pair."""

    interaction: Interaction
    prompt: tuple[Message, ...]
    completion: Message


def _answer(interaction: Interaction | None) -> _Answer | Skipped:
    if interaction is None:
        return Skipped.MISSING_INTERACTION
    if not interaction.is_stored:
        return Skipped.NOT_STORED
    prompt, completion = interaction.prompt, interaction.completion
    is_whole = interaction.is_complete and interaction.status == Status.OK
    if not is_whole or prompt is None or completion is None:
        return Skipped.INCOMPLETE
    if not prompt or _is_empty(completion):
        return Skipped.EMPTY
    return _Answer(interaction, prompt, completion)


def _problem(claim: _Claim, record: _Record, min_margin: float) -> Skipped | None:
    """The reason why `claim` on its own makes no pair, if there is one."""
    problem = _edit_problem(claim, record) if claim.source is Source.EDIT else _comparison_problem(claim, record)
    if problem is not None:
        return problem
    if _is_contradicted(claim, record):
        return Skipped.CONTRADICTION
    return Skipped.MARGIN_TOO_SMALL if claim.margin < min_margin else None


def _edit_problem(claim: _Claim, record: _Record) -> Skipped | None:
    rejected = _answer(record.interactions.get(claim.rejected))
    if isinstance(rejected, Skipped):
        return rejected
    if not claim.chosen.strip():
        return Skipped.EMPTY
    is_same = _substance(_edited(rejected.completion, claim.chosen)) == _substance(rejected.completion)
    return Skipped.IDENTICAL if is_same else None


def _comparison_problem(claim: _Claim, record: _Record) -> Skipped | None:
    """What keeps two served answers from being compared."""
    chosen = _answer(record.interactions.get(claim.chosen))
    rejected = _answer(record.interactions.get(claim.rejected))
    if isinstance(chosen, Skipped) or isinstance(rejected, Skipped):
        return min((side for side in (chosen, rejected) if isinstance(side, Skipped)), key=list(Skipped).index)
    new, old = chosen.interaction, rejected.interaction
    if new.key_id != old.key_id and claim.source is not Source.THUMBS:
        return Skipped.FOREIGN
    if new.alias != old.alias:
        return Skipped.DIFFERENT_ALIAS
    if _conversation(new) != _conversation(old):
        return Skipped.DIFFERENT_PROMPT
    is_same = _substance(chosen.completion) == _substance(rejected.completion)
    return Skipped.IDENTICAL if is_same else None


def _is_contradicted(claim: _Claim, record: _Record) -> bool:
    """Whether another signal speaks against `claim`; opposite claims are settled later.

    A regeneration is weak evidence, so any sign against it counts: the first answer was liked, or the later one was
    disliked, replaced in its turn, or not later at all. A choice falls only when thumbs and reports order the two
    the other way, an edit when the edited answer was liked.
    """
    if claim.source is Source.EDIT:
        return record.is_liked(claim.rejected)
    if claim.source is Source.REGENERATION:
        return _is_regeneration_contradicted(claim, record)
    return record.opinion(claim.chosen) < record.opinion(claim.rejected)


def _is_regeneration_contradicted(claim: _Claim, record: _Record) -> bool:
    new, old = record.interactions[claim.chosen], record.interactions[claim.rejected]
    return (
        record.is_liked(old.id)
        or record.is_disliked(new.id)
        or new.id in record.replacements
        or record.replacements[old.id][-1] != new.id
        or new.created_at < old.created_at
    )


def _settle(claims: Iterable[_Claim]) -> tuple[list[_Claim], list[Skipped]]:
    """Keep one claim per two sides: the strongest, with the voters of those that agree.

    Two equally strong claims of opposite direction cancel each other and all weaker ones.
    """
    rivals: defaultdict[tuple[bool, frozenset[str]], list[_Claim]] = defaultdict(list)
    for claim in claims:
        rivals[claim.source is Source.EDIT, frozenset((claim.chosen, claim.rejected))].append(claim)
    settled: list[_Claim] = []
    lost: list[Skipped] = []
    for group in rivals.values():
        ranked = sorted(group, key=lambda claim: STRENGTH[claim.source])
        best = ranked[0]
        if any(each.source is best.source and each.chosen != best.chosen for each in ranked):
            lost += [Skipped.CONTRADICTION] * len(ranked)
            continue
        for other in ranked[1:]:
            agrees = other.chosen == best.chosen
            best = _join(best, other) if agrees else best
            lost.append(Skipped.DUPLICATE if agrees else Skipped.CONTRADICTION)
        settled.append(best)
    return settled, lost


# Results


def _pair(claim: _Claim, record: _Record) -> PreferencePair:
    """The pair of a claim that passed every check."""
    rejected = record.interactions[claim.rejected]
    served = rejected if claim.source is Source.EDIT else record.interactions[claim.chosen]
    assert rejected.prompt is not None
    assert rejected.completion is not None
    assert served.completion is not None
    is_edit = claim.source is Source.EDIT
    return PreferencePair(
        id=_digest(claim.source, claim.chosen, claim.rejected),
        alias=rejected.alias,
        source=claim.source.value,
        prompt=rejected.prompt,
        chosen=_edited(rejected.completion, claim.chosen) if is_edit else served.completion,
        rejected=rejected.completion,
        margin=claim.margin,
        n_voters=len(claim.principals),
        principals=tuple(sorted(claim.principals)),
        chosen_interaction=None if is_edit else served.id,
        rejected_interaction=rejected.id,
        models=tuple(sorted({served.model, rejected.model})),
        probability=served.probability,
        created_at=max(claim.at, served.created_at, rejected.created_at),
    )


def _unpaired(alone: Iterable[_Ballot], pairs: Iterable[PreferencePair]) -> tuple[tuple[UnpairedExample, ...], int]:
    """The single thumbs to train on, and how many were dropped because a pair already holds their completion."""
    ballots = list(alone)
    sides = {side for pair in pairs for side in (pair.chosen_interaction, pair.rejected_interaction)}
    examples = [_example(ballot) for ballot in ballots if ballot.interaction.id not in sides]
    return tuple(sorted(examples, key=lambda example: example.id)), len(ballots) - len(examples)


def _example(ballot: _Ballot) -> UnpairedExample:
    interaction = ballot.interaction
    return UnpairedExample(
        id=_digest("unpaired", interaction.id),
        alias=interaction.alias,
        prompt=ballot.prompt,
        completion=ballot.completion,
        label=ballot.is_up,
        interaction=interaction.id,
        model=interaction.model,
        principals=tuple(sorted(ballot.principals)),
        created_at=max(ballot.at, interaction.created_at),
    )


# Messages


_Conversation = tuple[str, str | None, str]


def _conversation(interaction: Interaction) -> _Conversation:
    """What two answers must share to be compared. The messages themselves count, not only their recorded hash."""
    return (interaction.alias, interaction.prompt_sha, _digest(*map(canonical_json, interaction.prompt or ())))


def _edited(completion: Message, text: str) -> Message:
    """The completion as the user rewrote it; the tools it called are still called."""
    kept = {"tool_calls": completion["tool_calls"]} if completion.get("tool_calls") else {}
    return {"role": "assistant", "content": text, **kept}


def _substance(message: Message) -> str:
    """What a message says and does, without the random ids of its tool calls and the space around its text."""
    content = message.get("content")
    text = content.strip() if isinstance(content, str) else content
    calls = message.get("tool_calls") or ()
    functions = [call.get("function", call) if isinstance(call, Mapping) else call for call in calls]
    return canonical_json([text or None, functions, message.get("function_call")])


_NOTHING = "[null,[],null]"


def _is_empty(message: Message) -> bool:
    return _substance(message) == _NOTHING


def canonical_json(value: object) -> str:
    r"""One text for equal values: sorted keys, ASCII. Takes every text a client can send.

    >>> canonical_json({"b": "\ud800", "a": 1})
    '{"a":1,"b":"\\ud800"}'
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=dict)


def _digest(*parts: str) -> str:
    return hashlib.blake2b(canonical_json(parts).encode(), digest_size=16).hexdigest()
