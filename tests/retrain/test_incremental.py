"""Rounds that continue, keep to the base, or start again from it, on the tiny model."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from feedback.pairs import PreferencePair
from pawl import registry
from pawl.database import Database
from pawl.registry import ModelState
from pawl.settings import MixSettings, RebaseSettings, Settings, TrainingSettings
from retrain.dataset import Origin, example_of
from retrain.dpo import DPORun, TrainingResult, train
from retrain.drift import RoundRecord, Start, read_record
from retrain.explaining import what_it_did
from retrain.logprobs import implicit_rewards
from retrain.pipeline import RoundInputs, RoundOptions, RunOutcome, run_round
from tests.retrain.fake_engine import FakeEngine, serving
from tests.retrain.round_process import Scene, settings_of, well_behaved
from tests.retrain.tiny_model import TOPICS, TRAINING, make_pair

pytestmark = pytest.mark.training

N_ORIGINALS = 40
ONE_STEP = TRAINING.model_copy(
    update={
        "loss_type": ["sigmoid"],
        "loss_weights": [1.0],
        "batch_size": 16,
        "beta": 0.3,
        "gradient_accumulation_steps": 1,
    }
)
PAIRS = [make_pair(number) for number in range(16)]
EXAMPLES = [example_of(pair, Origin.NEW) for pair in PAIRS]


def run_on(
    base: Path, output: Path, training: TrainingSettings, parent: Path | None = None, **options: Any
) -> TrainingResult:
    return train(DPORun(str(base), "served/tiny", parent, output, training, seed=3, **options), EXAMPLES)


@pytest.fixture(scope="module")
def parent(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_on(tiny_base, tmp_path_factory.mktemp("parent"), TRAINING).adapter_dir


@pytest.mark.parametrize("reference", ["parent", "base"])
def test_a_continued_adapter_is_compared_with_the_reference_that_was_asked_for(
    tiny_base: Path, parent: Path, tmp_path: Path, reference: str
) -> None:
    """The loss of the first step is -log sigma(beta (r_chosen - r_rejected)), with rewards against the reference
    (Rafailov et al. 2023, eq. 7): against the base what the parent learned counts, against the parent nothing does."""
    rewards = implicit_rewards(str(tiny_base), {"m": parent}, PAIRS, dtype="float32", max_length=64, batch_size=8)["m"]
    margins = [0.0 if reference == "parent" else 0.3 * (each.chosen - each.rejected) for each in rewards]
    expected = sum(math.log1p(math.exp(-margin)) for margin in margins) / len(margins)
    result = run_on(tiny_base, tmp_path, ONE_STEP, parent, reference=reference)
    assert result.n_steps == 1
    assert result.loss_first == pytest.approx(expected, rel=1e-3)
    assert (expected < 0.6) == (reference == "base")
    assert sorted(path.name for path in result.adapter_dir.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


@pytest.fixture
def fake() -> Iterator[FakeEngine]:
    with serving(FakeEngine(answer=well_behaved)) as engine:
        yield engine


@pytest.fixture
def settings(fake: FakeEngine, tiny_base: Path, tmp_path: Path) -> Settings:
    lines = [original(number) for number in range(N_ORIGINALS)]
    (tmp_path / "original.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = settings_of(Scene(tmp_path, f"sqlite:///{tmp_path}/pawl.db", tiny_base, fake.url))
    changes = {
        "original_preferences": tmp_path / "original.jsonl",
        "original_holdout_share": 0.3,
        "mix": MixSettings(),
        "training": TRAINING.model_copy(update={"batch_size": 16}),
        "gate": found.retrain.gate.model_copy(update={"max_prompts": 5, "kl_prompts": 5}),
        "rebase": RebaseSettings(every_rounds=2, max_kl=None, max_weight_change=None),
    }
    return found.model_copy(update={"retrain": found.retrain.model_copy(update=changes)})


def original(number: int) -> dict[str, Any]:
    """Of words of their own, so that no user asks the same."""
    words = f"day{number} light{number}"
    sides = {"chosen": f"{words} is good", "rejected": f"{words} is bad"}
    answers = {side: [{"role": "assistant", "content": text}] for side, text in sides.items()}
    return {"pair_id": f"original-{number}", "prompt": [{"role": "user", "content": words}], **answers}


def asked(start: int) -> list[PreferencePair]:
    """Forty pairs, no two about the same."""
    return [make_pair(n, text=f"tell me about {TOPICS[n % 5]} number{n}") for n in range(start, start + 40)]


def with_rebase(settings: Settings, rebase: RebaseSettings) -> Settings:
    return settings.model_copy(update={"retrain": settings.retrain.model_copy(update={"rebase": rebase})})


def a_round(
    database: Database, settings: Settings, number: int, new: list[PreferencePair], earlier: list[PreferencePair]
) -> RunOutcome:
    def harmless(texts: Any) -> list[float]:
        return [0.0 for _ in texts]

    inputs = RoundInputs(new=new, earlier=earlier, score_toxicity=harmless, now=lambda: 1000.0 + number)
    options = RoundOptions(cycle=f"cycle-{number}", publish_despite_gate=True)
    outcome = run_round(database, settings, "assistant", inputs, options)
    assert outcome.model is not None
    registry.set_state(database, outcome.model, ModelState.CHAMPION, now=2000.0 + number)
    return outcome


def record_in(database: Database, outcome: RunOutcome) -> RoundRecord:
    assert outcome.model is not None
    record = read_record(registry.get_model(database, outcome.model).manifest)
    assert record is not None
    return record


def manifest_of(outcome: RunOutcome, step: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((outcome.directory / step / "manifest.json").read_text())
    return found


def test_rounds_continue_until_the_schedule_starts_again_from_the_base(database: Database, settings: Settings) -> None:
    batches = [asked(start) for start in (0, 40, 80)]
    outcomes = [
        a_round(database, settings, number, batches[number], [pair for batch in batches[:number] for pair in batch])
        for number in range(3)
    ]
    records = [record_in(database, outcome) for outcome in outcomes]
    assert [record.start for record in records] == [Start.FIRST, Start.CONTINUE, Start.REBASE]
    assert [record.rounds for record in records] == [1, 2, 1]
    assert [record.reference for record in records] == ["base", "parent", "base"]
    assert all(record.drift and record.drift.kl > 0 and record.drift.weight_change > 0 for record in records)
    methods = [manifest_of(outcome, "train")["result"]["method"] for outcome in outcomes]
    assert [method.split()[-1] for method in methods] == ["fresh", "continued", "fresh"]
    assert [manifest_of(outcome, "mine")["parent"] for outcome in outcomes] == [
        "tiny",
        outcomes[0].model,
        outcomes[1].model,
    ]

    builds = [manifest_of(outcome, "build") for outcome in outcomes]
    held = [{each for each in build["holdout_ids"] if each.startswith("original-")} for build in builds]
    assert held[0] == held[1] == held[2]
    assert 0 < len(held[0]) < N_ORIGINALS
    assert held[0].isdisjoint({each for build in builds for each in build["pair_ids"]})
    assert builds[0]["holdout_by_source"]["original"] == len(held[0])
    assert builds[1]["shares"] == {"new": 0.5, "original": 0.3, "earlier": 0.2}
    assert builds[2]["shares"] == {"new": 0.25, "original": 0.3, "earlier": 0.45}


def test_people_are_told_why_a_round_started_again_and_how_far_it_went() -> None:
    plan = {"start": "rebase", "rounds": 1, "reason": "m has 8 rounds on top of the base"}
    mined = what_it_did("mine", {"n_new": 9, "parent": "m", "plan": plan})
    assert mined.endswith("the parent is m, but starts again from the base: m has 8 rounds on top of the base")
    trained = what_it_did("train", {"model": "n", "incremental": {"drift": {"kl": 0.1234, "weight_change": 0.03}}})
    assert trained.endswith("the adapter is n, 0.123 nats per token and 3.0% of the weights off the base")


def test_a_parent_over_its_limit_is_not_continued(database: Database, settings: Settings) -> None:
    strict = with_rebase(settings, RebaseSettings(every_rounds=None, max_kl=1e-9))
    first = a_round(database, strict, 0, asked(0), [])
    second = a_round(database, strict, 1, asked(40), asked(0))
    assert record_in(database, second).start == Start.REBASE
    assert "nats per token, the limit is 1e-09" in manifest_of(second, "mine")["plan"]["reason"]
    assert manifest_of(second, "mine")["parent"] == first.model
