"""The worker's scoring duty: reads completions nobody has scored, scores them off the hot path, stores and counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from feedback.interactions import Interaction, Message
from feedback.store import Score, save_scores, unscored
from monitoring.harm import HarmLexicon
from monitoring.metrics import BENIGN_REQUESTS, HARMFUL_REQUESTS, REFUSALS, SCORED, TOXIC, RefusalKind
from monitoring.refusal import DETECTOR_VERSION, Response, classify_response
from pawl.clock import Clock
from pawl.database import Database

ScoreToxicity = Callable[[Sequence[str]], list[float]]


class ScoringDuty:
    """Scores in batches. It needs a toxicity scorer: an interaction is scored whole or not at all.

    Several workers may read the same batch; each score is kept, and counted, by the one that stores it first.
    """

    def __init__(
        self,
        database: Database,
        score_toxicity: ScoreToxicity,
        lexicon: HarmLexicon,
        *,
        threshold: float,
        batch_size: int,
        scorer_name: str,
        clock: Clock,
    ) -> None:
        self._database = database
        self._score_toxicity = score_toxicity
        self._lexicon = lexicon
        self._threshold = threshold
        self._batch_size = batch_size
        self._scorer = f"{scorer_name}+refusal-{DETECTOR_VERSION}"
        self._clock = clock

    def run_once(self) -> int:
        """Score one batch; return how many completions it was."""
        batch = unscored(self._database, self._batch_size)
        if not batch:
            return 0
        scores = self.scores_of(batch)
        added = save_scores(self._database, scores)
        for interaction, score in zip(batch, scores, strict=True):
            if score.interaction_id in added:
                count(interaction, score)
        return len(batch)

    def scores_of(self, batch: Sequence[Interaction]) -> list[Score]:
        """What the scorer finds in some answers; nothing is stored or counted."""
        answers = [text_of(interaction.completion) for interaction in batch]
        toxicities = self._score_toxicity(answers)
        return [self._score(*item) for item in zip(batch, answers, toxicities, strict=True)]

    def _score(self, interaction: Interaction, answer: str, toxicity: float) -> Score:
        return Score(
            interaction_id=interaction.id,
            toxicity=toxicity,
            is_toxic=toxicity >= self._threshold or was_withheld(interaction),
            response=classify_response(answer).value,
            is_harmful_prompt=self._lexicon.is_harmful(last_question(interaction)),
            scorer=self._scorer,
            scored_at=self._clock(),
        )


def was_withheld(interaction: Interaction) -> bool:
    """Whether a guard kept back what an engine said: what is stored is not what the variant would have told.

    A request that a guard refused has cost no tokens: nothing was said.
    """
    return interaction.finish_reason == "content_filter" and interaction.completion_tokens != 0


def last_question(interaction: Interaction) -> str:
    """What the user asked last."""
    asked = [message for message in interaction.prompt or () if message.get("role") == "user"]
    return text_of(asked[-1]) if asked else ""


def text_of(message: Message | None) -> str:
    """A message's text; parts are joined by newlines.

    >>> text_of({"content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]})
    'one\\ntwo'
    """
    content = (message or {}).get("content")
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    return "\n".join(str(part.get("text", "")) for part in parts if isinstance(part, dict))


def count(interaction: Interaction, score: Score) -> None:
    """Show a score in the metrics, under the variant that served."""
    labels = {"model": interaction.alias, "variant": interaction.served_variant}
    SCORED.labels(**labels).inc()
    TOXIC.labels(**labels).inc(int(bool(score.is_toxic)))
    is_refusal = int(score.response == Response.REFUSE)
    kind = RefusalKind.HARMFUL if score.is_harmful_prompt else RefusalKind.BENIGN
    REFUSALS.labels(kind=kind, **labels).inc(is_refusal)
    (HARMFUL_REQUESTS if score.is_harmful_prompt else BENIGN_REQUESTS).labels(**labels).inc()
