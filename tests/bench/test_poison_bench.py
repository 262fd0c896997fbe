"""The poison simulator: the issue's bounds in a small world, and that it notices a defence that does not defend."""

from __future__ import annotations

import numpy as np
import pytest

from bench.poison import QUICK, SWARM, Outcome, Scenario, broken_bounds, run
from bench.poison_world import APPLICATION, SLOW_DRIP, TRIGGER, World, honest_world
from pawl.settings import DefenceSettings

N_PAIRS = 4000
SETTINGS = DefenceSettings(application_keys=[APPLICATION])


@pytest.fixture(scope="module")
def world() -> World:
    return honest_world(np.random.default_rng(0), N_PAIRS)


@pytest.mark.parametrize("scenario", QUICK, ids=lambda each: f"{each.name}-{each.n_accounts}")
def test_no_bound_is_broken(world: World, scenario: Scenario) -> None:
    outcome = run(world, scenario, 0, SETTINGS)
    assert list(broken_bounds(outcome, SETTINGS)) == []
    assert outcome.got_in + sum(outcome.stopped_by.values()) == outcome.injected == round(scenario.share * N_PAIRS)


@pytest.mark.parametrize("swarm", [SWARM, SWARM._replace(is_single=True)], ids=lambda each: each.name)
def test_the_swarm_fills_what_its_key_may_have(world: World, swarm: Scenario) -> None:
    outcome = run(world, swarm, 0, SETTINGS)
    assert 0.09 < outcome.of_key <= SETTINGS.caps.key_share


def test_without_the_defence_the_poison_gets_in(world: World) -> None:
    settings = DefenceSettings(enabled=False)
    outcome = run(world, Scenario(TRIGGER, 1, 0.01), 0, settings)
    assert outcome.got_in == outcome.injected
    assert len(list(broken_bounds(outcome, settings))) == 2


def test_every_bound_is_looked_at() -> None:
    bad = Outcome("brigade under one key", 1, 10, 2, 0.01, 0.2, {}, 0.04, 0.0)
    assert len(list(broken_bounds(bad, SETTINGS))) == 4


def test_the_same_seed_gives_the_same_outcome(world: World) -> None:
    scenario = Scenario(SLOW_DRIP, 5, 0.01)
    assert run(world, scenario, 3, SETTINGS) == run(world, scenario, 3, SETTINGS)
