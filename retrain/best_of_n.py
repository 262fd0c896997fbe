"""Several answers to each prompt, ranked by a score: the best one to use, the best and the worst as a preference.

Best-of-n sampling as in Stiennon et al. 2020, "Learning to summarize from human feedback", section 4.3. The pairs are
the model's own answers, so preference training on them stays on the policy.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, NamedTuple

from feedback.chat_messages import for_templates
from feedback.messages import canonical_json
from retrain.answer_scores import ScoreAnswers, checked_scores
from retrain.errors import EvaluationFailed
from retrain.generations import Probe, Sampling, generate
from retrain.prompts import Prompt

AnswerPrompts = Callable[[Sequence[Prompt], int], Sequence[Sequence[str]]]
"""Given prompts and a number, so many answers to each, in their order."""

SOURCE = "best_of_n"


class ScoredAnswer(NamedTuple):
    """An answer and what it scored."""

    text: str
    score: float


@dataclass(frozen=True)
class Ranked:
    """Answers to one prompt, the best first; equal texts are there once."""

    prompt: Prompt
    answers: tuple[ScoredAnswer, ...]

    @property
    def best(self) -> ScoredAnswer:
        return self.answers[0]

    @property
    def worst(self) -> ScoredAnswer:
        return self.answers[-1]

    @property
    def mean(self) -> float:
        """Of the different answers."""
        return fmean(one.score for one in self.answers)


def best_of_n(answer: AnswerPrompts, prompts: Sequence[Prompt], n: int, score: ScoreAnswers) -> list[Ranked]:
    """Draw `n` answers to each prompt and rank them; of equal scores the text decides, so that the order is fixed.

    Raises:
        EvaluationFailed: a prompt did not get its answers.
        BadData: the score does not keep its promise.
    """
    drawn = answer(prompts, n)
    if len(drawn) != len(prompts) or any(len(texts) != n for texts in drawn):
        raise EvaluationFailed(f"not every one of {len(prompts)} prompts got {n} answers")
    asked = [(prompt, text) for prompt, texts in zip(prompts, drawn, strict=True) for text in sorted(set(texts))]
    conversations = [[*prompt, _answer(text)] for prompt, text in asked]
    scored = iter(
        [ScoredAnswer(text, one) for (_, text), one in zip(asked, checked_scores(score, conversations), strict=True)]
    )
    return [
        Ranked(prompt, tuple(sorted((next(scored) for _ in set(texts)), key=_rank)))
        for prompt, texts in zip(prompts, drawn, strict=True)
    ]


def answers_of_engine(url: str, model: str, *, temperature: float, max_tokens: int, seed: int) -> AnswerPrompts:
    """Answers from a served model."""

    def answer(prompts: Sequence[Prompt], n: int) -> list[list[str]]:
        probes = [Probe(str(number), prompt) for number, prompt in enumerate(prompts)]
        drawn = generate(url, [model], probes, Sampling(temperature, max_tokens, n, seed))
        return [[one.text for one in drawn[start : start + n]] for start in range(0, len(drawn), n)]

    return answer


def as_row(one: Ranked) -> dict[str, Any]:
    """As JSON: the prompt, and the answers with their scores, the best first."""
    answers = [answer._asdict() for answer in one.answers]
    return {"prompt": [for_templates(message) for message in one.prompt], "answers": answers}


def preferences(ranked: Iterable[Ranked], *, min_margin: float) -> list[dict[str, Any]]:
    """Best against worst of each prompt in TRL's format, where their scores are at least `min_margin` apart."""
    return [
        _preference(one) for one in ranked if len(one.answers) > 1 and one.best.score - one.worst.score >= min_margin
    ]


def _preference(one: Ranked) -> dict[str, Any]:
    prompt = [for_templates(message) for message in one.prompt]
    sides = {"chosen": [_answer(one.best.text)], "rejected": [_answer(one.worst.text)]}
    pair_id = hashlib.sha256(canonical_json([prompt, sides]).encode("utf-8", "surrogatepass")).hexdigest()[:32]
    return {"prompt": prompt, **sides, "pair_id": pair_id, "source": SOURCE, "margin": one.best.score - one.worst.score}


def _answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def _rank(one: ScoredAnswer) -> tuple[float, str]:
    return -one.score, one.text
