"""`pawl rollout shadow`, and rounds whose candidates begin in the dark."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ab_testing.shadow_store import ShadowAnswer, get_shadow, running_shadow, save_answer
from pawl import registry
from pawl.cli.due_rounds import decide_now
from pawl.cli.learning import canary_opener
from pawl.database import Database
from pawl.registry import Model, ModelState
from pawl.settings import Settings
from retrain.errors import CanaryTaken
from tests.pawl.conftest import Cli
from tests.pawl.records import save_with_scores, served
from tests.retrain.fake_engine import FakeEngine, serving
from tests.retrain.sealed_samples import place_adapter

CANDIDATE = "base-model--r0001-1a2b3c4d"
SILENT = "http://127.0.0.1:9"


@pytest.fixture
def engine(cli: Cli, tmp_path: Path) -> Iterator[FakeEngine]:  # noqa: ARG001  # It writes the configuration.
    """Behind the alias of `cli`'s configuration."""
    with serving(FakeEngine(base="base-model")) as engine:
        config = tmp_path / "pawl.yaml"
        config.write_text(config.read_text().replace(SILENT, engine.url))
        yield engine


@pytest.fixture
def registered(shared: Database, tmp_path: Path) -> Database:
    path = str(place_adapter(tmp_path / "adapters", CANDIDATE))
    model = Model(
        CANDIDATE, "assistant", "base-model", None, None, path, None, None, ModelState.CANDIDATE, {}, 1.0, 1.0
    )
    registry.register_model(shared, model)
    return shared


def settings_of(url: str, share: float) -> Settings:
    models = {"assistant": {"engines": [url], "champion": "base-model"}}
    return Settings.model_validate({"serving": {"models": models}, "rollout": {"shadow": {"share": share}}})


def test_a_run_from_its_start_to_its_report_and_stop(cli: Cli, registered: Database, engine: FakeEngine) -> None:
    said = cli("rollout", "shadow", "start", CANDIDATE, "--share", "0.5", "--pairs", "50", "--ramp")
    assert said.code == 0, said.err
    run = get_shadow(registered, said.out.strip())
    assert (run.rules.share, run.rules.min_pairs, run.rules.is_ramp) == (0.5, 50, True)
    assert engine.adapters.keys() == {CANDIDATE}
    assert cli("rollout", "shadow", "start", CANDIDATE).code == 1

    questions = [served(number, unit_id=f"user-{number}") for number in range(3)]
    save_with_scores(registered, questions)
    for number, one in enumerate(questions):
        error = "timeout" if number == 0 else None
        answer = None if error else {"role": "assistant", "content": "Light."}
        assert save_answer(registered, run, ShadowAnswer(one.id, answer, "stop", error, 5, 9, 20.0, float(number)))
    found = cli("rollout", "shadow", "report", "--json").json()
    assert (found["pairs"], found["unscored"], found["errors"]) == (3, 2, {"timeout": 1})
    by_name = {row["metric"]: row for row in found["differences"]}
    assert by_name["errors"]["difference"] == pytest.approx(1 / 3)
    assert by_name["toxicity"]["notes"].startswith("insufficient data")
    shown = cli("rollout", "shadow", "report", run.id).out
    assert "over_refusal" in shown
    assert "insufficient data: 0 of at least 2 users" in shown

    assert cli("rollout", "shadow", "stop", "--reason", "enough").code == 0
    assert cli("rollout", "shadow", "stop").code == 1
    assert get_shadow(registered, run.id).reason == "enough"


@pytest.mark.usefixtures("shared")
def test_where_there_is_none(cli: Cli) -> None:
    assert (cli("rollout", "shadow", "report").code, cli("rollout", "shadow", "stop").code) == (1, 1)
    assert cli("rollout", "shadow", "report", "sh_404").code == 1


def test_a_rounds_candidate_begins_in_the_dark(registered: Database, engine: FakeEngine) -> None:
    settings = settings_of(engine.url, 0.2)
    open_canary = canary_opener(registered, settings, "assistant")
    assert open_canary is not None
    for _ in range(2):  # A round that was killed and asks again begins no second one.
        with pytest.raises(CanaryTaken, match=r"sh_\w+ comes first \(running\)"):
            open_canary(CANDIDATE)
    run = running_shadow(registered, "assistant")
    assert run is not None
    assert (run.candidate, run.rules.is_ramp, run.rules.share) == (CANDIDATE, True, 0.2)
    assert registry.get_model(registered, CANDIDATE).state == ModelState.CANDIDATE
    assert run.id in decide_now(registered, settings, "assistant", 10**6, {}).reason


def test_without_a_share_it_goes_straight_to_its_canary(registered: Database, engine: FakeEngine) -> None:
    open_canary = canary_opener(registered, settings_of(engine.url, 0.0), "assistant")
    assert open_canary is not None
    opened = open_canary(CANDIDATE)
    assert opened is not None
    assert opened.startswith("ro_")
