"""`pawl experiment report` on what a gateway recorded."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from ab_testing.controller import start_rollout
from ab_testing.experiment import Route
from ab_testing.route_store import load_route
from feedback.interactions import Interaction
from pawl.audit import latest_events
from pawl.cli.learning import canary_opener
from pawl.database import Database
from pawl.settings import load_settings
from retrain.errors import CanaryTaken
from tests.ab_testing.test_experiment_table import shown
from tests.pawl.conftest import Cli
from tests.pawl.records import feedback, save

VARIANTS = ("control", "treatment")


def asked(key: str, n_users: int = 120) -> list[Interaction]:
    return [shown(user, f"user {user}", VARIANTS[user % 2], experiment=key) for user in range(n_users)]


def fill(database: Database, key: str) -> None:
    rows = asked(key)
    liked = [one for place, one in enumerate(rows) if place % (2 + 3 * (place % 2 == 0)) == 0 or place % 3 == 0]
    save(database, rows, [feedback(one.id, "thumbs", "up") for one in liked])


def test_a_report_for_programs_people_and_browsers(cli: Cli, shared: Database, tmp_path: Path) -> None:
    fill(shared, "tone")
    told = cli("experiment", "report", "tone", "--json").json()
    assert (told["experiment"], told["users"]) == ("tone", {"control": 60, "treatment": 60})
    (thumbs,) = [effect for effect in told["effects"] if effect["metric"] == "thumbs_up_rate"]
    assert thumbs["ci_lower"] < thumbs["estimate"] < thumbs["ci_upper"]
    page = tmp_path / "tone.html"
    lines = cli("experiment", "report", "tone", "--html", str(page), "--by", "tenure").out.splitlines()
    assert {"metric", "verdict"} <= set(lines[0].split())
    assert sum("thumbs_up_rate" in line for line in lines) == 2, "of everybody, and of the one tenure there is"
    assert "thumbs_up_rate" in page.read_text()
    assert "users of treatment: 60" in page.read_text()


def test_a_report_says_what_stands_against_it(cli: Cli, shared: Database) -> None:
    """Nine of ten users of the treatment never came: those who did are not like those of the control."""
    save(shared, [shown(n, f"user {n}", VARIANTS[n % 20 == 0], probability=0.5, experiment="lost") for n in range(400)])
    said = cli("experiment", "report", "lost")
    assert said.code == 0
    assert "the split of assigned users is not the one intended" in said.err
    assert "380 of control where 200 were due" in said.err
    split = cli("experiment", "report", "lost", "--json").json()["split"]
    assert (split["assigned"]["is_mismatch"], split["scored"]["counts"]) == (True, {})


def test_a_report_knows_the_metrics_that_a_split_was_started_with(cli: Cli, shared: Database, tmp_path: Path) -> None:
    assert cli(
        "experiment", "start", "tone", "--variant", "control=base-model:1", "--variant", "treatment=base-model:1"
    )
    (start,) = latest_events(shared, subject="tone")
    assert (len(str(start.detail["metrics"])), len(str(start.detail["declaration"]))) == (64, 64)
    fill(shared, "tone")
    assert cli("experiment", "report", "tone", "--json").json()["is_as_declared"] is True
    config = tmp_path / "pawl.yaml"
    config.write_text(config.read_text() + "\nrollout: {maturity_s: 7.0}\n")
    said = cli("experiment", "report", "tone")
    assert (said.code, "the metrics have been changed" in said.err) == (0, True)


@pytest.mark.usefixtures("shared")
def test_a_plan_for_people_and_programs(cli: Cli) -> None:
    assert (cli("experiment", "plan").code, "--users-per-hour" in cli("experiment", "plan").err) == (1, True)
    asked_for = ("experiment", "plan", "--users-per-hour", "44000", "--rate", "toxicity=0.005")
    said = cli(*asked_for)
    assert said.code == 0, said.err
    assert "at 1 %: toxicity: " in said.out
    assert "canary events, about " in said.out
    plan = cli(*asked_for, "--effect", "toxicity=0.01", "--json").json()
    (toxicity,) = [metric for metric in plan["split"]["metrics"] if metric["metric"] == "toxicity"]
    assert (toxicity["effect"], plan["users_per_hour"]) == (0.01, 44_000.0)
    assert {harm["metric"] for harm in plan["canary"]["detections"]} == {"toxicity"}
    assert plan["canary"]["is_promotable"]
    for wrong in (("--rate", "toxicity"), ("--rate", "colour=0.1"), ("--effect", "toxicity=much")):
        assert cli("experiment", "plan", "--users-per-hour", "1", *wrong).code == 2


def test_without_a_name_it_is_about_what_runs(cli: Cli, shared: Database, tmp_path: Path) -> None:
    assert (cli("experiment", "report").code, "no experiment now" in cli("experiment", "report").err) == (1, True)
    settings = load_settings(tmp_path / "pawl.yaml", {})
    start_rollout(shared, settings.rollout, Route("assistant", 0, "base-model"), "base--r1", now=1.0, epoch=0)
    route = load_route(shared, "assistant")
    assert route is not None
    assert route.experiment is not None
    fill(shared, route.experiment.key)
    assert cli("experiment", "report", "--json").json()["experiment"] == route.experiment.key


SPLIT = ("--variant", "control=base-model:1", "--variant", "warm=base-model:3")


def test_a_split_starts_moves_users_and_ends(cli: Cli, shared: Database, tmp_path: Path) -> None:
    said = cli("experiment", "start", "warmth", *SPLIT)
    assert (said.code, said.out) == (0, "warmth: assistant is split between control, warm\n")
    route = load_route(shared, "assistant")
    assert route is not None
    assert route.experiment is not None
    assert not route.experiment.is_canary
    seen = [cli("assignments", f"user-{number}", "--json").json() for number in range(20)]
    assert {one["variant"] for one in seen} == {"control", "warm"}
    assert all(one["experiment"] == "warmth" and one["is_analysed"] for one in seen)
    assert cli("experiment", "start", "other", *SPLIT).code == 1
    assert "is split" in str(opened(shared, tmp_path))
    assert cli("experiment", "stop", "other").err == "pawl: assistant has warmth running, not other\n"
    assert cli("experiment", "stop").out == "warmth: assistant answers with base-model again\n"
    assert "everybody sees the champion" in cli("assignments", "ann").out
    assert cli("experiment", "stop").code == 1
    noted = [(event.action, event.subject) for event in latest_events(shared)]
    assert noted == [("experiment.stop", "warmth"), ("experiment.start", "warmth")]


LAYERED = ("--layer", "checkout", "--share")


def test_splits_of_one_layer_share_the_users_of_an_alias(cli: Cli, shared: Database) -> None:
    assert cli("experiment", "start", "warmth", *SPLIT, *LAYERED, "0.3").out.endswith(
        "0.3 of all users, layer checkout\n"
    )
    assert "must share a layer" in cli("experiment", "start", "alone", *SPLIT).err
    assert "has no 0.8 of the users left" in cli("experiment", "start", "length", *SPLIT, *LAYERED, "0.8").err
    assert cli("experiment", "start", "length", *SPLIT, *LAYERED, "0.2").code == 0
    for user, slot, place in (("ada", 2322, "warmth"), ("user-2", 4540, "length"), ("grace", 5965, None)):
        one = cli("assignments", user, "--json").json()
        assert (one["layer_slot"], one["experiment"], one["is_analysed"]) == (slot, place, place is not None)
    for order in ("stop", "report"):
        assert cli("experiment", order).err == "pawl: assistant has warmth and length running: name one\n"
    assert cli("experiment", "stop", "warmth").code == 0
    route = load_route(shared, "assistant")
    assert route is not None
    assert [each.key for each in route.experiments] == ["length"]
    assert cli("experiment", "start", "third", *SPLIT, *LAYERED, "0.3").code == 0, "the room is free again"


def test_weights_move_in_phases(cli: Cli, shared: Database) -> None:
    variants = [word for name in ("a:50", "b:50", "c:0") for word in ("--variant", f"{name[0]}=base-model{name[1:]}")]
    assert cli("experiment", "start", "ramp", *variants, "--allocation", "slots").code == 0
    said = cli("experiment", "weigh", "--weight", "a=40", "--weight", "c=10")
    assert said.out == "ramp: phase 1: a 40, b 50, c 10\n"
    route = load_route(shared, "assistant")
    assert route is not None
    assert route.experiment is not None
    assert route.experiment.slots == (("a", 4000), ("c", 5000), ("b", 10000))
    one = cli("assignments", "ada", "--json").json()
    assert one["variant"] == next(name for name, end in route.experiment.slots if one["slot"] < end)
    assert cli("experiment", "weigh", "--weight", "d=1").err == "pawl: experiment 'ramp' has no variant 'd'\n"
    assert cli("experiment", "weigh", "--weight", "a").code == 2


def opened(shared: Database, tmp_path: Path) -> Exception:
    """What a round is told that would open its canary now."""
    settings = load_settings(tmp_path / "pawl.yaml", {})
    open_canary = canary_opener(shared, settings, "assistant")
    assert open_canary is not None
    with pytest.raises(CanaryTaken) as caught:
        open_canary("base-model--r0002-1a2b3c4d")
    return caught.value


def test_a_key_that_has_answers_is_not_used_again(cli: Cli, shared: Database) -> None:
    fill(shared, "tone")
    said = cli("experiment", "start", "tone", *SPLIT)
    assert (said.code, "needs a new key" in said.err) == (1, True)
    assert load_route(shared, "assistant") is None


def test_a_key_is_not_used_again_before_its_answers_have_come_in(cli: Cli, shared: Database) -> None:
    """A gateway's answers may reach the store after the split has ended: they would count for the next one's salt."""
    assert cli("experiment", "start", "tone", *SPLIT).code == 0
    assert cli("experiment", "stop").code == 0
    said = cli("experiment", "start", "tone", *SPLIT)
    assert (said.code, "needs a new key" in said.err) == (1, True)
    route = load_route(shared, "assistant")
    assert route is not None
    assert route.experiment is None


def test_a_canary_and_a_split_keep_out_of_each_other_s_way(cli: Cli, shared: Database, tmp_path: Path) -> None:
    settings = load_settings(tmp_path / "pawl.yaml", {})
    start_rollout(shared, settings.rollout, Route("assistant", 0, "base-model"), "base--r1", now=1.0, epoch=0)
    assert "running rollout" in cli("experiment", "start", "warmth", *SPLIT).err
    assert "`pawl rollout rollback` ends it" in cli("experiment", "stop").err


@pytest.mark.parametrize(
    ("variants", "code", "text"),
    [
        (("control=base-model:1", "control=base-model:1"), 2, "named twice"),
        (("control=base-model:1", "warm=nobody:1"), 2, "nobody is neither registered nor the champion"),
        (("control=base-model:0", "warm=base-model:0"), 2, "positive weight"),
        (("control:1",), 2, "NAME=MODEL:WEIGHT"),
        (("control=base-model:nan",), 2, "weight"),
    ],
)
def test_what_is_no_split_is_said(cli: Cli, shared: Database, variants: tuple[str, ...], code: int, text: str) -> None:
    flags = [word for variant in variants for word in ("--variant", variant)]
    said = cli("experiment", "start", "warmth", *flags)
    assert (said.code, text in said.err) == (code, True), said.err
    assert load_route(shared, "assistant") is None


def test_everybody_else_is_shown_beside_the_hold_out(cli: Cli, shared: Database) -> None:
    held = {"experiment": "holdout", "probability": 0.5, "is_analysed": False, "created_at": time.time() - 3600}
    rows = [
        shown(n, f"user {n}", ("holdout", "control")[n % 2], **(held if n % 2 == 0 else held | {"experiment": None}))
        for n in range(120)
    ]
    save(shared, rows)
    told = cli("experiment", "report", "--holdout", "--json").json()
    assert (told["experiment"], told["users"]) == ("holdout", {"everybody else": 60, "holdout": 60})
    assert not told["split"]["assigned"]["is_mismatch"]
    lines = cli("experiment", "report", "--holdout", "--days", "2").out.splitlines()
    assert "60 held-out users (0.5 of all were to be) beside 60 others" in lines[0]
    assert any("latency_p95_s" in line for line in lines)


@pytest.mark.parametrize(
    ("order", "code", "text"),
    [
        (("--holdout",), 1, "nobody of assistant was held out"),
        (("tone", "--holdout"), 2, "EXPERIMENT, --by and --control do not go with it"),
        (("tone", "--days", "2"), 2, "--days goes with --holdout"),
        (("nothing",), 1, "it has none at all"),
        (("tone", "--control", "plain"), 1, "60 of 'control', 60 of 'treatment'"),
        (("tone", "--html", "/nowhere/page.html"), 2, "cannot write /nowhere/page.html"),
        (("tone", "--by", "colour"), 2, "colour"),
    ],
)
def test_what_cannot_be_reported_is_said(
    cli: Cli, shared: Database, order: tuple[str, ...], code: int, text: str
) -> None:
    fill(shared, "tone")
    said = cli("experiment", "report", *order)
    assert said.code == code
    assert text in said.err
    assert len(said.err.splitlines()) == 1 or "Usage" in said.err
