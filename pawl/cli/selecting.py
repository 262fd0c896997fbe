"""Which of the mined pairs are trained on: the filters, with the detectors of this deployment, and the defence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from pawl.clock import now
from pawl.database import Database
from pawl.settings import Settings

if TYPE_CHECKING:
    from feedback.filters.filtering import Filtered
    from feedback.pairs import PreferencePair
    from feedback.poisoning.defence import Defended

ScoreToxicity = Callable[[Sequence[str]], list[float]]


def filter_mined(
    database: Database,
    settings: Settings,
    pairs: Sequence[PreferencePair],
    score_toxicity: ScoreToxicity | None = None,
) -> Filtered:
    """Keep which of these stored pairs are worth training on.

    Args:
        score_toxicity: for texts that users wrote; those of models were scored when they were served.
    """
    from feedback.filters.stored import Judges, filter_stored
    from monitoring.refusal import classify_response
    from pawl.cli.worker import load_lexicon

    lexicon = load_lexicon(settings.worker.scoring.harmful_patterns)
    judges = Judges(classify_response, lexicon.is_harmful, score_toxicity)
    return filter_stored(database, pairs, settings.feedback.filters, judges)


def shown(filtered: Filtered) -> dict[str, object]:
    """For people and for programs: how many were kept, and how many not by reason."""
    bias = filtered.length_bias
    return {
        "kept": len(filtered.kept),
        "dropped": {reason.value: n for reason, n in sorted(filtered.dropped.items())},
        "unjudged": filtered.n_unjudged,
        "length_bias": {"mean": bias.mean, "ci": [bias.ci_lower, bias.ci_upper], "share_longer": bias.share_longer},
        "length_shortfall": filtered.length_shortfall,
    }


class Selected(NamedTuple):
    """What a round may train on, and what became of the rest."""

    new: list[PreferencePair]
    """No promoted run has trained on these yet."""
    earlier: list[PreferencePair]
    filtered: Filtered
    """Of the new ones."""
    defended: Defended
    """Of all that the filters keep: caps and tests are about the whole set."""

    @property
    def left_out(self) -> Counter[str]:
        """How many pairs are not trained on, by reason."""
        dropped = Counter({reason.value: n for reason, n in self.filtered.dropped.items()})
        held = Counter(held.reason.value for held in self.defended.quarantined)
        return dropped + held + Counter({reason.value: n for reason, n in self.defended.refused.items()})


def select_stored(
    database: Database, settings: Settings, alias: str, score_toxicity: ScoreToxicity | None = None
) -> Selected:
    """Filter an alias's stored pairs and defend what is left against poisoning. Changes nothing that is stored."""
    return _select(database, settings, alias, score_toxicity, now())


def select_mined(
    database: Database, settings: Settings, alias: str, score_toxicity: ScoreToxicity | None = None
) -> Selected:
    """As `select_stored`, and bring the reviewers' queue up to date."""
    from feedback.poisoning.reviews import save_quarantine

    at = now()
    selected = _select(database, settings, alias, score_toxicity, at)
    held = {held.pair.id: held.reason.value for held in selected.defended.quarantined}
    save_quarantine(database, alias, held, at)
    return selected


def _select(
    database: Database, settings: Settings, alias: str, score_toxicity: ScoreToxicity | None, at: float
) -> Selected:
    from feedback.poisoning.reviews import defend_stored
    from feedback.store import load_pairs

    new = filter_mined(database, settings, load_pairs(database, alias, used=False), score_toxicity)
    earlier = filter_mined(database, settings, load_pairs(database, alias, used=True), score_toxicity)
    defended = defend_stored(database, alias, [*new.kept, *earlier.kept], settings.feedback.defence, at)
    accepted = {pair.id for pair in defended.accepted}
    return Selected(
        [pair for pair in new.kept if pair.id in accepted],
        [pair for pair in earlier.kept if pair.id in accepted],
        new,
        defended,
    )


def defence_shown(defended: Defended) -> dict[str, object]:
    """For people and for programs: how many pairs the defence lets in, and how many not by reason."""
    held = Counter(held.reason for held in defended.quarantined)
    return {
        "accepted": len(defended.accepted),
        "quarantined": {reason.value: n for reason, n in sorted(held.items())},
        "refused": {reason.value: n for reason, n in sorted(defended.refused.items())},
    }


def counts_shown(left_out: Mapping[str, int]) -> str:
    """Reasons with how often each, the most frequent first.

    >>> counts_shown({"flood": 2, "secret": 7, "echo": 2})
    '7 secret, 2 echo, 2 flood'
    """
    ordered = sorted(left_out.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{n} {reason}" for reason, n in ordered)
