"""Would this training set train what it should? Every example is tokenised and looked at before a GPU is touched."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Final

from jinja2 import TemplateError

from feedback.chat_messages import for_templates
from feedback.interactions import Message
from retrain.dataset import TrainingExample

MAX_LOST_SHARE = 0.05
"""Examples that may be cut short or dropped for length before the set counts as unfit."""


@dataclass(frozen=True)
class Encoder:
    """The tokenizer's side of it: two ways to render messages as token ids, and the ids that end a turn."""

    prompt: Callable[[Sequence[Message]], Sequence[int]]
    """With the generation prompt, as the engine sees it."""
    conversation: Callable[[Sequence[Message]], Sequence[int]]
    """Without it, the last message being the assistant's."""
    stop_ids: frozenset[int]


@dataclass(frozen=True)
class PreflightReport:
    """What was counted, and what must be fixed."""

    n_examples: int
    n_dropped: int
    """The prompt alone fills the length limit, so TRL leaves the example out without a word."""
    n_truncated: int
    """A side does not fit, so its end, stop token included, is never learned."""
    n_prefix_mismatch: int
    """The chat template renders the prompt differently once an answer follows."""
    n_missing_stop: int
    """No token that ends a turn in one of the answers: the model would learn to run on."""
    n_same_sides: int
    """Chosen and rejected are the same tokens."""
    mean_length_difference: float
    """Chosen minus rejected, in tokens; far from 0, length itself is what is being taught."""
    longest: int
    problems: tuple[str, ...]
    """Plain sentences; empty means the set may train."""


@dataclass(frozen=True)
class _Tokenised:
    n_prompt: int
    n_chosen: int
    n_rejected: int
    is_prefix: bool
    has_stops: bool
    is_same: bool

    @property
    def longest(self) -> int:
        return self.n_prompt + max(self.n_chosen, self.n_rejected)


def check(examples: Iterable[TrainingExample], encoder: Encoder, *, max_length: int) -> PreflightReport:
    """Tokenise all of `examples` the way TRL does and count what would go wrong."""
    rows = [_tokenise(example, encoder) for example in examples]
    dropped = [row for row in rows if row.n_prompt >= max_length]
    truncated = [row for row in rows if row.n_prompt < max_length < row.longest]
    counts = PreflightReport(
        n_examples=len(rows),
        n_dropped=len(dropped),
        n_truncated=len(truncated),
        n_prefix_mismatch=sum(not row.is_prefix for row in rows),
        n_missing_stop=sum(not row.has_stops for row in rows),
        n_same_sides=sum(row.is_same for row in rows),
        mean_length_difference=fmean(row.n_chosen - row.n_rejected for row in rows) if rows else 0.0,
        longest=max((row.longest for row in rows), default=0),
        problems=(),
    )
    return PreflightReport(**{**vars(counts), "problems": _problems(counts, max_length)})


def encoder_of(tokenizer: Any, stop_ids: frozenset[int] = frozenset()) -> Encoder:
    """Render with a Hugging Face tokenizer's chat template.

    Args:
        tokenizer: a `PreTrainedTokenizerBase` with a chat template and an end-of-sequence token.
        stop_ids: tokens besides it that end an answer, such as those of the model's generation settings.
    """

    def render(messages: Sequence[Message], *, add_generation_prompt: bool) -> list[int]:
        plain = [for_templates(message) for message in messages]
        return list(
            tokenizer.apply_chat_template(
                plain, tokenize=True, add_generation_prompt=add_generation_prompt, return_dict=True
            )["input_ids"]
        )

    return Encoder(
        prompt=lambda messages: render(messages, add_generation_prompt=True),
        conversation=lambda messages: render(messages, add_generation_prompt=False),
        stop_ids=stop_ids | {tokenizer.eos_token_id},
    )


_CALL: Final = {"type": "function", "function": {"name": "look_up", "arguments": {"title": "Emma"}}}
_TOOL_USE: Final[Sequence[Message]] = (
    {"role": "user", "content": "Who wrote it?"},
    {"role": "assistant", "content": "", "tool_calls": [_CALL]},
    {"role": "tool", "name": "look_up", "content": "Jane Austen"},
)


def reads_tools(tokenizer: Any) -> bool:
    """Whether a tokenizer's chat template shows tool calls, what they ask for and what they gave.

    Some templates refuse them, and others leave them out without a word.
    """
    try:
        text = tokenizer.apply_chat_template([for_templates(message) for message in _TOOL_USE], tokenize=False)
    except (TemplateError, TypeError, ValueError):
        return False
    return all(said in text for said in ("look_up", "title", "Emma", "Jane Austen"))


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """How many tokens the two begin with alike.

    >>> common_prefix([1, 2, 3], [1, 2, 4, 5])
    2
    """
    for index, (one, other) in enumerate(zip(left, right, strict=False)):
        if one != other:
            return index
    return min(len(left), len(right))


def _tokenise(example: TrainingExample, encoder: Encoder) -> _Tokenised:
    prompt = encoder.prompt(example.prompt)
    with_chosen = encoder.conversation([*example.prompt, example.chosen])
    with_rejected = encoder.conversation([*example.prompt, example.rejected])
    start = min(common_prefix(prompt, with_chosen), common_prefix(prompt, with_rejected))
    chosen, rejected = with_chosen[start:], with_rejected[start:]
    return _Tokenised(
        n_prompt=start,
        n_chosen=len(chosen),
        n_rejected=len(rejected),
        is_prefix=start == len(prompt),
        has_stops=not (encoder.stop_ids.isdisjoint(chosen) or encoder.stop_ids.isdisjoint(rejected)),
        is_same=list(chosen) == list(rejected),
    )


def _problems(report: PreflightReport, max_length: int) -> tuple[str, ...]:
    n = report.n_examples
    n_lost = report.n_dropped + report.n_truncated
    candidates = (
        (n == 0, "there is nothing to train on"),
        (
            n_lost > MAX_LOST_SHARE * n,
            f"{report.n_dropped} of {n} prompts fill the limit of {max_length} tokens and {report.n_truncated} answers "
            f"do not fit; raise max_length (the longest example has {report.longest})",
        ),
        (
            report.n_prefix_mismatch > 0,
            f"{report.n_prefix_mismatch} of {n} prompts are rendered differently once an answer follows; the chat "
            "template must keep the prompt as it is",
        ),
        (
            report.n_missing_stop > 0,
            f"{report.n_missing_stop} of {n} answers end without a stop token; the chat template must close every turn",
        ),
        (report.n_same_sides > 0, f"{report.n_same_sides} of {n} examples prefer an answer to itself"),
    )
    return tuple(sentence for applies, sentence in candidates if applies)
