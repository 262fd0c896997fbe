"""Exports as Parquet: a fixed schema for each layout, so that equal rows give equal bytes whatever they hold.

A message has a column for each field that trainers read. What does not fit them, such as a content of several parts,
stands as JSON in the field `more`, and takes its place again when the file is read.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from feedback.messages import canonical_json
from pawl.errors import ConfigurationError

if TYPE_CHECKING:
    import pyarrow as pa

Row = dict[str, object]
TEXT_FIELDS: Final = ("role", "content", "name", "tool_call_id")
CALL_FIELDS: Final = ("id", "type", "function")
FUNCTION_FIELDS: Final = ("name", "arguments")


class Column(NamedTuple):
    """How a value is written and read again."""

    kind: str
    write: Callable[[Any], object]
    read: Callable[[Any], object]


def _same(value: object) -> object:
    return value


def _fits(value: object, fields: tuple[str, ...]) -> bool:
    return isinstance(value, Mapping) and set(value) == set(fields)


def _is_call(call: object) -> bool:
    if not (isinstance(call, Mapping) and _fits(call, CALL_FIELDS) and _fits(call["function"], FUNCTION_FIELDS)):
        return False
    texts = (call["id"], call["type"], *call["function"].values())
    return all(isinstance(text, str) for text in texts)


def _fits_its_column(name: str, value: object) -> bool:
    if name in TEXT_FIELDS:
        return isinstance(value, str) or (name == "content" and value is None)
    return name == "tool_calls" and isinstance(value, list) and bool(value) and all(map(_is_call, value))


def _write_message(message: Mapping[str, object]) -> Row:
    plain = {name: value for name, value in message.items() if _fits_its_column(name, value)}
    more = {name: value for name, value in message.items() if name not in plain}
    columns = dict.fromkeys((*TEXT_FIELDS, "tool_calls"))
    return {**columns, **plain, "more": canonical_json(more) if more else None}


def _read_message(stored: Mapping[str, object]) -> Row:
    more = stored["more"]
    known = {name: value for name, value in stored.items() if name != "more" and value is not None}
    return {"content": None, **known, **(json.loads(more) if isinstance(more, str) else {})}


def _write_messages(messages: list[Row]) -> list[Row]:
    return [_write_message(message) for message in messages]


def _read_messages(stored: list[Row]) -> list[Row]:
    return [_read_message(message) for message in stored]


TEXT: Final = Column("string", _same, _same)
NUMBER: Final = Column("float64", _same, _same)
COUNT: Final = Column("int64", _same, _same)
FLAG: Final = Column("bool", _same, _same)
JSON: Final = Column("string", canonical_json, json.loads)
MESSAGES: Final = Column("messages", _write_messages, _read_messages)
INPUT: Final = Column(
    "input",
    lambda value: {"messages": _write_messages(value["messages"])},
    lambda value: {"messages": _read_messages(value["messages"])},
)

Columns = Mapping[str, Column]


def to_parquet(rows: list[Row], columns: Columns) -> bytes:
    """The file's bytes; equal for equal rows and the same version of pyarrow.

    Raises:
        ConfigurationError: pyarrow is not installed.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ModuleNotFoundError as exc:
        raise ConfigurationError("Parquet needs pyarrow, which the extra `train` brings") from exc

    stored = [{name: column.write(row[name]) for name, column in columns.items()} for row in rows]
    schema = pa.schema([(name, _kind(pa, column.kind)) for name, column in columns.items()])
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(stored, schema=schema), buffer, compression="zstd")
    return buffer.getvalue()


def from_parquet(content: bytes, columns: Columns) -> list[Row]:
    """The rows of such a file."""
    import pyarrow.parquet as pq

    stored = pq.read_table(io.BytesIO(content)).to_pylist()
    return [{name: column.read(row[name]) for name, column in columns.items()} for row in stored]


def _kind(arrow: Any, name: str) -> pa.DataType:
    function = arrow.struct([(field, arrow.string()) for field in FUNCTION_FIELDS])
    call = arrow.struct([("id", arrow.string()), ("type", arrow.string()), ("function", function)])
    texts = [(field, arrow.string()) for field in TEXT_FIELDS]
    messages = arrow.list_(arrow.struct([*texts, ("tool_calls", arrow.list_(call)), ("more", arrow.string())]))
    if name == "messages":
        return messages
    return arrow.struct([("messages", messages)]) if name == "input" else arrow.type_for_alias(name)
