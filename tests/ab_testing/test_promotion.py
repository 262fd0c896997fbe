"""The last step and what follows it: approval, baking, and the watch over a version that has nothing beside it."""

from __future__ import annotations

from typing import Any

import pytest

from ab_testing import controller
from ab_testing.canary_state import launch
from ab_testing.errors import InvalidOutcome, InvalidTransition
from ab_testing.experiment import Route
from ab_testing.replay import Inputs, replay
from ab_testing.rollout_rules import canary_config
from ab_testing.rollout_store import Rollout, count_rollbacks, decision_inputs, get_rollout, list_decisions
from ab_testing.sightings import look_after
from ab_testing.watch import SCORE_PATIENCE_S, Watch, Window, due_windows, observe_windows, take_back
from feedback.interactions import Status
from feedback.store import Score, save_scores
from pawl import registry
from pawl.errors import StaleWrite
from pawl.registry import Model, ModelState
from pawl.settings import RolloutSettings
from tests.ab_testing.world import ALIAS, BASE, CANDIDATE, SETTINGS, World
from tests.pawl.records import harmless, interaction_id, save, served

BETTER = {BASE: 0.6, CANDIDATE: 0.05}
CONFIG = canary_config(SETTINGS)


def with_settings(world: World, **changes: object) -> World:
    world.settings = SETTINGS.model_copy(update=changes)
    return world


def at_the_last_step(world: World) -> Rollout:
    """A rollout that a person took there, and users enough to certify it."""
    rollout = world.start()
    for _ in SETTINGS.steps[1:]:
        world.now += 1
        world.controller().act(ALIAS, "advance", "to see it sooner", actor="operator:eve", epoch=1)
    world.visit(1000, BETTER)
    return rollout


def promoted(world: World) -> Rollout:
    """A rollout whose promotion a person ordered at once, of models that the registry has."""
    for name, state in ((BASE, ModelState.CHAMPION), (CANDIDATE, ModelState.CANDIDATE)):
        model = Model(name, ALIAS, BASE, None, None, None, None, None, state, {}, world.now, world.now)
        registry.register_model(world.database, model)
    rollout = world.start()
    for _ in SETTINGS.steps:
        world.now += 1
        world.controller().act(ALIAS, "advance", "we know it", actor="operator:eve", epoch=1)
    assert world.route() == Route(ALIAS, 4, CANDIDATE, None)
    world.now += 1
    return get_rollout(world.database, rollout.id)


def answer_everybody(
    world: World, n_users: int, *, toxic: float = 0.0, failing: float = 0.0, is_scored: bool = True
) -> None:
    """The promoted version answers so many users once; the first of them get the bad answers."""
    numbers = range(world.n_users, world.n_users + n_users)
    status = [Status.UPSTREAM_ERROR if place < failing * n_users else Status.OK for place in range(n_users)]
    asked = [
        served(number, created_at=world.now, unit_id=f"user-{number}", model=CANDIDATE, status=one)
        for number, one in zip(numbers, status, strict=True)
    ]
    save(world.database, asked)
    world.n_users += n_users
    if is_scored:
        bad = int(toxic * n_users)
        save_scores(
            world.database,
            [Score(interaction_id(n), 0.9, True, "comply", False, "test", world.now) for n in numbers[:bad]]
            + [harmless(n) for n in numbers[bad:]],
        )


def later(world: World, seconds: float) -> None:
    world.now += seconds


def test_a_person_has_the_last_word_where_it_is_wanted(world: World) -> None:
    rollout = at_the_last_step(with_settings(world, needs_approval=True))
    held = world.tick().rollout.state
    assert (held.status, held.held_reason, world.tick().decision.verdict) == ("hold", "approval", "hold")
    world.now += 1
    tick = world.controller().act(ALIAS, "advance", "approved", actor="operator:eve", epoch=1)
    assert tick is not None
    assert (tick.decision.verdict, tick.rollout.state.status) == ("promote", "promoted")
    assert list_decisions(world.database, rollout.id)[-1].actor == "operator:eve"


def test_nothing_is_promoted_before_it_has_baked(world: World) -> None:
    at_the_last_step(with_settings(world, bake_s=1000.0))
    early = world.tick()
    assert (early.decision.verdict, early.rollout.state.status) == ("continue", "certify")
    assert "of 1000 s have passed since the launch" in early.decision.reason
    world.now += 1000.0
    assert world.tick().decision.verdict == "promote"


def test_a_promoted_version_that_turns_toxic_gives_way_to_the_old_champion(world: World) -> None:
    rollout = promoted(world)
    answer_everybody(world, 60, toxic=1.0)
    later(world, SETTINGS.maturity_s + SCORE_PATIENCE_S + 1)
    tick = world.tick()
    assert (tick.decision.verdict, tick.decision.cause, tick.decision.metric) == ("roll_back", "harm", "toxicity")
    assert world.route() == Route(ALIAS, 5, BASE, None)
    assert count_rollbacks(world.database) == {"toxicity": 1}
    assert registry.get_model(world.database, BASE).state == ModelState.CHAMPION
    assert registry.get_model(world.database, CANDIDATE).state == ModelState.RETIRED
    assert [ended.state.status for ended, _ in world.ended] == ["promoted", "rolled_back"]
    assert world.controller().tick(ALIAS, epoch=1) is None
    assert get_rollout(world.database, rollout.id).state.status == "rolled_back"


def test_a_promoted_version_that_stays_what_it_was_stays(world: World) -> None:
    rollout = promoted(world)
    for _ in range(4):
        answer_everybody(world, 50, toxic=0.1)
        later(world, SETTINGS.maturity_s + SCORE_PATIENCE_S + 1)
        assert world.tick().decision.verdict == "continue"
    later(world, SETTINGS.watch_s)
    over = world.tick()
    assert over.decision.reason.startswith("The watch over the promotion is over: 10% toxic in 200 users")
    assert world.controller().tick(ALIAS, epoch=1) is None
    assert world.route() == Route(ALIAS, 4, CANDIDATE, None)
    assert get_rollout(world.database, rollout.id).state.status == "promoted"


def test_a_promoted_version_that_fails_gives_way_at_once(world: World) -> None:
    promoted(world)
    answer_everybody(world, 30, failing=0.5)
    later(world, 1)
    assert (world.tick().decision.verdict, world.route()) == ("roll_back", Route(ALIAS, 5, BASE, None))
    assert count_rollbacks(world.database) == {"breaker": 1}


def test_answers_that_nobody_scores_say_nothing_of_a_promotion(world: World) -> None:
    promoted(world)
    answer_everybody(world, 50, is_scored=False)
    later(world, SETTINGS.maturity_s + SCORE_PATIENCE_S + 1)
    tick = world.tick()
    assert (tick.decision.verdict, tick.n_new_users) == ("continue", 0)
    assert "no user with scored answers" in tick.decision.reason


def test_a_person_may_take_a_promotion_back_while_it_is_watched(world: World) -> None:
    promoted(world)
    later(world, 1)
    orders = world.controller()
    assert orders.act(ALIAS, "advance", "more", actor="operator:eve", epoch=1) is None
    tick = orders.act(ALIAS, "roll_back", "complaints", actor="operator:eve", epoch=1)
    assert tick is not None
    assert world.route() == Route(ALIAS, 5, BASE, None)
    assert count_rollbacks(world.database) == {"operator": 1}
    assert orders.act(ALIAS, "roll_back", "again", actor="operator:eve", epoch=1) is None


def test_a_rollout_that_follows_ends_the_watch(world: World) -> None:
    promoted(world)
    later(world, 1)
    world.start("base-model--r0002-ffffffff")
    answer_everybody(world, 60, toxic=0.9, failing=0.5)
    later(world, SETTINGS.maturity_s + SCORE_PATIENCE_S + 1)
    tick = world.tick()
    assert (tick.rollout.candidate, tick.rollout.champion) == ("base-model--r0002-ffffffff", CANDIDATE)


def test_a_rollout_that_starts_while_a_promotion_is_being_taken_back_stays(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    promoted(world)
    answer_everybody(world, 30, failing=0.5)
    later(world, 1)

    def meanwhile(*given: Any) -> Inputs:
        seen = look_after(*given)
        world.start("base-model--r0002-ffffffff")
        return seen

    monkeypatch.setattr(controller, "look_after", meanwhile)
    with pytest.raises(StaleWrite):
        world.tick()
    route = world.route()
    assert route is not None
    assert route.champion == CANDIDATE
    assert route.experiment is not None
    assert route.experiment.is_canary


def test_without_a_time_to_watch_a_promotion_is_the_end(world: World) -> None:
    promoted(with_settings(world, watch_s=0.0))
    assert world.controller().tick(ALIAS, epoch=1) is None


@pytest.mark.parametrize("toxic", [0.0, 1.0])
def test_a_watch_comes_out_to_the_byte(world: World, toxic: float) -> None:
    rollout = promoted(world)
    for _ in range(2):
        answer_everybody(world, 40, toxic=toxic)
        later(world, SETTINGS.maturity_s + SCORE_PATIENCE_S + 1)
        if world.tick().rollout.state.status != "promoted":
            break
    found, kept = get_rollout(world.database, rollout.id), decision_inputs(world.database, rollout.id)
    records = [
        (record, Inputs.from_json(kept[record.id]) if record.id in kept else None)
        for record in list_decisions(world.database, rollout.id)
    ]
    again = list(replay(found, records))
    assert len(again) > 3
    assert [one.differences for one in again] == [()] * len(again)
    assert (again[-1].state, again[-1].watch) == (found.state, found.watch)


WATCH = Watch(100.0, 130.0, 20.0, 0.01, 0.05, 100.0)


def test_windows_are_read_once_their_answers_have_had_time_for_scores() -> None:
    assert due_windows(WATCH, 100.0 + 20.0 + SCORE_PATIENCE_S - 1) == []
    assert due_windows(WATCH, 1000.0) == [(100.0, 120.0), (120.0, 130.0)]
    assert due_windows(observe_windows(WATCH, [Window(120.0, ())]), 1000.0) == [(120.0, 130.0)]


@pytest.mark.parametrize("share", [float("nan"), -0.1, 1.1])
def test_an_impossible_share_is_no_evidence(share: float) -> None:
    with pytest.raises(InvalidOutcome):
        observe_windows(WATCH, [Window(120.0, (share,))])


def test_what_is_within_the_limit_never_adds_up_to_evidence() -> None:
    watch = WATCH
    for number in range(50):
        watch = observe_windows(watch, [Window(101.0 + number, (0.0,) * 19 + (1.0,))])
    assert watch.peak < 0.7
    assert Watch.from_json(watch.to_json()) == watch


def test_nobody_takes_back_what_is_not_watched() -> None:
    with pytest.raises(InvalidTransition):
        take_back(None, CONFIG, "late")


def test_the_watch_is_part_of_the_frozen_rules() -> None:
    settings = RolloutSettings(watch_s=7.0, bake_s=3.0, needs_approval=True)
    config = canary_config(settings)
    assert (config.watch_s, config.bake_s, config.needs_approval) == (7.0, 3.0, True)
    assert config.config_hash != canary_config(RolloutSettings()).config_hash
    assert launch(config, 1.0).status == "ramp"
