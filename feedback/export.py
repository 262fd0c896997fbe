"""Preference data as files, for trainers that are not ours: JSON lines, or Parquet where the name ends in `.parquet`.

The same pairs give the same bytes. Beside the file lies its manifest, written last: with it the file is complete, and
what is in it can be told from what is in another.

TRL trains on what `datasets.load_dataset` makes of either file. Parquet says that messages are JSON. Of JSON lines, the
types are guessed from the first ten megabytes, so rows whose messages differ in shape come first.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from feedback.chat_messages import for_templates, loadable, unfit
from feedback.errors import DamagedExport
from feedback.export_parquet import COUNT, FLAG, INPUT, JSON, MESSAGES, NUMBER, TEXT, Columns, from_parquet, to_parquet
from feedback.interactions import Message
from feedback.messages import canonical_json
from feedback.pairs import PreferencePair, UnpairedExample
from feedback.tools import tools_column
from pawl.durability import sync_directory

Row = dict[str, object]
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
    given, singles = list(pairs), list(unpaired)
    rows = export_rows(given, singles, layout=layout)
    content = to_parquet(rows, COLUMNS[layout]) if _is_parquet(path) else _lines(rows)
    _write_atomically(path, content)
    unfit_ones = count_unfit(given, singles, layout=layout)
    manifest = export_manifest(rows, given, layout, content) | {"left_out": dict(sorted(unfit_ones.items()))}
    _write_atomically(manifest_path(path), (json.dumps(manifest, indent=2) + "\n").encode())
    return len(rows)


def manifest_path(path: Path) -> Path:
    """Where the manifest of an export lies.

    >>> manifest_path(Path("pairs.jsonl")).name
    'pairs.jsonl.manifest.json'
    """
    return path.with_name(f"{path.name}.manifest.json")


def export_manifest(
    rows: Sequence[Row], pairs: Iterable[PreferencePair], layout: ExportFormat, content: bytes
) -> dict[str, Any]:
    """What tells one export from another; `content_sha256` is the same for JSON lines and Parquet."""
    return {
        "version": MANIFEST_VERSION,
        "layout": layout.value,
        "rows": len(rows),
        "sha256": hashlib.sha256(content).hexdigest(),
        "content_sha256": content_sha256(rows),
        "by_source": dict(sorted(Counter(str(pair.source) for pair in pairs).items())),
    }


def content_sha256(rows: Iterable[Row]) -> str:
    """The same for the same rows in the same order, whatever file they are in."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(canonical_json(row).encode() + b"\n")
    return digest.hexdigest()


def read_export(path: Path) -> list[Row]:
    """The rows of an export, as `export_rows` gave them.

    Raises:
        DamagedExport: there is no manifest, or the file is not the one that it describes.
    """
    manifest, content = _read_manifest(path), path.read_bytes()
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
    if _read_manifest(path)["layout"] != ExportFormat.PAWL:
        raise DamagedExport(f"{path} does not hold whole pairs: export them with the layout {ExportFormat.PAWL}")
    return [_pair(row) for row in read_export(path)]


def _read_manifest(path: Path) -> dict[str, Any]:
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


def _lines(rows: Iterable[Row]) -> bytes:
    return "".join(f"{json.dumps(row, allow_nan=True)}\n" for row in rows).encode()


def export_rows(
    pairs: Iterable[PreferencePair], unpaired: Iterable[UnpairedExample] = (), *, layout: ExportFormat
) -> list[Row]:
    """The rows of an export, in an order that the data alone decides."""
    ordered = sorted(pairs, key=lambda pair: pair.id)
    if layout is ExportFormat.PAWL:
        return [json.loads(canonical_json(vars(pair))) for pair in ordered]
    rows = _rows_for_trainers(ordered, unpaired, layout)
    return _odd_ones_first(rows)


def count_unfit(
    pairs: Iterable[PreferencePair], unpaired: Iterable[UnpairedExample] = (), *, layout: ExportFormat
) -> Counter[str]:
    """How many pairs and single thumbs an export has no rows of, by `Unfit`."""
    if layout not in (ExportFormat.TRL, ExportFormat.KTO):
        return Counter()
    singles = unpaired if layout is ExportFormat.KTO else ()
    reasons = [unfit(pair.prompt, pair.chosen, pair.rejected) for pair in pairs]
    reasons += [unfit(single.prompt, single.completion) for single in singles]
    return Counter(reason.value for reason in reasons if reason)


def _rows_for_trainers(
    ordered: Sequence[PreferencePair], unpaired: Iterable[UnpairedExample], layout: ExportFormat
) -> list[Row]:
    if layout is ExportFormat.OPENAI:
        return [loadable(_openai_row(pair)) for pair in ordered]
    fit = [pair for pair in ordered if unfit(pair.prompt, pair.chosen, pair.rejected) is None]
    if layout is ExportFormat.TRL:
        return [_trl_row(pair) for pair in fit]
    singles = [single for single in unpaired if unfit(single.prompt, single.completion) is None]
    return _kto_rows(fit, sorted(singles, key=lambda single: single.id))


def _odd_ones_first(rows: Sequence[Row]) -> list[Row]:
    """The rows that bring something of a new shape before the others, the less deep in the row the earlier."""
    seen: set[tuple[Place, object]] = set()
    depths = []
    for row in rows:
        new = set(_shapes(row)) - seen
        seen |= new
        depths.append(min((len(path) for path, _ in new), default=math.inf))
    return [rows[index] for index in sorted(range(len(rows)), key=depths.__getitem__)]


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
    return {
        "input": {"messages": [_message(message) for message in pair.prompt], **tools},
        "preferred_output": [_message(pair.chosen)],
        "non_preferred_output": [_message(pair.rejected)],
    }


def _kto_rows(pairs: Sequence[PreferencePair], unpaired: Sequence[UnpairedExample]) -> list[Row]:
    """Each answer once. One that was chosen here and rejected there has no label, so it is left out.

    Ordered by hash, which mixes the labels: KTO estimates its reference point within a batch.
    """
    sides = [
        (pair.prompt, side, side is pair.chosen, pair.tools) for pair in pairs for side in (pair.chosen, pair.rejected)
    ]
    singles = [(example.prompt, example.completion, example.label, example.tools) for example in unpaired]
    labels: dict[str, set[bool]] = {}
    rows: dict[str, Row] = {}
    for prompt, completion, label, tools in sides + singles:
        row: Row = {
            "prompt": [for_templates(message) for message in prompt],
            "completion": [for_templates(completion)],
            "label": label,
            **tools_column(tools),
        }
        key = canonical_json([row[name] for name in ("prompt", "completion", "tools") if name in row])
        labels.setdefault(key, set()).add(label)
        rows[key] = row
    return [rows[key] for key in sorted(rows, key=_hash_order) if len(labels[key]) == 1]


def _hash_order(key: str) -> bytes:
    return hashlib.blake2b(key.encode(), digest_size=16).digest()


def _message(message: Message) -> Row:
    """The fields of `message` that are set; `content` always, since trainers look for it."""
    fields = {name: message[name] for name in MESSAGE_FIELDS if message.get(name) is not None}
    return {"role": "assistant", "content": None, **fields}


def _write_atomically(path: Path, content: bytes) -> None:
    """Write beside `path`, make it durable, then take the name: a reader sees the old file or the whole new one."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    sync_directory(path.parent)
