"""Preference data as files, for trainers that are not ours: JSON lines, or Parquet where the name ends in `.parquet`.

The same pairs give the same bytes. Beside the file lies its manifest, written last: with it the file is complete, and
what is in it can be told from what is in another.

However many pairs there are, few are held: rows go to disk first, and from there into the file in their order.

TRL trains on what `datasets.load_dataset` makes of either file. Parquet says that messages are JSON. Of JSON lines, the
types are guessed from the first ten megabytes, so rows whose messages differ in shape come first.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import StrEnum
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np

from feedback.chat_messages import for_templates, loadable, unfit
from feedback.errors import DamagedExport
from feedback.export_parquet import (
    COUNT,
    FLAG,
    INPUT,
    JSON,
    MESSAGES,
    NUMBER,
    TEXT,
    TOOLS,
    Columns,
    Row,
    from_parquet,
    write_parquet,
)
from feedback.interactions import Message
from feedback.messages import canonical_json
from feedback.pairs import PreferencePair, UnpairedExample
from feedback.spilled_rows import SpilledRows
from feedback.tools import tools_column
from pawl.durability import sync_directory

Place = tuple[str, ...]
"""Where in a row something stands."""

MESSAGE_FIELDS = ("role", "content", "name", "tool_calls", "tool_call_id")
"""What a trainer reads of a message; anything else a client sent would only make rows of different shapes."""
MANIFEST_VERSION: Final = 3


class ExportFormat(StrEnum):
    """Whose data layout to write."""

    TRL = "trl"
    """TRL's conversational preference format, messages as chat templates read them."""
    KTO = "kto"
    """TRL's conversational unpaired format: every pair's two sides, and the single thumbs. Messages as in `TRL`."""
    OPENAI = "openai"
    """The preference format of OpenAI's fine-tuning API."""
    PAWL = "pawl"
    """Whole pairs, with who made them and of what; `read_pairs` gives them back as they were. Not for trainers."""


COLUMNS: Final[Mapping[ExportFormat, Columns]] = {
    ExportFormat.TRL: {
        "prompt": MESSAGES,
        "chosen": MESSAGES,
        "rejected": MESSAGES,
        "pair_id": TEXT,
        "source": TEXT,
        "margin": NUMBER,
        "tools": TEXT,
    },
    ExportFormat.KTO: {"prompt": MESSAGES, "completion": MESSAGES, "label": FLAG, "tools": TEXT},
    ExportFormat.OPENAI: {"input": INPUT, "preferred_output": MESSAGES, "non_preferred_output": MESSAGES},
    ExportFormat.PAWL: {
        **{field.name: JSON for field in fields(PreferencePair)},
        **dict.fromkeys(("id", "source"), TEXT),
        **dict.fromkeys(("margin", "probability", "created_at"), NUMBER),
        "n_voters": COUNT,
    },
}
"""Of a Parquet file; names and order are those of the rows. `tools` is left out where no row has any."""


def write_export(
    path: Path,
    pairs: Iterable[PreferencePair],
    unpaired: Iterable[UnpairedExample] = (),
    *,
    layout: ExportFormat = ExportFormat.TRL,
) -> int:
    """Write the rows and their manifest, and return how many rows. Each file appears whole or not at all.

    Only the KTO layout has room for `unpaired`.
    """
    with SpilledRows(path.parent) as rows:
        given = _Given()
        order = _spill(rows, given, pairs, unpaired, layout)
        if layout is not ExportFormat.PAWL:
            order = _odd_ones_first(rows, order)
        content = hashlib.sha256()
        written = _write_atomically(path, lambda file: _write_rows(file, path, rows, order, layout, content))
    facts = {
        "version": MANIFEST_VERSION,
        "layout": layout.value,
        "rows": len(order),
        "sha256": written,
        "content_sha256": content.hexdigest(),
        "by_source": dict(sorted(given.sources.items())),
        "left_out": dict(sorted(given.unfit.items())),
    }
    _write_atomically(manifest_path(path), lambda file: _write(file, json.dumps(facts, indent=2) + "\n"))
    return len(order)


def manifest_path(path: Path) -> Path:
    """Where the manifest of an export lies.

    >>> manifest_path(Path("pairs.jsonl")).name
    'pairs.jsonl.manifest.json'
    """
    return path.with_name(f"{path.name}.manifest.json")


@dataclass
class _Given:
    """What was to be exported, counted."""

    sources: Counter[str] = field(default_factory=Counter)
    unfit: Counter[str] = field(default_factory=Counter)
    """What there are no rows of, by `Unfit`."""

    def is_fit(self, layout: ExportFormat, prompt: Sequence[Message], *answers: Message) -> bool:
        """Whether a chat template can show it, where one has to."""
        reason = unfit(prompt, *answers) if layout in (ExportFormat.TRL, ExportFormat.KTO) else None
        if reason:
            self.unfit[reason.value] += 1
        return reason is None


def content_sha256(rows: Iterable[Row]) -> str:
    """The same for the same rows in the same order, whatever file they are in."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(_content(row))
    return digest.hexdigest()


def _content(row: Row) -> bytes:
    return canonical_json(row).encode() + b"\n"


def read_export(path: Path) -> list[Row]:
    """The rows of an export, in their order.

    Raises:
        DamagedExport: there is no manifest, or the file is not the one that it describes.
    """
    manifest, content = read_manifest(path), path.read_bytes()
    if hashlib.sha256(content).hexdigest() != manifest["sha256"]:
        raise DamagedExport(f"{path} is not what its manifest says: it was changed or not written to the end")
    columns = COLUMNS[ExportFormat(manifest["layout"])]
    rows = from_parquet(content, columns) if _is_parquet(path) else [json.loads(line) for line in content.splitlines()]
    if content_sha256(rows) != manifest["content_sha256"]:
        raise DamagedExport(f"{path} does not hold what its manifest says")
    return rows


def read_pairs(path: Path) -> list[PreferencePair]:
    """The pairs of an export with the layout `pawl`, as they were; by id.

    Raises:
        DamagedExport: the file is not complete, or has another layout.
    """
    if read_manifest(path)["layout"] != ExportFormat.PAWL:
        raise DamagedExport(f"{path} does not hold whole pairs: export them with the layout {ExportFormat.PAWL}")
    return [_pair(row) for row in read_export(path)]


def read_manifest(path: Path) -> dict[str, Any]:
    """What is in an export: how many rows, of which sources, what was left out.

    Raises:
        DamagedExport: there is none that can be read.
    """
    try:
        manifest: dict[str, Any] = json.loads(manifest_path(path).read_bytes())
    except (OSError, ValueError) as exc:
        raise DamagedExport(f"{path} has no manifest that can be read: {exc}") from exc
    return manifest


def _pair(row: Mapping[str, Any]) -> PreferencePair:
    several = {
        name: tuple(row[name]) for name in ("prompt", "principals", "models", "tools") if row.get(name) is not None
    }
    return PreferencePair(**{**row, **several})


def _is_parquet(path: Path) -> bool:
    return path.suffix == ".parquet"


def _spill(
    rows: SpilledRows,
    given: _Given,
    pairs: Iterable[PreferencePair],
    unpaired: Iterable[UnpairedExample],
    layout: ExportFormat,
) -> Sequence[int]:
    """Put what is to be exported to disk; returns the numbers of the rows, in an order that the data alone decides."""
    if layout is ExportFormat.KTO:
        return _spill_sides(rows, given, pairs, unpaired)
    ids = []
    for pair in pairs:
        given.sources[str(pair.source)] += 1
        if given.is_fit(layout, pair.prompt, pair.chosen, pair.rejected):
            rows.add(_ROWS[layout](pair))
            ids.append(pair.id)
    return _by_id(ids)


def _by_id(ids: Sequence[str]) -> list[int]:
    return sorted(range(len(ids)), key=ids.__getitem__)


def _odd_ones_first(rows: SpilledRows, order: Sequence[int]) -> list[int]:
    """The rows that bring something of a new shape before the others, the less deep in the row the earlier."""
    seen: set[tuple[Place, object]] = set()
    depths = array("d")
    for row in rows.rows(order):
        new = set(_shapes(row)) - seen
        seen |= new
        depths.append(min((len(path) for path, _ in new), default=math.inf))
    return [order[place] for place in sorted(range(len(order)), key=depths.__getitem__)]


def _shapes(value: object, path: Place = ()) -> Iterator[tuple[Place, object]]:
    """The fields of every object in `value`, and the type of everything else, with where it stands."""
    if isinstance(value, Mapping):
        yield path, frozenset(value)
        for name, item in value.items():
            yield from _shapes(item, (*path, name))
    elif isinstance(value, list):
        for item in value:
            yield from _shapes(item, (*path, "[]"))
    else:
        yield path, type(value)


def _whole_row(pair: PreferencePair) -> Row:
    row: Row = json.loads(canonical_json(vars(pair)))
    return row


def _trl_row(pair: PreferencePair) -> Row:
    return {
        "prompt": [for_templates(message) for message in pair.prompt],
        "chosen": [for_templates(pair.chosen)],
        "rejected": [for_templates(pair.rejected)],
        "pair_id": pair.id,
        "source": str(pair.source),
        "margin": pair.margin,
        **tools_column(pair.tools),
    }


def _openai_row(pair: PreferencePair) -> Row:
    tools = {"tools": list(pair.tools)} if pair.tools else {}
    row: Row = loadable(
        {
            "input": {"messages": [_message(message) for message in pair.prompt], **tools},
            "preferred_output": [_message(pair.chosen)],
            "non_preferred_output": [_message(pair.rejected)],
        }
    )
    return row


_ROWS: Final[Mapping[ExportFormat, Callable[[PreferencePair], Row]]] = {
    ExportFormat.TRL: _trl_row,
    ExportFormat.OPENAI: _openai_row,
    ExportFormat.PAWL: _whole_row,
}
"""What a pair is in the layouts that have one row for it."""


def _spill_sides(
    rows: SpilledRows, given: _Given, pairs: Iterable[PreferencePair], unpaired: Iterable[UnpairedExample]
) -> list[int]:
    """Each answer once. One that was chosen here and rejected there has no label, so it is left out.

    Ordered by hash, which mixes the labels: KTO estimates its reference point within a batch.
    """
    hashes = bytearray()
    labels = bytearray()
    pair_ids: list[str] = []
    single_ids: list[str] = []

    def add(prompt: Sequence[Message], completion: Message, label: bool, tools: Any) -> None:
        row = _kto_row(prompt, completion, label, tools)
        rows.add(row)
        hashes.extend(_answer_hash(row))
        labels.append(label)

    for pair in pairs:
        given.sources[str(pair.source)] += 1
        if given.is_fit(ExportFormat.KTO, pair.prompt, pair.chosen, pair.rejected):
            add(pair.prompt, pair.chosen, True, pair.tools)
            add(pair.prompt, pair.rejected, False, pair.tools)
            pair_ids.append(pair.id)
    for single in unpaired:
        if given.is_fit(ExportFormat.KTO, single.prompt, single.completion):
            add(single.prompt, single.completion, single.label, single.tools)
            single_ids.append(single.id)
    n_sides = 2 * len(pair_ids)
    turns = [*chain.from_iterable((2 * place, 2 * place + 1) for place in _by_id(pair_ids))]
    turns += [n_sides + place for place in _by_id(single_ids)]
    return _labelled_once(bytes(hashes), bytes(labels), turns)


def _labelled_once(hashes: bytes, labels: bytes, turns: Sequence[int]) -> list[int]:
    """Of rows with the same hash the last, where all have the same label; by hash.

    Args:
        turns: the rows in an order that the data alone decides.
    """
    halves = np.frombuffer(hashes, ">u8").reshape(-1, 2)[turns]
    given = np.frombuffer(labels, np.uint8)[turns]
    order = np.lexsort((halves[:, 1], halves[:, 0]))  # stable
    if not len(order):
        return []
    starts = np.flatnonzero(np.append(True, (halves[order][1:] != halves[order][:-1]).any(axis=1)))
    are_agreed = np.minimum.reduceat(given[order], starts) == np.maximum.reduceat(given[order], starts)
    lasts = np.append(starts[1:], len(order)) - 1
    return [turns[place] for place in order[lasts[are_agreed]].tolist()]


def _kto_row(prompt: Sequence[Message], completion: Message, label: bool, tools: Any) -> Row:
    return {
        "prompt": [for_templates(message) for message in prompt],
        "completion": [for_templates(completion)],
        "label": label,
        **tools_column(tools),
    }


def _answer_hash(row: Row) -> bytes:
    """The same for the same answer to the same prompt, whatever its label."""
    key = canonical_json([row[name] for name in ("prompt", "completion", TOOLS) if name in row])
    return hashlib.blake2b(key.encode(), digest_size=16).digest()


def _message(message: Message) -> Row:
    """The fields of `message` that are set; `content` always, since trainers look for it."""
    fields = {name: message[name] for name in MESSAGE_FIELDS if message.get(name) is not None}
    return {"role": "assistant", "content": None, **fields}


def _write_rows(
    file: BinaryIO, path: Path, rows: SpilledRows, order: Sequence[int], layout: ExportFormat, content: Any
) -> None:
    """Write the file, and let `content`, a hash, see its rows."""
    if not _is_parquet(path):
        for line in rows.lines(order):
            content.update(_content(json.loads(line)))
            file.write(line)
        return

    def seen() -> Iterator[Row]:
        for row in rows.rows(order):
            content.update(_content(row))
            yield row

    columns = COLUMNS[layout]
    if TOOLS in columns and not any(TOOLS in row for row in rows.rows(order)):
        columns = {name: column for name, column in columns.items() if name != TOOLS}
    write_parquet(file, seen(), columns)


def _write(file: BinaryIO, text: str) -> None:
    file.write(text.encode())


def _write_atomically(path: Path, write: Callable[[BinaryIO], None]) -> str:
    """Write beside `path`, make it durable, then take the name: a reader sees the old file or the whole new one.

    Returns its SHA-256, as hexadecimal.
    """
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w+b") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
            file.seek(0)
            written = hashlib.file_digest(file, "sha256").hexdigest()
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    sync_directory(path.parent)
    return written
