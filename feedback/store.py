"""Every query on interactions, feedback, scores and pairs in the shared database."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import sqlalchemy as sa

from feedback.interactions import FeedbackEvent, Interaction, Status
from feedback.pairs import PreferencePair
from pawl.database import Database
from pawl.schema import dead_letters, feedback_events, interactions, pairs, scores

TEXT_COLUMNS = frozenset({"prompt", "completion", "chosen", "rejected", "value", "reason", "comment"})
JSON_COLUMNS = TEXT_COLUMNS | {"parameters", "tags", "principals", "models"}
TUPLES = frozenset({"prompt", "principals", "models"})
READ_ROWS = 1000


class Score(NamedTuple):
    """What the worker found in one completion."""

    interaction_id: str
    toxicity: float | None
    is_toxic: bool | None
    response: str
    is_harmful_prompt: bool
    scorer: str
    scored_at: float


def _to_row(record: Any) -> dict[str, Any]:
    row: dict[str, Any] = asdict(record)
    for name in JSON_COLUMNS & row.keys():
        # JSON of None stays SQL NULL, except a feedback value, which is always text.
        if row[name] is not None or name == "value":
            row[name] = json.dumps(row[name])
    return row


def _from_row(row: sa.RowMapping) -> dict[str, Any]:
    values: dict[str, Any] = {str(name): value for name, value in row.items()}
    for name in JSON_COLUMNS & values.keys():
        if values[name] is not None:
            decoded = json.loads(values[name])
            values[name] = tuple(decoded) if name in TUPLES else decoded
    return values


def interaction_row(interaction: Interaction) -> dict[str, Any]:
    """As the table keeps it."""
    return {**_to_row(interaction), "status": interaction.status.value}


def event_row(event: FeedbackEvent) -> dict[str, Any]:
    """As the table keeps it."""
    return _to_row(event)


def _interaction(row: sa.RowMapping) -> Interaction:
    values = _from_row(row)
    return Interaction(**(values | {"status": Status(values["status"])}))


def _event(row: sa.RowMapping) -> FeedbackEvent:
    return FeedbackEvent(**_from_row(row))


def save_records(
    database: Database,
    new_interactions: Sequence[Mapping[str, Any]],
    new_events: Sequence[Mapping[str, Any]],
    new_dead_letters: Sequence[Mapping[str, Any]],
) -> None:
    """Add rows in one transaction; those whose id is there already are left as they are."""
    with database.write() as connection:
        for table, rows in (
            (interactions, new_interactions),
            (feedback_events, new_events),
            (dead_letters, new_dead_letters),
        ):
            if rows:
                database.insert_new(connection, table, rows)


def get_interaction(database: Database, interaction_id: str) -> Interaction | None:
    """One interaction, or None."""
    with database.read() as connection:
        row = connection.execute(sa.select(interactions).where(interactions.c.id == interaction_id)).mappings().first()
    return _interaction(row) if row else None


def answers_by_prompt(database: Database, alias: str, model: str, since: float, until: float) -> dict[str, str]:
    """One model's answers in a span of time by the question asked; of several answers to a question, the first."""
    i = interactions.c
    query = (
        sa.select(interactions)
        .where(
            i.alias == alias, i.model == model, i.created_at >= since, i.created_at < until, i.completion.is_not(None)
        )
        .order_by(i.created_at.desc(), i.id)
    )
    with database.read() as connection:
        found = [_interaction(row) for row in connection.execute(query).mappings()]
    return {
        str(a.prompt[-1].get("content")): str(a.completion.get("content")) for a in found if a.prompt and a.completion
    }


class Standing(NamedTuple):
    """What is known of a completion and of earlier feedback on it when feedback comes in."""

    alias: str | None
    """The model the client asked for; None while the interaction is not visible."""
    variant: str | None
    last_event: FeedbackEvent | None


def feedback_standing(database: Database, interaction_id: str, feedback_id: str) -> Standing:
    """What the shared database knows."""
    i, f = interactions.c, feedback_events.c
    newest_event = sa.select(feedback_events).where(f.feedback_id == feedback_id)
    newest_event = newest_event.order_by(f.created_at.desc(), f.id.desc()).limit(1)
    with database.read() as connection:
        rated = connection.execute(sa.select(i.alias, i.assigned_variant).where(i.id == interaction_id)).first()
        event = connection.execute(newest_event).mappings().first()
    alias, variant = rated if rated else (None, None)
    return Standing(alias, variant, _event(event) if event else None)


def rows_to_mine(database: Database, alias: str) -> tuple[list[Interaction], list[FeedbackEvent]]:
    """The interactions of an alias that feedback or a regeneration touches, and all feedback on them."""
    rated = sa.select(feedback_events.c.interaction_id)
    replaced = sa.select(interactions.c.regenerate_of).where(interactions.c.regenerate_of.is_not(None))
    touched = sa.or_(
        interactions.c.id.in_(rated), interactions.c.regenerate_of.is_not(None), interactions.c.id.in_(replaced)
    )
    with database.read() as connection:
        found = connection.execute(
            sa.select(interactions).where(interactions.c.alias == alias, touched).order_by(interactions.c.id)
        ).mappings()
        mined = [_interaction(row) for row in found]
        events = connection.execute(
            sa.select(feedback_events)
            .join(interactions, interactions.c.id == feedback_events.c.interaction_id)
            .where(interactions.c.alias == alias)
            .order_by(feedback_events.c.created_at, feedback_events.c.id)
        ).mappings()
        return mined, [_event(row) for row in events]


class PairChanges(NamedTuple):
    """What mining changed in the store."""

    added: int
    withdrawn: int


def sync_pairs(database: Database, alias: str, found: Iterable[PreferencePair], mined_at: float) -> PairChanges:
    """Make an alias's pairs those that its feedback gives now.

    Feedback can be replaced or retracted, so a pair that is no longer given goes, unless a promoted run trained on it:
    such a pair stays for lineage, and the same two answers are not added again.
    """
    rows = {pair.id: {**_to_row(pair), "mined_at": mined_at, "first_run": None} for pair in found}
    with database.write() as connection:
        p = pairs.c
        stored = connection.execute(
            sa.select(p.id, p.chosen_interaction, p.rejected_interaction, p.first_run).where(p.alias == alias)
        ).all()
        used = {(row.chosen_interaction, row.rejected_interaction) for row in stored if row.first_run is not None}
        known = {row.id for row in stored}
        gone = [row.id for row in stored if row.first_run is None and row.id not in rows]
        for start in range(0, len(gone), READ_ROWS):
            connection.execute(pairs.delete().where(p.id.in_(gone[start : start + READ_ROWS])))
        new = [row for row in rows.values() if row["id"] not in known and _sides(row) not in used]
        return PairChanges(database.insert_new(connection, pairs, new) if new else 0, len(gone))


def _sides(row: Mapping[str, Any]) -> tuple[str | None, str]:
    return row["chosen_interaction"], row["rejected_interaction"]


def load_pairs(database: Database, alias: str, *, used: bool | None = None) -> list[PreferencePair]:
    """An alias's pairs in order of id; `used` picks those that a promoted run has (not) trained on before."""
    query = sa.select(pairs).where(pairs.c.alias == alias).order_by(pairs.c.id)
    if used is not None:
        query = query.where(pairs.c.first_run.is_not(None) if used else pairs.c.first_run.is_(None))
    with database.read() as connection:
        return [_pair(row) for row in connection.execute(query).mappings()]


def mark_pairs_used(database: Database, pair_ids: Sequence[str], run_id: str) -> None:
    """Remember the first promoted run that trained on these pairs."""
    with database.write() as connection:
        for start in range(0, len(pair_ids), READ_ROWS):
            batch = pair_ids[start : start + READ_ROWS]
            connection.execute(
                pairs.update().where(pairs.c.id.in_(batch), pairs.c.first_run.is_(None)).values(first_run=run_id)
            )


class PairListing(NamedTuple):
    """One line of `pawl pairs list`."""

    id: str
    source: str
    margin: float
    n_voters: int
    created_at: float
    first_run: str | None


def list_pairs(database: Database, alias: str | None, limit: int) -> list[PairListing]:
    """The newest pairs first."""
    columns = [pairs.c[name] for name in PairListing._fields]
    query = sa.select(*columns).order_by(pairs.c.created_at.desc(), pairs.c.id).limit(limit)
    if alias:
        query = query.where(pairs.c.alias == alias)
    with database.read() as connection:
        return [PairListing(*row) for row in connection.execute(query)]


def count_pairs(database: Database) -> Counter[str]:
    """How many pairs there are by source."""
    with database.read() as connection:
        rows = connection.execute(sa.select(pairs.c.source, sa.func.count()).group_by(pairs.c.source)).all()
    return Counter({str(source): int(n) for source, n in rows})


def get_pair(database: Database, pair_id: str) -> tuple[PreferencePair, str | None] | None:
    """One pair and the first promoted run that used it."""
    with database.read() as connection:
        row = connection.execute(sa.select(pairs).where(pairs.c.id == pair_id)).mappings().first()
    return (_pair(row), row["first_run"]) if row else None


def _pair(row: sa.RowMapping) -> PreferencePair:
    values = _from_row(row)
    return PreferencePair(**{name: value for name, value in values.items() if name not in ("mined_at", "first_run")})


def unscored(database: Database, limit: int) -> list[Interaction]:
    """Finished completions with text that no scorer has seen, oldest first."""
    query = (
        sa.select(interactions)
        .outerjoin(scores, scores.c.interaction_id == interactions.c.id)
        .where(scores.c.interaction_id.is_(None), _scorable())
        .order_by(interactions.c.created_at, interactions.c.id)
        .limit(limit)
    )
    with database.read() as connection:
        return [_interaction(row) for row in connection.execute(query).mappings()]


def _scorable() -> sa.ColumnElement[bool]:
    return sa.and_(interactions.c.completion.is_not(None), interactions.c.is_stored)


def save_scores(database: Database, found: Sequence[Score]) -> set[str]:
    """Add scores; return whose were added. An interaction is scored once, and whoever comes second adds nothing."""
    with database.write() as connection:
        # One by one: only then does the database tell which of them were new.
        return {one.interaction_id for one in found if database.insert_new(connection, scores, [one._asdict()])}


class Exposure(NamedTuple):
    """One interaction with what users and scorers say of it."""

    unit_id: str
    created_at: float
    model: str
    assigned_variant: str
    served_variant: str
    probability: float
    phase: int
    status: str
    is_scorable: bool
    """There is a text that the worker scores, sooner or later."""
    is_scored: bool
    is_toxic: bool | None
    response: str | None
    is_harmful_prompt: bool | None
    is_thumbed_down: bool
    is_thumbed_up: bool


def experiment_units(database: Database, experiment: str) -> Iterator[tuple[str, bool]]:
    """Each unit's first exposure in an experiment: `(unit_id, was it in an analysed zone)`."""
    query = (
        sa.select(interactions.c.unit_id, interactions.c.is_analysed)
        .where(interactions.c.experiment == experiment)
        .order_by(interactions.c.created_at, interactions.c.id)
    )
    seen: set[str] = set()
    with database.read() as connection:
        for unit_id, is_analysed in connection.execute(query):
            if unit_id not in seen:
                seen.add(unit_id)
                yield unit_id, bool(is_analysed)


def experiment_rows(database: Database, experiment: str) -> list[Exposure]:
    """The analysed interactions of an experiment in time order."""
    return _exposures(database, interactions.c.experiment == experiment, interactions.c.is_analysed)


def exposures_between(database: Database, alias: str, since: float, until: float) -> list[Exposure]:
    """An alias's interactions in a span of time (seconds since the epoch, the end left out), in order."""
    i = interactions.c
    return _exposures(database, i.alias == alias, i.created_at >= since, i.created_at < until)


def _exposures(database: Database, *conditions: sa.ColumnElement[bool]) -> list[Exposure]:
    """Interactions in time order, each with its scores and its last thumb."""
    i, s = interactions.c, scores.c
    query = (
        sa.select(
            i.unit_id, i.created_at, i.model, i.assigned_variant, i.served_variant, i.probability, i.phase, i.status,
            _scorable(), s.interaction_id.is_not(None), s.is_toxic, s.response, s.is_harmful_prompt,
            _last_thumb(),
        )
        .outerjoin(scores, s.interaction_id == i.id)
        .where(*conditions)
        .order_by(i.created_at, i.id)
    )  # fmt: skip
    with database.read() as connection:
        rows = connection.execute(query).all()
    return [Exposure._make((*known, thumb == '"down"', thumb == '"up"')) for *known, thumb in rows]


def _last_thumb() -> sa.ScalarSelect[str | None]:
    """An interaction's thumb as it stands; looked up by index for each, whatever the planner knows of the tables."""
    f = feedback_events.c
    value = sa.case((f.is_retraction, None), else_=f.value)
    events = sa.select(value).where(f.interaction_id == interactions.c.id, f.type == "thumbs")
    return events.order_by(f.created_at.desc(), f.id.desc()).limit(1).scalar_subquery()
