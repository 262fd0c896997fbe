"""Every query on interactions, feedback, scores and pairs in the shared database."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import sqlalchemy as sa

from feedback.interactions import FeedbackEvent, Interaction, Status
from feedback.pairs import PreferencePair
from feedback.text_lock import hold_off_mining
from pawl.database import Database
from pawl.schema import dead_letters, feedback_events, interactions, judge_verdicts, pairs, scores, shadow_answers

TEXT_COLUMNS = frozenset({"prompt", "completion", "chosen", "rejected", "value", "reason", "comment"})
JSON_COLUMNS = TEXT_COLUMNS | {"parameters", "tags", "principals", "models", "tools"}
TUPLES = frozenset({"prompt", "principals", "models", "tools"})
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
    # Not `asdict`, which copies every message deeply, only for them to be written as JSON in the next step.
    row: dict[str, Any] = dict(vars(record))
    for name in JSON_COLUMNS & row.keys():
        # JSON of None stays SQL NULL, except a feedback value, which is always text.
        if row[name] is not None or name == "value":
            row[name] = json.dumps(row[name])
    return row


def _from_row(row: Mapping[Any, Any]) -> dict[str, Any]:
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


def _interaction(row: Mapping[Any, Any]) -> Interaction:
    values = _from_row(row)
    return Interaction(**(values | {"status": Status(values["status"])}))


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
    row = database.first_row(sa.select(interactions).where(interactions.c.id == interaction_id))
    return _interaction(row) if row else None


class StoredQuery(NamedTuple):
    """Which of a caller's stored completions are asked for."""

    route: str
    key_id: str
    user: str
    """Empty for all users of the key."""
    model: str | None
    """The name that was asked for, or the version that answered."""
    metadata: Mapping[str, str]
    after: str | None
    """The id, without its prefix, of the last one that the caller has."""
    limit: int
    is_newest_first: bool


def list_stored(database: Database, wanted: StoredQuery) -> tuple[list[Interaction], bool]:
    """A page of stored completions in order of time, and whether there are more after it."""
    found: list[Interaction] = []
    after = wanted.after
    with database.read() as connection:
        while True:
            rows = connection.execute(_stored_page(wanted, after)).mappings().all()
            found += [one for one in map(_interaction, rows) if has_metadata(one, wanted.metadata)]
            if len(found) > wanted.limit or len(rows) < READ_ROWS:
                return found[: wanted.limit], len(found) > wanted.limit
            after = rows[-1]["id"]


def _stored_page(wanted: StoredQuery, after: str | None) -> sa.Select[Any]:
    """The next rows that may match. Ids begin with their time, so their order is that of time."""
    i = interactions.c
    query = sa.select(interactions).where(
        i.key_id == wanted.key_id, i.route == wanted.route, i.is_stored, i.completion.is_not(None)
    )
    if wanted.user:
        query = query.where(i.user_id == wanted.user)
    if wanted.model is not None:
        query = query.where(sa.or_(i.alias == wanted.model, i.model == wanted.model))
    for name, value in wanted.metadata.items():  # Rules most rows out; `has_metadata` decides.
        query = query.where(i.parameters.contains(json.dumps({name: value})[1:-1], autoescape=True))
    if after is not None:
        query = query.where(i.id < after if wanted.is_newest_first else i.id > after)
    # Without metadata every row of a page counts, so no more than the page and one are read.
    n_rows = READ_ROWS if wanted.metadata else min(READ_ROWS, wanted.limit + 1)
    return query.order_by(i.id.desc() if wanted.is_newest_first else i.id).limit(n_rows)


def has_metadata(interaction: Interaction, wanted: Mapping[str, str]) -> bool:
    """Whether the request carried all of these."""
    metadata = metadata_of(interaction)
    return all(metadata.get(name) == value for name, value in wanted.items())


def metadata_of(interaction: Interaction) -> Mapping[str, str]:
    """What the client attached to the completion."""
    metadata = interaction.parameters.get("metadata")
    return metadata if isinstance(metadata, dict) else {}


def replace_metadata(database: Database, interaction_id: str, metadata: Mapping[str, str]) -> Interaction | None:
    """Attach other metadata to a stored completion; None when there is no such completion."""
    this = interactions.c.id == interaction_id
    query = sa.select(interactions).where(this, interactions.c.is_stored).with_for_update()
    with database.write() as connection:
        row = connection.execute(query).mappings().first()
        if row is None:
            return None
        parameters = {**json.loads(row["parameters"] or "{}"), "metadata": dict(metadata)}
        connection.execute(interactions.update().where(this).values(parameters=json.dumps(parameters)))
    return _interaction({**row, "parameters": json.dumps(parameters)})


NO_TEXT: Mapping[str, Any] = {
    "prompt": None,
    "prompt_sha": None,
    "completion": None,
    "parameters": "{}",
    "tools": None,
    "is_stored": False,
    "is_complete": False,
}
"""An interaction of which the numbers stay."""
NO_PAIR_TEXT: Mapping[str, Any] = {"prompt": "[]", "chosen": "{}", "rejected": "{}", "tools": None}
"""A pair of which the lineage stays: what it was made from, and the run that learned from it."""
TEXT_FEEDBACK = ("edit", "comment")
PATIENCE_S = 2
"""A client waits, and one of the gateway's few connections with it: better that it asks again."""


def delete_texts(database: Database, interaction_id: str, otherwise: Mapping[str, Any]) -> bool:
    """Remove the texts of a completion, of feedback on it and of pairs from it; False if they were gone before.

    A pair that a promoted run trained on stays without its texts, so that what a model learned from can be traced.

    Args:
        otherwise: The row that is left while the completion itself is still on its way here. Rows are inserted only
            where their id is new, so what comes late finds this one and is dropped.
    """
    with database.write() as connection:
        hold_off_mining(connection, PATIENCE_S)
        deleted = _clear(connection, interaction_id)
        if not deleted and not database.insert_new(connection, interactions, [{**otherwise, **NO_TEXT}]):
            deleted = _clear(connection, interaction_id)  # It arrived in this moment, or was deleted before.
            if not deleted:
                return False
        p, f = pairs.c, feedback_events.c
        sides = sa.or_(p.chosen_interaction == interaction_id, p.rejected_interaction == interaction_id)
        connection.execute(pairs.delete().where(sides, p.first_run.is_(None)))
        connection.execute(pairs.update().where(sides).values(**NO_PAIR_TEXT))
        on_it = f.interaction_id == interaction_id
        connection.execute(feedback_events.delete().where(on_it, f.type.in_(TEXT_FEEDBACK)))
        connection.execute(feedback_events.update().where(on_it).values(reason=None, comment=None, tags=None))
        connection.execute(dead_letters.delete().where(dead_letters.c.id == f"interact-{interaction_id}"))
        v = judge_verdicts.c
        connection.execute(judge_verdicts.delete().where(sa.or_(v.first == interaction_id, v.second == interaction_id)))
        connection.execute(shadow_answers.delete().where(shadow_answers.c.interaction_id == interaction_id))
    return True


def _clear(connection: sa.Connection, interaction_id: str) -> bool:
    i = interactions.c
    found = connection.execute(interactions.update().where(i.id == interaction_id, i.is_stored).values(**NO_TEXT))
    return found.rowcount > 0


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


def pair_row(pair: PreferencePair, mined_at: float) -> dict[str, Any]:
    """As the table keeps it when no run has trained on it yet."""
    return {**_to_row(pair), "mined_at": mined_at, "first_run": None}


def load_pairs(database: Database, alias: str, *, used: bool | None = None) -> list[PreferencePair]:
    """An alias's pairs with texts, by id; `used` picks those that a promoted run has (not) trained on before."""
    has_texts = pairs.c.chosen != NO_PAIR_TEXT["chosen"]
    query = sa.select(pairs).where(pairs.c.alias == alias, has_texts).order_by(pairs.c.id)
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
    row = database.first_row(sa.select(pairs).where(pairs.c.id == pair_id))
    return (_pair(row), row["first_run"]) if row else None


def _pair(row: sa.RowMapping) -> PreferencePair:
    values = _from_row(row)
    return PreferencePair(**{name: value for name, value in values.items() if name not in ("mined_at", "first_run")})


def unscored(database: Database, limit: int) -> list[Interaction]:
    """Finished completions with text that no scorer has seen, oldest first."""
    query = (
        sa.select(interactions)
        .outerjoin(scores, scores.c.interaction_id == interactions.c.id)
        .where(scores.c.interaction_id.is_(None), scorable())
        .order_by(interactions.c.created_at, interactions.c.id)
        .limit(limit)
    )
    with database.read() as connection:
        return [_interaction(row) for row in connection.execute(query).mappings()]


def scorable() -> sa.ColumnElement[bool]:
    """There is a text that the worker scores, sooner or later."""
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
    is_regenerated: bool
    """Another answer was asked for in its place."""
    is_edited: bool
    """Its user wrote down what it should have been."""
    latency_ms: float
    first_byte_ms: float | None
    completion_tokens: int | None


def experiment_rows(database: Database, experiment: str) -> list[Exposure]:
    """The analysed interactions of an experiment in time order."""
    return exposures_where(database, interactions.c.experiment == experiment, interactions.c.is_analysed)


def exposures_between(database: Database, alias: str, since: float, until: float) -> list[Exposure]:
    """An alias's interactions in a span of time (seconds since the epoch, the end left out), in order."""
    i = interactions.c
    return exposures_where(database, i.alias == alias, i.created_at >= since, i.created_at < until)


def exposures_where(database: Database, *conditions: sa.ColumnElement[bool]) -> list[Exposure]:
    """Interactions in time order, each with its scores and its last thumb."""
    i, s = interactions.c, scores.c
    query = (
        sa.select(
            i.unit_id, i.created_at, i.model, i.assigned_variant, i.served_variant, i.probability, i.phase, i.status,
            scorable(), s.interaction_id.is_not(None), s.is_toxic, s.response, s.is_harmful_prompt,
            i.latency_ms, i.first_byte_ms, i.completion_tokens, _was_replaced(),
            _last_of("thumbs"), _last_of("edit", kept=sa.literal("edit")), _last_of("regenerate"),
        )
        .outerjoin(scores, s.interaction_id == i.id)
        .where(*conditions)
        .order_by(i.created_at, i.id)
    )  # fmt: skip
    with database.read() as connection:
        return [_exposure(*row) for row in connection.execute(query)]


def _exposure(*row: Any) -> Exposure:
    *known, latency_ms, first_byte_ms, n_tokens, is_replaced, thumb, edit, regenerate = row
    is_regenerated = bool(is_replaced) or regenerate is not None
    said = (thumb == '"down"', thumb == '"up"', is_regenerated, edit is not None)
    return Exposure._make((*known, *said, latency_ms, first_byte_ms, n_tokens))


def _was_replaced() -> sa.ColumnElement[bool]:
    newer = interactions.alias("newer")
    found = sa.select(newer.c.id).where(newer.c.regenerate_of == interactions.c.id).correlate(interactions)
    # Where hardly anything was regenerated, SQLite takes the index for useless, and reads the table for each.
    return found.with_hint(newer, "INDEXED BY ix_interactions_regenerate_of", "sqlite").exists()


def _last_of(kind: str, kept: sa.ColumnElement[Any] | None = None) -> sa.ScalarSelect[Any]:
    """What the last event of a kind says of an interaction, None if it was taken back.

    Looked up by index for each, whatever the planner knows of the tables.

    Args:
        kept: Instead of the event's value, which may be long.
    """
    f = feedback_events.c
    value = sa.case((f.is_retraction, None), else_=f.value if kept is None else kept)
    events = sa.select(value).where(f.interaction_id == interactions.c.id, f.type == kind)
    return events.order_by(f.created_at.desc(), f.id.desc()).limit(1).scalar_subquery()
