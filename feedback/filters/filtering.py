"""Which of the mined pairs are worth training on: every filter in one pass, each pair kept or counted once. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from feedback.candidates import Source
from feedback.filters.consent import is_opted_out
from feedback.filters.contradiction import contradicted
from feedback.filters.evidence import Evidence
from feedback.filters.length_bias import LengthBias, Rebalanced, measure, rebalance
from feedback.filters.reasons import Reason
from feedback.filters.refusal_policy import behaviour, refusal_problem
from feedback.filters.sensitive_pairs import OPERATORS, SensitiveTexts
from feedback.filters.toxicity import chosen_toxicity
from feedback.filters.wholeness import has_odd_length, is_identical, is_incomplete
from feedback.messages import canonical_json
from feedback.pairs import PreferencePair, UnpairedExample
from feedback.sensitive.finding import find_credential, find_person
from pawl.settings import FilterSettings

Check = Callable[[PreferencePair], Reason | None]


@dataclass(frozen=True)
class Filtered:
    """Every pair that came in is in `kept` or counted once in `dropped`."""

    kept: tuple[PreferencePair, ...]
    """By id."""
    dropped: Counter[Reason]
    length_bias: LengthBias
    """Of what is kept."""
    length_shortfall: float
    """By how much it still exceeds the limit."""
    n_unjudged: int
    """Pairs that are kept although a scorer that is switched on has not seen them."""


def filter_pairs(pairs: Iterable[PreferencePair], evidence: Evidence, settings: FilterSettings) -> Filtered:
    """Keep what is worth training on. A function of the set of pairs: their order changes nothing."""
    ordered, n_repeated = _distinct(pairs)
    checks = _checks(evidence, settings)
    reasons = {pair.id: _first(checks, pair) for pair in ordered}
    sound = [pair for pair in ordered if reasons[pair.id] is None]
    agreed, n_opposed = _without(sound, contradicted(sound) if settings.contradiction else frozenset())
    lopsided = _rebalanced(agreed, settings)
    kept, n_lopsided = _without(agreed, lopsided.dropped)
    dropped = Counter(reason for reason in reasons.values() if reason is not None)
    dropped += Counter({Reason.DUPLICATE: n_repeated, Reason.CONTRADICTION: n_opposed, Reason.LENGTH_BIAS: n_lopsided})
    n_unjudged = sum(_is_unjudged(pair, evidence, settings) for pair in kept)
    return Filtered(tuple(kept), dropped, measure(kept), lopsided.shortfall, n_unjudged)


class FilteredSingles(NamedTuple):
    """Every single thumb that came in is in `kept` or counted once in `dropped`."""

    kept: tuple[UnpairedExample, ...]
    """By id."""
    dropped: Counter[Reason]


def filter_singles(
    examples: Iterable[UnpairedExample], evidence: Evidence, settings: FilterSettings
) -> FilteredSingles:
    """Keep the single thumbs that the filters have nothing against, as far as these do not compare two sides.

    A disliked answer may be toxic: that is what is learned from it.
    """
    alone = settings.model_copy(update={"identical": False, "refusal_policy": False})
    checks = {
        True: _checks(evidence, alone),
        False: _checks(evidence, alone.model_copy(update={"toxic_chosen": False})),
    }
    ordered = sorted(examples, key=lambda example: example.id)
    reasons = {example.id: _first(checks[example.label], _with_itself(example)) for example in ordered}
    dropped = Counter(reason for reason in reasons.values() if reason is not None)
    return FilteredSingles(tuple(example for example in ordered if reasons[example.id] is None), dropped)


def _with_itself(example: UnpairedExample) -> PreferencePair:
    """A pair of one answer on both sides, for filters that look at either."""
    return PreferencePair(
        id=example.id,
        alias=example.alias,
        source=Source.THUMBS.value,
        prompt=example.prompt,
        chosen=example.completion,
        rejected=example.completion,
        margin=0.0,
        n_voters=len(example.principals),
        principals=example.principals,
        chosen_interaction=example.interaction,
        rejected_interaction=example.interaction,
        models=(example.model,),
        probability=1.0,
        created_at=example.created_at,
    )


def _distinct(pairs: Iterable[PreferencePair]) -> tuple[list[PreferencePair], int]:
    """One pair of each id, by id; of different ones with the same id the first in the order of their contents."""
    given = sorted(pairs, key=lambda pair: pair.id)
    repeated = {one.id for one, other in pairwise(given) if one.id == other.id}
    if repeated:
        given.sort(key=lambda pair: (pair.id, canonical_json(vars(pair)) if pair.id in repeated else ""))
    distinct: dict[str, PreferencePair] = {}
    for pair in given:
        distinct.setdefault(pair.id, pair)
    return list(distinct.values()), len(given) - len(distinct)


def _first(checks: Sequence[Check], pair: PreferencePair) -> Reason | None:
    return next((reason for reason in (check(pair) for check in checks) if reason is not None), None)


def _without(pairs: Sequence[PreferencePair], ids: frozenset[str]) -> tuple[list[PreferencePair], int]:
    kept = [pair for pair in pairs if pair.id not in ids]
    return kept, len(pairs) - len(kept)


def _checks(evidence: Evidence, settings: FilterSettings) -> list[Check]:
    """The filters that are switched on and look at one pair at a time, in the order of their reasons."""
    credentials, persons = SensitiveTexts(find_credential), SensitiveTexts(find_person, skipped_roles=OPERATORS)
    checks: list[tuple[bool, Check]] = [
        (settings.consent, lambda pair: Reason.OPTED_OUT if is_opted_out(pair, evidence) else None),
        (settings.incomplete, lambda pair: Reason.INCOMPLETE if is_incomplete(pair, evidence) else None),
        (settings.length, lambda pair: _length(pair, settings)),
        (settings.identical, lambda pair: Reason.IDENTICAL if is_identical(pair) else None),
        (settings.secrets, lambda pair: Reason.SECRET if credentials.are_in(pair) else None),
        (settings.personal_data, lambda pair: Reason.PERSONAL_DATA if persons.are_in(pair) else None),
        (settings.toxic_chosen, lambda pair: _toxic(pair, evidence, settings.toxicity_threshold)),
        (settings.refusal_policy, lambda pair: refusal_problem(behaviour(pair, evidence))),
    ]
    return [check for is_on, check in checks if is_on]


def _length(pair: PreferencePair, settings: FilterSettings) -> Reason | None:
    return Reason.LENGTH if has_odd_length(pair, settings.min_chars, settings.max_chars) else None


def _toxic(pair: PreferencePair, evidence: Evidence, threshold: float) -> Reason | None:
    toxicity = chosen_toxicity(pair, evidence)
    return Reason.TOXIC_CHOSEN if toxicity is not None and toxicity >= threshold else None


def _is_unjudged(pair: PreferencePair, evidence: Evidence, settings: FilterSettings) -> bool:
    if settings.toxic_chosen and chosen_toxicity(pair, evidence) is None:
        return True
    return settings.refusal_policy and None in behaviour(pair, evidence)


def _rebalanced(pairs: Sequence[PreferencePair], settings: FilterSettings) -> Rebalanced:
    if settings.max_length_bias is None:
        return Rebalanced(frozenset(), 0.0)
    return rebalance(pairs, settings.max_length_bias, settings.max_length_dropped)
