"""Exports as Parquet: a fixed schema for each layout, so that equal rows give equal bytes whatever they hold.

A message is one JSON value, and the schema says so. In columns of its own, every message would come back with every
field that any message has; chat templates take a field that is there, though empty, for one that was set.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any, BinaryIO, Final, NamedTuple

from feedback.messages import canonical_json
from pawl.errors import ConfigurationError

if TYPE_CHECKING:
    import pyarrow as pa

Row = dict[str, object]


class Column(NamedTuple):
    """How a value is written and read again."""

    kind: str
    write: Callable[[Any], object]
    read: Callable[[Any], object]


def _same(value: object) -> object:
    return value


def _write_json(value: object) -> str:
    """In the order of its keys: templates write the arguments of a tool call in it."""
    return json.dumps(value, separators=(",", ":"))


TEXT: Final = Column("string", _same, _same)
NUMBER: Final = Column("float64", _same, _same)
COUNT: Final = Column("int64", _same, _same)
FLAG: Final = Column("bool", _same, _same)
JSON: Final = Column("string", canonical_json, json.loads)
"""For nobody but Pawl."""
MESSAGES: Final = Column(
    "messages",
    lambda messages: [_write_json(message) for message in messages],
    lambda stored: [json.loads(message) for message in stored],
)
INPUT: Final = Column("json", _write_json, json.loads)

TOOLS: Final = "tools"
"""A column that few rows have anything in; those that have not lack the field, too."""

Columns = Mapping[str, Column]


GROUP_ROWS: Final = 2000
"""Rows that are held at once, and that lie together in the file."""


def write_parquet(file: BinaryIO, rows: Iterable[Row], columns: Columns) -> None:
    """Write the rows; equal bytes for equal rows and the same version of pyarrow.

    Raises:
        ConfigurationError: pyarrow is not installed.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ModuleNotFoundError as exc:
        raise ConfigurationError("Parquet needs pyarrow, which the extra `train` brings") from exc

    # Arrow makes no JSON of Python's texts, but takes columns of texts for JSON.
    texts, schema = _schema(pa, columns, pa.string()), _schema(pa, columns, pa.json_())
    rest = iter(rows)
    with pq.ParquetWriter(file, schema, compression="zstd") as writer:
        group = list(islice(rest, GROUP_ROWS))
        while True:
            stored = [{name: column.write(row.get(name)) for name, column in columns.items()} for row in group]
            writer.write_table(pa.Table.from_pylist(stored, schema=texts).cast(schema))
            group = list(islice(rest, GROUP_ROWS))
            if not group:
                return


def from_parquet(content: bytes, columns: Columns) -> list[Row]:
    """The rows of such a file."""
    import pyarrow.parquet as pq

    stored = pq.read_table(io.BytesIO(content)).to_pylist()
    return [
        {name: column.read(row[name]) for name, column in columns.items() if name != TOOLS or row.get(name) is not None}
        for row in stored
    ]


def _schema(arrow: Any, columns: Columns, json_kind: pa.DataType) -> pa.Schema:
    kinds = {"messages": arrow.list_(json_kind), "json": json_kind}
    return arrow.schema(
        [(name, kinds.get(column.kind) or arrow.type_for_alias(column.kind)) for name, column in columns.items()]
    )
