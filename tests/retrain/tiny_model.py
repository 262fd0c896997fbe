"""A tiny Llama with random weights, and pairs with a preference that it can learn in seconds."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from feedback.pairs import PreferencePair
from pawl.settings import TrainingSettings

WORDS = (
    "what",
    "is",
    "tell",
    "me",
    "about",
    "tea",
    "rain",
    "bread",
    "music",
    "ships",
    "good",
    "kind",
    "bad",
    "rude",
    "day",
)
TOPICS = ("tea", "rain", "bread", "music", "ships")
SPECIAL = ("<pad>", "<unk>", "<end>", "<user>", "<assistant>")
TEMPLATE = (
    "{%- for message in messages -%}{{- '<' + message['role'] + '> ' + message['content'] + ' <end> ' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<assistant> ' -}}{%- endif -%}"
)
TRAINING = TrainingSettings(
    learning_rate=5e-3,
    batch_size=4,
    gradient_accumulation_steps=1,
    max_length=64,
    lora_rank=4,
    lora_alpha=8,
    dtype="float32",
    gradient_checkpointing=False,
    threads=1,
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate((*SPECIAL, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<end>",
        additional_special_tokens=["<user>", "<assistant>"],
        chat_template=TEMPLATE,
        model_max_length=128,
    )


def make_model(directory: Path) -> Path:
    """Save model and tokenizer; the same weights every time."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "max_position_embeddings": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return save_llama(directory, make_tokenizer(), **sizes, **heads)


def save_llama(directory: Path, tokenizer: PreTrainedTokenizerFast, **sizes: int) -> Path:
    """Save a Llama of these sizes, with the same weights every time, and its tokenizer."""
    special = {"pad_token_id": 0, "eos_token_id": 2, "bos_token_id": None}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, **special))
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def make_pair(number: int, *, user: str | None = None, text: str | None = None) -> PreferencePair:
    """People like a good kind answer and dislike a bad rude one."""
    topic = TOPICS[number % len(TOPICS)]
    prompt = text or ("tell me about " + " ".join([topic] * (1 + number // len(TOPICS) % 9)))
    return PreferencePair(
        id=f"{number:032x}",
        alias="assistant",
        source="regeneration" if number % 3 else "edit",
        prompt=({"role": "user", "content": prompt},),
        chosen={"role": "assistant", "content": f"{topic} is good kind"},
        rejected={"role": "assistant", "content": f"{topic} is bad rude"},
        margin=1.0,
        n_voters=1,
        principals=(user or f"key/user-{number}",),
        chosen_interaction=None,
        rejected_interaction=f"{number:048x}",
        models=("tiny",),
        probability=0.5,
        created_at=1000.0 + number,
    )
