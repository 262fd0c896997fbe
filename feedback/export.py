"""Preference data as JSON lines, for trainers that are not ours."""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path

from feedback.interactions import Message
from feedback.pairs import PreferencePair, UnpairedExample, canonical_json

Row = dict[str, object]

MESSAGE_FIELDS = ("role", "content", "name", "tool_calls", "tool_call_id")
"""What a trainer reads of a message; anything else a client sent would only make rows of different shapes."""
INT64_BOUND = 2**63


class ExportFormat(StrEnum):
    """Whose data layout to write."""

    TRL = "trl"
    """TRL's conversational preference format."""
    KTO = "kto"
    """TRL's conversational unpaired format: every pair's two sides, and the single thumbs."""
    OPENAI = "openai"
    """The preference format of OpenAI's fine-tuning API."""


def write_export(
    path: Path,
    pairs: Iterable[PreferencePair],
    unpaired: Iterable[UnpairedExample] = (),
    *,
    layout: ExportFormat = ExportFormat.TRL,
) -> int:
    """Write one JSON object per line and return how many. The file appears whole or not at all.

    Only the KTO layout has room for `unpaired`.
    """
    rows = export_rows(pairs, unpaired, layout=layout)
    _write_atomically(path, "".join(f"{_line(row)}\n" for row in rows))
    return len(rows)


def export_rows(
    pairs: Iterable[PreferencePair], unpaired: Iterable[UnpairedExample] = (), *, layout: ExportFormat
) -> list[Row]:
    """The rows of an export, in an order that the data alone decides."""
    ordered = sorted(pairs, key=lambda pair: pair.id)
    if layout is ExportFormat.KTO:
        return _kto_rows(ordered, sorted(unpaired, key=lambda example: example.id))
    to_row: Callable[[PreferencePair], Row] = _trl_row if layout is ExportFormat.TRL else _openai_row
    return [to_row(pair) for pair in ordered]


def _trl_row(pair: PreferencePair) -> Row:
    return {
        "prompt": [_chat_message(message) for message in pair.prompt],
        "chosen": [_chat_message(pair.chosen)],
        "rejected": [_chat_message(pair.rejected)],
        "pair_id": pair.id,
        "source": str(pair.source),
        "margin": pair.margin,
    }


def _openai_row(pair: PreferencePair) -> Row:
    return {
        "input": {"messages": [_message(message) for message in pair.prompt]},
        "preferred_output": [_message(pair.chosen)],
        "non_preferred_output": [_message(pair.rejected)],
    }


def _kto_rows(pairs: Sequence[PreferencePair], unpaired: Sequence[UnpairedExample]) -> list[Row]:
    """Each answer once. One that was chosen here and rejected there has no label, so it is left out.

    Ordered by hash, which mixes the labels: KTO estimates its reference point within a batch.
    """
    sides = [(pair.prompt, side, side is pair.chosen) for pair in pairs for side in (pair.chosen, pair.rejected)]
    singles = [(example.prompt, example.completion, example.label) for example in unpaired]
    labels: dict[str, set[bool]] = {}
    rows: dict[str, Row] = {}
    for prompt, completion, label in sides + singles:
        row: Row = {
            "prompt": [_chat_message(message) for message in prompt],
            "completion": [_chat_message(completion)],
            "label": label,
        }
        key = canonical_json([row["prompt"], row["completion"]])
        labels.setdefault(key, set()).add(label)
        rows[key] = row
    return [rows[key] for key in sorted(rows, key=_hash_order) if len(labels[key]) == 1]


def _hash_order(key: str) -> bytes:
    return hashlib.blake2b(key.encode(), digest_size=16).digest()


def _message(message: Message) -> Row:
    """The fields of `message` that are set; `content` always, since trainers look for it."""
    fields = {name: message[name] for name in MESSAGE_FIELDS if message.get(name) is not None}
    return {"role": "assistant", "content": None, **fields}


def _chat_message(message: Message) -> Row:
    """As `_message`, its text parts joined to one text: most chat templates take nothing else."""
    row = _message(message)
    return row | {"content": _joined(row["content"])}


def _joined(content: object) -> object:
    if not isinstance(content, Sequence) or isinstance(content, str):
        return content
    texts = [part.get("text") for part in content if isinstance(part, Mapping) and part.get("type") == "text"]
    whole = [text for text in texts if isinstance(text, str)]
    return "\n".join(whole) if len(whole) == len(content) else content


def _line(row: Row) -> str:
    return json.dumps(_loadable(row), allow_nan=False)


def _loadable(value: object) -> object:
    """`value` without what makes Arrow's JSON reader refuse the whole file: one odd row must not spoil the others.

    Lone surrogates become U+FFFD, numbers that are not finite null, and integers past 64 bits text.
    """
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, Mapping):
        return {str(_loadable(str(key))): _loadable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_loadable(item) for item in value]
    return _loadable_number(value)


def _loadable_number(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, int) and not -INT64_BOUND <= value < INT64_BOUND:
        return str(value)
    return value


def _write_atomically(path: Path, text: str) -> None:
    """Write beside `path`, make it durable, then take the name: a reader sees the old file or the whole new one."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    _sync_directory(path.parent)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
