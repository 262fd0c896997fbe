"""Preferences that would teach to refuse the benign, or to obey the harmful.

Training on pairs of refusals and answers moves a model's refusals as a whole: preferring one refusal over another took
a model from refusing 74 % of harmful prompts to 33 % (Razin et al. 2024, arXiv:2410.08847).
"""

from __future__ import annotations

from typing import Final, NamedTuple

from feedback.filters.evidence import Evidence
from feedback.filters.message_texts import question, said
from feedback.filters.reasons import Reason
from feedback.interactions import Message
from feedback.pairs import PreferencePair

REFUSE: Final = "refuse"
ANSWERS: Final = frozenset({"comply", "partial"})
"""Who declines in words and does the task all the same has answered."""


class Behaviour(NamedTuple):
    """What the two sides did with what they were asked; None where nobody can say."""

    chosen: str | None
    rejected: str | None
    is_harmful_prompt: bool | None


def refusal_reason(pair: PreferencePair, evidence: Evidence) -> Reason | None:
    """What the pair would teach that nobody should learn, by the scores where there are any, else by the detectors."""
    chosen = _response(pair.chosen_interaction, pair.chosen, evidence)
    rejected = _response(pair.rejected_interaction, pair.rejected, evidence)
    if (chosen == REFUSE and rejected in ANSWERS) or (chosen in ANSWERS and rejected == REFUSE):
        return refusal_problem(Behaviour(chosen, rejected, _is_harmful(pair, evidence)))
    return None  # Whatever the prompt asks for: it need not be looked at.


def can_be_judged(pair: PreferencePair, evidence: Evidence) -> bool:
    """Whether somebody can say what both sides did, and whether they were asked for harm."""
    sides = (evidence.of(pair.chosen_interaction), evidence.of(pair.rejected_interaction))
    are_known = evidence.classify is not None or all(side and side.response is not None for side in sides)
    is_scored = any(side.is_harmful_prompt is not None for side in evidence.sides(pair))
    return are_known and (is_scored or evidence.is_harmful is not None)


def refusal_problem(seen: Behaviour) -> Reason | None:
    """What the pair would teach that nobody should learn.

    >>> refusal_problem(Behaviour("refuse", "comply", False)), refusal_problem(Behaviour("refuse", "comply", True))
    (<Reason.REFUSES_BENIGN: 'refuses_benign'>, None)
    """
    if seen.is_harmful_prompt is False and seen.chosen == REFUSE and seen.rejected in ANSWERS:
        return Reason.REFUSES_BENIGN
    if seen.is_harmful_prompt and seen.chosen in ANSWERS and seen.rejected == REFUSE:
        return Reason.OBEYS_HARMFUL
    return None


def _response(interaction_id: str | None, side: Message, evidence: Evidence) -> str | None:
    served = evidence.of(interaction_id)
    if served is not None and served.response is not None:
        return served.response
    if evidence.classify is None:
        return None
    # A call of a tool is an answer, whatever else is said.
    return "comply" if side.get("tool_calls") else evidence.classify(said(side))


def _is_harmful(pair: PreferencePair, evidence: Evidence) -> bool | None:
    """Both sides answer the same prompt, so one score of it is enough; any that calls it harmful counts."""
    scored = {side.is_harmful_prompt for side in evidence.sides(pair)} - {None}
    if scored:
        return True in scored
    return None if evidence.is_harmful is None else evidence.is_harmful(question(pair.prompt))
