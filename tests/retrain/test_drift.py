"""When a round starts again from the base, and whether what that rests on is measured rightly."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoTokenizer

from pawl.settings import RebaseSettings
from retrain.base_model import load_base, quiet_renames
from retrain.drift import (
    RECORD,
    Drift,
    Parent,
    Start,
    drift_curve,
    over_limits,
    parent_of,
    plan_round,
    read_record,
    record_of,
)
from retrain.drift_measurement import MAX_ANSWERS, measure_drift
from retrain.errors import EvaluationFailed
from retrain.preflight import encoder_of
from tests.retrain.tiny_model import make_pair

LIMITS = RebaseSettings(every_rounds=4, max_kl=0.3, max_weight_change=0.1)
NEAR = Drift(kl=0.1, weight_change=0.02)
PAIRS = [make_pair(number) for number in range(12)]
distances = st.floats(0, 1)


def test_without_an_adapter_the_first_round_starts_fresh() -> None:
    plan = plan_round(None, LIMITS)
    assert (plan.start, plan.rounds) == (Start.FIRST, 1)


@given(distances, distances, st.integers(1, 12))
def test_a_parent_is_continued_exactly_while_it_is_within_every_limit(kl: float, change: float, rounds: int) -> None:
    plan = plan_round(Parent("m", rounds, Drift(kl, change)), LIMITS)
    is_within = kl <= 0.3 and change <= 0.1 and rounds < 4
    assert plan.start == (Start.CONTINUE if is_within else Start.REBASE)
    assert plan.rounds == (rounds + 1 if is_within else 1)


@given(st.lists(st.tuples(distances, distances), max_size=4))
def test_a_candidate_that_went_too_far_is_not_made_again(tried: list[tuple[float, float]]) -> None:
    drifts = [Drift(*each) for each in tried]
    plan = plan_round(Parent("m", 1, NEAR), LIMITS, tried=drifts)
    went_too_far = any(over_limits(drift, LIMITS) for drift in drifts)
    assert plan.start == (Start.REBASE if went_too_far else Start.CONTINUE)


def test_the_reason_says_which_limit() -> None:
    far = Parent("m", 2, Drift(kl=0.4567, weight_change=0.2))
    assert plan_round(far, LIMITS).reason == (
        "m is too far from the base: 0.457 nats per token, the limit is 0.3; 0.2 of the weights' norm, the limit is 0.1"
    )
    assert plan_round(Parent("m", 4, NEAR), LIMITS).reason == "m has 4 rounds on top of the base"


def test_no_limit_is_never_broken_and_what_is_no_number_breaks_every_one() -> None:
    endless = RebaseSettings(every_rounds=None, max_kl=None, max_weight_change=None)
    assert plan_round(Parent("m", 1000, Drift(9.0, 9.0)), endless).start == Start.CONTINUE
    assert len(over_limits(Drift(math.nan, math.inf), LIMITS)) == 2


def test_a_parent_of_unknown_drift_is_continued() -> None:
    """It may have been made before drift was measured; the schedule counts from here."""
    assert parent_of("old", {}) == Parent("old", 1, None)
    assert plan_round(parent_of("old", {}), LIMITS).start == Start.CONTINUE


@pytest.mark.parametrize("damaged", [{}, {RECORD: None}, {RECORD: {"start": "?"}}, {RECORD: {"drift": {"kl": 1}}}])
def test_a_damaged_record_is_none(damaged: dict[str, Any]) -> None:
    assert read_record(damaged) is None


def test_the_drift_of_every_model_makes_a_curve() -> None:
    plan, manifests = plan_round(None, LIMITS), []
    for number in range(3):
        record = record_of(plan, "parent", Drift(0.1 * number, 0.01 * number))
        manifests.append((f"m{number}", {RECORD: record}))
        plan = plan_round(parent_of(*manifests[-1]), LIMITS)
    curve = drift_curve(manifests[::-1])
    assert [(point.name, point.rounds) for point in curve] == [("m0", 1), ("m1", 2), ("m2", 3)]
    assert [point.drift.kl for point in curve if point.drift] == pytest.approx([0.0, 0.1, 0.2])
    assert [manifest[RECORD]["reference"] for _, manifest in manifests] == ["base", "parent", "parent"]


def make_adapter(base: Path, directory: Path, scale: float) -> Path:
    """A random adapter; at scale 0 it changes nothing."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        shape = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
        with quiet_renames():
            model = get_peft_model(load_base(str(base), "float32"), shape)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=scale)
    model.save_pretrained(str(directory))
    return directory


def drift_of(base: Path, adapter: Path, batch_size: int = 5) -> Drift:
    return measure_drift(str(base), adapter, PAIRS, dtype="float32", max_length=64, batch_size=batch_size)


def test_an_adapter_that_does_nothing_has_not_drifted(tiny_base: Path, tmp_path: Path) -> None:
    found = drift_of(tiny_base, make_adapter(tiny_base, tmp_path, 0.0))
    assert found.weight_change == 0
    assert found.kl == pytest.approx(0, abs=1e-7)


def test_drift_is_the_divergence_and_the_norm_it_says_it_is(tiny_base: Path, tmp_path: Path) -> None:
    """Against the merged model, answer by answer without padding, and against the merged weights."""
    adapter = make_adapter(tiny_base, tmp_path, 0.5)
    base = load_base(str(tiny_base), "float32").eval()
    with quiet_renames():
        adapted = PeftModel.from_pretrained(load_base(str(tiny_base), "float32"), str(adapter))
    merged = adapted.merge_and_unload().eval()
    encoder = encoder_of(AutoTokenizer.from_pretrained(str(tiny_base)))
    expected: list[torch.Tensor] = []
    for pair in PAIRS:
        start, tokens = len(encoder.prompt(pair.prompt)), encoder.conversation([*pair.prompt, pair.chosen])
        with torch.inference_mode():
            own, other = (model(torch.tensor([list(tokens)])).logits[0].log_softmax(-1) for model in (merged, base))
        each = torch.nn.functional.kl_div(other, own, log_target=True, reduction="none").sum(-1)
        expected += list(each[start - 1 : -1])
    found = drift_of(tiny_base, adapter)
    assert found.kl == pytest.approx(float(torch.stack(expected).mean()), rel=1e-4)
    assert found.kl > 1e-3
    assert drift_of(tiny_base, adapter, batch_size=1).kl == pytest.approx(found.kl, rel=1e-5)

    old, new = base.state_dict(), merged.state_dict()
    names = [name for name in old if "q_proj" in name or "down_proj" in name]
    added = torch.cat([(new[name] - old[name]).flatten() for name in names]).norm()
    whole = torch.cat([old[name].flatten() for name in names]).norm()
    assert found.weight_change == pytest.approx(float(added / whole), rel=1e-4)


def test_there_must_be_something_to_measure_on(tiny_base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tiny_base, tmp_path, 0.0)
    with pytest.raises(EvaluationFailed, match="no answers"):
        measure_drift(str(tiny_base), adapter, [], dtype="float32", max_length=64, batch_size=4)
    assert MAX_ANSWERS >= 100
