"""Training in several processes: who does what and is sent what. The training itself is in `test_training_speed.py`."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pawl.errors import ConfigurationError, Unreachable
from pawl.settings import DistributedSettings
from retrain import distributed, dpo
from retrain.distributed import RESULT, Job, group_of, job_of, join, order_of, shared_out
from retrain.dpo import DPORun
from retrain.ranks import Group, Message, run_ranks
from tests.retrain.test_training_speed import EXAMPLES, STEPWISE
from tests.servers import free_port

pytestmark = pytest.mark.training


def run_on(base: Path, output: Path) -> DPORun:
    return DPORun(str(base), "served/tiny", None, output, STEPWISE, seed=3)


def test_processes_that_ended_with_different_weights_are_found_out(tmp_path: Path) -> None:
    script = """
import json, os, torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from retrain.process_group import (
    check_ranks_agree, from_first, is_first, n_processes, process_group, trained_weights,
)
with process_group(600):
    rank = int(os.environ["RANK"])
    torch.manual_seed(0)
    sharded = torch.nn.Linear(4, 3, bias=False)
    whole = sharded.weight.detach().clone()
    fully_shard(sharded, mesh=init_device_mesh("cpu", (2,)))
    said = {"rank": rank, "first": is_first(), "n": n_processes(), "from_first": from_first(rank)}
    said["part"] = len(sharded.weight.to_local())
    said["is_whole"] = torch.equal(trained_weights(sharded)["weight"], whole)
    check_ranks_agree({"a": torch.ones(2)})
    try:
        check_ranks_agree({"a": torch.full((2,), float(rank))})
    except Exception as exc:
        said["odd"] = str(exc)
    print(json.dumps(said), flush=True)
"""
    said: list[Message] = []
    run_ranks([sys.executable, "-c", script], Group(2, port=free_port()), tmp_path / "ranks", said.append)
    odd = "the processes ended with different weights: ranks [1] differ from rank 0"
    expected = {"n": 2, "from_first": 0, "odd": odd, "is_whole": True}
    first, second = sorted(said, key=lambda message: int(message["rank"]))
    assert first == {"rank": 0, "first": True, "part": 2, **expected}
    assert second == {"rank": 1, "first": False, "part": 1, **expected}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there are GPUs to shard over")
def test_a_model_is_not_sharded_over_cpus() -> None:
    with pytest.raises(ConfigurationError, match="sharding is fsdp, which takes GPUs"):
        group_of(DistributedSettings(processes=2, sharding="fsdp"))


def test_one_process_trains_in_this_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_on(Path("base"), tmp_path)
    asked: list[tuple[object, ...]] = []
    monkeypatch.setattr(dpo, "train", lambda *given, **_: asked.append(given))
    distributed.train(run, EXAMPLES, settings=DistributedSettings())
    assert asked[0][:2] == (run, EXAMPLES)
    assert list(tmp_path.iterdir()) == []


def test_the_examples_of_a_step_are_shared_out() -> None:
    run = run_on(Path("base"), Path("out"))
    assert shared_out(run, 4).training.gradient_accumulation_steps == 1
    assert shared_out(run, 4).training.batch_size == run.training.batch_size
    with pytest.raises(ConfigurationError, match="is 4, which 3 processes cannot share"):
        shared_out(run, 3)


def test_what_the_processes_are_sent_arrives_as_it_was() -> None:
    half = replace(EXAMPLES[0], prompt=({"role": "user", "content": "half of a sign: \ud83d\nand a line"},))
    job = Job(replace(run_on(Path("base"), Path("out")), parent_adapter=Path("p")), (half, EXAMPLES[1]), (), False)
    assert job_of(order_of(job)) == job
    assert b"\n" not in order_of(job), "it is sent as one line"
    result = dpo.TrainingResult(Path("a"), "dpo", 1, 2, 3, 4.0, 0.7, 0.6, ({"loss": 0.7, "step": 1.0},), {"trl": "1"})
    assert RESULT.validate_json(RESULT.dump_json(result)) == result


def test_a_first_node_that_never_trains_is_waited_for_in_vain(tmp_path: Path) -> None:
    settings = DistributedSettings(nodes=2, node_rank=1, port=free_port(), join_hours=1e-9)
    with pytest.raises(Unreachable, match="did not begin to train"):
        join(settings, tmp_path)


def test_nodes_count_from_zero_and_meet_at_the_first() -> None:
    group = group_of(DistributedSettings(processes=2, nodes=2, node_rank=1, leader="first", port=29555))
    assert (group.size, group.environment(1)["RANK"]) == (4, "3")
    assert (group.address, group.port) == ("first", 29555)
    with pytest.raises(ValueError, match="counted from 0"):
        DistributedSettings(nodes=2, node_rank=2)
