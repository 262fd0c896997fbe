"""`pawl experiment report` on what a gateway recorded."""

from __future__ import annotations

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


@pytest.mark.parametrize(
    ("order", "code", "text"),
    [
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
