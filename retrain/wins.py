"""Whose answers are better: the candidate's or its parent's, by a judge that reads both or by a reward model."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

from feedback.errors import JudgeRefuses
from feedback.interactions import Message
from feedback.judged.constitution import Constitution
from feedback.judged.judge import Judge
from feedback.judged.question import Comparison, question, response_format
from feedback.judged.reply import Scores, read_scores
from feedback.judged.rulings import Outcome, Ruling, rule
from retrain.answer_scores import TIE, ScoreAnswers
from retrain.errors import EvaluationFailed
from retrain.measurements import Wins

MARK_BYTES = 12
MAX_UNREADABLE = 0.1
"""Of the comparisons: when more of a judge's replies cannot be read, the others are no fair sample."""


class Duel(NamedTuple):
    """Two answers to one prompt."""

    unit: str
    prompt: tuple[Message, ...]
    parent: str
    candidate: str
    length_difference: float
    """Of the candidate's answer, in tokens."""


Umpire = Callable[[Sequence[Duel]], Sequence[float]]
"""For each duel: 1 where the candidate's answer is better, 0 where the parent's is, 0.5 where it cannot be told."""


@dataclass(frozen=True)
class LlmUmpire:
    """A judge behind an API. It sees no names, and both orders; a winner must win in both."""

    judge: Judge
    constitution: Constitution
    response_format: str
    concurrency: int

    def __call__(self, duels: Sequence[Duel]) -> list[float]:
        """
        Raises:
            EvaluationFailed: too many of its replies could not be read.
            PawlError: it does not answer.
        """
        with ThreadPoolExecutor(self.concurrency, thread_name_prefix="gate-judge") as pool:
            rulings = list(pool.map(self._rule, duels))
        n_unreadable = sum(ruling.outcome == Outcome.UNREADABLE for ruling in rulings)
        if n_unreadable > MAX_UNREADABLE * len(rulings):
            raise EvaluationFailed(f"{n_unreadable} of {len(rulings)} replies of the judge could not be read")
        return [_score(ruling) for ruling in rulings]

    def _rule(self, duel: Duel) -> Ruling:
        sides = ({"role": "assistant", "content": text} for text in (duel.candidate, duel.parent))
        comparison = Comparison(duel.prompt, *sides)
        return rule(self._ask(comparison), self._ask(comparison.reversed()), self.constitution)

    def _ask(self, comparison: Comparison) -> Scores | None:
        messages = question(comparison, self.constitution, lambda: secrets.token_hex(MARK_BYTES))
        try:
            reply = self.judge.ask(messages, response_format(self.response_format, self.constitution))
        except JudgeRefuses:
            return None
        return read_scores(reply, self.constitution)


def reward_umpire(score: ScoreAnswers) -> Umpire:
    """Lets the higher score win."""

    def judge(duels: Sequence[Duel]) -> list[float]:
        texts = [text for duel in duels for text in (duel.candidate, duel.parent)]
        prompts = [duel.prompt for duel in duels for _ in range(2)]
        answered = [
            (*prompt, {"role": "assistant", "content": text}) for prompt, text in zip(prompts, texts, strict=True)
        ]
        scores = score(answered)
        leads = (own - its for own, its in zip(scores[::2], scores[1::2], strict=True))
        return [0.5 if abs(lead) <= TIE else float(lead > 0) for lead in leads]

    return judge


def hold(duels: Sequence[Duel], umpire: Umpire) -> Wins | None:
    """Have all duels judged; None when there are none.

    Raises:
        EvaluationFailed: a duel got no score.
    """
    if not duels:
        return None
    scores = umpire(duels)
    if len(scores) != len(duels):
        raise EvaluationFailed(f"the judge gave {len(scores)} scores for {len(duels)} comparisons")
    lengths = tuple(duel.length_difference for duel in duels)
    return Wins(tuple(duel.unit for duel in duels), tuple(map(float, scores)), lengths)


def _score(ruling: Ruling) -> float:
    return float(ruling.lead > 0) if ruling.outcome == Outcome.PREFERRED else 0.5
