"""Answers that were preferred although they are toxic."""

from __future__ import annotations

from feedback.filters.evidence import Evidence
from feedback.pairs import PreferencePair


def chosen_toxicity(pair: PreferencePair, evidence: Evidence) -> float | None:
    """How toxic the chosen side is, 0 to 1; None if nobody has scored it."""
    if pair.chosen_interaction is None:
        return evidence.edit_toxicity.get(pair.id)
    served = evidence.of(pair.chosen_interaction)
    return None if served is None else served.toxicity
