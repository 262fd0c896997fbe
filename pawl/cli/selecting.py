"""Which of the mined pairs are trained on: the filters, with the detectors of this deployment, and the defence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from pawl.clock import now
from pawl.cores import usable_cores
from pawl.database import Database
from pawl.settings import Settings

if TYPE_CHECKING:
    from feedback.filters.filtering import Sifted
    from feedback.pairs import UnpairedExample
    from feedback.part_work import Workplace
    from feedback.poisoning.defence import Judged
    from feedback.selection import Selected

ScoreToxicity = Callable[[Sequence[str]], list[float]]


def shown(filtered: Sifted) -> dict[str, object]:
    """For people and for programs: how many were kept, and how many not by reason."""
    bias = filtered.length_bias
    return {
        "kept": len(filtered.kept),
        "dropped": {reason.value: n for reason, n in sorted(filtered.dropped.items())},
        "unjudged": filtered.n_unjudged,
        "length_bias": {"mean": bias.mean, "ci": [bias.ci_lower, bias.ci_upper], "share_longer": bias.share_longer},
        "length_shortfall": filtered.length_shortfall,
    }


def select_stored(
    database: Database, settings: Settings, alias: str, score_toxicity: ScoreToxicity | None = None
) -> Selected:
    """Filter an alias's stored pairs and defend what is left against poisoning. Changes nothing that is stored.

    Args:
        score_toxicity: for texts that users wrote; those of models were scored when they were served.
    """
    return _select(database, settings, alias, score_toxicity, now(), None)


def select_mined(
    database: Database,
    settings: Settings,
    alias: str,
    score_toxicity: ScoreToxicity | None = None,
    *,
    place: Workplace | None = None,
) -> Selected:
    """As `select_stored`, and bring the reviewers' queue up to date.

    Args:
        place: processes that are there already; others are started unless it is some.
    """
    from feedback.poisoning.reviews import save_quarantine

    at = now()
    selected = _select(database, settings, alias, score_toxicity, at, place)
    held = {pair_id: reason.value for pair_id, reason in selected.defended.quarantined.items()}
    save_quarantine(database, alias, held, at)
    return selected


def select_thumbs(
    database: Database, settings: Settings, alias: str, *, place: Workplace | None = None
) -> tuple[Sequence[UnpairedExample], Mapping[str, int]]:
    """The single thumbs that may be trained on, and how many may not, by reason."""
    from feedback.filters.stored import filter_stored_singles
    from feedback.mining import unpaired_examples
    from feedback.poisoning.reviews import defend_stored_singles
    from feedback.similarity.configured import similarity_of

    near = similarity_of(settings.feedback.similarity)
    singles = unpaired_examples(database, alias, place=place, similarity=near)
    filtered = filter_stored_singles(database, singles, settings.feedback.filters)
    defended = defend_stored_singles(database, filtered.kept, settings.feedback.defence, now())
    left_out = {reason.value: n for reason, n in [*filtered.dropped.items(), *defended.counts.items()]}
    return defended.accepted, left_out


def _select(
    database: Database,
    settings: Settings,
    alias: str,
    score_toxicity: ScoreToxicity | None,
    at: float,
    place: Workplace | None,
) -> Selected:
    from feedback.filters.stored import Judges
    from feedback.part_workers import Processes
    from feedback.selection import Rules, select_pairs
    from monitoring.refusal import classify_response
    from pawl.cli.lexicon import load_lexicon

    lexicon = load_lexicon(settings.worker.scoring.harmful_patterns)
    judges = Judges(classify_response, lexicon.is_harmful, score_toxicity)
    rules = Rules(settings.feedback.filters, settings.feedback.defence, judges)
    if score_toxicity:  # It stays where its model is.
        return select_pairs(database, alias, rules, at)
    if not isinstance(place, Processes):  # A cluster is for histories: of pairs there are few.
        place = Processes(settings.database, settings.feedback.mining.processes or usable_cores())
    return select_pairs(database, alias, rules, at, place)


def defence_shown(defended: Judged) -> dict[str, object]:
    """For people and for programs: how many pairs the defence lets in, and how many not by reason."""
    held = Counter(defended.quarantined.values())
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
