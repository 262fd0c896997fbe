"""Preference pairs and single thumbs with their texts, and mining as one pure function.

What a candidate is and which of them become pairs: `feedback/candidates.py` and `feedback/judging.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from feedback.candidates import (
    MARGINS,
    Answer,
    Ballot,
    Claim,
    Served,
    Skipped,
    Source,
    Verdict,
    answer_of,
    opinion_of,
    said,
    served,
)
from feedback.interactions import FeedbackEvent, Interaction, Message
from feedback.judging import decide
from feedback.messages import digest, edited
from feedback.signals import latest
from feedback.similarity.embedding import Similarity
from feedback.similarity.matching import add_similar
from feedback.similarity.questions import Question, question_of


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
    tools: tuple[Mapping[str, Any], ...] | None = None
    """The functions that were offered when the prompt was answered, see `feedback.tools`."""


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
    tools: tuple[Mapping[str, Any], ...] | None = None


def as_pair(example: UnpairedExample, *, chosen: Message, rejected: Message) -> PreferencePair:
    """A single thumb in the form of a pair, for what looks at pairs; the caller says what stands on each side."""
    return PreferencePair(
        id=example.id,
        alias=example.alias,
        source=Source.THUMBS.value,
        prompt=example.prompt,
        chosen=chosen,
        rejected=rejected,
        margin=0.0,
        n_voters=len(example.principals),
        principals=example.principals,
        chosen_interaction=example.interaction,
        rejected_interaction=example.interaction,
        models=(example.model,),
        probability=1.0,
        created_at=example.created_at,
        tools=example.tools,
    )


@dataclass(frozen=True)
class MinedPairs:
    """What a mining pass found: `len(pairs) + skipped.total()` is the number of candidates."""

    pairs: tuple[PreferencePair, ...]
    """By id."""
    skipped: Counter[Skipped]
    unpaired: tuple[UnpairedExample, ...]
    """By id; as many as `skipped[Skipped.UNPAIRED]`."""


class Texts(NamedTuple):
    """What an interaction said."""

    prompt: tuple[Message, ...]
    completion: Message
    tools: tuple[Mapping[str, Any], ...] | None = None


def mine_pairs(
    interactions: Iterable[Interaction],
    events: Iterable[FeedbackEvent],
    verdicts: Iterable[Verdict] = (),
    *,
    min_margin: float = 0.0,
    min_judged_margin: float = 0.0,
    similarity: Similarity | None = None,
) -> MinedPairs:
    """Turn interactions and feedback into preference pairs.

    A pure function of these sets: neither order nor repetition changes the result.

    Args:
        interactions: what was served. Feedback on anything else is counted as `missing_interaction`.
        events: the whole history, retractions included.
        verdicts: a judge's, of each two answers one at most.
        min_margin: pairs with a smaller margin are left out.
        min_judged_margin: the same for those that a judge made.
        similarity: what counts as nearly the same question; without it thumbs on such questions stay alone.
    """
    given = {interaction.id: interaction for interaction in interactions}
    by_id = {one: served(interaction) for one, interaction in given.items()}
    answers = {interaction_id: answer_of(one) for interaction_id, one in by_id.items()}
    live = latest(events).values()
    margins = {"min_margin": min_margin, "min_judged_margin": min_judged_margin}
    decided = decide(answers.values(), map(opinion_of, map(said, live)), set(verdicts), **margins)
    if similarity is not None and min_margin <= MARGINS[Source.SIMILAR_THUMBS]:
        decided = add_similar(decided, partial(_settings, by_id), partial(_questions, by_id), similarity)
    edits = {event.id: str(event.value) for event in live}
    texts = {
        one.id: Texts(one.prompt, one.completion, one.tools)
        for one in given.values()
        if one.prompt is not None and one.completion is not None
    }
    pairs = [pair_of(claim.pair_id, claim, answers, texts, edits) for claim in decided.settled]
    unpaired = [example_of(ballot, texts[ballot.answer.id]) for ballot in decided.alone]
    return MinedPairs(
        tuple(sorted(pairs, key=lambda pair: pair.id)),
        decided.skipped,
        tuple(sorted(unpaired, key=lambda example: example.id)),
    )


def _questions(by_id: Mapping[str, Served], ids: Iterable[str]) -> dict[str, Question]:
    """What was asked in some interactions, as far as it can be compared."""
    asked = {name: question_of(one.alias, one.prompt_sha, one.prompt or ()) for name in ids for one in (by_id[name],)}
    return {name: question for name, question in asked.items() if question is not None}


def _settings(by_id: Mapping[str, Served], ids: Iterable[str]) -> dict[str, bytes]:
    """With what these questions may be compared."""
    return {name: question.setting for name, question in _questions(by_id, ids).items()}


def pair_of(
    pair_id: str, claim: Claim, answers: Mapping[str, Answer], texts: Mapping[str, Texts], edits: Mapping[str, str]
) -> PreferencePair:
    """The pair of a claim that was settled.

    Args:
        edits: the texts that users wanted, by event id.
    """
    rejected = answers[claim.rejected]
    preferred = answers[claim.served] if claim.served else rejected
    completion = texts[rejected.id].completion
    return PreferencePair(
        id=pair_id,
        alias=rejected.alias,
        source=claim.source.value,
        prompt=texts[preferred.id].prompt,
        chosen=edited(completion, edits[claim.edit.event_id]) if claim.edit else texts[preferred.id].completion,
        rejected=completion,
        margin=claim.margin,
        n_voters=len(claim.principals),
        principals=tuple(sorted(claim.principals)),
        chosen_interaction=claim.served,
        rejected_interaction=rejected.id,
        models=tuple(sorted({preferred.model, rejected.model})),
        probability=preferred.probability,
        created_at=claim.at,
        tools=texts[preferred.id].tools,
    )


def example_of(ballot: Ballot, texts: Texts) -> UnpairedExample:
    """The example that a thumb without a partner makes."""
    answer = ballot.answer
    return UnpairedExample(
        id=digest("unpaired", answer.id),
        alias=answer.alias,
        prompt=texts.prompt,
        completion=texts.completion,
        label=ballot.is_up,
        interaction=answer.id,
        model=answer.model,
        principals=tuple(sorted(ballot.principals)),
        created_at=max(ballot.at, answer.created_at),
        tools=texts.tools,
    )
