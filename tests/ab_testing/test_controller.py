"""The controller on real databases: synthetic users come through the routing table, and it decides by itself."""

from __future__ import annotations

import itertools
import json
import math
import threading
from dataclasses import dataclass
from typing import Any

import pytest
import sqlalchemy as sa

from ab_testing.controller import start_rollout
from ab_testing.errors import InvalidOutcome
from ab_testing.experiment import Route
from ab_testing.rollout_orders import carry_out
from ab_testing.rollout_rules import canary_config
from ab_testing.rollout_store import (
    Rollout,
    count_rollbacks,
    get_rollout,
    list_decisions,
    list_rollouts,
    running_rollout,
)
from ab_testing.route_store import write_route
from ab_testing.sightings import NO_DATA_S
from feedback.store import Score, save_scores
from pawl.errors import ConfigurationError, NegativeVerdict, StaleWrite
from pawl.schema import rollouts
from pawl.settings import RolloutMetricSettings, RolloutSettings
from tests.ab_testing.world import ALIAS, BASE, CANDIDATE, SETTINGS, START, World
from tests.pawl.records import harmless, interaction_id, save, save_with_scores, served


def weight(world: World) -> float | None:
    route = world.route()
    experiment = route.experiment if route else None
    return experiment.variant("treatment").weight if experiment else None


def test_a_good_candidate_goes_all_the_way_by_its_own_evidence(world: World) -> None:
    rollout = world.start()
    weights = [weight(world)]
    for _ in range(8):
        world.visit(1000, {BASE: 0.6, CANDIDATE: 0.05})
        tick = world.tick()
        weights.append(weight(world))
        if tick.rollout.state.is_final:
            break
    assert list(dict.fromkeys(weights)) == [0.01, 0.10, 0.50, None]
    assert world.route() == Route(ALIAS, 4, CANDIDATE, None)
    assert [(ended.id, decision.verdict) for ended, decision in world.ended] == [(rollout.id, "promote")]
    records = list_decisions(world.database, rollout.id)
    assert [record.verdict for record in records if record.verdict != "continue"] == ["advance", "advance", "promote"]
    assert [record.actor for record in records] == ["controller"] * len(records)
    assert all(record.reason and record.evidence["harm_needed"] == 20 for record in records)
    assert get_rollout(world.database, rollout.id).state.status == "promoted"
    assert world.tick().decision.reason.startswith("Watched after promotion")
    assert list_decisions(world.database, rollout.id) == records


def test_every_analysed_user_is_counted_once_over_all_ticks(world: World) -> None:
    rollout = world.start()
    world.controller().act(ALIAS, "hold", "to count", actor="operator:eve", epoch=1)
    analysed = 0
    for _ in range(3):
        world.visit(300, {BASE: 0.3, CANDIDATE: 0.3})
        n_new = world.tick().n_new_users
        assert world.tick().n_new_users == 0
        analysed += n_new
    counts = get_rollout(world.database, rollout.id).state.phases
    assert sum(count.control + count.treatment for count in counts) == analysed
    assert 900 * 0.4 < analysed < 900 * 0.65


def test_a_bad_candidate_is_rolled_back_and_the_champion_serves_everybody(world: World) -> None:
    rollout = world.start()
    world.controller().act(ALIAS, "advance", "to see it sooner", actor="operator:eve", epoch=1)
    for _ in range(6):
        world.visit(500, {BASE: 0.05, CANDIDATE: 0.95})
        if world.tick().rollout.state.is_final:
            break
    assert world.route() == Route(ALIAS, 3, BASE, None)
    last = list_decisions(world.database, rollout.id)[-1]
    assert (last.verdict, last.metric, last.weight) == ("roll_back", "thumbs_down", 0.0)
    assert last.evidence["harm"] >= last.evidence["harm_needed"]
    assert [(ended.state.status, decision.metric) for ended, decision in world.ended] == [
        ("rolled_back", "thumbs_down")
    ]
    assert count_rollbacks(world.database) == {"thumbs_down": 1}


def test_hard_failures_of_the_last_minute_roll_back_at_once(world: World) -> None:
    world.start()
    world.controller().act(ALIAS, "advance", "more traffic", actor="operator:eve", epoch=1)
    world.visit(400, {BASE: 0.0, CANDIDATE: 0.0}, failing=[CANDIDATE])
    world.now -= SETTINGS.min_dwell_s + SETTINGS.maturity_s
    tick = world.tick()
    assert (tick.decision.verdict, tick.decision.cause) == ("roll_back", "breaker")
    assert world.route() == Route(ALIAS, 3, BASE, None)
    assert count_rollbacks(world.database) == {"breaker": 1}


def test_an_outage_of_all_engines_is_not_the_canary_s_fault(world: World) -> None:
    world.start()
    world.controller().act(ALIAS, "advance", "more traffic", actor="operator:eve", epoch=1)
    world.visit(400, {BASE: 0.0, CANDIDATE: 0.0}, failing=[BASE, CANDIDATE])
    world.now -= SETTINGS.min_dwell_s + SETTINGS.maturity_s
    assert world.tick().decision.verdict == "continue"
    assert weight(world) == 0.10


def test_missing_scores_hold_the_canary_and_it_goes_on_when_they_come(world: World) -> None:
    rollout = world.start()
    world.visit(300, {BASE: 0.3, CANDIDATE: 0.3}, are_scored=False)
    held = world.tick()
    assert (held.decision.verdict, held.rollout.state.held_reason) == ("hold", "missing_data")
    world.tick()
    assert [record.verdict for record in list_decisions(world.database, rollout.id)] == ["hold"]
    assert weight(world) == 0.01
    save_scores(world.database, [harmless(number) for number in range(world.n_users)])
    resumed = world.tick()
    assert resumed.rollout.state.held_reason is None
    assert resumed.n_new_users > 100
    assert [record.verdict for record in list_decisions(world.database, rollout.id)][1] in ("continue", "advance")


def test_answers_that_are_never_kept_do_not_hold_anything(world: World) -> None:
    world.start()
    route = world.route()
    assert route is not None
    assert route.experiment is not None
    private = served(
        1,
        created_at=world.now,
        experiment=route.experiment.key,
        is_analysed=True,
        probability=0.5 / 0.51,
        is_stored=False,
        prompt=None,
        completion=None,
    )
    save(world.database, [private])
    world.now += 1000
    tick = world.tick()
    assert tick.n_new_users == 1
    assert tick.decision.verdict == "continue"


@dataclass(frozen=True)
class Kept:
    """All that a tick may change."""

    rollouts: list[Rollout]
    n_decisions: int
    route: Route | None


def kept(world: World, rollout: Rollout) -> Kept:
    return Kept(list_rollouts(world.database), len(list_decisions(world.database, rollout.id)), world.route())


def test_an_old_lease_holder_moves_nothing(world: World) -> None:
    rollout = world.start(epoch=1)
    route = world.route()
    assert route is not None
    with world.database.write() as connection:
        write_route(connection, route, epoch=2, at=world.now)
    world.visit(400, {BASE: 0.0, CANDIDATE: 0.0}, failing=[BASE, CANDIDATE])
    before = kept(world, rollout)
    with pytest.raises(StaleWrite):
        world.controller().act(ALIAS, "advance", "late", actor="operator:eve", epoch=1)
    assert kept(world, rollout) == before
    assert world.ended == []
    world.controller().act(ALIAS, "advance", "in time", actor="operator:eve", epoch=2)
    assert weight(world) == 0.10


def test_a_tick_that_was_overtaken_changes_nothing(world: World) -> None:
    rollout = world.start()
    world.visit(300, {BASE: 0.3, CANDIDATE: 0.3})
    after_order: list[Kept] = []

    def clock() -> float:
        """Between the tick's reading and its writing, a person orders something."""
        if not after_order:
            world.controller().act(ALIAS, "hold", "wait", actor="operator:eve", epoch=1)
            after_order.append(kept(world, rollout))
        return world.now + 1

    with pytest.raises(StaleWrite):
        world.controller(clock).tick(ALIAS, epoch=1)
    assert [kept(world, rollout)] == after_order
    assert get_rollout(world.database, rollout.id).state.held_reason == "operator"


def test_a_person_s_order_wins_over_the_ticks_it_races_with(world: World) -> None:
    world.start()
    n_ticks = itertools.count()

    def clock() -> float:
        """Between the order's reading and its writing the worker looks, twice in a row."""
        if next(n_ticks) < 2:
            world.now += 1
            world.tick()
        return world.now

    tick = world.controller(clock).act(ALIAS, "roll_back", "now", actor="operator:eve", epoch=1)
    assert tick is not None
    assert tick.rollout.state.status == "rolled_back"
    assert world.route() == Route(ALIAS, 2, BASE, None)
    assert len(world.ended) == 1
    assert count_rollbacks(world.database) == {"operator": 1}


def test_an_order_for_one_rollout_never_reaches_the_next(world: World) -> None:
    rollout, following = world.start(), "base-model--r0002-ffffffff"
    n_reads = itertools.count()

    def clock() -> float:
        """Between the order's reading and its writing that rollout ends, and another one begins."""
        if next(n_reads) == 0:
            world.now += 1
            world.controller().act(ALIAS, "roll_back", "no", actor="operator:ann", epoch=1)
            world.start(following)
        return world.now

    with pytest.raises(NegativeVerdict, match="over"):
        carry_out(world.database, rollout, "advance", "well done", actor="operator:eve", clock=clock)
    running = running_rollout(world.database, ALIAS)
    assert running is not None
    assert (running.candidate, weight(world), running.state.step) == (following, 0.01, 0)
    assert list_decisions(world.database, running.id) == []


def test_what_a_person_orders_is_recorded_under_the_persons_name(world: World) -> None:
    rollout = world.start()
    controller = world.controller()
    for action in ("hold", "resume", "advance", "roll_back"):
        world.now += 1
        tick = controller.act(ALIAS, action, f"because of {action}", actor="operator:eve", epoch=1)
        assert tick is not None
    records = list_decisions(world.database, rollout.id)
    assert [(record.verdict, record.reason, record.actor) for record in records] == [
        (action, f"because of {action}", "operator:eve") for action in ("hold", "resume", "advance", "roll_back")
    ]
    assert [record.weight for record in records] == [0.01, 0.01, 0.10, 0.0]
    assert world.route() == Route(ALIAS, 3, BASE, None)
    assert controller.act(ALIAS, "advance", "again", actor="operator:eve", epoch=1) is None
    assert [ended.state.status for ended, _ in world.ended] == ["rolled_back"]


def test_a_person_s_hold_stays_until_a_person_ends_it(world: World) -> None:
    world.start()
    world.controller().act(ALIAS, "hold", "wait", actor="operator:eve", epoch=1)
    world.visit(400, {BASE: 0.6, CANDIDATE: 0.0})
    assert world.tick().rollout.state.held_reason == "operator"
    world.now += 1
    world.controller().act(ALIAS, "resume", "go", actor="operator:eve", epoch=1)
    assert world.tick().rollout.state.status == "ramp"


def test_one_rollout_at_a_time(world: World) -> None:
    rollout = world.start()
    with pytest.raises(NegativeVerdict, match=rollout.id):
        world.start("base-model--r0002-ffffffff")
    assert [found.id for found in list_rollouts(world.database)] == [rollout.id]
    world.controller().act(ALIAS, "roll_back", "no", actor="operator:eve", epoch=1)
    following = world.start("base-model--r0002-ffffffff")
    running = running_rollout(world.database, ALIAS)
    assert running is not None
    assert running.id == following.id


def test_of_several_starts_at_once_one_wins(world: World) -> None:
    won: list[str] = []
    lost: list[Exception] = []
    barrier = threading.Barrier(4)

    def start(number: int) -> None:
        barrier.wait(10)
        try:
            route = Route(ALIAS, 0, BASE)
            won.append(start_rollout(world.database, SETTINGS, route, f"m{number}", now=START, epoch=0).id)
        except (NegativeVerdict, StaleWrite) as exc:
            lost.append(exc)

    threads = [threading.Thread(target=start, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert (len(won), len(lost)) == (1, 3)
    assert [found.id for found in list_rollouts(world.database)] == won


def test_what_cannot_be_rolled_out_is_refused_as_configuration() -> None:
    with pytest.raises(ConfigurationError, match="rollout: steps"):
        canary_config(RolloutSettings(steps=[0.1, 0.9], min_users=[5, 5]))


def test_the_champion_is_no_candidate(world: World) -> None:
    with pytest.raises(ConfigurationError, match="champion"):
        world.start(BASE)


def tell(world: World, n_users: int, variant: str, **changes: Any) -> None:
    """So many users of one variant come in the last second, whatever the route says, and are scored as harmless."""
    rollout = running_rollout(world.database, ALIAS)
    assert rollout is not None
    share = 0.10 / 0.60 if variant == "treatment" else 0.50 / 0.60
    known = {"experiment": rollout.id, "is_analysed": True, "phase": 1, "probability": share, "created_at": world.now}
    numbers = range(world.n_users, world.n_users + n_users)
    sides = {"assigned_variant": variant, "served_variant": variant}
    asked = [served(number, **{"unit_id": f"user-{number}"} | known | sides | changes) for number in numbers]
    save_with_scores(world.database, asked)
    world.n_users += n_users


def at_ten_percent(world: World) -> Rollout:
    rollout = world.start()
    world.controller().act(ALIAS, "advance", "to see it sooner", actor="operator:eve", epoch=1)
    return rollout


@pytest.mark.parametrize("variant", ["control", "treatment"])
def test_users_of_one_side_only_never_advance_a_canary(world: World, variant: str) -> None:
    at_ten_percent(world)
    for _ in range(3):
        tell(world, 200, variant)
        world.now += SETTINGS.min_dwell_s + SETTINGS.maturity_s
        decision = world.tick().decision
        assert decision.verdict == "hold"
        assert decision.cause == "srm_assigned"
    assert weight(world) == 0.10


def test_no_user_at_all_never_advances_a_canary(world: World) -> None:
    at_ten_percent(world)
    verdicts = []
    for _ in range(4):
        world.now += NO_DATA_S / 2
        verdicts.append(world.tick().decision.verdict)
    assert verdicts == ["continue", "hold", "hold", "hold"]
    tell(world, 1, "control")
    resumed = world.tick()
    assert (resumed.decision.verdict, resumed.rollout.state.held_reason) == ("continue", None)
    assert weight(world) == 0.10


def test_records_that_stopped_coming_never_advance_a_canary(world: World) -> None:
    """Evidence for the next step is there, and nobody has come since: stale, or a clock that jumped ahead."""
    world.start()
    world.visit(1000, {BASE: 0.6, CANDIDATE: 0.05})
    world.now += 10 * 86_400.0
    assert world.tick().decision.cause == "missing_data"
    assert weight(world) == 0.01


def test_a_clock_that_went_back_never_advances_a_canary(world: World) -> None:
    world.start()
    world.visit(1000, {BASE: 0.6, CANDIDATE: 0.05})
    world.now -= 3000.0
    tick = world.tick()
    assert (tick.decision.cause, tick.n_new_users) == ("missing_data", 0)
    world.now += 3000.0
    assert world.tick().decision.verdict == "advance"


def as_betting_1_wrote_it(world: World) -> None:
    """Take out of the running rollout what the first version of the statistics did not know."""
    with world.database.write() as connection:
        row = connection.execute(sa.select(rollouts.c.config, rollouts.c.state)).one()
        config, state = json.loads(row.config), json.loads(row.state)
        for known, new in (
            (config, ("watch_s", "bake_s", "needs_approval", "max_silence_s")),
            (state, ("reading", "watch")),
            (state["canary"], ("assigned", "baked_from", "seen_at", "seen")),
            *((metric, ("threshold", "counts_events")) for metric in config["metrics"]),
            *((metric, ("events",)) for metric in state["canary"]["metrics"].values()),
            *((metric["certify"], ("treatment_count",)) for metric in state["canary"]["metrics"].values()),
        ):
            for name in new:
                del known[name]
        connection.execute(rollouts.update().values(config=json.dumps(config), state=json.dumps(state)))


def test_a_rollout_of_an_older_version_goes_on_to_its_end(world: World) -> None:
    world.start()
    world.visit(400, {BASE: 0.6, CANDIDATE: 0.05})
    before = world.tick().rollout.state
    as_betting_1_wrote_it(world)
    ends = []
    for _ in range(8):
        world.visit(1000, {BASE: 0.6, CANDIDATE: 0.05})
        ends.append(world.tick())
        if ends[-1].rollout.state.is_final:
            break
    counted = [
        sum(count.control + count.treatment for count in state.phases) for state in (before, ends[0].rollout.state)
    ]
    assert counted[1] == counted[0] + ends[0].n_new_users
    assert sum(count.control + count.treatment for count in ends[0].rollout.state.assigned) == counted[1]
    assert ends[-1].decision.verdict == "promote"
    assert world.controller().tick(ALIAS, epoch=1) is None


def test_a_probability_that_cannot_be_stops_the_controller_and_not_the_champion(world: World) -> None:
    at_ten_percent(world)
    tell(world, 3, "treatment", probability=0.0)
    world.now += SETTINGS.min_dwell_s + SETTINGS.maturity_s
    with pytest.raises(InvalidOutcome):
        world.tick()
    assert weight(world) == 0.10


def test_answers_of_no_known_length_or_speed_certify_nothing(world: World) -> None:
    slow = RolloutMetricSettings(name="slow_answers", margin=0.2, weight=0.5, threshold=1000.0)
    down = RolloutMetricSettings(name="thumbs_down", margin=0.2, weight=0.5, role="primary")
    world.settings = SETTINGS.model_copy(update={"metrics": [down, slow], "steps": [0.1], "min_users": [2]})
    rollout = world.start()
    if world.database.is_sqlite:  # It keeps no NaN.
        return
    tell(world, 20, "treatment", phase=0, latency_ms=math.nan)
    tell(world, 100, "control", phase=0, latency_ms=math.nan)
    world.now += SETTINGS.min_dwell_s + SETTINGS.maturity_s
    tick = world.tick()
    assert tick.decision.verdict == "continue"
    assert "slow_answers" in tick.decision.reason
    assert get_rollout(world.database, rollout.id).state.metrics["slow_answers"].treatment_count == 0


def test_a_toxic_answer_counts_before_its_user_has_matured(world: World) -> None:
    at_ten_percent(world)
    for number in range(5):
        tell(world, 1, "treatment")
        score = Score(interaction_id(10_000 + number), 0.9, True, "comply", False, "test", world.now)
        late = served(
            10_000 + number,
            created_at=world.now,
            unit_id=f"user-{number}",
            experiment=get_rollout(world.database, list_rollouts(world.database)[0].id).id,
            assigned_variant="treatment",
            served_variant="treatment",
            is_analysed=True,
            probability=0.10 / 0.60,
            phase=1,
        )
        save(world.database, [late])
        save_scores(world.database, [score])
    world.now += 1
    tick = world.tick()
    assert tick.n_new_users == 0
    assert (tick.decision.verdict, tick.decision.metric) == ("roll_back", "toxicity")
