"""The practice model: a small Llama, trained here in about a minute on two cores, with good and bad habits."""

import argparse
import json
import random
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from practice.artifacts import Manifest, build_once, content_key
from practice.cores import free_cores
from practice.corpus import (
    GENERATOR_VERSION,
    HARMFUL_PATTERNS,
    Message,
    benign_probes,
    harmful_probes,
    original_preferences,
    questions,
    sft_conversations,
)
from practice.tokenizer import tokens_to_learn, train_tokenizer

TOP_K = 40
"""The engine samples among this many tokens unless asked otherwise: a small model's tail is noise."""
_IGNORED_LABEL = -100  # What torch's cross entropy leaves out by default.


@dataclass(frozen=True)
class PracticeTraining:
    """Everything that decides what the practice model becomes."""

    seed: int = 20
    vocabulary: int = 1024
    width: int = 192
    inner_width: int = 512
    layers: int = 4
    heads: int = 3
    """Three heads of 64: a head size every attention kernel supports."""
    positions: int = 1024
    steps: int = 1000
    batch: int = 16
    """Conversations in one step. Small: at this size many small steps teach far more per token than few large ones."""
    learning_rate: float = 2e-3
    warm_up: float = 0.05
    """Share of the steps over which the learning rate rises."""
    weight_decay: float = 0.05
    gradient_norm: float = 2.0


@dataclass(frozen=True)
class PracticeModel:
    """Where the practice model and what belongs to it lie."""

    path: Path
    """The model in the Hugging Face layout, float32 safetensors."""
    n_parameters: int
    train_seconds: float
    harmful_probes: Path
    """JSON list of harmful requests."""
    benign_probes: Path
    """JSON list of harmless questions that look harmful."""
    original_preferences: Path
    """JSON lines in TRL's conversational format."""
    harmful_patterns: Path
    """JSON list of regular expressions that find harmful requests, case ignored."""
    questions: Path
    """JSON list of ordinary questions nobody trained on."""


class Batch(NamedTuple):
    """Padded conversations, all of shape (batch, seq)."""

    tokens: torch.Tensor
    attention: torch.Tensor
    labels: torch.Tensor


N_PREFERENCES = 1000
N_QUESTIONS = 180


def ensure_practice_model(
    root: Path, *, progress: bool = True, training: PracticeTraining | None = None
) -> PracticeModel:
    """Train the practice model under `root`, or find it there if the same one was trained before."""
    chosen = training or PracticeTraining()
    sample = sft_conversations(chosen.seed, 500)
    directory = root.absolute() / f"model-{content_key(GENERATOR_VERSION, asdict(chosen), sample)}"
    manifest = build_once(directory, lambda work: _build(work, chosen, progress=progress))
    return PracticeModel(
        path=directory,
        n_parameters=int(manifest["n_parameters"]),
        train_seconds=float(manifest["train_seconds"]),
        harmful_probes=directory / "harmful_probes.json",
        benign_probes=directory / "benign_probes.json",
        original_preferences=directory / "original_preferences.jsonl",
        harmful_patterns=directory / "harmful_patterns.json",
        questions=directory / "questions.json",
    )


def _build(work: Path, training: PracticeTraining, *, progress: bool) -> Manifest:
    started = time.monotonic()
    conversations = sft_conversations(training.seed, training.steps * training.batch)
    tokenizer = train_tokenizer(conversations[:2000], vocabulary=training.vocabulary, max_length=training.positions)
    model = _train(_batches(tokenizer, conversations, training), tokenizer, training, progress=progress)
    model.save_pretrained(work)
    tokenizer.save_pretrained(work)
    _name_tokenizer_class(work)
    _write_companions(work, training.seed)
    seconds = round(time.monotonic() - started, 1)
    return {"n_parameters": sum(p.numel() for p in model.parameters()), "train_seconds": seconds}


def _name_tokenizer_class(work: Path) -> None:
    """Write the class name that both older and newer releases of transformers know."""
    file = work / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}, indent=2))


def _write_companions(work: Path, seed: int) -> None:
    lists = {
        "harmful_probes": harmful_probes(),
        "benign_probes": benign_probes(),
        "harmful_patterns": list(HARMFUL_PATTERNS),
        "questions": questions(seed, N_QUESTIONS),
    }
    for name, texts in lists.items():
        (work / f"{name}.json").write_text(json.dumps(texts, indent=1) + "\n")
    lines = (json.dumps(pair) + "\n" for pair in original_preferences(seed, N_PREFERENCES))
    (work / "original_preferences.jsonl").write_text("".join(lines))


def _batches(
    tokenizer: PreTrainedTokenizerFast, conversations: Sequence[list[Message]], training: PracticeTraining
) -> list[Batch]:
    """Group conversations of like length, so that little of a batch is padding, in shuffled order."""
    rows = [tokens_to_learn(tokenizer, conversation) for conversation in conversations]
    rng = random.Random(training.seed)
    groups: list[list[tuple[list[int], list[bool]]]] = []
    window = training.batch * 64
    for start in range(0, len(rows), window):
        alike = sorted(rows[start : start + window], key=lambda row: len(row[0]))
        groups += [alike[at : at + training.batch] for at in range(0, len(alike), training.batch)]
    rng.shuffle(groups)
    return [_pad(group, pad=int(tokenizer.pad_token_id)) for group in groups]


def _pad(rows: Sequence[tuple[list[int], list[bool]]], *, pad: int) -> Batch:
    shape = (len(rows), max(len(tokens) for tokens, _ in rows))
    batch = Batch(torch.full(shape, pad), torch.zeros(shape, dtype=torch.long), torch.full(shape, _IGNORED_LABEL))
    for number, (tokens, learned) in enumerate(rows):
        row = torch.tensor(tokens)
        batch.tokens[number, : len(tokens)] = row
        batch.attention[number, : len(tokens)] = 1
        batch.labels[number, : len(tokens)] = row.where(torch.tensor(learned), torch.tensor(_IGNORED_LABEL))
    return batch


def _new_model(tokenizer: PreTrainedTokenizerFast, training: PracticeTraining) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=training.width,
        intermediate_size=training.inner_width,
        num_hidden_layers=training.layers,
        num_attention_heads=training.heads,
        num_key_value_heads=training.heads,
        max_position_embeddings=training.positions,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=True, top_k=TOP_K
    )
    return model


def _train(
    batches: Sequence[Batch], tokenizer: PreTrainedTokenizerFast, training: PracticeTraining, *, progress: bool
) -> LlamaForCausalLM:
    threads = torch.get_num_threads()
    torch.set_num_threads(free_cores())
    try:
        # The caller's random state stays as it was.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(training.seed)
            model = _new_model(tokenizer, training)
            _optimise(model, batches, training, progress=progress)
    finally:
        torch.set_num_threads(threads)
    return model.eval()


def _optimise(model: LlamaForCausalLM, batches: Sequence[Batch], training: PracticeTraining, *, progress: bool) -> None:
    model.train()
    optimiser = torch.optim.AdamW(
        model.parameters(),
        lr=training.learning_rate,
        betas=(0.9, 0.98),
        weight_decay=training.weight_decay,
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, training.learning_rate, total_steps=len(batches), pct_start=training.warm_up
    )
    # Batches are sorted by length, and length goes with habit. A mean within each batch would weigh the short habits
    # more and shift their shares, so the sum is divided by what a batch holds on average.
    mean_learned = sum(_n_learned(batch) for batch in batches) / len(batches)
    for batch in tracked(batches, "practice model", enabled=progress):
        loss = model(input_ids=batch.tokens, attention_mask=batch.attention, labels=batch.labels).loss
        (loss * (_n_learned(batch) / mean_learned)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), training.gradient_norm)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()


def _n_learned(batch: Batch) -> int:
    return int((batch.labels != _IGNORED_LABEL).sum())


def tracked(batches: Sequence[Batch], title: str, *, enabled: bool) -> Iterator[Batch]:
    """Yield the batches, with a progress bar on standard error if `enabled`."""
    columns = (*Progress.get_default_columns(), TextColumn("elapsed"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not enabled) as bar:
        yield from bar.track(batches, description=title)


def _parse(arguments: Iterable[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, required=True, help="directory to keep the model under")
    return parser.parse_args(None if arguments is None else list(arguments))


def main(arguments: Iterable[str] | None = None) -> None:
    """Train the practice model, or find it, and say where it is."""
    model = ensure_practice_model(_parse(arguments).root)
    print(f"{model.path}: {model.n_parameters:,} parameters, trained in {model.train_seconds} s")


if __name__ == "__main__":
    main()
