"""What a training shows: a bar to people, JSON lines and Prometheus text to everything else."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from retrain.dataset import Origin, example_of
from retrain.dpo import DPORun, train
from retrain.progress import GAUGES, LoggedStep, ignore, reporting, written_to
from tests.retrain.tiny_model import TRAINING, make_pair

STEP = LoggedStep(3, 9, {"loss": 0.5, "rewards/margins": 1.25, "num_tokens": 640.0})


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def samples(path: Path) -> dict[str, float]:
    families = text_string_to_metric_families(path.read_text())
    return {sample.name: sample.value for family in families for sample in family.samples}


def test_a_terminal_gets_a_bar() -> None:
    stream = Terminal()
    with reporting(stream) as report:
        report(STEP)
    shown = stream.getvalue()
    assert "training" in shown
    assert "loss 0.500" in shown
    assert "margins 1.250" in shown


def test_everything_else_gets_a_line_of_json_per_step() -> None:
    stream = io.StringIO()
    with reporting(stream) as report:
        report(STEP)
        report(LoggedStep(4, 9, {"loss": 0.25}))
    first, second = map(json.loads, stream.getvalue().splitlines())
    assert first == {"event": "training_step", "step": 3, "n_steps": 9, **STEP.values}
    assert (second["step"], second["loss"]) == (4, 0.25)


def test_prometheus_reads_the_newest_step_and_whether_there_will_be_more(tmp_path: Path) -> None:
    path = tmp_path / "collector" / "pawl_training.prom"
    seen: list[LoggedStep] = []
    with written_to(path, seen.append) as report:
        assert samples(path)["pawl_training_steps"] == 0
        report(STEP)
        during = samples(path)
    assert seen == [STEP]
    expected = {
        "pawl_training_step": 3,
        "pawl_training_steps": 9,
        "pawl_training_loss": 0.5,
        "pawl_training_running": 1,
    }
    assert during | expected == during
    assert during["pawl_training_tokens"] == 640
    assert "pawl_training_gradient_norm" not in during, "what was not reported is not invented"
    after = samples(path)
    assert (after["pawl_training_running"], after["pawl_training_step"]) == (0, 3)
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_a_training_that_dies_is_not_running(tmp_path: Path) -> None:
    path = tmp_path / "pawl_training.prom"

    def die() -> None:
        with written_to(path, ignore) as report:
            report(STEP)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        die()
    assert samples(path)["pawl_training_running"] == 0


def test_without_a_file_the_report_is_the_same() -> None:
    with written_to(None, ignore) as report:
        assert report is ignore


@pytest.mark.training
def test_a_training_writes_every_gauge(tiny_base: Path, tmp_path: Path) -> None:
    path = tmp_path / "pawl_training.prom"
    training = TRAINING.model_copy(update={"metrics_file": path})
    examples = [example_of(make_pair(number), Origin.NEW) for number in range(12)]
    result = train(DPORun(str(tiny_base), "served/tiny", None, tmp_path, training, seed=3), examples)
    found = samples(path)
    assert {name for name, _ in GAUGES.values()} <= found.keys()
    assert found["pawl_training_step"] == found["pawl_training_steps"] == result.n_steps == 3
    assert found["pawl_training_chosen_logp_per_token"] == result.history[-1]["logps/chosen_per_token"] < 0
    assert found["pawl_training_tokens_per_second"] > 0
