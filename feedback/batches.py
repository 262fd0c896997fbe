"""Reading much from the database with little of it in memory: server-side cursors, look-ups in batches, columns."""

from __future__ import annotations

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
    for start in range(0, len(ids), LOOKED_UP_ROWS):
        yield connection.execute(query.where(column.in_(ids[start : start + LOOKED_UP_ROWS]))).all()


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
