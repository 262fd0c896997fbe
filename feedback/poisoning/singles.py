"""The defence for single thumbs, which make no pair: liked answers are what is taught, disliked ones stand against it.

A set of its own: the caps are about the single thumbs alone. Nobody reviews them: what pairs would wait in quarantine
for is left out here, and comes in by itself when the reason no longer holds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from feedback.interactions import Message
from feedback.pairs import PreferencePair, UnpairedExample, as_pair
from feedback.poisoning.concentrated_phrases import MOST
from feedback.poisoning.defence import SideTables, judge
from feedback.poisoning.evidence import Evidence, gather
from feedback.poisoning.prompt_clusters import LexicalClusterer
from feedback.poisoning.reasons import Reason
from pawl.settings import DefenceSettings

NOTHING: Message = {"role": "assistant", "content": ""}
"""On the side that a single thumb does not have."""
MOST_LIKED = 0.99
"""Where everything is liked, liking proves nothing; this much keeps the test defined."""


class DefendedSingles(NamedTuple):
    """Every single thumb that came in is accepted or left out for one reason."""

    accepted: tuple[UnpairedExample, ...]
    """By id."""
    left_out: Mapping[str, Reason]
    """By id."""

    @property
    def counts(self) -> Counter[Reason]:
        """How many were left out, by reason."""
        return Counter(self.left_out.values())


def defend_singles(
    examples: Iterable[UnpairedExample], tables: SideTables, settings: DefenceSettings
) -> DefendedSingles:
    """Sort single thumbs with different ids into accepted and left out.

    A pure function of the set: their order changes nothing.
    """
    ordered = sorted(examples, key=lambda example: example.id)
    if not settings.enabled:
        return DefendedSingles(tuple(ordered), {})
    evidence = gather(map(_one_sided, ordered), LexicalClusterer(settings.prompt_similarity))
    telling = _without_words_of_a_few(evidence, settings.phrases.few_parties - 1)
    reasons = judge(telling, tables, settings, chance=_chance_liked(ordered))
    return DefendedSingles(tuple(example for example in ordered if example.id not in reasons), reasons)


def _one_sided(example: UnpairedExample) -> PreferencePair:
    answer = example.completion
    chosen, rejected = (answer, NOTHING) if example.label else (NOTHING, answer)
    return as_pair(example, chosen=chosen, rejected=rejected)


def _without_words_of_a_few(evidence: Evidence, few: int) -> Evidence:
    """The same without what is taught if so few principals gave most of all thumbs.

    A single thumb teaches the whole answer, common words included: these are in the hands of a few like all others.
    """
    given = Counter(principal for known in evidence.pairs for principal in known.principals)
    n_by_few = sum(n for _, n in given.most_common(few))
    return evidence._replace(taught=()) if n_by_few >= MOST * len(evidence.pairs) else evidence


def _chance_liked(examples: Sequence[UnpairedExample]) -> float:
    """How probable it is that a phrase is in a liked answer if that has nothing to do with it; at least a half."""
    n_liked = sum(example.label for example in examples)
    return min(MOST_LIKED, max(1 / 2, n_liked / max(1, len(examples))))
