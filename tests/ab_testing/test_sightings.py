"""A tick reads only what is new, and finds what reading everything again would have found."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from random import Random
from typing import Any

import pytest

from ab_testing.canary_state import launch
from ab_testing.experiment import CONTROL, TREATMENT
from ab_testing.outcomes import COMPLIES, Matured, matured_users
from ab_testing.rollout_rules import canary_config
from ab_testing.rollout_store import Rollout
from ab_testing.sightings import CLOCKS_APART_S, NO_DATA_S, OVERLAP_S, Sighting, look, new_users
from feedback.experiment_users import harms_since
from feedback.interactions import Interaction, Status
from feedback.store import Score, experiment_rows, save_scores
from pawl.database import Database
from pawl.schema import interactions
from pawl.settings import RolloutSettings
from tests.pawl.records import interaction, save, thumb

CONFIG = canary_config(RolloutSettings())
MATURITY_S = 10.0
START = 1_000_000.0
_numbers = itertools.count(1)


def rollout_named(name: str, at: float = START) -> Rollout:
    return Rollout(name, "assistant", "base", "base--r1", CONFIG, launch(CONFIG, at), MATURITY_S, None, at, at)


def asked(experiment: str, unit: str, at: float, *, is_analysed: bool = True, **changes: Any) -> Interaction:
    number = next(_numbers)
    is_treatment = sum(unit.encode()) % 3 == 0
    known = {
        "created_at": START + at,
        "unit_id": unit,
        "experiment": experiment,
        "is_analysed": is_analysed,
        "assigned_variant": TREATMENT if is_treatment else CONTROL,
        "served_variant": TREATMENT if is_treatment else CONTROL,
        "probability": 0.01 / 0.51 if is_treatment else 0.5 / 0.51,
    }
    return interaction(f"{number:048x}", **(known | changes))


def scored(one: Interaction, at: float, *, is_toxic: bool = False, complies: bool = False) -> Score:
    return Score(one.id, 0.9 if is_toxic else 0.1, is_toxic, "comply", complies, "test", START + at)


def all_at_once(database: Database, rollout: Rollout, now: float) -> Matured:
    """The definition: every record read again."""
    i = interactions.c
    query = interactions.select().where(i.experiment == rollout.id).order_by(i.created_at, i.id)
    zones: dict[str, bool] = {}
    with database.read() as connection:
        for row in connection.execute(query):
            zones.setdefault(row.unit_id, bool(row.is_analysed))
    return matured_users(
        experiment_rows(database, rollout.id),
        zones,
        CONFIG.metrics,
        cursor=rollout.cursor,
        maturity_s=MATURITY_S,
        now=now,
    )


def history(random: Random, experiment: str) -> list[tuple[float, Interaction, float]]:
    """When a record arrives, the record, and when its scores do; some users move into the treatment later."""
    told = []
    for unit in random.sample("abcdefghijkl", random.randint(1, 12)):
        analysed_from = random.choice([0, 0, 0, 30])
        for _ in range(random.randint(1, 4)):
            at = float(random.randint(0, 60))
            status = random.choice([Status.OK, Status.OK, Status.UPSTREAM_ERROR])
            one = asked(experiment, unit, at, is_analysed=at >= analysed_from, status=status)
            told.append((at + random.choice([0, 0, 25]), one, at + random.choice([0, 0, 5, 40])))
    return told


def test_many_small_looks_find_what_reading_everything_finds(database: Database) -> None:
    random = Random(20)
    for number in range(6):
        rollout = rollout_named(f"ro_{number}")
        told = history(random, rollout.id)
        for at in [*sorted(random.uniform(0, 120) for _ in range(5)), 500.0]:
            arrived = [entry for entry in told if entry[0] <= at]
            save(
                database, [one for _, one, _ in arrived], [thumb(int(one.id, 16), "down") for _, one, _ in arrived[::3]]
            )
            save_scores(database, [scored(one, due, is_toxic=due % 2 == 1) for _, one, due in arrived if due <= at])
            now = START + at
            expected = all_at_once(database, rollout, now)
            assert new_users(database, rollout, now, random.choice([1, 2, 1000])) == expected
            rollout = replace(rollout, cursor=expected.cursor)


def test_days_that_are_due_at_once_are_read_in_several_ticks(database: Database) -> None:
    rollout = rollout_named("ro_late")
    told = [asked(rollout.id, f"user-{number}", number / 10) for number in range(50)]
    save(database, told)
    save_scores(database, [scored(one, 100.0) for one in told])
    now = START + 1000
    expected = all_at_once(database, rollout, now)
    found: list[Matured] = []
    while not found or found[-1].outcomes:
        found.append(new_users(database, rollout, now, page_users=5, most_pages=4))
        rollout = replace(rollout, cursor=found[-1].cursor)
    assert [len(one.outcomes) for one in found] == [20, 19, 11, 0], "a page begins with the last one of the page before"
    assert sum((one.outcomes for one in found), ()) == expected.outcomes
    assert found[-1].cursor == expected.cursor


class Story:
    """One rollout that is looked at again and again."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.rollout = rollout_named("ro_story")

    def tell(self, *told: Interaction) -> None:
        save(self.database, told)

    def look(self, at: float) -> Sighting:
        seen = look(self.database, self.rollout, START + at)
        self.rollout = replace(self.rollout, cursor=seen.cursor, reading=seen.reading)
        return seen

    def events(self, at: float) -> list[tuple[str, str]]:
        return [(event.metric, event.unit) for event in self.look(at).inputs.events]


@pytest.fixture
def story(database: Database) -> Story:
    return Story(database)


def test_the_first_harmful_answer_of_a_user_counts_as_soon_as_it_is_scored_and_only_once(story: Story) -> None:
    first, second, other = (asked("ro_story", unit, at) for unit, at in (("ann", 1.0), ("ann", 2.0), ("ben", 3.0)))
    story.tell(first, second, other)
    save_scores(story.database, [scored(first, 4.0, is_toxic=True), scored(other, 4.0)])
    assert story.events(5.0) == [("toxicity", "ann")]
    save_scores(story.database, [scored(second, 6.0, is_toxic=True, complies=True)])
    assert story.events(7.0) == [("harmful_compliance", "ann")]
    assert story.events(8.0) == []
    assert story.events(7.0 + 3 * OVERLAP_S) == []
    late = asked("ro_story", "ann", 500.0)
    story.tell(late)
    save_scores(story.database, [scored(late, 501.0, is_toxic=True, complies=True)])
    assert story.events(505.0) == []


def test_an_answer_that_the_outcome_of_its_user_is_not_made_of_is_no_event(story: Story) -> None:
    first, within, beyond = (asked("ro_story", "ann", at) for at in (1.0, 1.0 + MATURITY_S, 1.5 + MATURITY_S))
    story.tell(first, within, beyond)
    save_scores(story.database, [scored(beyond, 12.0, is_toxic=True)])
    assert story.events(13.0) == []
    save_scores(story.database, [scored(first, 14.0), scored(within, 14.0, is_toxic=True)])
    assert story.events(15.0) == [("toxicity", "ann")]


def test_an_event_told_of_after_the_outcome_of_its_user_is_none(story: Story) -> None:
    story.tell(asked("ro_story", "ann", 1.0, is_stored=False))
    assert [outcome.unit for outcome in story.look(2.0 + MATURITY_S).inputs.outcomes] == ["ann"]
    delayed = asked("ro_story", "ann", 2.0)
    story.tell(delayed)
    save_scores(story.database, [scored(delayed, 14.0, is_toxic=True)])
    assert story.events(15.0) == []


def test_scores_that_are_written_late_are_still_found(story: Story) -> None:
    on_time, late = asked("ro_story", "ann", 1.0), asked("ro_story", "ben", 1.0)
    story.tell(on_time, late)
    save_scores(story.database, [scored(on_time, 50.0, is_toxic=True)])
    assert story.events(50.0) == [("toxicity", "ann")]
    save_scores(story.database, [scored(late, 51.0 - OVERLAP_S, is_toxic=True)])
    assert story.events(60.0) == [("toxicity", "ben")]


def test_who_was_moved_into_the_treatment_later_is_in_no_count(story: Story) -> None:
    story.tell(asked("ro_story", "ann", 1.0, is_analysed=False))
    moved = asked("ro_story", "ann", 5.0, assigned_variant=TREATMENT, phase=1)
    story.tell(moved, asked("ro_story", "ben", 5.0, assigned_variant=CONTROL))
    save_scores(story.database, [scored(moved, 6.0, is_toxic=True)])
    seen = story.look(30.0)
    assert seen.inputs.events == ()
    assert [(count.control, count.treatment) for count in seen.inputs.assigned] == [(1, 0)]
    assert len(harms_since(story.database, "ro_story", START, COMPLIES)) == 1


def test_assigned_users_are_counted_once_whether_or_not_anybody_scores_them(story: Story) -> None:
    story.tell(*(asked("ro_story", f"user-{number}", float(number)) for number in range(20)))
    told = [sum(count.control + count.treatment for count in story.look(at).inputs.assigned) for at in range(0, 40, 3)]
    assert sum(told) == 20
    assert max(told) < 10
    assert story.rollout.cursor is None


def missing(story: Story, at: float) -> Sequence[str]:
    return story.look(at).inputs.health.missing


def test_nothing_is_known_while_nobody_comes_or_the_clocks_disagree(story: Story) -> None:
    names = tuple(metric.name for metric in CONFIG.metrics)
    assert missing(story, 1.0) == ()
    assert missing(story, NO_DATA_S) == names
    story.tell(asked("ro_story", "ann", NO_DATA_S, is_stored=False))
    assert missing(story, NO_DATA_S + 1) == ()
    assert missing(story, NO_DATA_S - CLOCKS_APART_S - 1) == names
    assert missing(story, NO_DATA_S + 10 * 86_400) == names
    assert missing(story, math.nan) == names


def test_requests_that_failed_or_were_answered_by_the_other_variant_count_as_failures(story: Story) -> None:
    canary: dict[str, Any] = {"assigned_variant": TREATMENT, "served_variant": TREATMENT}
    story.tell(
        asked("ro_story", "ann", 100.0, **canary),
        asked("ro_story", "ann", 101.0, **canary, status=Status.UPSTREAM_ERROR),
        asked("ro_story", "ann", 102.0, **{**canary, "served_variant": CONTROL}),
        asked("ro_story", "ann", 20.0, **canary, status=Status.UPSTREAM_ERROR),
        asked("ro_story", "ben", 100.0, assigned_variant=CONTROL, served_variant=CONTROL),
    )
    health = story.look(103.0).inputs.health
    assert (health.canary_requests, health.canary_errors) == (3, 2)
    assert (health.control_requests, health.control_errors) == (1, 0)


def test_a_clock_that_jumped_ahead_loses_no_user_and_no_event(story: Story) -> None:
    first = asked("ro_story", "ann", 1.0)
    story.tell(first)
    save_scores(story.database, [scored(first, 2.0)])
    story.look(100_000.0)
    following = asked("ro_story", "ben", 20.0)
    story.tell(following)
    save_scores(story.database, [scored(following, 21.0, is_toxic=True)])
    seen = story.look(40.0).inputs
    assert [outcome.unit for outcome in seen.outcomes] == ["ben"]
    assert [event.unit for event in seen.events] == ["ben"]
    assert sum(count.control + count.treatment for count in seen.assigned) == 1
