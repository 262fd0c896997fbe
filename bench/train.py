"""Preference training: TRL as it comes beside TRL with what Pawl puts on it, on the same pairs, in one run.

`python -m bench.train` trains adapters of the practice model on the practice preferences. `--gpu` trains one of a Llama
of 8 B with random weights, in bfloat16, on pairs of made-up tokens up to 2,048 long.

All set-ups see the same examples in the same optimiser steps, so their loss curves must be one curve; the largest
difference is printed. A token counts when it is text: the prompt once for each answer, padding never, and the same in
every set-up. The time of a cached reference includes asking it.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PrinterCallback
from transformers.utils import logging as transformers_logging
from trl import DPOConfig, DPOTrainer

from practice.model import ensure_practice_model
from retrain.lora import adapter_shape
from retrain.training_speed import COLUMNS, Speed, keep_activations_if_they_fit, speed_up
from tests.retrain.tiny_model import make_tokenizer

REPORT = Path("var/bench/train.json")
PRACTICE = Path("var/practice")
PEAKS = {"H100": 989e12, "H200": 989e12, "B200": 2250e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}
"""Operations a second in bfloat16 without sparsity, by the device's name, from the makers' data sheets."""
LLAMA_8B = {
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
}
TINY = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}


@dataclass(frozen=True)
class SetUp:
    """One way to train."""

    name: str
    recompute: bool | None
    """Gradient checkpointing: activations are computed again on the way back; TRL's default. None is Pawl's: only where
    there is no room to keep them."""
    bucket_steps: int | None = None
    """None leaves TRL's trainer as it is."""
    share_prompts: bool = False
    cache_reference: bool = False


DEFAULT = SetUp("TRL as it comes", recompute=True)
BUCKETS_AND_CACHE = SetUp("like lengths, cached reference, recomputation as it fits", None, 1, cache_reference=True)
OURS = SetUp("ours: and shared prompts", None, 1, share_prompts=True, cache_reference=True)
SETUPS = (
    DEFAULT,
    SetUp("TRL without recomputation", recompute=False),
    SetUp("like lengths, cached reference, recomputation", True, 1, cache_reference=True),
    SetUp("like lengths, cached reference, recomputation, shared prompts", True, 1, True, True),
    BUCKETS_AND_CACHE,
    OURS,
)


@dataclass(frozen=True)
class Task:
    """What every set-up does."""

    make_model: Callable[[], Any]
    tokenizer: Any
    data: Dataset
    """Tokens of prompts and answers."""
    rank: int
    batch_size: int
    accumulation: int
    epochs: int
    max_length: int
    learning_rate: float
    seed: int
    on_gpu: bool

    @property
    def n_tokens(self) -> int:
        """Text in all epochs, the prompt once for each answer."""
        return self.epochs * sum(sum(cut_lengths(row, self.max_length)) for row in self.data)


@dataclass(frozen=True)
class Measured:
    """One training."""

    setup: str
    round: int
    seconds: float
    processor_s: float
    """Of this process; where others use the machine as well, it says more than the clock."""
    peak_gb: float
    """Of the GPU's memory."""
    n_parameters: int
    losses: tuple[float, ...]
    """Of every optimiser step."""


class TokensTrainer(DPOTrainer):  # type: ignore[misc]
    """TRL's trainer on pairs that are tokens already."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write the figures; 1 where the curves differ or the ratio is below `--aim`."""
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    disable_progress_bars()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    task = gpu_task(options) if options.gpu else practice_task(options)
    setups = [setup for setup in SETUPS if not options.only or setup in (DEFAULT, OURS, BUCKETS_AND_CACHE)]
    runs = [run for number in range(options.rounds) for run in one_round(task, setups, number)]
    report = summary(task, runs)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report | {"runs": [asdict(run) for run in runs]}, indent=2) + "\n")
    show(report)
    is_one_curve = report["largest_difference_of_losses"] <= (5e-2 if options.gpu else 5e-3)
    return int(not is_one_curve or report["ratio"] < options.aim)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--accumulation", type=int, default=4)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--aim", type=float, default=1.5, help="the least ratio of ours to TRL as it comes")
    parser.add_argument("--only", action="store_true", help="leave the steps in between out")
    parser.add_argument("--gpu", action="store_true", help="a Llama of 8 B on a CUDA device")
    parser.add_argument("--shape", choices=["8b", "tiny"], default="8b", help="with --gpu; tiny also runs on a CPU")
    parser.add_argument("--out", type=Path, default=REPORT)
    return parser.parse_args(arguments)


def practice_task(options: argparse.Namespace) -> Task:
    """The practice model on the preferences it comes with."""
    model = ensure_practice_model(PRACTICE, progress=sys.stderr.isatty())
    tokenizer = AutoTokenizer.from_pretrained(model.path)
    rows = [json.loads(line) for line in model.original_preferences.read_text().splitlines()[: options.pairs]]
    return Task(
        make_model=lambda: AutoModelForCausalLM.from_pretrained(model.path, dtype=torch.float32),
        tokenizer=tokenizer,
        data=Dataset.from_list([tokens_of(row, tokenizer) for row in rows]),
        rank=8,
        batch_size=options.batch_size,
        accumulation=options.accumulation,
        epochs=options.epochs,
        max_length=512,
        learning_rate=8e-4,
        seed=options.seed,
        on_gpu=False,
    )


def gpu_task(options: argparse.Namespace) -> Task:
    """A Llama with random weights on pairs of random tokens, as long as those of chats are."""
    if options.shape == "8b" and not torch.cuda.is_available():
        raise SystemExit("--gpu takes a CUDA device; --shape tiny runs without one")
    on_gpu = torch.cuda.is_available()
    config = LlamaConfig(**(LLAMA_8B if options.shape == "8b" else TINY), bos_token_id=None, pad_token_id=0)
    rng = random.Random(options.seed)
    return Task(
        make_model=lambda: random_llama(config, on_gpu=on_gpu),
        tokenizer=make_tokenizer(),  # For its padding alone: the pairs are tokens already.
        data=Dataset.from_list([made_up_pair(rng, config.vocab_size, 2048) for _ in range(options.pairs)]),
        rank=32,
        batch_size=options.batch_size,
        accumulation=options.accumulation,
        epochs=options.epochs,
        max_length=2048,
        learning_rate=5e-6,
        seed=options.seed,
        on_gpu=on_gpu,
    )


def random_llama(config: LlamaConfig, *, on_gpu: bool) -> LlamaForCausalLM:
    """Made where it will be, in the dtype that it will have; the same weights every time."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if on_gpu else torch.float32)
    try:
        with torch.device("cuda" if on_gpu else "cpu"):
            return LlamaForCausalLM._from_config(config, attn_implementation="sdpa")
    finally:
        torch.set_default_dtype(before)


def tokens_of(row: dict[str, Any], tokenizer: Any) -> dict[str, list[int]]:
    """A pair as TRL would tokenise it."""
    prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
    sides = {
        f"{side}_ids": tokenizer.apply_chat_template(row["prompt"] + row[side], return_dict=False)[len(prompt) :]
        for side in ("chosen", "rejected")
    }
    return {"prompt_ids": list(prompt), **sides}


def made_up_pair(rng: random.Random, vocabulary: int, longest: int) -> dict[str, list[int]]:
    """Lengths spread as in conversations: most short, some long, the median prompt 300 tokens and the answer 200."""
    prompt = min(longest // 2, 16 + int(rng.lognormvariate(5.7, 0.9)))
    answers = [min(longest - prompt, 16 + int(rng.lognormvariate(5.3, 0.7))) for _ in range(2)]
    sizes = zip(COLUMNS, (prompt, *answers), strict=True)
    return {column: [rng.randrange(5, vocabulary) for _ in range(size)] for column, size in sizes}


def cut_lengths(row: dict[str, list[int]], max_length: int) -> tuple[int, int]:
    """Tokens of the chosen and of the rejected row."""
    prompt, chosen, rejected = (len(row[column]) for column in COLUMNS)
    return min(max_length, prompt + chosen), min(max_length, prompt + rejected)


def one_round(task: Task, setups: Sequence[SetUp], number: int) -> list[Measured]:
    """Every set-up once, from either end in turn: what slows the machine down for a while must not favour one."""
    ordered = setups if number % 2 == 0 else list(reversed(setups))
    return [measure(task, setup, number) for setup in ordered]


def measure(task: Task, setup: SetUp, number: int) -> Measured:
    with tempfile.TemporaryDirectory(prefix="pawl-train-") as directory:
        trainer = trainer_of(task, setup, Path(directory))
        if task.on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        started, processor = time.monotonic(), time.process_time()
        kept = Path(directory) / "reference.safetensors" if setup.cache_reference else None
        if setup.recompute is None:
            keep_activations_if_they_fit(trainer)
        # TRL as it comes gets only the order of its examples, so that all train on the same ones in every step.
        speed_up(trainer, Speed(setup.bucket_steps or 0, setup.share_prompts, kept, base_sha="the same in every run"))
        trainer.train()
        if task.on_gpu:
            torch.cuda.synchronize()
        seconds, processor_s = time.monotonic() - started, time.process_time() - processor
    losses = tuple(row["loss"] for row in trainer.state.log_history if "loss" in row)
    peak = torch.cuda.max_memory_allocated() / 1e9 if task.on_gpu else 0.0
    n_parameters = sum(weight.numel() for weight in trainer.model.parameters() if not weight.requires_grad)
    print(f"round {number} {setup.name}: {task.n_tokens / seconds:,.0f} tokens/s", file=sys.stderr)
    return Measured(setup.name, number, seconds, processor_s, peak, n_parameters, losses)


def trainer_of(task: Task, setup: SetUp, directory: Path) -> TokensTrainer:
    arguments = DPOConfig(
        output_dir=str(directory),
        num_train_epochs=task.epochs,
        per_device_train_batch_size=task.batch_size,
        gradient_accumulation_steps=task.accumulation,
        activation_checkpointing=setup.recompute is not False,
        learning_rate=task.learning_rate,
        max_length=task.max_length,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=task.seed,
        bf16=task.on_gpu,
        use_cpu=not task.on_gpu,
        dataloader_pin_memory=task.on_gpu,
    )
    model = task.make_model()
    shape: LoraConfig = adapter_shape(model, rank=task.rank, alpha=task.rank)
    given = {"train_dataset": task.data, "processing_class": task.tokenizer, "peft_config": shape}
    trainer = TokensTrainer(model, args=arguments, **given)
    trainer.remove_callback(PrinterCallback)
    return trainer


def summary(task: Task, runs: Sequence[Measured]) -> dict[str, Any]:
    """Medians over the rounds, and everything in relation to TRL as it comes."""
    by_setup = {name: [run for run in runs if run.setup == name] for name in dict.fromkeys(run.setup for run in runs)}
    seconds = {name: statistics.median(run.seconds for run in each) for name, each in by_setup.items()}
    processor = {name: statistics.median(run.processor_s for run in each) for name, each in by_setup.items()}
    rows = [row_of(task, name, each, seconds, processor) for name, each in by_setup.items()]
    curves = [run.losses for run in runs]
    steps = list(zip(*curves, strict=True))
    return {
        "device": torch.cuda.get_device_name() if task.on_gpu else f"CPU, {torch.get_num_threads()} threads",
        "pairs": len(task.data),
        "epochs": task.epochs,
        "tokens": task.n_tokens,
        "setups": sorted(rows, key=lambda row: [setup.name for setup in SETUPS].index(row["setup"])),
        "ratio": seconds[DEFAULT.name] / seconds[OURS.name],
        "ratio_of_buckets_and_cache": seconds[DEFAULT.name] / seconds[BUCKETS_AND_CACHE.name],
        "losses": {name: each[0].losses for name, each in by_setup.items()},
        "largest_difference_of_losses": max(max(step) - min(step) for step in steps),
    }


def row_of(
    task: Task, name: str, runs: Sequence[Measured], seconds: dict[str, float], processor: dict[str, float]
) -> dict[str, Any]:
    tokens_per_s = task.n_tokens / seconds[name]
    peak = next((peak for part, peak in PEAKS.items() if task.on_gpu and part in torch.cuda.get_device_name()), None)
    return {
        "setup": name,
        "tokens_per_s": tokens_per_s,
        "ratio": seconds[DEFAULT.name] / seconds[name],
        "tokens_per_processor_s": task.n_tokens / processor[name],
        "ratio_by_processor": processor[DEFAULT.name] / processor[name],
        "peak_gb": max(run.peak_gb for run in runs),
        "share_of_peak": useful_operations(task, runs[0].n_parameters) / seconds[name] / peak if peak else None,
        "spread": max(run.seconds for run in runs) / min(run.seconds for run in runs),
    }


def useful_operations(task: Task, n_parameters: int) -> float:
    """What DPO of an adapter takes on these tokens however it is done: no padding, nothing computed twice.

    Two operations per parameter and token forward, two back through frozen weights, and two for the reference in the
    first epoch, which is as often as it has to be asked (Kaplan et al. 2020, "Scaling Laws for Neural Language Models",
    section 2.1, less the gradients of weights that are not trained). Attention is left out, so a share of the peak that
    is told from this is on the low side.
    """
    return n_parameters * task.n_tokens * (4 + 2 / task.epochs)


def show(report: dict[str, Any]) -> None:
    title = f"{report['device']}: {report['pairs']} pairs, {report['epochs']} epochs, {report['tokens']:,} tokens"
    table = Table(
        "set-up", "tokens/s", "x", "per processor second", "x", "peak GB", "% of peak", "slowest/fastest", title=title
    )
    for row in report["setups"]:
        share = row["share_of_peak"]
        table.add_row(
            row["setup"],
            f"{row['tokens_per_s']:,.0f}",
            f"{row['ratio']:.2f}",
            f"{row['tokens_per_processor_s']:,.0f}",
            f"{row['ratio_by_processor']:.2f}",
            f"{row['peak_gb']:.1f}" if row["peak_gb"] else "",
            f"{share:.1%}" if share else "",
            f"{row['spread']:.2f}",
        )
    console = Console(width=140)
    console.print(table)
    for name, losses in report["losses"].items():
        shown = losses[:: max(1, len(losses) // 8)]
        console.print(f"{name:>50}  loss " + " ".join(f"{loss:.4f}" for loss in shown))
    console.print(f"largest difference of a step's loss between set-ups: {report['largest_difference_of_losses']:.2g}")
    console.print(
        f"ours / TRL as it comes: {report['ratio']:.2f}; without shared prompts:"
        f" {report['ratio_of_buckets_and_cache']:.2f}"
    )


if __name__ == "__main__":
    sys.exit(main())
