"""The defence against poisoning: which of the mined pairs may be trained on, and why the others may not.

In preference training about one pair in two hundred is enough to plant a behaviour (Pathmanathan et al. 2024,
arXiv:2406.12091), and one user with votes alone can plant a fact (Hilel et al. 2025, arXiv:2507.02850).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from feedback.pairs import PreferencePair
from feedback.poisoning.bursts import frozen_by_bursts
from feedback.poisoning.caps import floods, over_cap
from feedback.poisoning.concentrated_phrases import membership, overrepresented, repeated
from feedback.poisoning.corroboration import uncorroborated_edits
from feedback.poisoning.evidence import Evidence, gather
from feedback.poisoning.identities import Identities, identities
from feedback.poisoning.newcomers import newcomers
from feedback.poisoning.prompt_clusters import LexicalClusterer
from feedback.poisoning.reasons import QUARANTINED, Reason
from pawl.settings import DefenceSettings


@dataclass(frozen=True)
class SideTables:
    """What the pairs themselves do not say."""

    now: float
    first_seen: Mapping[str, float] = field(default_factory=dict)
    """When each principal was served first; who is not in it came with its earliest pair."""
    decisions: Mapping[str, bool] = field(default_factory=dict)
    """Of the pairs that reviewers have decided on, by id: whether they let them in."""


class QuarantinedPair(NamedTuple):
    """A pair that waits for a reviewer, or for time to pass."""

    pair: PreferencePair
    reason: Reason


@dataclass(frozen=True)
class Defended:
    """Every pair that came in is in one of the first two or counted once in the third."""

    accepted: tuple[PreferencePair, ...]
    """By id."""
    quarantined: tuple[QuarantinedPair, ...]
    """By id."""
    refused: Counter[Reason]


def defend(pairs: Iterable[PreferencePair], tables: SideTables, settings: DefenceSettings) -> Defended:
    """Sort pairs with different ids into accepted, quarantined and refused.

    A pure function of the set of pairs: their order changes nothing.
    """
    ordered = sorted(pairs, key=lambda pair: pair.id)
    if not settings.enabled:
        return Defended(tuple(ordered), (), Counter())
    judged = judge_all(gather(ordered, LexicalClusterer(settings.prompt_similarity)), tables, settings)
    by_id = {pair.id: pair for pair in ordered}
    return Defended(
        tuple(by_id[each] for each in judged.accepted),
        tuple(QuarantinedPair(by_id[each], reason) for each, reason in judged.quarantined.items()),
        judged.refused,
    )


class Judged(NamedTuple):
    """As `Defended`, with ids in place of pairs."""

    accepted: tuple[str, ...]
    quarantined: Mapping[str, Reason]
    refused: Counter[Reason]


def judge_all(evidence: Evidence, tables: SideTables, settings: DefenceSettings) -> Judged:
    """Sort what was gathered of pairs; the ids keep their order."""
    reasons = judge(evidence, tables, settings) if settings.enabled else {}
    found = [(pair.id, reasons.get(pair.id)) for pair in evidence.pairs]
    return Judged(
        tuple(pair_id for pair_id, reason in found if reason is None),
        {pair_id: reason for pair_id, reason in found if reason in QUARANTINED},
        Counter(reason for _, reason in found if reason is not None and reason not in QUARANTINED),
    )


def judge(
    evidence: Evidence, tables: SideTables, settings: DefenceSettings, *, chance: float = 1 / 2
) -> dict[str, Reason]:
    """Why each pair is kept out, by id; those that are not in it may be trained on.

    For pairs that stream by: `gather` them first, and keep of them what this says.

    Args:
        chance: how probable it is that a phrase in one side only is in the chosen one, where nobody pushes anything.
    """
    new = newcomers(evidence.pairs, tables.first_seen, now=tables.now, wait_s=settings.newcomer_wait_s)
    # Whoever can make up users must not become the majority by them at once.
    who = identities((each for pair in evidence.pairs for each in pair.principals if each not in new), settings)
    new = frozenset(principal for principal in new if not who.is_trusted(principal))
    suspicions = _suspicions(evidence, who, new, settings, chance)
    reasons: dict[int, Reason] = {}
    given: list[int] = []
    candidates: list[int] = []
    for index, pair in enumerate(evidence.pairs):
        is_let_in = tables.decisions.get(pair.id)
        reason = next((each for each, marks in suspicions if marks[index]), None)
        if is_let_in is False:
            reasons[index] = Reason.REVIEWER
        elif is_let_in or _is_trusted(pair.principals, who, reason):
            given.append(index)
        elif reason is not None:
            reasons[index] = reason
        else:
            candidates.append(index)
    reasons |= over_cap(evidence, candidates, given, who, settings.caps)
    return {evidence.pairs[index].id: reason for index, reason in reasons.items()}


def _is_trusted(principals: Sequence[str], who: Identities, reason: Reason | None) -> bool:
    """Whether those behind a pair answer for it themselves; even they may not put the answer into the prompt.

    A pair with nobody behind it is nobody's word.
    """
    return reason is not Reason.ECHO and bool(principals) and all(who.is_trusted(principal) for principal in principals)


_Marks = Sequence[bool] | NDArray[np.bool_]


def _suspicions(
    evidence: Evidence, who: Identities, new: Collection[str], settings: DefenceSettings, chance: float
) -> list[tuple[Reason, _Marks]]:
    """Of each pair, which of these reasons speak against it, in their order."""
    principals = membership([pair.principals for pair in evidence.pairs])
    parties = membership([sorted(set(map(who.party, pair.principals))) for pair in evidence.pairs])
    return [
        (Reason.ECHO, evidence.echoes >= settings.max_echo),
        (Reason.NEWCOMER, [any(each in new for each in pair.principals) for pair in evidence.pairs]),
        (Reason.UNCORROBORATED_EDIT, uncorroborated_edits(evidence, who, new, n_parties=settings.edit_parties)),
        (Reason.OVERREPRESENTED, overrepresented(evidence, parties, settings.phrases, chance=chance)),
        (Reason.REPEATED_PHRASE, repeated(evidence, principals, settings.phrases)),
        (Reason.BURST, frozen_by_bursts(evidence, settings.bursts)),
        (Reason.FLOOD, floods(evidence, who, settings.caps)),
    ]
