"""`pawl experiment report` on what a gateway recorded."""

from __future__ import annotations

from pathlib import Path

import pytest

from ab_testing.controller import start_rollout
from ab_testing.experiment import Route
from ab_testing.route_store import load_route
from feedback.interactions import Interaction
from pawl.database import Database
from pawl.settings import load_settings
from tests.feedback.test_experiment_table import shown
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
