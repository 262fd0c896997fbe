"""Measures how far an adapter is from its base, on the trainer's side: in what it says and in its weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import AutoTokenizer

from feedback.pairs import PreferencePair
from retrain.base_model import load_base, quiet_renames
from retrain.drift import Drift
from retrain.errors import EvaluationFailed
from retrain.preflight import common_prefix, encoder_of

MAX_ANSWERS = 200
ADAPTER = "default"


class _Answer(NamedTuple):
    """A prompt with an answer, as tokens; the answer starts at `start`."""

    tokens: Sequence[int]
    start: int


def measure_drift(
    base: str, adapter: Path, pairs: Sequence[PreferencePair], *, dtype: str, max_length: int, batch_size: int
) -> Drift:
    """The distance of an adapter's model from its base.

    The divergence is exact at every token of the preferred answers, the whole vocabulary summed up, so a few hundred
    answers are enough; it is not that of answers the model would give itself, which an engine has to be asked for.

    Args:
        pairs: at most `MAX_ANSWERS` of them are looked at, the same ones whatever their order.

    Raises:
        EvaluationFailed: there is nothing to measure on, or what was measured is not a number.
    """
    answers = _answers(base, sorted(pairs, key=lambda pair: pair.id)[:MAX_ANSWERS], max_length)
    with quiet_renames():
        model: Any = PeftModel.from_pretrained(load_base(base, dtype), str(adapter), adapter_name=ADAPTER)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    with torch.inference_mode():
        drift = Drift(kl=_kl_per_token(model, answers, batch_size), weight_change=weight_change(model))
    if not all(map(math.isfinite, (drift.kl, drift.weight_change))):
        raise EvaluationFailed("the drift from the base is not a number")
    return drift


def weight_change(model: PeftModel) -> float:
    """The norm of everything the adapter adds, over the norm of the layers it is added to (Frobenius).

    |B A|^2 = tr((B^T B)(A A^T)): two products of the rank's size instead of one of the layer's.
    """
    added = whole = 0.0
    for layer in model.modules():
        if isinstance(layer, LoraLayer) and ADAPTER in layer.lora_A:
            a, b = layer.lora_A[ADAPTER].weight.double(), layer.lora_B[ADAPTER].weight.double()
            added += layer.scaling[ADAPTER] ** 2 * float(((b.T @ b) * (a @ a.T)).sum())
            whole += float(layer.get_base_layer().weight.double().square().sum())
    return math.sqrt(max(added, 0.0) / whole) if whole else 0.0


def _kl_per_token(model: Any, answers: Sequence[_Answer], batch_size: int) -> float:
    divergences = [one for batch in _batches(answers, batch_size) for one in _divergences(model, batch)]
    if not divergences:
        raise EvaluationFailed("there are no answers to measure the drift from the base on")
    return math.fsum(divergences) / len(divergences)


def _batches(answers: Sequence[_Answer], size: int) -> Iterator[Sequence[_Answer]]:
    by_length = sorted(answers, key=lambda answer: len(answer.tokens))
    yield from (by_length[start : start + size] for start in range(0, len(by_length), size))


def _divergences(model: Any, batch: Sequence[_Answer]) -> list[float]:
    """KL(model || base) at every token of every answer, a row at a time: vocabularies are large."""
    shape = (len(batch), max(len(answer.tokens) for answer in batch))
    tokens, present = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    for row, answer in enumerate(batch):
        tokens[row, : len(answer.tokens)] = torch.tensor(answer.tokens)
        present[row, : len(answer.tokens)] = 1
    inputs = {"input_ids": tokens.to(model.device), "attention_mask": present.to(model.device)}
    own = model(**inputs).logits
    with model.disable_adapter():
        base = model(**inputs).logits
    found: list[float] = []
    for row, answer in enumerate(batch):
        scored = slice(answer.start - 1, len(answer.tokens) - 1)
        p, q = (logits[row, scored].float().log_softmax(-1) for logits in (own, base))
        found += (p.exp() * (p - q)).sum(-1).tolist()
    return found


def _answers(base: str, pairs: Sequence[PreferencePair], max_length: int) -> list[_Answer]:
    encoder = encoder_of(AutoTokenizer.from_pretrained(base))
    found = []
    for pair in pairs:
        tokens = encoder.conversation([*pair.prompt, pair.chosen], pair.tools)[:max_length]
        start = common_prefix(encoder.prompt(pair.prompt, pair.tools), tokens)
        if 0 < start < len(tokens):
            found.append(_Answer(tokens, start))
    return found
