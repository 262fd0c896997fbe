"""What supervised training learns from: conversations whose answers are worth imitating, and which of their tokens.

Only the assistant's turns are learned, each with the token that ends it: a model that never sees the end of a turn
never learns to stop. Masks come from rendering a conversation turn by turn, so every chat template will do that keeps
what it has rendered; those that change earlier turns are rendered once per answer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from feedback.candidates import Source
from feedback.chat_messages import unfit
from feedback.interactions import Message
from feedback.pairs import PreferencePair
from retrain.errors import BadData
from retrain.preflight import Encoder, common_prefix

MAX_LOST_SHARE = 0.05
"""Conversations that may be cut short or left out for length before they count as unfit."""
NOT_LEARNED = -100
"""The label that torch's cross entropy leaves out."""


@dataclass(frozen=True)
class Demonstration:
    """A conversation to imitate."""

    id: str
    source: str
    messages: tuple[Message, ...]
    first_learned: int
    """The assistant's messages from here on are learned; earlier ones are only read."""

    @property
    def learned(self) -> list[int]:
        """Where the messages stand that are learned."""
        turns = range(self.first_learned, len(self.messages))
        return [turn for turn in turns if self.messages[turn].get("role") == "assistant"]


class Labelled(NamedTuple):
    """Token ids, and the same with `NOT_LEARNED` where nothing is learned."""

    tokens: tuple[int, ...]
    labels: tuple[int, ...]


@dataclass(frozen=True)
class Prepared:
    """What is trained on, and what was counted on the way."""

    rows: tuple[Labelled, ...]
    n_demonstrations: int
    n_truncated: int
    """Rows of which the end, stop token included, is never learned."""
    n_dropped: int
    """Rows of which nothing learned is left within the limit."""
    n_changed_prompts: int
    """Answers after which the chat template renders the prompt in another way."""
    n_missing_stop: int
    """Answers without a token that ends a turn."""
    n_learned_tokens: int
    longest: int
    problems: tuple[str, ...]
    """Plain sentences; empty means that it may train."""


def parse_demonstrations(lines: Iterable[str]) -> list[Demonstration]:
    """Read conversations: `messages`, of which every answer is learned, or `prompt` and one `completion`.

    Raises:
        BadData: a line is neither; the text names its number.
    """
    return [_parse(number, line) for number, line in enumerate(lines, 1) if line.strip()]


def from_edits(pairs: Iterable[PreferencePair]) -> list[Demonstration]:
    """What users made of answers they did not like: their text is learned, not the turns before it."""
    return [
        Demonstration(pair.id, pair.source, (*pair.prompt, pair.chosen), len(pair.prompt))
        for pair in pairs
        if pair.source == Source.EDIT
    ]


def prepare(demonstrations: Sequence[Demonstration], encoder: Encoder, *, max_length: int) -> Prepared:
    """Tokenise everything and look at it before anything is trained."""
    turns = [turn for one in demonstrations for turn in _rendered(one, encoder)]
    cut = [Labelled(row.tokens[:max_length], row.labels[:max_length]) for row in (turn.row for turn in turns)]
    kept = [row for row in cut if any(label != NOT_LEARNED for label in row.labels)]
    counts = Prepared(
        rows=tuple(kept),
        n_demonstrations=len(demonstrations),
        n_truncated=sum(len(turn.row.tokens) > max_length for turn in turns) - (len(cut) - len(kept)),
        n_dropped=len(cut) - len(kept),
        n_changed_prompts=sum(turn.n_changed for turn in turns),
        n_missing_stop=sum(turn.n_unstopped for turn in turns),
        n_learned_tokens=sum(label != NOT_LEARNED for row in kept for label in row.labels),
        longest=max((len(turn.row.tokens) for turn in turns), default=0),
        problems=(),
    )
    return Prepared(**{**vars(counts), "problems": _problems(counts, len(cut), max_length)})


class _Rendered(NamedTuple):
    row: Labelled
    n_changed: int
    n_unstopped: int


class _Span(NamedTuple):
    """Where in a conversation an answer's tokens are, and whether its prompt is what the engine will see."""

    start: int
    end: int
    is_prompt_kept: bool


def _rendered(one: Demonstration, encoder: Encoder) -> list[_Rendered]:
    """One row; one per answer where the template changes what came before."""
    whole = tuple(encoder.conversation(one.messages))
    spans = [_span(one.messages[: turn + 1], whole, encoder) for turn in one.learned]
    if all(span.is_prompt_kept for span in spans) or len(spans) == 1:
        return [_label(whole, spans, encoder)]
    apart = (one.messages[: turn + 1] for turn in one.learned)
    return [
        _label(tokens, [_span(said, tokens, encoder)], encoder)
        for said in apart
        for tokens in (tuple(encoder.conversation(said)),)
    ]


def _span(said: Sequence[Message], whole: Sequence[int], encoder: Encoder) -> _Span:
    prompt, so_far = encoder.prompt(said[:-1]), encoder.conversation(said)
    start, end = common_prefix(prompt, whole), common_prefix(so_far, whole)
    return _Span(start, end, is_prompt_kept=start == len(prompt) and end == len(so_far))


def _label(tokens: tuple[int, ...], spans: Sequence[_Span], encoder: Encoder) -> _Rendered:
    labels = [NOT_LEARNED] * len(tokens)
    for span in spans:
        labels[span.start : span.end] = tokens[span.start : span.end]
    n_unstopped = sum(encoder.stop_ids.isdisjoint(tokens[span.start : span.end]) for span in spans)
    n_changed = sum(not span.is_prompt_kept for span in spans)
    return _Rendered(Labelled(tokens, tuple(labels)), n_changed, n_unstopped)


def _problems(counts: Prepared, n_rows: int, max_length: int) -> tuple[str, ...]:
    n_lost = counts.n_dropped + counts.n_truncated
    candidates = (
        (not counts.rows, "there is nothing to train on"),
        (
            n_lost > MAX_LOST_SHARE * n_rows,
            f"{n_lost} of {n_rows} conversations do not fit into {max_length} tokens; raise max_length "
            f"(the longest has {counts.longest})",
        ),
        (
            counts.n_changed_prompts > 0,
            f"{counts.n_changed_prompts} prompts are rendered differently once an answer follows; the chat template "
            "must keep the prompt as it is",
        ),
        (
            counts.n_missing_stop > 0,
            f"{counts.n_missing_stop} answers end without a stop token; the chat template must close every turn",
        ),
    )
    return tuple(sentence for applies, sentence in candidates if applies)


def _parse(number: int, line: str) -> Demonstration:
    try:
        row = json.loads(line)
        prompt = _messages(row["messages"] if "messages" in row else row["prompt"])
        answer = () if "messages" in row else _messages(row["completion"])
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise BadData(f"demonstrations, line {number}: neither `messages` nor `prompt` and `completion`") from exc
    first = len(prompt) if answer else 0
    name = str(row.get("id") or hashlib.sha256(line.strip().encode("utf-8", "surrogatepass")).hexdigest())
    found = Demonstration(name, str(row.get("source") or "demonstration"), (*prompt, *answer), first)
    if not found.learned or found.messages[-1]["role"] != "assistant":
        raise BadData(f"demonstrations, line {number}: the last message must be the assistant's")
    if unfit(found.messages) is not None or found.learned[0] == 0:
        raise BadData(f"demonstrations, line {number}: no chat template can show this conversation")
    return found


def _messages(rows: Iterable[Mapping[str, Any]]) -> tuple[Message, ...]:
    if isinstance(rows, str | Mapping):
        raise TypeError("not a list of messages")
    return tuple(_message(row) for row in rows)


def _message(row: Mapping[str, Any]) -> Message:
    named = {name: row[name] for name in ("name", "tool_calls", "tool_call_id") if row.get(name) is not None}
    content = row.get("content") if row.get("tool_calls") else row["content"]
    return {"role": str(row["role"]), "content": content, **named}
