"""A pair's prompt goes through the model once, not once per side.

A preference batch holds every prompt twice, before the chosen and before the rejected answer. Here a row is laid out as
prompt, chosen, rejected; either answer sees the prompt and itself, at the positions it would have had in a row of its
own, so every log-probability is what it was (prefix sharing: Wang and Hegde 2024, "Accelerating Direct Preference
Optimization with Prefix Sharing", section 3). The head, too, then works on answers only.

It is put between TRL's loss and the model, so every loss that TRL computes from a batch of pairs can use it.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import structlog
import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

log = structlog.get_logger()

IGNORED = -100
PROMPT, CHOSEN, REJECTED, PADDING = range(4)
WORTH_IT = 0.9
"""Shared rows are used where they have at most this share of the batch's positions: their attention needs an explicit
mask, which kernels take longer over than over a causal one."""
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 2e-2}
"""How far the mean log-probability of a token may be off in the trial before the first batch, by the weights' dtype."""


@dataclass(frozen=True)
class PairRows:
    """A batch of n pairs, laid out as n rows. Shapes: n pairs, w positions, s scored tokens."""

    tokens: Tensor
    """(n, w)"""
    positions: Tensor
    """(n, w); those of the rows of a side's own."""
    attention: Tensor
    """(n, 1, w, w), true where a position sees another."""
    scored_at: tuple[Tensor, Tensor]
    """Row and position whose state predicts each scored token; (s,) each."""
    targets: Tensor
    """(s,)"""
    home: tuple[Tensor, Tensor]
    """Where each scored token's results belong in the batch of 2 n rows, shifted by one; (s,) each."""


class _Sides(NamedTuple):
    """Lengths of a pair's parts, (n, 1) each."""

    prompt: Tensor
    chosen: Tensor
    rejected: Tensor


def lay_out(tokens: Tensor, attention: Tensor, labels: Tensor) -> PairRows | None:
    """Lay out a padded batch of chosen rows and then rejected rows, (2 n, l) each; None where it would not pay.

    Args:
        attention: 1 on text, 0 on the padding to its right.
        labels: the token where it is scored, -100 on prompts and padding.
    """
    sides = _sides(attention, labels)
    if sides is None:
        return None
    width = int((sides.prompt + sides.chosen + sides.rejected).max())
    if len(tokens) // 2 * width > WORTH_IT * tokens.numel():
        return None
    place = torch.arange(width, device=tokens.device).unsqueeze(0)
    parts = _parts(place, sides)
    column = torch.where(parts == REJECTED, place - sides.chosen, place).where(parts != PADDING, 0)
    n_pairs = len(tokens) // 2
    row = torch.arange(n_pairs, device=tokens.device).unsqueeze(1) + n_pairs * (parts == REJECTED)
    scored_row, before = (labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
    pair = scored_row % n_pairs
    is_behind_chosen = (scored_row >= n_pairs) & (before >= sides.prompt[pair, 0])
    return PairRows(
        tokens=tokens[row, column],
        positions=column,
        attention=_attention(parts).unsqueeze(1),
        scored_at=(pair, before + sides.chosen[pair, 0] * is_behind_chosen),
        targets=labels[scored_row, before + 1],
        home=(scored_row, before),
    )


def supports_sharing(config: PretrainedConfig) -> str | None:
    """Why the model cannot have prompts shared, None if it can."""
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    if config._attn_implementation != "sdpa":
        return "its attention takes no mask of ours"
    if kinds != {"full_attention"} or getattr(text, "sliding_window", None) is not None:
        return "not all of its layers see the whole text"
    if getattr(text, "num_local_experts", None) or getattr(text, "num_experts", None):
        return "the balance of its experts counts every row"
    return None


def share_prompts(model: PreTrainedModel) -> str | None:
    """Make the model's fused forward, which TRL calls, share prompts.

    Before the first batch it is tried against the forward that it replaces, and given up where they differ: a model
    may do something with positions that its configuration does not tell.

    Returns:
        Why it cannot be done, None if it is.
    """
    if reason := supports_sharing(model.config):
        return reason
    model.forward = types.MethodType(_SharedForward(model), model)
    return None


class _SharedForward:
    def __init__(self, model: PreTrainedModel) -> None:
        self.plain = model.forward
        self.scored_at: tuple[Tensor, Tensor] | None = None
        self.is_trusted: bool | None = None
        model.base_model.register_forward_hook(self._keep_scored)

    def __call__(self, _model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        rows = self._rows(kwargs) if kwargs.get("fused_lm_head") and not args else None
        if rows is None or not self._passes_trial(rows, kwargs):
            return self.plain(*args, **kwargs)
        return self._forward(rows, kwargs)

    def _rows(self, kwargs: dict[str, Any]) -> PairRows | None:
        tokens, attention, labels = (kwargs.get(name) for name in ("input_ids", "attention_mask", "labels"))
        if self.is_trusted is False or tokens is None or attention is None or labels is None or len(tokens) % 2:
            return None
        return lay_out(tokens, attention, labels)

    def _passes_trial(self, rows: PairRows, kwargs: dict[str, Any]) -> bool:
        if self.is_trusted is None:
            with torch.no_grad():
                expected, found = self.plain(**kwargs).log_probs, self._forward(rows, kwargs).log_probs
            difference = float((expected - found).abs().sum() / max(1, len(rows.targets)))
            self.is_trusted = difference <= TOLERANCE.get(_weights_dtype(self.plain.__self__), 0.0)
            if not self.is_trusted:
                log.warning("prompts_not_shared", reason="log-probabilities differ", difference=difference)
        return self.is_trusted

    def _forward(self, rows: PairRows, kwargs: dict[str, Any]) -> Any:
        others = {name: value for name, value in kwargs.items() if name not in ("labels", "attention_mask")}
        ours = {"input_ids": rows.tokens, "attention_mask": rows.attention, "position_ids": rows.positions}
        with self._scoring(rows):
            output = self.plain(**others | ours, shift_labels=rows.targets.unsqueeze(0))
        shape = kwargs["labels"][:, 1:].shape
        per_token = {
            field.name: _bring_home(value, rows.home, shape)
            for field in dataclasses.fields(output)
            if (value := getattr(output, field.name)) is not None and value.dim() == 2
        }
        return dataclasses.replace(output, **per_token)

    @contextmanager
    def _scoring(self, rows: PairRows) -> Iterator[None]:
        self.scored_at = rows.scored_at
        try:
            yield
        finally:
            self.scored_at = None

    def _keep_scored(self, _backbone: torch.nn.Module, _args: Any, output: Any) -> Any:
        """Leave only the states that predict a scored token, as one row."""
        if self.scored_at is not None:
            output.last_hidden_state = output.last_hidden_state[self.scored_at].unsqueeze(0)
        return output


def _sides(attention: Tensor, labels: Tensor) -> _Sides | None:
    """Lengths of the parts; None for a batch whose rows do not pair up, or that has a pair without a prompt."""
    scored = (labels != IGNORED).sum(1)
    prompt, other_prompt = (attention.sum(1) - scored).chunk(2)
    if not bool(((prompt == other_prompt) & (prompt > 0)).all()):
        return None
    chosen, rejected = scored.chunk(2)
    return _Sides(prompt.unsqueeze(1), chosen.unsqueeze(1), rejected.unsqueeze(1))


def _parts(place: Tensor, sides: _Sides) -> Tensor:
    """Which part each position belongs to, (n, w)."""
    chosen_end = sides.prompt + sides.chosen
    ends = (sides.prompt, chosen_end, chosen_end + sides.rejected)
    return torch.stack([place >= end for end in ends]).sum(0)


def _attention(parts: Tensor) -> Tensor:
    """(n, w, w): back to the prompt and within the own part. Padding sees the prompt, so that no row is without."""
    width = parts.shape[1]
    is_before = torch.ones(width, width, dtype=torch.bool, device=parts.device).tril()
    seen, seeing = parts.unsqueeze(1), parts.unsqueeze(2)
    return is_before & ((seen == PROMPT) | (seen == seeing))


def _bring_home(values: Tensor, home: tuple[Tensor, Tensor], shape: torch.Size) -> Tensor:
    return values.new_zeros(shape).index_put(home, values.squeeze(0))


def _weights_dtype(model: PreTrainedModel) -> torch.dtype:
    dtype: torch.dtype = model.get_output_embeddings().weight.dtype
    return dtype
