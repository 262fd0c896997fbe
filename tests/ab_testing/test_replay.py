"""A rollout made again from what was recorded is the rollout that was."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st

from ab_testing import rollout_store
from ab_testing.canary import Decision, Health
from ab_testing.canary_state import PhaseCount, UserEvent, UserOutcome
from ab_testing.replay import NOBODY, Inputs, Replayed, replay
from ab_testing.rollout_store import (
    CONTROLLER,
    DecisionRecord,
    decision_inputs,
    get_rollout,
    list_decisions,
    save_progress,
)
from ab_testing.watch import Window
from pawl.audit import latest_events
from pawl.database import Database
from pawl.schema import rollouts
from tests.ab_testing.world import ALIAS, BASE, CANDIDATE, World


def remade(database: Database, rollout_id: str, *, spoil: int | None = None) -> list[Replayed]:
    """All decisions again; of the one numbered `spoil` every user is taken out."""
    records, kept = list_decisions(database, rollout_id), decision_inputs(database, rollout_id)
    inputs = {key: Inputs.from_json(value) for key, value in kept.items()}
    if spoil is not None:
        lost = records[spoil].id
        inputs[lost] = inputs[lost]._replace(outcomes=())
    return list(replay(get_rollout(database, rollout_id), [(record, inputs.get(record.id)) for record in records]))


def until_it_is_over(world: World, down: dict[str, float]) -> None:
    for _ in range(8):
        world.visit(1000, down)
        if world.tick().rollout.state.is_final:
            return
    pytest.fail("it should be over by now")


@pytest.mark.parametrize(
    ("down", "end"), [({BASE: 0.6, CANDIDATE: 0.05}, "promote"), ({BASE: 0.05, CANDIDATE: 0.9}, "roll_back")]
)
def test_every_decision_comes_out_to_the_byte(world: World, down: dict[str, float], end: str) -> None:
    rollout = world.start()
    until_it_is_over(world, down)
    again = remade(world.database, rollout.id)
    assert [one.differences for one in again] == [()] * len(again)
    assert again[-1].again.verdict == end
    assert again[-1].state == get_rollout(world.database, rollout.id).state


def test_orders_holds_and_missing_scores_are_part_of_it(world: World) -> None:
    rollout = world.start()
    world.visit(200, {BASE: 0.1, CANDIDATE: 0.1}, are_scored=False)
    world.tick()
    world.tick()
    world.controller().act(ALIAS, "advance", "we know", actor="operator:ann", epoch=1)
    world.controller().act(ALIAS, "hold", "lunch", actor="operator:ann", epoch=1)
    world.visit(200, {BASE: 0.1, CANDIDATE: 0.1})
    world.tick()
    world.controller().act(ALIAS, "resume", "back", actor="operator:ann", epoch=1)
    world.visit(200, {BASE: 0.1, CANDIDATE: 0.1})
    world.tick()
    again = remade(world.database, rollout.id)
    assert [one.differences for one in again] == [()] * len(again)
    assert again[-1].state == get_rollout(world.database, rollout.id).state
    assert {one.record.verdict for one in again} >= {"hold", "advance", "resume"}


def test_a_tick_while_the_history_is_read_is_not_half_of_it(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    rollout = world.start()
    world.visit(200, {BASE: 0.1, CANDIDATE: 0.1})
    world.tick()
    world.visit(200, {BASE: 0.1, CANDIDATE: 0.1})

    def late(database: Database, rollout_id: str) -> list[DecisionRecord]:
        world.tick()
        return list_decisions(database, rollout_id)

    monkeypatch.setattr(rollout_store, "list_decisions", late)
    found, records = rollout_store.read_history(world.database, rollout.id)
    kept = decision_inputs(world.database, rollout.id)
    again = list(replay(found, [(record, Inputs.from_json(kept[record.id])) for record in records]))
    assert (len(records), len(kept)) == (1, 2)
    assert again[-1].state == found.state


def test_another_history_does_not_pass_for_this_one(world: World) -> None:
    rollout = world.start()
    until_it_is_over(world, {BASE: 0.6, CANDIDATE: 0.05})
    again = remade(world.database, rollout.id, spoil=0)
    assert "evidence" in again[0].differences
    assert again[-1].state != get_rollout(world.database, rollout.id).state


def test_other_rules_are_noticed(world: World) -> None:
    rollout = world.start()
    until_it_is_over(world, {BASE: 0.6, CANDIDATE: 0.05})
    kept = decision_inputs(world.database, rollout.id)
    records = [(one, Inputs.from_json(kept[one.id])) for one in list_decisions(world.database, rollout.id)]
    stricter = replace(rollout, config=replace(rollout.config, min_users=(50, 50, 50)))
    assert any(one.differences for one in replay(stricter, records[:1]))


def test_no_name_of_a_user_is_kept(world: World) -> None:
    rollout = world.start()
    world.visit(300, {BASE: 0.1, CANDIDATE: 0.1})
    world.tick()
    (kept,) = decision_inputs(world.database, rollout.id).values()
    assert len(kept["outcomes"]) > 100
    assert "user-" not in json.dumps(kept)


def test_a_hold_that_goes_on_leaves_one_line_in_the_audit_trail(world: World) -> None:
    rollout = world.start()
    world.controller().act(ALIAS, "hold", "lunch", actor="operator:ann", epoch=1)
    for _ in range(3):
        world.visit(50, {BASE: 0.1, CANDIDATE: 0.1})
        world.tick()
    assert [event.action for event in latest_events(world.database, subject=rollout.id)] == [
        "rollout.hold",
        "rollout.start",
    ]
    assert [record.actor for record in list_decisions(world.database, rollout.id)][1:] == [CONTROLLER] * 3


def test_a_hold_for_another_reason_is_told_of(world: World) -> None:
    rollout = world.start()
    world.visit(50, {BASE: 0.1, CANDIDATE: 0.1}, are_scored=False)
    assert world.tick().decision.cause == "missing_data"
    before = get_rollout(world.database, rollout.id)
    world.now += 1
    approval = Decision("hold", 0.01, "waits for approval", "approval")
    after = replace(before, state=replace(before.state, held_reason="approval"), updated_at=world.now)
    save_progress(world.database, before, after, approval, None, actor=CONTROLLER, epoch=1)
    assert [event.action for event in latest_events(world.database, subject=rollout.id)] == [
        "rollout.hold",
        "rollout.hold",
        "rollout.start",
    ]


def test_no_name_of_a_user_stays_with_a_rollout_that_is_over(world: World) -> None:
    rollout = world.start()
    until_it_is_over(world, {BASE: 0.05, CANDIDATE: 0.9})
    with world.database.read() as connection:
        kept = connection.execute(sa.select(rollouts.c.state).where(rollouts.c.id == rollout.id)).scalar_one()
    assert "user-" not in kept


shares = st.floats(0.001, 0.999)
outcomes = st.builds(
    UserOutcome,
    unit=st.just(NOBODY),
    is_treatment=st.booleans(),
    treatment_probability=shares,
    values=st.dictionaries(st.sampled_from(["thumbs_down", "toxicity"]), st.none() | st.floats(0, 1)),
    phase=st.integers(0, 3),
)

events = st.builds(
    UserEvent,
    metric=st.sampled_from(["toxicity", "harmful_compliance"]),
    unit=st.just(NOBODY),
    is_treatment=st.booleans(),
    treatment_probability=shares,
    phase=st.integers(0, 3),
)
counts = st.builds(PhaseCount, st.integers(0, 3), shares, st.integers(0, 99), st.integers(0, 99))
windows = st.builds(Window, st.floats(0, 9), st.lists(st.floats(0, 1), max_size=3).map(tuple))


@given(
    st.builds(
        Inputs,
        st.builds(Health, st.integers(0, 99), st.integers(0, 9), missing=st.lists(st.text(max_size=5)).map(tuple)),
        st.lists(outcomes, max_size=5).map(tuple),
        st.lists(events, max_size=3).map(tuple),
        st.lists(counts, max_size=3).map(tuple),
        st.lists(windows, max_size=3).map(tuple),
    )
)
def test_inputs_survive_being_kept(inputs: Inputs) -> None:
    assert Inputs.from_json(json.loads(json.dumps(inputs.to_json()))) == inputs


def test_inputs_that_an_older_version_kept_are_still_read() -> None:
    kept = Inputs(Health()).to_json()
    assert Inputs.from_json({"health": kept["health"], "outcomes": []}) == Inputs(Health())
