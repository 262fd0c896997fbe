"""Which of the mined pairs are worth training on: every filter in one pass, each pair kept or counted once. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from feedback.filters.consent import is_opted_out
from feedback.filters.contradiction import Dispute, contradicted, dispute_of, disputed
from feedback.filters.evidence import Evidence
from feedback.filters.length_bias import LengthBias, Rebalanced, log_ratio, measure, rebalance
from feedback.filters.reasons import Reason
from feedback.filters.refusal_policy import can_be_judged, refusal_reason
from feedback.filters.sensitive_pairs import OPERATORS, SensitiveTexts
from feedback.filters.toxicity import chosen_toxicity
from feedback.filters.wholeness import has_odd_length, is_identical, is_incomplete
from feedback.messages import canonical_json
from feedback.pairs import PreferencePair, UnpairedExample, as_pair
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
    ratios = {pair.id: log_ratio(pair) for pair in agreed}
    lopsided = _rebalanced(ratios, settings)
    kept, n_lopsided = _without(agreed, lopsided.dropped)
    dropped = Counter(reason for reason in reasons.values() if reason is not None)
    dropped += Counter({Reason.DUPLICATE: n_repeated, Reason.CONTRADICTION: n_opposed, Reason.LENGTH_BIAS: n_lopsided})
    n_unjudged = sum(_is_unjudged(pair, evidence, settings) for pair in kept)
    bias = measure(ratios[pair.id] for pair in kept)
    return Filtered(tuple(kept), dropped, bias, lopsided.shortfall, n_unjudged)


class Sound(NamedTuple):
    """What the filters that look at all pairs together need of one."""

    id: str
    log_ratio: float
    dispute: Dispute
    is_unjudged: bool


class Examined(NamedTuple):
    """What the filters that look at one pair at a time make of some pairs: numbers, no texts."""

    sound: tuple[Sound, ...]
    dropped: Counter[Reason]


@dataclass(frozen=True)
class Sifted:
    """As `Filtered`, of pairs that were examined in lots: their ids."""

    kept: tuple[str, ...]
    """In ascending order."""
    dropped: Counter[Reason]
    length_bias: LengthBias
    length_shortfall: float
    n_unjudged: int


def examine(pairs: Iterable[PreferencePair], evidence: Evidence, settings: FilterSettings) -> Examined:
    """Look at some of the pairs, wherever they are.

    Args:
        pairs: with ids that no other pair has.
    """
    checks = _checks(evidence, settings)
    found = [(pair, _first(checks, pair)) for pair in pairs]
    sound = (_sound(pair, evidence, settings) for pair, reason in found if reason is None)
    return Examined(tuple(sound), Counter(reason for _, reason in found if reason is not None))


def _sound(pair: PreferencePair, evidence: Evidence, settings: FilterSettings) -> Sound:
    return Sound(pair.id, log_ratio(pair), dispute_of(pair), _is_unjudged(pair, evidence, settings))


def disputed_pairs(examined: Iterable[Examined], settings: FilterSettings) -> list[str]:
    """Ids of sound pairs that may contradict each other; their prompts say whether they do."""
    sound = ((one.id, one.dispute) for each in examined for one in each.sound)
    return disputed(sound) if settings.contradiction else []


def sift(examined: Sequence[Examined], opposed: Collection[str], settings: FilterSettings) -> Sifted:
    """What `filter_pairs` says of all pairs together.

    Args:
        opposed: which of the disputed pairs do contradict each other.
    """
    sound = sorted(one for each in examined for one in each.sound)
    agreed = [one for one in sound if one.id not in opposed]
    lopsided = _rebalanced({one.id: one.log_ratio for one in agreed}, settings)
    kept = [one for one in agreed if one.id not in lopsided.dropped]
    dropped = sum((each.dropped for each in examined), Counter[Reason]())
    dropped += Counter({Reason.CONTRADICTION: len(sound) - len(agreed), Reason.LENGTH_BIAS: len(agreed) - len(kept)})
    bias, n_unjudged = measure(one.log_ratio for one in kept), sum(one.is_unjudged for one in kept)
    return Sifted(tuple(one.id for one in kept), dropped, bias, lopsided.shortfall, n_unjudged)


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
    return as_pair(example, chosen=example.completion, rejected=example.completion)


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
        (settings.refusal_policy, lambda pair: refusal_reason(pair, evidence)),
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
    return settings.refusal_policy and not can_be_judged(pair, evidence)


def _rebalanced(ratios: Mapping[str, float], settings: FilterSettings) -> Rebalanced:
    if settings.max_length_bias is None:
        return Rebalanced(frozenset(), 0.0)
    return rebalance(ratios, settings.max_length_bias, settings.max_length_dropped)
