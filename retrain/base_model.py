"""The base model in this process, for training and for log-probabilities."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel


def load_base(name: str, dtype: str) -> PreTrainedModel:
    """Load a directory or hub name with its weights in `dtype`."""
    return AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, dtype), attn_implementation="sdpa")


@contextmanager
def quiet_renames() -> Iterator[None]:
    """Keep one warning from the user: PEFT and TRL still read a name that transformers 5 is renaming."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated", category=FutureWarning)
        yield
