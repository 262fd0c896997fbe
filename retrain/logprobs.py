"""How strongly a model prefers one answer over another: its log-probabilities against those of the base.

The reward a preference-trained model implies is r(x, y) = log pi(y|x) - log pi_base(y|x), up to a factor that does not
matter for which of two answers has more of it (Rafailov et al. 2023, "Direct Preference Optimization", eq. 5).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch.nn import functional
from transformers import AutoTokenizer

from feedback.pairs import PreferencePair
from retrain.base_model import load_base, quiet_renames
from retrain.preflight import common_prefix, encoder_of

TIE = 1e-6
"""Rewards closer than this, per pair, are equal."""


class Sequenced(NamedTuple):
    """A prompt with an answer, as tokens; the answer starts at `start`."""

    tokens: tuple[int, ...]
    start: int


class Rewards(NamedTuple):
    """What a model makes of one pair."""

    chosen: float
    rejected: float

    @property
    def score(self) -> float:
        """1 for preferring the chosen answer, 0 for the rejected, 0.5 for neither."""
        difference = self.chosen - self.rejected
        return 0.5 if abs(difference) <= TIE else float(difference > 0)


def implicit_rewards(
    base: str,
    adapters: Mapping[str, Path | None],
    pairs: Sequence[PreferencePair],
    *,
    dtype: str,
    max_length: int,
    batch_size: int,
) -> dict[str, list[Rewards]]:
    """Rewards of every named model on every pair, in the order of `pairs`.

    Args:
        base: directory or hub name of the base model.
        adapters: by model name; None is the base itself, whose rewards are all 0 by definition.
        max_length: tokens beyond it are not looked at, as in training.
    """
    sequences = _sequences(base, pairs, max_length)
    scorer = _Scorer(base, adapters, dtype)
    reference = scorer.logps(None, sequences, batch_size)
    rewards: dict[str, list[Rewards]] = {}
    for name, path in adapters.items():
        logps = reference if path is None else scorer.logps(name, sequences, batch_size)
        gains = [own - base_logp for own, base_logp in zip(logps, reference, strict=True)]
        rewards[name] = [Rewards(*two) for two in zip(gains[::2], gains[1::2], strict=True)]
    return rewards


class _Scorer:
    """The base model with any number of adapters side by side."""

    def __init__(self, base: str, adapters: Mapping[str, Path | None], dtype: str) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        model = load_base(base, dtype)
        self.slots: dict[str, str] = {}
        for name, path in adapters.items():
            if path is not None:
                self.slots[name] = slot = f"adapter{len(self.slots)}"  # PEFT allows no dots in adapter names.
                model = _with_adapter(model, path, slot)
        self.model: Any = model.to(self.device).eval()

    @contextmanager
    def _as(self, name: str | None) -> Iterator[None]:
        if name is not None:
            self.model.set_adapter(self.slots[name])
            yield
        elif self.slots:
            with self.model.disable_adapter():
                yield
        else:
            yield

    def logps(self, name: str | None, sequences: Sequence[Sequenced], batch_size: int) -> list[float]:
        """Log-probability of each answer given its prompt, under one adapter or (None) the base."""
        found: list[float] = []
        with self._as(name), torch.inference_mode():
            for start in range(0, len(sequences), batch_size):
                found += self._batch(sequences[start : start + batch_size])
        return found

    def _batch(self, sequences: Sequence[Sequenced]) -> list[float]:
        longest = max(len(sequence.tokens) for sequence in sequences)
        tokens = torch.zeros((len(sequences), longest), dtype=torch.long)
        present = torch.zeros_like(tokens)
        answer = torch.zeros_like(tokens)
        for row, sequence in enumerate(sequences):
            n = len(sequence.tokens)
            tokens[row, :n] = torch.tensor(sequence.tokens)
            present[row, :n] = 1
            answer[row, sequence.start : n] = 1
        tokens, present, answer = (t.to(self.device) for t in (tokens, present, answer))
        logits = self.model(input_ids=tokens, attention_mask=present).logits[:, :-1].float()
        token_logps = -functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
        return [float(value) for value in (token_logps * answer[:, 1:]).sum(dim=1)]


def _with_adapter(model: Any, path: Path, slot: str) -> Any:
    if isinstance(model, PeftModel):
        model.load_adapter(str(path), adapter_name=slot)
        return model
    with quiet_renames():
        return PeftModel.from_pretrained(model, str(path), adapter_name=slot)


def _sequences(base: str, pairs: Sequence[PreferencePair], max_length: int) -> list[Sequenced]:
    """Chosen and rejected of each pair in turn."""
    encoder = encoder_of(AutoTokenizer.from_pretrained(base))
    found = []
    for pair in pairs:
        prompt = encoder.prompt(pair.prompt, pair.tools)
        for answer in (pair.chosen, pair.rejected):
            tokens = encoder.conversation([*pair.prompt, answer], pair.tools)
            found.append(Sequenced(tuple(tokens[:max_length]), min(common_prefix(prompt, tokens), max_length)))
    return found
