"""An experiment as a table: what became of every interaction of its users, in columns.

Read through server-side cursors: of a row never more than a few numbers is kept, about 150 bytes, and of each user
the name while the rows are read. Texts are not read at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final, NamedTuple

import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray

from ab_testing.outcomes import COMPLIES, REFUSES
from feedback.batches import Batch, stream
from feedback.history import ID
from feedback.interactions import Status
from feedback.partitions import Ids
from feedback.signals import Signal, Thumbs, thumb_of
from feedback.stored_json import read_json
from pawl.database import Database
from pawl.schema import feedback_events, interactions, scores

DAY_S: Final = 86400.0
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

    def array(self) -> NDArray[np.str_]:
        return np.array(list(self._numbers), np.str_)


class _Rows(NamedTuple):
    """Interactions by column, in time order."""

    id: Ids
    user: NDArray[np.int64]
    variant: NDArray[np.int64]
    phase: NDArray[np.int64]
    is_analysed: NDArray[np.bool_]
    created_at: NDArray[np.float64]
    facts: NDArray[np.float64]
    """Shape (rows, `_FACTS`)."""


_FACTS: Final = (
    "counted", "answered", "failed", "fallback", "scored", "toxic", "harmful_asked", "harmful_complied",
    "harmful_refused", "benign_asked", "benign_refused", "tokens", "latency_s", "ttft_s",
)  # fmt: skip
_SAID: Final = ("thumbs_up", "thumbs_down", "regenerated", "edited")


def read_experiment(database: Database, experiment: str, *, now: float, return_days: float = 7.0) -> Table:
    """The columns of `ab_testing.built_in_metrics.EXPERIMENT_COLUMNS`; of an experiment without users, empty ones.

    Only users who were in an analysed zone when they were first seen count, by the variant that they were assigned
    then: others moved, and were not randomised when they did.

    Args:
        now: Seconds since the epoch.
        return_days: within how many days of the first exposure somebody comes back or does not.
    """
    names = _Names()
    rows = _read_rows(database, experiment, names)
    first = _first_rows(rows.user)
    is_kept = rows.is_analysed & rows.is_analysed[first][rows.user]
    said = _said(database, experiment, rows.id)
    table: Table = {
        "user_id": rows.user,
        "variant": names.array()[rows.variant[first][rows.user]],
        "phase": rows.phase[first][rows.user],
        "created_at": rows.created_at,
        "tenure": _tenure(rows, first),
        **{name: rows.facts[:, place] for place, name in enumerate(_FACTS)},
        **{name: said[place] * rows.facts[:, _FACTS.index("answered")] for place, name in enumerate(_SAID)},
        **_returns(rows, first, now, return_days * DAY_S),
    }
    return {name: column[is_kept] for name, column in table.items()}


def _read_rows(database: Database, experiment: str, names: _Names) -> _Rows:
    i, s = interactions.c, scores.c
    query = (
        sa.select(
            i.id, i.unit_id, i.assigned_variant, i.served_variant, i.phase, i.is_analysed, i.created_at, i.status,
            i.completion_tokens, i.latency_ms, i.first_byte_ms, s.is_toxic, s.response, s.is_harmful_prompt,
        )
        .outerjoin(scores, s.interaction_id == i.id)
        .where(i.experiment == experiment)
        .order_by(i.created_at, i.id)
    )  # fmt: skip
    users = _Names()
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
        *(_number(value, is_answered) for value in (row.completion_tokens, _seconds(row.latency_ms))),
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


def _said(database: Database, experiment: str, ids: Ids) -> NDArray[np.float64]:
    """What feedback and later attempts say of each interaction, shape (`_SAID`, interactions)."""
    marks = np.zeros((len(_SAID), len(ids)))
    places = {about: place for place, about in enumerate(ids.tolist())}
    for about, what in _signals(database, experiment):
        if about in places:  # What has come since the interactions were read is for the next report.
            marks[what, places[about]] = 1.0
    return marks


def _signals(database: Database, experiment: str) -> Iterator[tuple[bytes, int]]:
    """An interaction of the experiment, and the number of what was said of it in `_SAID`."""
    with database.read() as connection:
        for batch in stream(connection, _live(experiment)):
            for row in batch:
                place = _place_of(row.type, row.value)
                if place is not None:
                    yield row.interaction_id.encode(), place
        for batch in stream(connection, _replaced(experiment)):
            yield from ((row.id.encode(), _SAID.index("regenerated")) for row in batch)


def _place_of(kind: str, value: str | None) -> int | None:
    if kind == Signal.EDIT:
        return _SAID.index("edited")
    if kind == Signal.REGENERATE:
        return _SAID.index("regenerated")
    thumb = thumb_of(kind, read_json(value or "null"))
    return None if thumb is None else _SAID.index("thumbs_up" if thumb is Thumbs.UP else "thumbs_down")


def _live(experiment: str) -> sa.Select[Any]:
    f, newer, i = feedback_events.c, feedback_events.alias("newer").c, interactions.c
    is_newer = sa.or_(newer.created_at > f.created_at, sa.and_(newer.created_at == f.created_at, newer.id > f.id))
    kinds = [Signal.THUMBS, Signal.RATING, Signal.EDIT, Signal.REGENERATE]
    mark = sa.case((f.type != Signal.EDIT.value, f.value)).label("value")  # An edit's would be the user's text.
    return (
        sa.select(f.interaction_id, f.type, mark)
        .join(interactions, i.id == f.interaction_id)
        .where(i.experiment == experiment, f.type.in_([kind.value for kind in kinds]), sa.not_(f.is_retraction))
        .where(sa.not_(sa.exists().where(newer.feedback_id == f.feedback_id, is_newer)))
    )


def _replaced(experiment: str) -> sa.Select[Any]:
    old, new = interactions.alias("old"), interactions.alias("new")
    joined = sa.select(old.c.id).join_from(old, new, new.c.regenerate_of == old.c.id)
    return joined.where(old.c.experiment == experiment)


def users_of(table: Mapping[str, NDArray[Any]]) -> dict[str, int]:
    """How many users each variant has."""
    variants = sorted(set(table["variant"].tolist()))
    return {name: len(np.unique(table["user_id"][table["variant"] == name])) for name in variants}
