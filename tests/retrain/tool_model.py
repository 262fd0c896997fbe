"""A tiny Llama whose tokenizer reads every byte and writes tool calls as a well-known model's does."""

from __future__ import annotations

from pathlib import Path

import trl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.retrain.tiny_model import save_llama

TEMPLATES = Path(str(trl.__file__)).parent / "chat_templates"
"""Chat templates of published models, as TRL brings them along."""
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
POSITIONS = 4096


def template(name: str) -> str:
    return (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")


def make_byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte, so that nothing is lost between a text and its tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate((*SPECIAL, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIAL[0],
        eos_token=SPECIAL[2],
        additional_special_tokens=list(SPECIAL),
        chat_template=template("qwen2_5"),
        model_max_length=POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def make_tool_model(directory: Path) -> Path:
    """Save model and tokenizer; the same weights every time."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "max_position_embeddings": POSITIONS}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return save_llama(directory, make_byte_tokenizer(), **sizes, **heads)
