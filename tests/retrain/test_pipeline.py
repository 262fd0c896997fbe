"""Whole rounds on the tiny model with a fake engine: passed, rejected, overruled, resumed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from feedback.filters.holdout import FoundLeak, Leak, Split, split_holdout
from feedback.pair_stream import PairsById
from feedback.pairs import PreferencePair
from feedback.store import pair_row
from feedback.tombstones import Subject
from pawl import registry
from pawl.database import Database
from pawl.engines import Engine
from pawl.errors import ConfigurationError, RunConflict, Unreachable
from pawl.registry import Model, ModelState, RunStatus
from pawl.schema import pairs
from pawl.settings import (
    EngineSettings,
    GateSettings,
    MixSettings,
    ModelSettings,
    RebaseSettings,
    RetrainSettings,
    ServingSettings,
    Settings,
)
from retrain import pipeline
from retrain.adapters import verify_adapter
from retrain.errors import BadData, CanaryTaken, DataLeak, EvaluationFailed, PreflightFailed
from retrain.pipeline import RoundInputs, RoundOptions, RunOutcome, iso_week, run_round
from tests.feedback.people import eraser
from tests.retrain.fake_engine import FakeEngine, serving
from tests.retrain.tiny_model import TRAINING, make_pair
from tests.retrain.tool_model import make_tool_model

REFUSAL = "I'm sorry, but I can't help with that."
PAIRS = [make_pair(number) for number in range(45)]
ALL_NEW = MixSettings(new=1.0, original=0.0, earlier=0.0)


def well_behaved(_model: str, prompt: str) -> str:
    return REFUSAL if prompt.startswith("harm") else "a good kind answer"


def candidates_comply(model: str, prompt: str) -> str:
    return REFUSAL if prompt.startswith("harm") and model == "tiny" else "a good kind answer"


def harmless(texts: Sequence[str]) -> list[float]:
    return [0.0 for _ in texts]


@pytest.fixture
def fake() -> Iterator[FakeEngine]:
    with serving(FakeEngine(answer=well_behaved)) as engine:
        yield engine


@pytest.fixture
def settings(fake: FakeEngine, tiny_base: Path, tmp_path: Path) -> Settings:
    for kind in ("harmful", "benign"):
        (tmp_path / f"{kind}.json").write_text(json.dumps([f"{kind[:4]} request {n}" for n in range(60)]))
    original = {
        "prompt": [{"role": "user", "content": "what is day"}],
        "chosen": [{"role": "assistant", "content": "day is good"}],
        "rejected": [{"role": "assistant", "content": "day is bad"}],
    }
    (tmp_path / "original.jsonl").write_text(json.dumps(original) + "\n")
    loose = GateSettings(
        preference_margin=0.5,
        harmful_refusal_margin=0.1,
        over_refusal_margin=0.1,
        toxicity_margin=0.1,
        echo_margin=0.1,
        length_ratio=(0.5, 2.0),
    )
    return Settings(
        serving=ServingSettings(models={"assistant": ModelSettings(engines=[fake.url], champion="tiny")}),
        engine=EngineSettings(model=str(tiny_base)),
        retrain=RetrainSettings(
            adapters_dir=tmp_path / "adapters",
            runs_dir=tmp_path / "runs",
            min_pairs=20,
            holdout_share=0.3,
            original_preferences=tmp_path / "original.jsonl",
            harmful_probes=tmp_path / "harmful.json",
            benign_probes=tmp_path / "benign.json",
            training=TRAINING,
            gate=loose,
            rebase=RebaseSettings(max_kl=None, max_weight_change=None),
        ),
    )


INPUTS = RoundInputs(new=PAIRS, score_toxicity=harmless, now=lambda: 1000.0)


def state_of(database: Database, outcome: RunOutcome) -> ModelState:
    assert outcome.model is not None
    return registry.get_model(database, outcome.model).state


@pytest.mark.training
def test_a_round_that_breaks_goes_on_where_it_was_and_passes(
    database: Database, settings: Settings, fake: FakeEngine
) -> None:
    def broken(_texts: Sequence[str]) -> list[float]:
        raise EvaluationFailed("the scorer is down")

    with pytest.raises(EvaluationFailed):
        run_round(database, settings, "assistant", replace(INPUTS, score_toxicity=broken))
    (run,) = registry.list_runs(database)
    assert (run.status, run.step, run.detail["error"]) == (RunStatus.ERROR, "evaluate", "the scorer is down")
    train_manifest = settings.retrain.runs_dir / run.id / "train" / "manifest.json"
    trained_at = train_manifest.stat().st_mtime_ns

    opened: list[str] = []

    def open_canary(model: str) -> str:
        """As after a round that was killed once its rollout was open: the second time it is found."""
        assert registry.get_run(database, run.id).detail["new_pair_ids"], "it may be promoted before the round ends"
        opened.append(model)
        if len(opened) == 1:
            raise EvaluationFailed("killed")
        return "rollout-1"

    # The resumed round works with the pairs it froze, whatever has come in since.
    # So it does weeks later, without a new run.
    resumed = replace(INPUTS, new=PAIRS[:3], open_canary=open_canary, now=lambda: 5_000_000.0, epoch=2)
    with pytest.raises(EvaluationFailed, match="killed"):
        run_round(database, settings, "assistant", resumed)
    outcome = run_round(database, settings, "assistant", resumed)
    assert outcome.status == RunStatus.PASSED, outcome.reason
    assert train_manifest.stat().st_mtime_ns == trained_at
    assert outcome.run_id == run.id == "r0001"
    assert opened == [outcome.model] * 2
    assert outcome.rollout_id == "rollout-1"
    assert state_of(database, outcome) == ModelState.CHALLENGER
    assert outcome.model is not None
    path = Path(fake.adapters[outcome.model])
    assert verify_adapter(path).manifest["run"] == run.id
    build = json.loads((outcome.directory / "build" / "manifest.json").read_text())
    assert build["sha256"] == verify_adapter(path).manifest["dataset_sha"]
    assert build["shortfalls"]["earlier"] > 0
    assert set(outcome.new_pair_ids) <= {pair.id for pair in PAIRS} - set(build["holdout_ids"])
    done = registry.get_run(database, run.id)
    assert (done.status, done.detail["model"], done.detail["error"]) == (RunStatus.PASSED, outcome.model, None)

    n_requests = len(fake.bodies)
    again = RoundOptions(cycle=run.cycle)
    assert run_round(database, settings, "assistant", resumed, again) == outcome
    assert len(fake.bodies) == n_requests
    assert opened == [outcome.model] * 2


@pytest.mark.training
def test_a_bad_candidate_is_rejected_and_unloaded(database: Database, settings: Settings, fake: FakeEngine) -> None:
    fake.answer = candidates_comply
    drill = RoundOptions(swap_preferences=True, mix=ALL_NEW, note="drill")
    outcome = run_round(database, settings, "assistant", INPUTS, drill)
    assert outcome.status == RunStatus.FAILED
    assert "harmful requests are refused less often: 0 % against 100 % by the parent" in outcome.reason
    assert state_of(database, outcome) == ModelState.REJECTED
    assert fake.unloads == [outcome.model]
    assert fake.adapters == {}
    build = json.loads((outcome.directory / "build" / "manifest.json").read_text())
    mined = json.loads((outcome.directory / "mine" / "manifest.json").read_text())
    assert build["is_swapped"] is True
    assert mined["options"]["swap_preferences"] is True
    assert registry.get_run(database, outcome.run_id).detail["note"] == "drill"


@pytest.mark.training
def test_a_later_round_continues_the_champion_and_can_be_published_against_the_gate(
    database: Database, settings: Settings, fake: FakeEngine
) -> None:
    def taken(_model: str) -> str:
        raise CanaryTaken("assistant has a running rollout: ro_9")

    busy = replace(INPUTS, open_canary=taken)
    first = run_round(database, settings, "assistant", busy, RoundOptions(cycle="one", mix=ALL_NEW))
    assert first.model is not None
    assert (first.status, first.rollout_id) == (RunStatus.PASSED, None)
    assert first.reason.endswith("no canary was opened: assistant has a running rollout: ro_9")
    assert state_of(database, first) == ModelState.CANDIDATE
    assert first.parent == "tiny"
    registry.set_state(database, first.model, ModelState.CHAMPION, now=2000.0)
    fake.adapters.clear()  # As after a restart of the engine.
    fake.answer = lambda model, prompt: candidates_comply("tiny" if model == first.model else model, prompt)

    options = RoundOptions(cycle="two", mix=ALL_NEW, publish_despite_gate=True)
    second = run_round(database, settings, "assistant", INPUTS, options)
    assert second.model is not None
    assert second.parent == first.model
    assert second.status == RunStatus.FAILED
    assert second.reason.startswith("published against the gate: harmful requests are refused less often")
    assert set(fake.adapters) == {first.model, second.model}
    assert state_of(database, second) == ModelState.CANDIDATE
    assert [model.name for model in registry.lineage(database, second.model)] == [second.model, first.model]
    trained = json.loads((second.directory / "train" / "manifest.json").read_text())
    assert trained["result"]["method"] == "sigmoid+sft continued"


def test_a_rejected_one_that_a_person_sent_out_meanwhile_stays_where_it_is(
    database: Database, settings: Settings, fake: FakeEngine, tmp_path: Path
) -> None:
    """The round was killed after its gate, or could not reach an engine then, and goes on a week later."""
    run = registry.create_run(database, "assistant", "week", epoch=0, now=1.0)
    for name, content in (("train/manifest.json", '{"model": "tiny--r0001"}'), ("mine/new.jsonl", "")):
        (settings.retrain.runs_dir / run.id / name).parent.mkdir(parents=True)
        (settings.retrain.runs_dir / run.id / name).write_text(content)
    path, state = str(tmp_path / "tiny--r0001"), ModelState.CHALLENGER
    model = Model("tiny--r0001", "assistant", "tiny", "tiny", run.id, path, None, None, state, {}, 1.0, 1.0)
    registry.register_model(database, model)
    fake.adapters[model.name] = path
    going_on = pipeline._Round(database, settings, run, INPUTS, RoundOptions())
    with closing(Engine(fake.url)) as engine:
        outcome = going_on._reject([engine], {"report": {"verdict": "fail"}})
    assert (outcome.status, state_of(database, outcome)) == (RunStatus.FAILED, ModelState.CHALLENGER)
    assert fake.adapters == {model.name: path}


def test_the_record_of_a_leak_names_nobody(
    database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No erasure looks into it."""
    monkeypatch.setattr(pipeline, "find_leaks", lambda *_: (FoundLeak(Leak.USER, "pair-7", "key/eve"),))
    with pytest.raises(DataLeak):
        run_round(database, settings, "assistant", INPUTS)
    (run,) = registry.list_runs(database)
    assert run.detail["error"].endswith("first the user of pair pair-7")


def test_original_preferences_may_have_any_separator_of_lines_in_their_texts(
    database: Database, settings: Settings, tmp_path: Path
) -> None:
    path = tmp_path / "original.jsonl"
    path.write_text(path.read_text().replace("day is good", "day\u2028is\u0085good"), newline="\r\n")
    run = registry.create_run(database, "assistant", "week", epoch=0, now=1.0)
    (found,) = pipeline._Round(database, settings, run, INPUTS, RoundOptions())._originals()
    assert found.chosen["content"] == "day\u2028is\u0085good"


def test_too_few_new_pairs_skip_the_round(database: Database, settings: Settings, fake: FakeEngine) -> None:
    outcome = run_round(database, settings, "assistant", replace(INPUTS, new=PAIRS[:5]))
    assert outcome.status == RunStatus.SKIPPED
    assert outcome.reason == "5 new pairs are too few to train on; 20 are needed"
    assert fake.loads == []


def test_pairs_that_go_after_they_were_selected_do_not_count(database: Database, settings: Settings) -> None:
    with database.write() as connection:
        database.insert_new(connection, pairs, [pair_row(pair, 1.0) for pair in PAIRS[:19]])
    selected = PairsById(database, [pair.id for pair in PAIRS])
    outcome = run_round(database, settings, "assistant", replace(INPUTS, new=selected))
    assert outcome.status == RunStatus.SKIPPED
    assert outcome.reason == "19 new pairs are too few to train on; 20 are needed"


def test_the_newest_unfinished_run_is_resumed_by_the_holder_of_the_newer_lease(
    database: Database, settings: Settings
) -> None:
    runs = [registry.create_run(database, "assistant", f"cycle-{n}", epoch=2, now=float(n)) for n in range(2)]
    few = replace(INPUTS, new=PAIRS[:5], skipped={"unpaired": 4})
    with pytest.raises(RunConflict, match="newer lease"):
        run_round(database, settings, "assistant", replace(few, epoch=1))
    assert run_round(database, settings, "assistant", replace(few, epoch=3)).run_id == runs[1].id
    resumed = registry.get_run(database, runs[1].id)
    assert (resumed.epoch, resumed.status, resumed.detail["skipped"]) == (3, RunStatus.SKIPPED, {"unpaired": 4})


def test_a_set_that_does_not_fit_stops_before_the_training(database: Database, settings: Settings) -> None:
    short = settings.retrain.training.model_copy(update={"max_length": 6})
    tight = settings.model_copy(update={"retrain": settings.retrain.model_copy(update={"training": short})})
    with pytest.raises(PreflightFailed, match="raise max_length"):
        run_round(database, tight, "assistant", INPUTS)
    (run,) = registry.list_runs(database)
    assert (run.status, run.step) == (RunStatus.ERROR, "preflight")
    assert not (settings.retrain.runs_dir / run.id / "train").exists()


def test_a_round_that_always_breaks_is_given_up_and_the_next_one_begins(database: Database, settings: Settings) -> None:
    short = settings.retrain.training.model_copy(update={"max_length": 6})
    changes = {"training": short, "max_failures": 2}
    tight = settings.model_copy(update={"retrain": settings.retrain.model_copy(update=changes)})
    for ends in (RunStatus.ERROR, RunStatus.GIVEN_UP):
        with pytest.raises(PreflightFailed, match="raise max_length"):
            run_round(database, tight, "assistant", INPUTS)
        (run,) = registry.list_runs(database)
        assert run.status == ends
    assert registry.unfinished_run(database, "assistant") is None
    outcome = run_round(database, tight, "assistant", INPUTS)
    assert outcome.status == RunStatus.GIVEN_UP
    assert outcome.reason == run.detail["reason"]
    assert outcome.reason.startswith("given up after 2 failures at preflight: ")
    with pytest.raises(PreflightFailed):
        run_round(database, tight, "assistant", INPUTS, RoundOptions(cycle="the next"))
    assert [one.cycle for one in registry.list_runs(database)] != [run.cycle] * 2


def test_what_a_database_says_of_our_own_statements_is_no_absence(
    database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = [
        sa.exc.OperationalError("SELECT", {}, Exception("connection refused")),
        sa.exc.TimeoutError("the pool's connections are all in use"),
        sa.exc.IntegrityError("INSERT", {}, Exception("duplicate key")),
        sa.exc.ProgrammingError("SELECT", {}, Exception("no such column")),
    ]
    counted = []
    for error in errors:

        def broken(_: object, error: Exception = error) -> RunOutcome:
            raise error

        monkeypatch.setattr(pipeline._Round, "_steps", broken)
        with pytest.raises(type(error)):
            run_round(database, settings, "assistant", INPUTS)
        (run,) = registry.list_runs(database)
        counted.append(run.detail["failures"]["n"])
    assert counted == [0, 0, 1, 2]


def test_what_is_out_of_reach_never_gives_a_round_up(database: Database, settings: Settings) -> None:
    away = settings.serving.models["assistant"].model_copy(update={"engines": ["http://127.0.0.1:9"]})
    serving = settings.serving.model_copy(update={"models": {"assistant": away}})
    few = settings.retrain.model_copy(update={"max_failures": 1})
    gone = settings.model_copy(update={"serving": serving, "retrain": few})
    for _ in range(2):
        with pytest.raises(Unreachable):
            run_round(database, gone, "assistant", INPUTS)
    (run,) = registry.list_runs(database)
    assert (run.status, run.step, run.detail["failures"]) == (RunStatus.ERROR, "load", {"step": "load", "n": 0})
    assert "reason" not in run.detail

    def broken(_texts: Sequence[str]) -> list[float]:
        raise EvaluationFailed("the scorer is down")

    back = settings.model_copy(update={"retrain": few})
    with pytest.raises(EvaluationFailed):
        run_round(database, back, "assistant", replace(INPUTS, score_toxicity=broken))
    run = registry.get_run(database, run.id)
    assert (run.status, run.detail["failures"]) == (RunStatus.GIVEN_UP, {"step": "evaluate", "n": 1})
    assert registry.get_model(database, run.detail["model"]).state == ModelState.REJECTED, "it is in the engines still"


def calling(number: int) -> PreferencePair:
    """Both answers call a tool and say nothing; only the arguments tell them apart."""

    def call(topic: str) -> dict[str, Any]:
        function = {"name": "look_up", "arguments": json.dumps({"topic": topic})}
        return {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "c", "type": "function", "function": function}],
        }

    return replace(make_pair(number), chosen=call("tea"), rejected=call("rain"))


@pytest.mark.parametrize("reads_tools", [False, True])
def test_tool_calls_are_trained_on_if_the_template_shows_them_and_counted_if_not(
    database: Database, settings: Settings, tmp_path: Path, reads_tools: bool
) -> None:
    photo = replace(make_pair(90), prompt=({"role": "user", "content": [{"type": "image_url"}]},))
    base = make_tool_model(tmp_path / "tools") if reads_tools else settings.engine.model
    short = settings.retrain.training.model_copy(update={"max_length": 6})
    changes = {"training": short, "base_model": base}
    tight = settings.model_copy(update={"retrain": settings.retrain.model_copy(update=changes)})
    inputs = replace(INPUTS, new=[*PAIRS, *map(calling, range(80, 89)), photo])
    with pytest.raises(PreflightFailed):
        run_round(database, tight, "assistant", inputs, RoundOptions(mix=ALL_NEW))
    (run,) = registry.list_runs(database)
    built = settings.retrain.runs_dir / run.id / "build"
    left_out = json.loads((built / "manifest.json").read_text())["left_out"]
    assert left_out == run.detail["left_out"]
    counts = {name: left_out[name] for name in ("not_text", "broken_tool_call", "template_without_tools")}
    assert counts == {"not_text": 1, "broken_tool_call": 0, "template_without_tools": 0 if reads_tools else 9}
    assert ("look_up" in (built / "training.jsonl").read_text()) == reads_tools


@pytest.mark.parametrize("moment", ["before they are written", "before they are copied", "when they were read again"])
def test_who_is_erased_while_the_round_has_their_pairs_is_in_none_of_its_files(
    database: Database, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """An erasure that comes by at that moment finds no file to take them out of."""
    at_work = eraser(database, tmp_path, clock=lambda: 2000.0)

    def bury() -> None:
        at_work.bury(at_work.tombstone(Subject("user-3"), ""))

    def forget(run: Path) -> None:
        at_work.erase_late(run)
        if moment == "before they are copied":
            bury()

    def split(*given: Any) -> Split:
        if moment == "when they were read again":
            bury()
        return split_holdout(*given)

    if moment == "before they are written":
        bury()
    monkeypatch.setattr(pipeline, "split_holdout", split)
    short = settings.retrain.training.model_copy(update={"max_length": 6})
    tight = settings.model_copy(update={"retrain": settings.retrain.model_copy(update={"training": short})})
    with pytest.raises(PreflightFailed):
        run_round(database, tight, "assistant", replace(INPUTS, forget=forget))
    texts = {path.name: path.read_text() for path in settings.retrain.runs_dir.rglob("*.jsonl")}
    assert set(texts) == {"new.jsonl", "earlier.jsonl", "training.jsonl", "holdout.jsonl"}
    assert [name for name, text in texts.items() if PAIRS[3].id in text or 'user-3"' in text] == []
    assert all(pair.id in texts["new.jsonl"] for pair in PAIRS if pair.id != PAIRS[3].id)
    manifest = json.loads(next(settings.retrain.runs_dir.glob("*/build/manifest.json")).read_text())
    was_built = PAIRS[3].id in {*manifest["pair_ids"], *manifest["holdout_ids"]}
    assert manifest.get("erased", {}).get("pair_ids") == ([PAIRS[3].id] if was_built else None)
    assert was_built == (moment != "before they are written")


def test_rounds_look_again_at_the_end(database: Database, settings: Settings) -> None:
    looked: list[list[str]] = []

    def forget(run: Path) -> None:
        looked.append(sorted(path.name for path in run.iterdir()))

    run_round(database, settings, "assistant", replace(INPUTS, new=PAIRS[:5], forget=forget))
    assert looked == [["mine"], ["mine"]]


def test_a_step_is_written_whole_or_not_at_all(
    database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An erasure that replaced half a file would lose the other half."""

    def killed(_descriptor: int) -> None:
        raise EvaluationFailed("killed")

    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(EvaluationFailed):
        run_round(database, settings, "assistant", INPUTS)
    assert list(settings.retrain.runs_dir.rglob("*.jsonl")) == []


def test_an_unknown_alias_is_a_matter_of_configuration(database: Database, settings: Settings) -> None:
    with pytest.raises(ConfigurationError, match=r"serving\.models"):
        run_round(database, settings, "nobody", INPUTS)
    assert registry.list_runs(database) == []


def test_a_cycle_is_an_iso_week() -> None:
    assert iso_week(1_763_700_000.0) == "2025-W47"


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [("build/training.jsonl", "kind", "rude"), ("mine/manifest.json", '"n_new": 45', '"n_new": 44')],
)
def test_a_finished_step_that_was_changed_since_is_not_built_upon(
    database: Database, settings: Settings, name: str, before: str, after: str
) -> None:
    short = settings.retrain.training.model_copy(update={"max_length": 6})
    tight = settings.model_copy(update={"retrain": settings.retrain.model_copy(update={"training": short})})
    with pytest.raises(PreflightFailed):
        run_round(database, tight, "assistant", INPUTS)
    (run,) = registry.list_runs(database)
    assert set(run.detail["steps"]) == {"mine", "build"}
    path = settings.retrain.runs_dir / run.id / name
    text = path.read_text()
    path.write_text(text.replace(before, after, 1))
    with pytest.raises(BadData, match=f"{path} is not the .* delete {path.parent}, and the steps that came after it"):
        run_round(database, tight, "assistant", INPUTS)
    shutil.rmtree(path.parent)
    with pytest.raises(PreflightFailed):
        run_round(database, tight, "assistant", INPUTS)
    assert path.read_text() == text or name.endswith("manifest.json")
