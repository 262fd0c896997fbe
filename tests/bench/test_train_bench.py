"""What the training bench counts, and that it runs."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from bench.train import DEFAULT, OURS, cut_lengths, gpu_task, made_up_pair, main, parse, useful_operations


def test_the_prompt_counts_once_for_each_answer_and_what_is_cut_off_does_not() -> None:
    row = {"prompt_ids": [1] * 5, "chosen_ids": [2] * 3, "rejected_ids": [3] * 10}
    assert cut_lengths(row, 100) == (8, 15)
    assert cut_lengths(row, 12) == (8, 12)


def test_made_up_pairs_fit_and_differ_in_length() -> None:
    rng = random.Random(1)
    pairs = [made_up_pair(rng, 1000, 2048) for _ in range(200)]
    sizes = [max(cut_lengths(pair, 100_000)) for pair in pairs]
    assert max(sizes) <= 2048
    assert min(sizes) < 300 < 1000 < max(sizes)
    assert all(5 <= token < 1000 for pair in pairs for token in pair["chosen_ids"])


def test_the_reference_is_work_for_one_epoch() -> None:
    once, twice = (gpu_task(parse(["--gpu", "--shape", "tiny", "--pairs", "2", "--epochs", n])) for n in "12")
    assert useful_operations(once, 10) == pytest.approx(10 * once.n_tokens * 6)
    assert useful_operations(twice, 10) == pytest.approx(10 * once.n_tokens * (2 * 4 + 2))


@pytest.mark.training
def test_both_train_the_same_curve(tmp_path: Path) -> None:
    out = tmp_path / "train.json"
    few = ["--pairs", "4", "--batch-size", "2", "--accumulation", "1", "--rounds", "1", "--threads", "1"]
    assert main(["--gpu", "--shape", "tiny", "--only", "--aim", "0", "--out", str(out), *few]) == 0
    report = json.loads(out.read_text())
    assert [row["setup"] for row in report["setups"]][:: len(report["setups"]) - 1] == [DEFAULT.name, OURS.name]
    assert all(len(run["losses"]) == 4 for run in report["runs"])
    assert report["largest_difference_of_losses"] < 1e-3
