"""A reward model: the base with an adapter and a head that gives an answer one number, learned from people's choices.

The manifest beside the weights says how well it found people's choices again on pairs it had not seen. `RewardModel`
has the form of `ScoreAnswers`, so it can judge for the gate, rank the best of several answers, and reward in GRPO.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from pawl.errors import BadAdapter
from retrain.adapters import base_fingerprint
from retrain.answer_scores import Conversation
from retrain.base_model import quiet_renames
from retrain.errors import EvaluationFailed
from retrain.preflight import Encoder, encoder_of
from retrain.sealed_files import verify_files
from retrain.trl_training import can_pad

KIND = "reward"
FILES = {"adapter_config.json", "adapter_model.safetensors"}


class RewardModel:
    """A sealed reward model in memory. Calling it scores conversations."""

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int,
        batch_size: int,
        manifest: Mapping[str, Any] | None = None,
    ) -> None:
        self.model = model.eval()
        self.encoder = encoder_of(tokenizer)
        self.pad_id = int(tokenizer.pad_token_id)
        self.max_length = max_length
        self.batch_size = batch_size
        self.manifest = manifest or {}

    @classmethod
    def load(cls, path: Path, base: str, *, dtype: str, batch_size: int = 16) -> RewardModel:
        """Read a sealed reward model and the base it belongs to.

        Args:
            base: directory or hub name of the base model.
            batch_size: answers scored at once; it bounds the memory, not how many can be scored.

        Raises:
            BadAdapter: its files are not those that were sealed, or it was trained on another base.
        """
        manifest = verify_files(path, KIND)
        if set(manifest["files"]) != FILES:
            raise BadAdapter(f"{path} is not a reward model: it holds {', '.join(sorted(manifest['files']))}")
        if manifest.get("base_sha") != base_fingerprint(base):
            raise BadAdapter(f"{path.name} was trained on another base model than {base}")
        tokenizer = can_pad(AutoTokenizer.from_pretrained(base))
        with quiet_renames():
            model = PeftModel.from_pretrained(headed_base(base, dtype, tokenizer), str(path))
        device = "cuda" if torch.cuda.is_available() else "cpu"
        max_length = int(manifest["max_length"])
        return cls(model.to(device), tokenizer, max_length=max_length, batch_size=batch_size, manifest=manifest)

    @property
    def name(self) -> str:
        return str(self.manifest.get("name", KIND))

    @property
    def beats_chance(self) -> bool:
        """Whether it found people's choices again on unseen pairs, more surely than a coin."""
        return bool(self.manifest.get("holdout", {}).get("beats_chance"))

    def __call__(self, conversations: Sequence[Conversation]) -> list[float]:
        return self.score(conversations)

    def score(self, conversations: Sequence[Conversation]) -> list[float]:
        """One number per conversation, for its last message. A batch at a time; those of like length together.

        Raises:
            EvaluationFailed: a score is not a finite number.
        """
        rows = [tokens_of(conversation, self.encoder, self.max_length) for conversation in conversations]
        order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
        scores = [0.0] * len(rows)
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            for index, value in zip(batch, self._scores([rows[index] for index in batch]), strict=True):
                scores[index] = value
        if not all(map(math.isfinite, scores)):
            raise EvaluationFailed(f"{self.name} gave a score that is infinite or not a number")
        return scores

    def _scores(self, rows: Sequence[Sequence[int]]) -> list[float]:
        """Scores of rows of token ids, in one pass."""
        tokens = torch.full((len(rows), max(map(len, rows))), self.pad_id)
        present = torch.zeros_like(tokens)
        for number, row in enumerate(rows):
            tokens[number, : len(row)] = torch.tensor(row)
            present[number, : len(row)] = 1
        device = next(self.model.parameters()).device
        with torch.inference_mode():
            logits = self.model(input_ids=tokens.to(device), attention_mask=present.to(device)).logits
        return [float(value) for value in logits[:, 0].float()]


def tokens_of(conversation: Conversation, encoder: Encoder, max_length: int) -> list[int]:
    """A conversation as the reward model reads it: the end of a long one, for there the answer is."""
    return list(encoder.conversation(conversation))[-max_length:]


def headed_base(base: str, dtype: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The base model with a head of one number in place of its output layer; the head starts random."""
    with _quiet_head():
        model = AutoModelForSequenceClassification.from_pretrained(
            base, num_labels=1, dtype=getattr(torch, dtype), attn_implementation="sdpa"
        )
    # The head reads the last token that is no padding, so it must know what padding is.
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return model


@contextmanager
def _quiet_head() -> Iterator[None]:
    """Keep one report from the user: that the head is new and the output layer is not used is what is wanted."""
    loader = logging.getLogger("transformers")
    level = loader.level
    loader.setLevel(logging.ERROR)
    try:
        yield
    finally:
        loader.setLevel(level)
