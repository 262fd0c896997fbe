"""Would this training set train what it should? Every example is tokenised and looked at before a GPU is touched."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean
from typing import Any, Final, Protocol

from jinja2 import TemplateError
from transformers import AutoConfig, AutoTokenizer

from feedback.chat_messages import for_templates
from feedback.filters.length_bias import measure as measure_bias
from feedback.interactions import Message
from feedback.tools import Tool
from feedback.tools import for_templates as tools_for_templates
from pawl.settings import PreflightSettings
from retrain.adapters import base_fingerprint
from retrain.dataset import TrainingExample, canonical_json

MAX_LOST_SHARE: Final = PreflightSettings().max_lost_share
"""Of sets that have no settings of their own."""
MIN_FOR_BIAS = 30
"""Examples below which a mean of lengths says nothing about what is taught."""
READ_ALOUD: Final = (
    "How do I bake bread?",
    "  Two spaces,\ttabs\nand lines\r\n",
    "naïve Straße 東京 Ελλάδα 🙂",
    "x = [1, 22, 333]; don't STOP_here",
)
"""What a tokenizer makes of these tells its rules apart where its vocabulary does not."""


class Render(Protocol):
    """Messages, and the functions offered with them, as token ids."""

    def __call__(self, messages: Sequence[Message], tools: Sequence[Tool] | None = None, /) -> Sequence[int]: ...


@dataclass(frozen=True)
class Encoder:
    """The tokenizer's side of it: two ways to render messages as token ids, and the ids that end a turn."""

    prompt: Render
    """With the generation prompt, as the engine sees it."""
    conversation: Render
    """Without it, the last message being the assistant's."""
    stop_ids: frozenset[int]
    n_known: int | None = None
    """Tokens the model has embeddings for; None where nobody can say."""


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
    n_unknown_tokens: int
    """Examples with a token that the model has no embedding for."""
    n_chosen_longer: int
    mean_length_difference: float
    """Chosen minus rejected, in tokens; far from 0, length itself is what is being taught."""
    length_bias: float | None
    """The mean of log(tokens of chosen / tokens of rejected)."""
    length_bias_ci: tuple[float, float] | None
    """Of it, Student's at 95 %; None for fewer than two examples."""
    longest: int
    n_tokens: int
    """Of both sides of every example, prompts counted twice, as they are trained on."""
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
    is_known: bool

    @property
    def longest(self) -> int:
        return self.n_prompt + max(self.n_chosen, self.n_rejected)


def check_round(
    base: str,
    examples: Iterable[TrainingExample],
    parent: Mapping[str, Any] | None,
    *,
    max_length: int,
    limits: PreflightSettings,
) -> PreflightReport:
    """Everything that can be known of a training before it is run.

    Args:
        base: directory or hub name of the base model.
        parent: the manifest of the adapter that is to be continued; None for a fresh one.
    """
    tokenizer = AutoTokenizer.from_pretrained(base)
    encoder = replace(encoder_of(tokenizer), n_known=_n_embeddings(base))
    report = check(examples, encoder, max_length=max_length, limits=limits)
    found = Identity(base_fingerprint(base), tokenizer_fingerprint(tokenizer))
    return replace(report, problems=(*report.problems, *identity_problems(found, parent or {})))


def check(
    examples: Iterable[TrainingExample],
    encoder: Encoder,
    *,
    max_length: int,
    limits: PreflightSettings = PreflightSettings(),  # noqa: B008 - frozen.
) -> PreflightReport:
    """Tokenise all of `examples` the way TRL does and count what would go wrong."""
    rows = [_tokenise(example, encoder) for example in examples]
    dropped = [row for row in rows if row.n_prompt >= max_length]
    truncated = [row for row in rows if row.n_prompt < max_length < row.longest]
    bias = measure_bias(math.log((1 + row.n_chosen) / (1 + row.n_rejected)) for row in rows)
    counts = PreflightReport(
        n_examples=len(rows),
        n_dropped=len(dropped),
        n_truncated=len(truncated),
        n_prefix_mismatch=sum(not row.is_prefix for row in rows),
        n_missing_stop=sum(not row.has_stops for row in rows),
        n_same_sides=sum(row.is_same for row in rows),
        n_unknown_tokens=sum(not row.is_known for row in rows),
        n_chosen_longer=sum(row.n_chosen > row.n_rejected for row in rows),
        mean_length_difference=fmean(row.n_chosen - row.n_rejected for row in rows) if rows else 0.0,
        length_bias=bias.mean,
        length_bias_ci=None if bias.ci_lower is None or bias.ci_upper is None else (bias.ci_lower, bias.ci_upper),
        longest=max((row.longest for row in rows), default=0),
        n_tokens=sum(2 * row.n_prompt + row.n_chosen + row.n_rejected for row in rows),
        problems=(),
    )
    return replace(counts, problems=_problems(counts, max_length, limits))


@dataclass(frozen=True)
class Identity:
    """Which base model and which tokenizer, by what they are and not by where they lie."""

    base_sha: str
    tokenizer_sha: str


def identity_problems(found: Identity, parent: Mapping[str, Any]) -> tuple[str, ...]:
    """What a parent adapter was made with and is not there any more; what its manifest leaves out is not looked at."""
    names = (("base_sha", found.base_sha, "base model"), ("tokenizer_sha", found.tokenizer_sha, "tokenizer"))
    return tuple(
        f"the parent {parent.get('name', 'adapter')} was trained with another {what}: its manifest says "
        f"{str(parent[key])[:12]}, here is {sha[:12]}; start again from the base, or bring the old {what} back"
        for key, sha, what in names
        if parent.get(key) and parent[key] != sha
    )


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """sha256 of what a tokenizer does: its vocabulary, its chat template, its special tokens, and some texts read."""
    does = {
        "vocabulary": sorted(tokenizer.get_vocab().items()),
        "template": tokenizer.chat_template or "",
        "special": {name: str(token) for name, token in sorted(tokenizer.special_tokens_map.items())},
        "reads": [list(tokenizer(text, add_special_tokens=True)["input_ids"]) for text in READ_ALOUD],
    }
    return hashlib.sha256(canonical_json(does).encode()).hexdigest()


def encoder_of(tokenizer: Any, stop_ids: frozenset[int] = frozenset()) -> Encoder:
    """Render with a Hugging Face tokenizer's chat template.

    Args:
        tokenizer: a `PreTrainedTokenizerBase` with a chat template and an end-of-sequence token.
        stop_ids: tokens besides it that end an answer, such as those of the model's generation settings.
    """

    def render(
        messages: Sequence[Message], tools: Sequence[Tool] | None = None, *, add_generation_prompt: bool
    ) -> list[int]:
        plain = [for_templates(message) for message in messages]
        offered = {"tools": tools_for_templates(tools)} if tools else {}
        return list(
            tokenizer.apply_chat_template(
                plain, tokenize=True, add_generation_prompt=add_generation_prompt, return_dict=True, **offered
            )["input_ids"]
        )

    return Encoder(
        prompt=partial(render, add_generation_prompt=True),
        conversation=partial(render, add_generation_prompt=False),
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
    prompt = encoder.prompt(example.prompt, example.tools)
    with_chosen = encoder.conversation([*example.prompt, example.chosen], example.tools)
    with_rejected = encoder.conversation([*example.prompt, example.rejected], example.tools)
    start = min(common_prefix(prompt, with_chosen), common_prefix(prompt, with_rejected))
    chosen, rejected = with_chosen[start:], with_rejected[start:]
    return _Tokenised(
        n_prompt=start,
        n_chosen=len(chosen),
        n_rejected=len(rejected),
        is_prefix=start == len(prompt),
        has_stops=not (encoder.stop_ids.isdisjoint(chosen) or encoder.stop_ids.isdisjoint(rejected)),
        is_same=list(chosen) == list(rejected),
        is_known=encoder.n_known is None or max((*with_chosen, *with_rejected), default=0) < encoder.n_known,
    )


def _problems(report: PreflightReport, max_length: int, limits: PreflightSettings) -> tuple[str, ...]:
    n = report.n_examples
    n_lost = report.n_dropped + report.n_truncated
    candidates = (
        (n == 0, "there is nothing to train on"),
        (
            n_lost > limits.max_lost_share * n,
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
        (
            report.n_unknown_tokens > 0,
            f"{report.n_unknown_tokens} of {n} examples have tokens that the model has no embedding for; the tokenizer "
            "belongs to another model",
        ),
        (_teaches_length(report, limits), _length_sentence(report, limits)),
    )
    return tuple(sentence for applies, sentence in candidates if applies)


def _teaches_length(report: PreflightReport, limits: PreflightSettings) -> bool:
    """Only where it is known: both ends of the interval are on the same side, over the limit."""
    if limits.max_length_bias is None or report.length_bias_ci is None or report.n_examples < MIN_FOR_BIAS:
        return False
    lower, upper = report.length_bias_ci
    return max(lower, -upper) > limits.max_length_bias


def _length_sentence(report: PreflightReport, limits: PreflightSettings) -> str:
    mean = report.length_bias or 0.0
    limit = math.exp(limits.max_length_bias or 0.0)
    n, n_longer = report.n_examples, report.n_chosen_longer
    return (
        f"{n_longer} of {n} preferred answers are the longer one, and on average the preferred answer is "
        f"{math.exp(mean):.2f} times as long as the other ({1 / limit:.2f} to {limit:.2f} are allowed): length is what "
        "would be learned"
    )


def _n_embeddings(base: str) -> int | None:
    config = AutoConfig.from_pretrained(base).get_text_config()
    return int(config.vocab_size) if getattr(config, "vocab_size", None) else None
