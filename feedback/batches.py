"""Reading much from the database with little of it in memory: server-side cursors, look-ups in batches, columns."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import sqlalchemy as sa

from feedback.partitions import Ids

STREAMED_ROWS = 10_000
"""Of ids only, fetched at once by a server-side cursor."""
LOOKED_UP_ROWS = 1000
"""Of any size, fetched at once by their ids."""

Batch = Sequence[sa.Row[Any]]


def stream(connection: sa.Connection, query: sa.Select[Any]) -> Iterator[Batch]:
    """What `query` finds, through a server-side cursor."""
    return connection.execution_options(yield_per=STREAMED_ROWS).execute(query).partitions()


def look_up(
    connection: sa.Connection, query: sa.Select[Any], column: sa.ColumnElement[str], ids: Sequence[str]
) -> Iterator[Batch]:
    """What `query` finds where `column` is one of `ids`."""
    asked = query.where(_is_among(connection, column))
    for start in range(0, len(ids), LOOKED_UP_ROWS):
        some = json.dumps(list(ids[start : start + LOOKED_UP_ROWS]))
        yield connection.execute(asked, {"ids": some}).all()


def _is_among(connection: sa.Connection, column: sa.ColumnElement[str]) -> sa.ColumnElement[bool]:
    """Whether `column` is in the JSON list `ids`: a thousand parameters would take longer than the rows."""
    ids = sa.bindparam("ids", type_=sa.Text)
    if connection.dialect.name == "postgresql":
        some = sa.func.json_array_elements_text(sa.cast(ids, sa.JSON)).column_valued()
        return column == sa.any_(sa.func.array(sa.select(some).scalar_subquery()))
    return column.in_(sa.select(sa.func.json_each(ids).table_valued("value").c.value))


def columns(
    batches: Iterable[Batch], kinds: Sequence[str], read: Callable[[Sequence[Any]], Sequence[str]] = tuple
) -> list[Ids]:
    """Rows as one array per column; only one batch at a time exists as Python objects.

    Args:
        kinds: NumPy's names of the columns' types.
        read: what to keep of a row.
    """
    parts = [[np.array([], kind) for kind in kinds]]
    for batch in batches:
        cells = zip(*map(read, batch), strict=True)
        parts.append([np.array(column, kind) for column, kind in zip(cells, kinds, strict=False)])
    return [np.concatenate(column) for column in zip(*filter(None, parts), strict=True)]


def names(ids: Ids) -> list[str]:
    """Ids as the database has them."""
    return [name.decode() for name in ids.tolist()]
