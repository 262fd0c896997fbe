"""What a round trains on: a mix of old and new preferences without a leak, and a record of exactly what went in."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any

from feedback.chat_messages import Unfit, calls_tools, unfit
from feedback.filters.holdout import prompt_key
from feedback.interactions import Message
from feedback.pairs import PreferencePair
from retrain.errors import BadData, DataLeak


class Origin(StrEnum):
    """Where an example comes from, as far as the mix is concerned."""

    NEW = "new"
    """Feedback that no promoted model has learned from."""
    ORIGINAL = "original"
    """The preferences the first model was made with; they keep old virtues alive."""
    EARLIER = "earlier"
    """Feedback of earlier rounds."""


@dataclass(frozen=True)
class TrainingExample:
    """One preference, ready to be tokenised."""

    pair_id: str
    origin: Origin
    source: str
    """How the preference was expressed: edit, regeneration, thumbs, or original."""
    category: str
    """What the prompt is about where the data says so, else empty."""
    prompt: tuple[Message, ...]
    chosen: Message
    rejected: Message


@dataclass(frozen=True)
class Mixed:
    """A training set, and where it falls short of the shares asked for."""

    examples: tuple[TrainingExample, ...]
    counts: Mapping[Origin, int]
    shortfalls: Mapping[Origin, int]
    """Examples missing by origin; nothing replaces them, the set is smaller."""


def example_of(pair: PreferencePair, origin: Origin) -> TrainingExample:
    """The training example that a mined pair makes."""
    return TrainingExample(pair.id, origin, pair.source, "", pair.prompt, pair.chosen, pair.rejected)


class Untrainable(StrEnum):
    """Why a preference is not trained on, whatever it says."""

    NOT_TEXT = Unfit.NOT_TEXT.value
    BROKEN_CALL = Unfit.BROKEN_CALL.value
    NO_TOOLS = "template_without_tools"
    """It calls tools, and the base model's chat template leaves out or refuses tool calls or their results."""


def untrainable(pair: PreferencePair | TrainingExample, *, reads_tools: bool) -> Untrainable | None:
    """Why this one cannot be trained on; None if it can.

    Args:
        reads_tools: whether the base model's chat template shows tool calls and their results.
    """
    reason = unfit(pair.prompt, pair.chosen, pair.rejected)
    if reason is not None:
        return Untrainable(reason.value)
    needs_tools = not reads_tools and calls_tools((*pair.prompt, pair.chosen, pair.rejected))
    return Untrainable.NO_TOOLS if needs_tools else None


def parse_originals(lines: Iterable[str]) -> list[TrainingExample]:
    """Read preferences in TRL's conversational format: `prompt`, `chosen` and `rejected` are lists of messages.

    Raises:
        BadData: a line is not such a preference; the text names its number.
    """
    return [_parse_original(number, line) for number, line in enumerate(lines, 1) if line.strip()]


def _parse_original(number: int, line: str) -> TrainingExample:
    try:
        row = json.loads(line)
        (chosen,), (rejected,) = map(_messages, (row["chosen"], row["rejected"]))
        prompt = _messages(row["prompt"])
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise BadData(
            f"original preferences, line {number}: not a preference with one chosen and one rejected"
        ) from exc
    pair_id = str(row.get("pair_id") or _digest(line.strip()))
    source = str(row.get("source") or Origin.ORIGINAL)
    return TrainingExample(pair_id, Origin.ORIGINAL, source, str(row.get("category") or ""), prompt, chosen, rejected)


def _messages(rows: Iterable[Mapping[str, Any]]) -> tuple[Message, ...]:
    return tuple(map(_message, rows))


def _message(row: Mapping[str, Any]) -> Message:
    """As TRL reads it: a message that calls tools need not say anything."""
    named = {name: row[name] for name in ("name", "tool_calls", "tool_call_id") if row.get(name) is not None}
    content = row.get("content") if row.get("tool_calls") else row["content"]
    return {"role": str(row["role"]), "content": content, **named}


def drop_leaks(examples: Iterable[TrainingExample], holdout: Iterable[PreferencePair]) -> list[TrainingExample]:
    """The examples whose prompt the hold-out does not ask."""
    asked = {prompt_key(pair.prompt) for pair in holdout}
    return [example for example in examples if prompt_key(example.prompt) not in asked]


def check_no_leak(examples: Iterable[TrainingExample], holdout: Sequence[PreferencePair]) -> None:
    """Make sure of it.

    Raises:
        DataLeak: a prompt, or a whole pair, is on both sides.
    """
    asked = {prompt_key(pair.prompt) for pair in holdout}
    held = {pair.id for pair in holdout}
    n_leaks = sum(example.pair_id in held or prompt_key(example.prompt) in asked for example in examples)
    if n_leaks:
        raise DataLeak(f"{n_leaks} training examples share their prompt with the hold-out")


def mix(examples: Sequence[TrainingExample], shares: Mapping[Origin, float], *, max_pairs: int, seed: int) -> Mixed:
    """Draw a training set with these shares by origin, without replacement.

    New feedback sets the size: the set is as large as uses all of it at its share (or `max_pairs`), and the other
    origins are drawn to match. Where an origin has too few, all it has is taken and the set is that much smaller; it is
    never padded by repeating examples or by raising another origin's count. The result does not depend on the order of
    `examples`.
    """
    by_origin = {origin: _distinct(examples, origin) for origin in Origin}
    total = _total(by_origin, shares, max_pairs)
    wanted = dict(zip(Origin, apportion([shares.get(origin, 0.0) for origin in Origin], total), strict=True))
    drawn = {origin: _draw(by_origin[origin], wanted[origin], seed) for origin in Origin}
    counts = {origin: len(drawn[origin]) for origin in Origin}
    shortfalls = {origin: wanted[origin] - counts[origin] for origin in Origin if counts[origin] < wanted[origin]}
    chosen = [example for origin in Origin for example in drawn[origin]]
    return Mixed(tuple(sorted(chosen, key=_shuffle_key(seed))), counts, shortfalls)


def apportion(shares: Sequence[float], total: int) -> list[int]:
    """Whole numbers that sum to `total`, as close to the shares as can be (largest remainder, Hamilton's method).

    >>> apportion([0.5, 0.3, 0.2], 7)
    [4, 2, 1]
    """
    whole = sum(shares)
    if whole <= 0:
        return [0 for _ in shares]
    exact = [share / whole * total for share in shares]
    counts = [math.floor(value) for value in exact]
    by_remainder = sorted(range(len(shares)), key=lambda index: counts[index] - exact[index])
    for index in by_remainder[: total - sum(counts)]:
        counts[index] += 1
    return counts


def swap_preferences(examples: Iterable[TrainingExample]) -> tuple[TrainingExample, ...]:
    """The opposite of what people preferred; only for drills that must produce a bad model."""
    return tuple(replace(example, chosen=example.rejected, rejected=example.chosen) for example in examples)


def dataset_manifest(
    mixed: Mixed, holdout: Sequence[PreferencePair], *, seed: int, shares: Mapping[Origin, float], is_swapped: bool
) -> dict[str, Any]:
    """Everything that tells one training set from another; the same inputs give the same bytes."""
    return {
        "sha256": _digest(canonical_json([asdict(example) for example in mixed.examples])),
        "holdout_sha256": _digest(canonical_json([asdict(pair) for pair in holdout])),
        "pair_ids": [example.pair_id for example in mixed.examples],
        "holdout_ids": [pair.id for pair in holdout],
        "by_origin": {str(origin): count for origin, count in mixed.counts.items()},
        "by_source": dict(sorted(Counter(example.source for example in mixed.examples).items())),
        "shortfalls": {str(origin): count for origin, count in mixed.shortfalls.items()},
        "shares": {str(origin): share for origin, share in shares.items()},
        "seed": seed,
        "is_swapped": is_swapped,
    }


def canonical_json(value: Any) -> str:
    """JSON text with one spelling per value."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def _total(
    by_origin: Mapping[Origin, Sequence[TrainingExample]], shares: Mapping[Origin, float], max_pairs: int
) -> int:
    whole = sum(shares.values())
    leading = next((origin for origin in Origin if shares.get(origin, 0.0) > 0), None)
    if leading is None or whole <= 0:
        return 0
    return min(max_pairs, round(len(by_origin[leading]) * whole / shares[leading]))


def _distinct(examples: Iterable[TrainingExample], origin: Origin) -> list[TrainingExample]:
    return list({example.pair_id: example for example in examples if example.origin == origin}.values())


def _draw(examples: Sequence[TrainingExample], count: int, seed: int) -> list[TrainingExample]:
    return sorted(examples, key=_shuffle_key(seed))[:count]


def _shuffle_key(seed: int) -> Callable[[TrainingExample], tuple[float, str]]:
    return lambda example: (_uniform("mix", str(seed), example.origin, example.pair_id), example.pair_id)


def _uniform(*parts: str) -> float:
    key = "\x1f".join(parts).encode("utf-8", "surrogatepass")
    return (int.from_bytes(hashlib.blake2b(key, digest_size=8).digest()) >> 11) / 2**53


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
