"""The sizes of a base model's linear layers, from its configuration: no weights are read."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pawl.adapter_files import LayerSizes


def linear_layers(base: str) -> LayerSizes:
    """By each layer's full name, how many values go out and how many come in.

    Args:
        base: directory or hub name.
    """
    config = AutoConfig.from_pretrained(base)
    with torch.device("meta"):  # Shapes without memory.
        model = AutoModelForCausalLM.from_config(config)
    layers = ((name, module) for name, module in model.named_modules() if isinstance(module, torch.nn.Linear))
    return {name: (module.out_features, module.in_features) for name, module in layers}
