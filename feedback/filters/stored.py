"""The filters on an alias's stored pairs, with what the database knows of the answers behind them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa

from feedback.batches import look_up
from feedback.candidates import principal_of
from feedback.filters.evidence import Evidence, ServedAnswer
from feedback.filters.filtering import Filtered, FilteredSingles, filter_pairs, filter_singles
from feedback.filters.message_texts import said
from feedback.interactions import Status
from feedback.pairs import PreferencePair, UnpairedExample
from pawl.database import Database
from pawl.errors import ConfigurationError
from pawl.schema import interactions, scores
from pawl.settings import FilterSettings


@dataclass(frozen=True)
class Judges:
    """Detectors for what the worker has not scored, such as texts that users wrote. Without one, nobody is judged."""

    classify: Callable[[str], str] | None = None
    is_harmful: Callable[[str], bool] | None = None
    score_toxicity: Callable[[Sequence[str]], list[float]] | None = None


def filter_stored(
    database: Database, pairs: Sequence[PreferencePair], settings: FilterSettings, judges: Judges
) -> Filtered:
    """Keep which of these stored pairs are worth training on.

    Raises:
        ConfigurationError: the list of those who opted out cannot be read.
    """
    return filter_pairs(pairs, evidence_on(database, pairs, settings, judges, opted_out(settings)), settings)


def evidence_on(
    database: Database, pairs: Sequence[PreferencePair], settings: FilterSettings, judges: Judges, out: frozenset[str]
) -> Evidence:
    """What the database and the judges know of some pairs.

    Args:
        out: those who opted out, see `opted_out`.
    """
    return Evidence(
        served=served_answers(database, pairs),
        edit_toxicity=_edit_toxicity(pairs, judges) if settings.toxic_chosen else {},
        opted_out=out,
        classify=judges.classify,
        is_harmful=judges.is_harmful,
    )


def filter_stored_singles(
    database: Database, examples: Sequence[UnpairedExample], settings: FilterSettings
) -> FilteredSingles:
    """Keep which of these single thumbs are worth training on; what nobody has scored is not judged.

    Raises:
        ConfigurationError: the list of those who opted out cannot be read.
    """
    served = _answers(database, {example.interaction for example in examples})
    return filter_singles(examples, Evidence(served=served, opted_out=opted_out(settings)), settings)


def served_answers(database: Database, pairs: Iterable[PreferencePair]) -> dict[str, ServedAnswer]:
    """What is known of the interactions behind pairs, by id."""
    sides = {side for pair in pairs for side in (pair.chosen_interaction, pair.rejected_interaction) if side}
    return _answers(database, sides)


def _answers(database: Database, ids: set[str]) -> dict[str, ServedAnswer]:
    with database.read() as connection:
        return dict(_read(connection, sorted(ids)))


def _read(connection: sa.Connection, ids: Sequence[str]) -> Iterator[tuple[str, ServedAnswer]]:
    i, s = interactions.c, scores.c
    query = sa.select(
        i.id, i.key_id, i.user_id, i.is_complete, i.status, i.is_stored, s.toxicity, s.response, s.is_harmful_prompt
    ).outerjoin(scores, s.interaction_id == i.id)
    for rows in look_up(connection, query, i.id, ids):
        for row in map(tuple, rows):
            name, key_id, user_id, is_complete, status, *rest = row
            yield name, ServedAnswer(principal_of(key_id, user_id), is_complete and status == Status.OK, *rest)


def _edit_toxicity(pairs: Iterable[PreferencePair], judges: Judges) -> dict[str, float]:
    edits = {pair.id: said(pair.chosen) for pair in pairs if pair.chosen_interaction is None}
    if not edits or judges.score_toxicity is None:
        return {}
    return dict(zip(edits, judges.score_toxicity(list(edits.values())), strict=True))


def opted_out(settings: FilterSettings) -> frozenset[str]:
    """Everybody who is named in the settings or in the file they name.

    Raises:
        ConfigurationError: the file cannot be read: nobody is trained on by mistake.
    """
    return frozenset(settings.opted_out) | (_names(settings.opted_out_file) if settings.opted_out_file else frozenset())


def _names(path: Path) -> frozenset[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigurationError(f"cannot read feedback.filters.opted_out_file {path}: {exc}") from exc
    return frozenset(line.strip() for line in lines if line.strip())
