"""An experiment as a table: what became of every interaction of its users, in columns.

Read through server-side cursors: of a row never more than a few numbers is kept, about 150 bytes, and of each user
the name while the rows are read. Texts are not read at all.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray

from ab_testing.experiment import CONTROL, HOLDOUT
from ab_testing.outcomes import COMPLIES, REFUSES
from feedback.batches import Batch, stream
from feedback.erasure_store import was_erased
from feedback.history import ID
from feedback.interactions import Status
from feedback.partitions import Ids
from feedback.signals import Signal, Thumbs, thumb_of
from feedback.stored_json import read_json
from pawl.database import Database
from pawl.schema import feedback_events, interactions, scores

DAY_S: Final = 86400.0
EVERYBODY_ELSE: Final = "everybody else"
TENURES: Final = ("first day", "first week", "later")
COUNTED: Final = frozenset({Status.OK.value, Status.UPSTREAM_ERROR.value, Status.CLIENT_DISCONNECTED.value})
"""A request that the engine refused, or that a restart cut short, says nothing of the variant."""

Table = dict[str, NDArray[Any]]


class _Names:
    """Names as numbers, in the order in which they came."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def number(self, name: str) -> int:
        return self._numbers.setdefault(name, len(self._numbers))

    def known(self, name: str) -> int | None:
        return self._numbers.get(name)

    def array(self) -> NDArray[np.str_]:
        return np.array(list(self._numbers), np.str_)

    @property
    def n(self) -> int:
        return len(self._numbers)


class _Rows(NamedTuple):
    """Interactions by column, in time order."""

    id: Ids
    user: NDArray[np.int64]
    variant: NDArray[np.int64]
    phase: NDArray[np.int64]
    probability: NDArray[np.float64]
    is_analysed: NDArray[np.bool_]
    created_at: NDArray[np.float64]
    facts: NDArray[np.float64]
    """Shape (rows, `_FACTS`)."""


_FACTS: Final = (
    "counted", "answered", "failed", "fallback", "scored", "toxic", "harmful_asked", "harmful_complied",
    "harmful_refused", "benign_asked", "benign_refused", "tokens", "latency_s", "log_latency", "ttft_s",
)  # fmt: skip
_SAID: Final = ("thumbs_up", "thumbs_down", "regenerated", "edited")
_PAST: Final = (
    "before_answers", "before_tokens", "before_latency_s", "before_ttft_s", "before_thumbs_up", "before_thumbs_down",
)  # fmt: skip
PAST_DAYS: Final = 28.0
"""Before an experiment in which what its users did is looked at: weekly habits average out over whole weeks."""


def read_experiment(database: Database, experiment: str, *, now: float, return_days: float = 7.0) -> Table:
    """The columns of `ab_testing.built_in_metrics.EXPERIMENT_COLUMNS`; of an experiment without users, empty ones.

    Only users who were in an analysed zone when they were first seen count, by the variant that they were assigned
    then: others moved, and were not randomised when they did.

    Args:
        now: Seconds since the epoch.
        return_days: within how many days of the first exposure somebody comes back or does not.
    """
    users, names = _Names(), _Names()
    rows = _read_rows(database, interactions.c.experiment == experiment, users, names)
    first = _first_rows(rows.user)
    is_kept = rows.is_analysed & rows.is_analysed[first][rows.user]
    said = _said(database, interactions.c.experiment == experiment, rows.id)
    table: Table = {
        "user_id": rows.user,
        "variant": names.array()[rows.variant[first][rows.user]],
        "phase": rows.phase[first][rows.user],
        "probability": rows.probability[first][rows.user],
        "created_at": rows.created_at,
        "tenure": _tenure(rows, first),
        **_measures(rows, said),
        **_returns(rows, first, now, return_days * DAY_S),
        **_past(database, experiment, users, first, len(rows.id)),
    }
    return {name: column[is_kept] for name, column in table.items()}


class Beside(NamedTuple):
    """The hold-out beside everybody else."""

    table: Table
    """As `read_experiment` gives it, but for the past; its variants are `holdout` and `everybody else`."""
    since: float
    """The first request of the hold-out as it is now."""
    share: float
    """Of the users, which was to be held out."""
    n_in_both: int
    """Users who were held out at times only: somebody changed the salt."""


def read_holdout(
    database: Database, alias: str, *, since: float, now: float, return_days: float = 7.0
) -> Beside | None:
    """What happened to held-out users and to everybody else who can be named; None without a held-out user.

    A user belongs to the side of the first request; one who asked for a variant by its name is not counted with that.
    Only the time of the hold-out's present share is read: with another share others were held out.
    """
    i = interactions.c
    is_recent = sa.and_(i.alias == alias, i.created_at >= since, i.created_at < now)
    began, share = _present_holdout(database, is_recent)
    if share is None:
        return None
    is_told_apart = sa.and_(_is_somebody(), sa.not_(was_erased()), sa.not_(_is_forced()))
    wanted = sa.and_(is_recent, i.created_at >= began, is_told_apart)
    users, names = _Names(), _Names()
    rows = _read_rows(database, wanted, users, names)
    first = _first_rows(rows.user)
    # A variant of an experiment may have that name too, but the hold-out's users are analysed nowhere.
    is_held = (rows.variant == names.number(HOLDOUT)) & ~rows.is_analysed
    is_held_first = is_held[first][rows.user]
    table: Table = {
        "user_id": rows.user,
        "variant": np.where(is_held_first, HOLDOUT, EVERYBODY_ELSE),
        "created_at": rows.created_at,
        **_measures(rows, _said(database, wanted, rows.id)),
        **_returns(rows, first, now, return_days * DAY_S),
    }
    return Beside(table, began, share, len(np.unique(rows.user[is_held != is_held_first])))


def _present_holdout(database: Database, is_recent: sa.ColumnElement[bool]) -> tuple[float, float | None]:
    """Since when the hold-out has had its present share, as far back as was asked for, and that share."""
    i = interactions.c
    is_held = sa.and_(is_recent, i.experiment == HOLDOUT, i.assigned_variant == HOLDOUT, sa.not_(i.is_analysed))
    query = sa.select(i.probability, sa.func.min(i.created_at), sa.func.max(i.created_at)).where(is_held)
    with database.read() as connection:
        found = sorted(connection.execute(query.group_by(i.probability)).all(), key=lambda row: row[2])
    if not found:
        return 0.0, None
    share, began, _ = found[-1]
    ended = max((row[2] for row in found[:-1]), default=-math.inf)
    return max(float(began), math.nextafter(ended, math.inf)), float(share)


def _is_somebody() -> sa.ColumnElement[bool]:
    """Requests of nobody, without user and key, are another unit each time, and never held out."""
    return sa.or_(interactions.c.user_id.is_not(None), interactions.c.key_id != "")


def _is_forced() -> sa.ColumnElement[bool]:
    """Whether somebody asked for this variant by its name: it had no chance, and is analysed nowhere."""
    i = interactions.c
    is_in_one = sa.and_(i.experiment.is_not(None), i.experiment != HOLDOUT)
    return sa.and_(is_in_one, sa.not_(i.is_analysed), i.probability == 1.0)


class Traffic(NamedTuple):
    """What an alias had to do lately."""

    table: Table
    """As `read_experiment` gives it, of everybody who was answered by the champion."""
    users: int
    """Everybody, whoever answered."""
    seconds: float
    """From the first interaction of the time asked for until now."""


def read_traffic(database: Database, alias: str, *, since: float, now: float) -> Traffic:
    """What happened at an alias, in an experiment or not."""
    i = interactions.c
    is_recent = sa.and_(i.alias == alias, i.created_at >= since, i.created_at < now)
    users, names = _Names(), _Names()
    rows = _read_rows(database, is_recent, users, names)
    said = _said(database, is_recent, rows.id)
    is_kept = np.isin(rows.variant, [names.number(CONTROL)])
    table: Table = {
        "user_id": rows.user,
        "variant": names.array()[rows.variant],
        "created_at": rows.created_at,
        **_measures(rows, said),
    }
    seconds = now - float(rows.created_at[0]) if len(rows.id) else 0.0
    return Traffic({name: column[is_kept] for name, column in table.items()}, users.n, seconds)


def _measures(rows: _Rows, said: NDArray[np.float64]) -> Table:
    """What was found of each interaction, and what was said of those that were answered."""
    answered = rows.facts[:, _FACTS.index("answered")]
    facts = {name: rows.facts[:, place] for place, name in enumerate(_FACTS)}
    return facts | {name: said[place] * answered for place, name in enumerate(_SAID)}


def is_known(database: Database, experiment: str) -> bool:
    """Whether anybody was ever in it."""
    query = sa.select(interactions.c.id).where(interactions.c.experiment == experiment).limit(1)
    with database.read() as connection:
        return connection.execute(query).first() is not None


def _read_rows(database: Database, wanted: sa.ColumnElement[bool], users: _Names, names: _Names) -> _Rows:
    i, s = interactions.c, scores.c
    query = (
        sa.select(
            i.id, i.unit_id, i.assigned_variant, i.served_variant, i.phase, i.probability, i.is_analysed, i.created_at,
            i.status, i.completion_tokens, i.latency_ms, i.first_byte_ms, s.is_toxic, s.response, s.is_harmful_prompt,
        )
        .outerjoin(scores, s.interaction_id == i.id)
        .where(wanted)
        .order_by(i.created_at, i.id)
    )  # fmt: skip
    with database.read() as connection:
        lots = [_lot(batch, users, names) for batch in stream(connection, query)]
    return _Rows(*(np.concatenate(column) for column in zip(*[_lot([], users, names), *lots], strict=True)))


def _lot(batch: Batch, users: _Names, names: _Names) -> _Rows:
    facts = [_facts(row) for row in batch]
    return _Rows(
        np.array([row.id for row in batch], ID),
        np.array([users.number(row.unit_id) for row in batch], np.int64),
        np.array([names.number(row.assigned_variant) for row in batch], np.int64),
        np.array([row.phase for row in batch], np.int64),
        np.array([row.probability for row in batch], np.float64),
        np.array([row.is_analysed for row in batch], np.bool_),
        np.array([row.created_at for row in batch], np.float64),
        np.array(facts, np.float64).reshape(len(facts), len(_FACTS)),
    )


def _facts(row: Any) -> tuple[float, ...]:
    """In the order of `_FACTS`."""
    is_answered, is_scored = row.status == Status.OK.value, row.is_toxic is not None
    is_harmful = is_scored and bool(row.is_harmful_prompt)
    is_benign = is_scored and not row.is_harmful_prompt
    is_counted = row.status in COUNTED
    return (
        is_counted,
        is_answered,
        row.status == Status.UPSTREAM_ERROR.value,
        is_counted and row.served_variant != row.assigned_variant,
        is_scored,
        bool(row.is_toxic),
        is_harmful,
        is_harmful and row.response in COMPLIES,
        is_harmful and row.response == REFUSES,
        is_benign,
        is_benign and row.response == REFUSES,
        _number(row.completion_tokens, is_answered),
        _number(_seconds(row.latency_ms), is_answered),
        _number(math.log(row.latency_ms / 1000) if row.latency_ms > 0 else None, is_answered),
        _number(_seconds(row.first_byte_ms), is_answered),
    )


def _number(value: float | None, is_answered: bool) -> float:
    return float(value) if is_answered and value is not None else np.nan


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1000


def _first_rows(users: NDArray[np.int64]) -> NDArray[np.int64]:
    """The place of each user's first row; users are counted in the order in which they came."""
    return np.unique(users, return_index=True)[1]


def _tenure(rows: _Rows, first: NDArray[np.int64]) -> NDArray[np.str_]:
    days = (rows.created_at - rows.created_at[first][rows.user]) / DAY_S
    return np.array(TENURES)[np.searchsorted([1.0, 7.0], days, "right")]


def _returns(rows: _Rows, first: NDArray[np.int64], now: float, window_s: float) -> Table:
    """Whether a user was there again more than a day after the first time, on the user's first row."""
    may, did = np.zeros(len(rows.id)), np.zeros(len(rows.id))
    age = rows.created_at - rows.created_at[first][rows.user]
    came = np.zeros(len(first), np.bool_)
    came[rows.user[(age >= DAY_S) & (age <= window_s)]] = True
    has_time = now - rows.created_at[first] >= window_s
    may[first], did[first] = has_time, has_time & came
    return {"may_return": may, "returned": did}


def _past(database: Database, experiment: str, users: _Names, first: NDArray[np.int64], n_rows: int) -> Table:
    """What users did before the experiment, on the first row of each; NaN of those who were not here then."""
    columns = np.full((len(_PAST), n_rows), np.nan)
    with database.read() as connection:
        for query, places in _past_queries(connection, experiment):
            for batch in stream(connection, query):
                for row in batch:
                    number = users.known(row.unit_id)
                    if number is not None:
                        columns[places, first[number]] = _sums(row)
    return dict(zip(_PAST, columns, strict=True))


def _sums(row: Any) -> list[float]:
    """What follows the user's name; of values that were never known there is no sum."""
    return [float(value or 0.0) for value in row[1:]]


def _past_queries(connection: sa.Connection, experiment: str) -> Iterator[tuple[sa.Select[Any], list[int]]]:
    """Of answers, then of thumbs: sums by user, and the places of these sums in `_PAST`."""
    i = interactions.c
    began = connection.execute(
        sa.select(i.alias, i.created_at).where(i.experiment == experiment).order_by(i.created_at).limit(1)
    ).first()
    if began is None:
        return
    is_before = sa.and_(
        i.alias == began.alias,
        i.created_at >= began.created_at - PAST_DAYS * DAY_S,
        i.created_at < began.created_at,
        i.status == Status.OK.value,
    )
    answers = (
        sa.select(
            i.unit_id, sa.func.count(), sa.func.sum(i.completion_tokens), sa.func.sum(i.latency_ms / 1000),
            sa.func.sum(i.first_byte_ms / 1000), sa.literal(0.0), sa.literal(0.0),
        )
        .where(is_before)
        .group_by(i.unit_id)
    )  # fmt: skip
    yield answers, list(range(len(_PAST)))
    thumbs = _past_thumbs(is_before, began.created_at)
    yield thumbs, [_PAST.index("before_thumbs_up"), _PAST.index("before_thumbs_down")]


def _past_thumbs(is_before: sa.ColumnElement[bool], began: float) -> sa.Select[Any]:
    """As they stood when the experiment began: who has seen it may think otherwise of old answers."""
    live = _live(is_before, [Signal.THUMBS], until=began).subquery().c
    i = interactions.c

    def said(thumb: Thumbs) -> sa.Function[Any]:
        return sa.func.sum(sa.case((live.value == json.dumps(thumb.value), 1.0), else_=0.0))

    joined = sa.select(i.unit_id, said(Thumbs.UP), said(Thumbs.DOWN)).join_from(
        interactions, live.interaction_id.table, live.interaction_id == i.id
    )
    return joined.where(is_before).group_by(i.unit_id)


def _said(database: Database, wanted: sa.ColumnElement[bool], ids: Ids) -> NDArray[np.float64]:
    """What feedback and later attempts say of each interaction, shape (`_SAID`, interactions)."""
    marks = np.zeros((len(_SAID), len(ids)))
    places = {about: place for place, about in enumerate(ids.tolist())}
    for about, what in _signals(database, wanted):
        if about in places:  # What has come since the interactions were read is for the next report.
            marks[what, places[about]] = 1.0
    return marks


def _signals(database: Database, wanted: sa.ColumnElement[bool]) -> Iterator[tuple[bytes, int]]:
    """An interaction that is wanted, and the number of what was said of it in `_SAID`."""
    kinds = [Signal.THUMBS, Signal.RATING, Signal.EDIT, Signal.REGENERATE]
    with database.read() as connection:
        for batch in stream(connection, _live(wanted, kinds)):
            for row in batch:
                place = _place_of(row.type, row.value)
                if place is not None:
                    yield row.interaction_id.encode(), place
        for batch in stream(connection, _replaced(wanted)):
            yield from ((row.id.encode(), _SAID.index("regenerated")) for row in batch)


def _place_of(kind: str, value: str | None) -> int | None:
    if kind == Signal.EDIT:
        return _SAID.index("edited")
    if kind == Signal.REGENERATE:
        return _SAID.index("regenerated")
    thumb = thumb_of(kind, read_json(value or "null"))
    return None if thumb is None else _SAID.index("thumbs_up" if thumb is Thumbs.UP else "thumbs_down")


def _live(wanted: sa.ColumnElement[bool], kinds: Sequence[Signal], until: float | None = None) -> sa.Select[Any]:
    """What was said last of interactions that are wanted, of all that was said before some moment."""
    f, newer, i = feedback_events.c, feedback_events.alias("newer").c, interactions.c
    is_newer = sa.or_(newer.created_at > f.created_at, sa.and_(newer.created_at == f.created_at, newer.id > f.id))
    is_said: sa.ColumnElement[bool] = sa.true()
    if until is not None:
        is_said, is_newer = f.created_at < until, sa.and_(is_newer, newer.created_at < until)
    mark = sa.case((f.type != Signal.EDIT.value, f.value)).label("value")  # An edit's would be the user's text.
    return (
        sa.select(f.interaction_id, f.type, mark)
        .join(interactions, i.id == f.interaction_id)
        .where(wanted, is_said, f.type.in_([kind.value for kind in kinds]), sa.not_(f.is_retraction))
        .where(sa.not_(sa.exists().where(newer.feedback_id == f.feedback_id, is_newer)))
    )


def _replaced(wanted: sa.ColumnElement[bool]) -> sa.Select[Any]:
    new = interactions.alias("new").c
    return sa.select(interactions.c.id).join(new.id.table, new.regenerate_of == interactions.c.id).where(wanted)


def users_of(table: Mapping[str, NDArray[Any]]) -> dict[str, int]:
    """How many users each variant has."""
    variants = sorted(set(table["variant"].tolist()))
    return {name: len(np.unique(table["user_id"][table["variant"] == name])) for name in variants}
