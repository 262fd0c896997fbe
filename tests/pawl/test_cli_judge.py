"""`pawl pairs judge`: what it says, and how it ends."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from feedback.judged.constitution import load_constitution
from pawl.database import Database
from tests.feedback.judged.fake_judge import FakeJudge
from tests.pawl.conftest import Cli
from tests.pawl.records import save, served
from tests.servers import running


@pytest.fixture
def judge() -> FakeJudge:
    return FakeJudge()


@pytest.fixture
def judged(cli: Cli, judge: FakeJudge, shared: Database, monkeypatch: pytest.MonkeyPatch) -> Iterator[Database]:
    """Two questions with two answers each, and a judge that is configured."""
    assert cli("db", "check").code == 0
    save(shared, [served(n, question=f"What is {n // 10}?") for n in (10, 14, 20, 24)])
    with running(judge.app) as address:
        monkeypatch.setenv("PAWL_FEEDBACK__JUDGE__URL", f"{address}/v1/")
        monkeypatch.setenv("PAWL_FEEDBACK__JUDGE__MODEL", "judge-1")
        monkeypatch.setenv("PAWL_FEEDBACK__JUDGE__API_KEY", "12345")
        monkeypatch.setenv("PAWL_FEEDBACK__JUDGE__ATTEMPTS", "1")
        yield shared


@pytest.mark.usefixtures("judged")
def test_from_answers_to_pairs(cli: Cli, judge: FakeJudge) -> None:
    said = cli("pairs", "judge", "--json")
    assert (said.code, said.err) == (0, "")
    constitution = load_constitution(None)
    assert said.json() == {
        "alias": "assistant",
        "judge": "judge-1",
        "constitution": {"version": "1", "sha256": constitution.sha256},
        "answers_left_out": {},
        "judged": 2,
        "outcomes": {"preferred": 2},
    }
    assert judge.keys == {"Bearer 12345"}
    assert cli("pairs", "judge").code == 0
    assert len(judge.bodies) == 4, "nothing was left to ask"
    assert cli("pairs", "mine", "--json").json()["by_source"] == {"judge": 2}
    pair = cli("pairs", "list", "--json").json()[0]
    assert pair["source"] == "judge"
    shown = cli("pairs", "show", pair["id"], "--json").json()
    assert (shown["verdict"]["judge"], shown["verdict"]["outcome"]) == ("judge-1", "preferred")


@pytest.mark.usefixtures("judged")
def test_a_dry_run_sends_nothing(cli: Cli, judge: FakeJudge) -> None:
    told = cli("pairs", "judge", "--dry-run", "--json").json()
    assert (told["would_judge"], told["requests"]) == (2, 4)
    assert cli("pairs", "judge", "--dry-run", "--limit", "1", "--json").json()["would_judge"] == 1
    assert judge.bodies == []
    assert cli("pairs", "judge", "--json").json()["judged"] == 2


@pytest.mark.usefixtures("judged")
def test_the_least_margin_is_a_setting(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    cli("pairs", "judge")
    monkeypatch.setenv("PAWL_FEEDBACK__JUDGE__MIN_MARGIN", "0.5")
    assert cli("pairs", "mine", "--json").json()["skipped"] == {"margin_too_small": 2}


@pytest.mark.usefixtures("judged")
def test_a_judge_that_is_away_is_out_of_reach(cli: Cli, judge: FakeJudge) -> None:
    judge.is_away = True
    said = cli("pairs", "judge", "--json")
    assert (said.code, said.json()["judged"]) == (3, 0)
    assert "the judge at http://127.0.0.1" in said.err
    assert said.err.count("\n") == 1


@pytest.mark.usefixtures("judged")
def test_a_constitution_that_is_wrong_is_told_before_anything_is_sent(
    cli: Cli, judge: FakeJudge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PAWL_FEEDBACK__JUDGE__CONSTITUTION", "mine.yaml")
    assert "cannot read feedback.judge.constitution mine.yaml" in cli("pairs", "judge").err
    (tmp_path / "mine.yaml").write_text("version: 2\nprinciples: [{id: kind}]\n")
    said = cli("pairs", "judge")
    assert (said.code, said.err) == (
        2, "pawl: constitution mine.yaml: principles[0].text: say in a sentence or two what makes an answer better\n",
    )  # fmt: skip
    assert judge.bodies == []


@pytest.mark.usefixtures("shared")
def test_without_a_judge_nothing_is_sent(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    said = cli("pairs", "judge")
    assert (said.code, said.err) == (
        2, "pawl: no judge is configured: set feedback.judge.url and feedback.judge.model\n",
    )  # fmt: skip
    monkeypatch.setenv("PAWL_FEEDBACK__JUDGE__URL", "http://127.0.0.1:9/v1")
    assert "feedback.judge: Value error, url needs model" in cli("pairs", "judge").err
    monkeypatch.setenv("PAWL_FEEDBACK__JUDGE__URL", "ftp://judge")
    assert "not an http:// or https:// address" in cli("pairs", "judge").err


@pytest.mark.usefixtures("shared")
def test_a_key_comes_from_a_file(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAWL_FEEDBACK__JUDGE__URL", "http://127.0.0.1:9/v1")
    monkeypatch.setenv("PAWL_FEEDBACK__JUDGE__MODEL", "judge-1")
    monkeypatch.setenv("PAWL_FEEDBACK__JUDGE__API_KEY_FILE", "nowhere")
    said = cli("pairs", "judge")
    assert (said.code, "cannot read feedback.judge.api_key_file nowhere" in said.err) == (2, True)
