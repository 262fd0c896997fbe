"""Settings with which the tiny model learns something in a second, and what it then says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from pawl.settings import GRPOSettings, RewardSettings, SFTSettings
from retrain.base_model import quiet_renames

SMALL: dict[str, Any] = {
    "dtype": "float32",
    "gradient_checkpointing": False,
    "threads": 1,
    "batch_size": 8,
    "gradient_accumulation_steps": 1,
}
AS_DELIVERED: dict[str, Any] = {"dtype": "bfloat16", "gradient_checkpointing": True}
"""What large models are trained with."""
SFT = SFTSettings(**SMALL, learning_rate=7e-3, epochs=12, max_length=64, lora_rank=8, lora_alpha=16)
REWARD = RewardSettings(**SMALL, learning_rate=5e-3, epochs=2, max_length=64, lora_rank=4, lora_alpha=8)
GRPO = GRPOSettings(
    **SMALL | {"batch_size": 16},
    learning_rate=1e-2,
    steps=2,
    answers_per_prompt=8,
    max_prompt_tokens=64,
    max_answer_tokens=8,
    lora_rank=4,
    lora_alpha=8,
)


def greedy_answer(base: Path, adapter: Path | None, question: str) -> str:
    """What a model says, its stop token included, in at most twelve tokens."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    if adapter:
        with quiet_renames():
            model = PeftModel.from_pretrained(model, str(adapter))
    asked = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.inference_mode():
        said = model.eval().generate(**prompt, max_new_tokens=12, do_sample=False)
    return str(tokenizer.decode(said[0][prompt["input_ids"].shape[1] :]))
