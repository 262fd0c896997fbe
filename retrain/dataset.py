"""What a round trains on: a mix of old and new preferences without a leak, and a record of exactly what went in."""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from itertools import groupby
from typing import Any, NamedTuple

from feedback.chat_messages import Unfit, calls_tools, unfit
from feedback.filters.holdout import prompt_key
from feedback.filters.near_prompts import NearPrompts, asked
from feedback.interactions import Message
from feedback.pairs import PreferencePair
from feedback.tools import Tool, read_tools
from pawl.settings import MixSettings
from retrain.errors import BadData, DataLeak

DAY_S = 86400.0


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
    created_at: float | None = None
    """When it was expressed; None for original preferences, which have no age."""
    tools: tuple[Tool, ...] | None = None
    """The functions that were offered with the prompt."""


_Arrival = Callable[[TrainingExample], tuple[float, str]]


class OriginalSplit(NamedTuple):
    """The original preferences on two sides that stay the same in every round."""

    training: tuple[TrainingExample, ...]
    holdout: tuple[PreferencePair, ...]
    n_near: int
    """Left out of both: they ask nearly what the hold-out asks."""


@dataclass(frozen=True)
class Mixed:
    """A training set, and where it falls short of the shares asked for."""

    examples: tuple[TrainingExample, ...]
    counts: Mapping[Origin, int]
    shortfalls: Mapping[Origin, int]
    """Examples missing by origin; nothing replaces them, the set is smaller."""


def example_of(pair: PreferencePair, origin: Origin) -> TrainingExample:
    """The training example that a mined pair makes."""
    return TrainingExample(
        pair.id,
        origin,
        pair.source,
        "",
        pair.prompt,
        pair.chosen,
        pair.rejected,
        created_at=pair.created_at,
        tools=pair.tools,
    )


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
        prompt, tools = _messages(row["prompt"]), read_tools(row.get("tools"))
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise BadData(
            f"original preferences, line {number}: not a preference with one chosen and one rejected"
        ) from exc
    pair_id = str(row.get("pair_id") or _digest(line.strip()))
    source = str(row.get("source") or Origin.ORIGINAL)
    category = str(row.get("category") or "")
    return TrainingExample(pair_id, Origin.ORIGINAL, source, category, prompt, chosen, rejected, tools=tools)


def _messages(rows: Iterable[Mapping[str, Any]]) -> tuple[Message, ...]:
    return tuple(map(_message, rows))


def _message(row: Mapping[str, Any]) -> Message:
    """As TRL reads it: a message that calls tools need not say anything."""
    named = {name: row[name] for name in ("name", "tool_calls", "tool_call_id") if row.get(name) is not None}
    content = row.get("content") if row.get("tool_calls") else row["content"]
    return {"role": str(row["role"]), "content": content, **named}


def split_originals(
    originals: Iterable[TrainingExample], *, share: float, seed: int, similarity: float
) -> OriginalSplit:
    """Hold out a share of what the original preferences ask.

    A prompt's side depends on its words and the seed alone: no prompt is on both sides, and none ever changes sides,
    whatever is added to the file. Measured by these pairs, the rounds of a year are comparable.
    """
    sides: dict[bool, list[TrainingExample]] = {True: [], False: []}
    for example in sorted(originals, key=lambda each: each.pair_id):
        sides[_uniform("original holdout", str(seed), prompt_key(example.prompt)) < share].append(example)
    holdout = tuple(map(_held_pair, sides[True]))
    training = tuple(drop_leaks(sides[False], holdout, similarity))
    return OriginalSplit(training, holdout, len(sides[False]) - len(training))


def drop_leaks(
    examples: Iterable[TrainingExample], holdout: Iterable[PreferencePair], similarity: float | None = None
) -> list[TrainingExample]:
    """The examples whose prompt the hold-out does not ask.

    Args:
        similarity: from which on a prompt is nearly another (`near_prompts`); None compares their words exactly.
    """
    prompts = [pair.prompt for pair in holdout]
    held = {prompt_key(prompt) for prompt in prompts}
    kept = [example for example in examples if prompt_key(example.prompt) not in held]
    if similarity is None:
        return kept
    are_near = NearPrompts(map(asked, prompts), similarity).are_near([asked(example.prompt) for example in kept])
    return [example for example, is_near in zip(kept, are_near, strict=True) if not is_near]


def check_no_leak(examples: Iterable[TrainingExample], holdout: Sequence[PreferencePair]) -> None:
    """Make sure of it.

    Raises:
        DataLeak: a prompt, or a whole pair, is on both sides.
    """
    prompts = {prompt_key(pair.prompt) for pair in holdout}
    held = {pair.id for pair in holdout}
    n_leaks = sum(example.pair_id in held or prompt_key(example.prompt) in prompts for example in examples)
    if n_leaks:
        raise DataLeak(f"{n_leaks} training examples share their prompt with the hold-out")


def shares_of(settings: MixSettings) -> dict[Origin, float]:
    """The share of each origin."""
    return {Origin.NEW: settings.new, Origin.ORIGINAL: settings.original, Origin.EARLIER: settings.earlier}


def half_life_of(settings: MixSettings) -> float | None:
    """In seconds."""
    return None if settings.half_life_days is None else settings.half_life_days * DAY_S


def mix(
    examples: Sequence[TrainingExample],
    shares: Mapping[Origin, float],
    *,
    max_pairs: int,
    seed: int,
    half_life_s: float | None = None,
) -> Mixed:
    """Draw a training set with these shares by origin, without replacement.

    New feedback sets the size: the set is as large as uses all of it at its share (or `max_pairs`), and the other
    origins are drawn to match. Where an origin has too few, all it has is taken and the set is that much smaller; it is
    never padded by repeating examples or by raising another origin's count. Within an origin, sources and categories
    keep the shares they have there. The result does not depend on the order of `examples`.

    Args:
        half_life_s: where not all of an origin's examples are taken, one that is this much older than another is half
            as likely to be drawn first; None draws them alike.
    """
    by_origin = _by_origin(examples)
    total = _total(by_origin, shares, max_pairs)
    wanted = dict(zip(Origin, apportion([shares.get(origin, 0.0) for origin in Origin], total), strict=True))
    arrival = _arrival(seed, half_life_s)
    drawn = {origin: _draw(by_origin[origin], wanted[origin], arrival) for origin in Origin}
    counts = {origin: len(drawn[origin]) for origin in Origin}
    shortfalls = {origin: wanted[origin] - counts[origin] for origin in Origin if counts[origin] < wanted[origin]}
    chosen = [example for origin in Origin for example in drawn[origin]]
    return Mixed(tuple(sorted(chosen, key=_arrival(seed, None))), counts, shortfalls)


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
    mixed: Mixed,
    holdout: Sequence[PreferencePair],
    *,
    seed: int,
    shares: Mapping[Origin, float],
    is_swapped: bool,
    half_life_s: float | None = None,
) -> dict[str, Any]:
    """Everything that tells one training set from another; the same inputs give the same bytes."""
    held = Counter(pair.source for pair in holdout)
    return {
        "sha256": _digest(canonical_json([asdict(example) for example in mixed.examples])),
        "holdout_sha256": _digest(canonical_json([asdict(pair) for pair in holdout])),
        "pair_ids": [example.pair_id for example in mixed.examples],
        "holdout_ids": [pair.id for pair in holdout],
        "by_origin": {str(origin): count for origin, count in mixed.counts.items()},
        "by_source": dict(sorted(Counter(example.source for example in mixed.examples).items())),
        "by_stratum": {str(origin): _strata_counts(mixed.examples, origin) for origin in Origin},
        "holdout_by_source": dict(sorted(held.items())),
        "sources_without_holdout": sorted({_holdout_source(example) for example in mixed.examples} - held.keys()),
        "shortfalls": {str(origin): count for origin, count in mixed.shortfalls.items()},
        "shares": {str(origin): share for origin, share in shares.items()},
        "half_life_s": half_life_s,
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


def _by_origin(examples: Iterable[TrainingExample]) -> dict[Origin, list[TrainingExample]]:
    """Each id once and each preference once; what more than one origin has is the first one's."""
    rank = {origin: place for place, origin in enumerate(Origin)}
    by_origin: dict[Origin, list[TrainingExample]] = {origin: [] for origin in Origin}
    seen: set[str] = set()
    for example in sorted(examples, key=lambda each: (rank[each.origin], each.pair_id)):
        names = {example.pair_id, _digest(canonical_json([example.prompt, example.chosen, example.rejected]))}
        if seen.isdisjoint(names):
            by_origin[example.origin].append(example)
        seen |= names
    return by_origin


def _draw(examples: Sequence[TrainingExample], count: int, arrival: _Arrival) -> list[TrainingExample]:
    """The first to arrive of each source and category, which keep their shares."""
    strata = [list(stratum) for _, stratum in groupby(sorted(examples, key=_stratum), key=_stratum)]
    counts = apportion([len(stratum) for stratum in strata], min(count, len(examples)))
    return [example for stratum, n in zip(strata, counts, strict=True) for example in sorted(stratum, key=arrival)[:n]]


def _stratum(example: TrainingExample) -> tuple[str, str]:
    return example.source, example.category


def _strata_counts(examples: Iterable[TrainingExample], origin: Origin) -> dict[str, int]:
    """How many of each source and category; a category is there where the data names it."""
    counts: dict[str, int] = defaultdict(int)
    for source, category in sorted(_stratum(example) for example in examples if example.origin == origin):
        counts[f"{source}/{category}" if category else source] += 1
    return dict(counts)


def _arrival(seed: int, half_life_s: float | None) -> _Arrival:
    """When each example arrives in a race that draws without replacement by weight.

    Times are exponential with rate 1/2 to the age in half-lives, so the first to arrive are drawn one after the other
    with probabilities by weight (Efraimidis and Spirakis 2006, "Weighted random sampling with a reservoir"). They are
    compared by their logarithms, which no age can overflow, and to which an age is added: counted from no particular
    day, as only differences matter.
    """

    def arrival(example: TrainingExample) -> tuple[float, str]:
        uniform = _uniform("mix", str(seed), example.origin, example.pair_id)
        time = math.log(max(-math.log1p(-uniform), sys.float_info.min))
        if half_life_s is not None and example.created_at is not None:
            time -= math.log(2) * example.created_at / half_life_s
        return time, example.pair_id

    return arrival


def _held_pair(example: TrainingExample) -> PreferencePair:
    """An original preference as evaluations read pairs."""
    return PreferencePair(
        id=example.pair_id,
        alias="",
        source=str(Origin.ORIGINAL),
        prompt=example.prompt,
        chosen=example.chosen,
        rejected=example.rejected,
        margin=1.0,
        n_voters=0,
        principals=(),
        chosen_interaction=None,
        rejected_interaction="",
        models=(),
        probability=1.0,
        created_at=0.0,
        tools=example.tools,
    )


def _holdout_source(example: TrainingExample) -> str:
    """Under which the hold-out has its like: the original preferences are one source there."""
    return str(Origin.ORIGINAL) if example.origin == Origin.ORIGINAL else example.source


def _uniform(*parts: str) -> float:
    """In [0, 1)."""
    key = "\x1f".join(parts).encode("utf-8", "surrogatepass")
    return (int.from_bytes(hashlib.blake2b(key, digest_size=8).digest()) >> 11) / 2**53


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
