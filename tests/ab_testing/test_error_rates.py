import json
from dataclasses import replace

import pytest

from bench.ab_whole_canaries import SCENARIOS, Scenario, run_scenario

_MISTAKES = [scenario for scenario in SCENARIOS if scenario.error is not None]
_VERDICTS = [scenario for scenario in SCENARIOS if scenario.error is None]


@pytest.mark.parametrize("scenario", _MISTAKES, ids=lambda scenario: scenario.name)
def test_mistakes_stay_within_their_bound_at_every_look(scenario: Scenario) -> None:
    short = replace(scenario, users=400)
    summary = run_scenario(short, sims=100, seed=1)
    assert summary.error_rate is not None
    assert summary.error_rate <= summary.allowed


@pytest.mark.parametrize("scenario", _VERDICTS, ids=lambda scenario: scenario.name)
def test_clear_cases_are_decided_rightly_and_fast(scenario: Scenario) -> None:
    summary = run_scenario(scenario, sims=15, seed=2)
    expected = "promoted" if summary.name.startswith("good") else "rolled_back"
    assert summary.ended.get(expected, 0) >= 0.9
    assert summary.median_users <= 1500


def test_the_same_seed_gives_the_same_summary() -> None:
    first, second = (run_scenario(replace(SCENARIOS[0], users=100), sims=2, seed=5) for _ in range(2))
    assert json.dumps(first.ended) == json.dumps(second.ended)
    assert first == second
