"""The shape of an adapter: which layers of a base model it changes."""

from __future__ import annotations

import torch
from peft import LoraConfig
from transformers import PreTrainedModel

HEAD = "score"
"""What transformers calls the layer that makes one number of a sequence."""


def adapter_shape(base: PreTrainedModel, *, rank: int, alpha: int) -> LoraConfig:
    """All linear layers but the output layer, and nothing that vLLM refuses to serve.

    PEFT's own "all-linear" writes full module paths into the configuration of a small model; servers expect plain
    names.
    """
    return LoraConfig(r=rank, lora_alpha=alpha, target_modules=_inner_layers(base), bias="none", task_type="CAUSAL_LM")


def reward_shape(base: PreTrainedModel, *, rank: int, alpha: int) -> LoraConfig:
    """The same with a head that is trained whole: it starts random, and must be kept with the rest."""
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=_inner_layers(base),
        bias="none",
        modules_to_save=[HEAD],
        task_type="SEQ_CLS",
    )


def _inner_layers(base: PreTrainedModel) -> list[str]:
    output = base.get_output_embeddings()
    layers = ((name, module) for name, module in base.named_modules() if isinstance(module, torch.nn.Linear))
    names = {name.rsplit(".", 1)[-1] for name, module in layers if module is not output}
    return sorted(names - {HEAD})
