"""Single thumbs in a round: apart from the hold-out, in its files and manifest, gone when their user is erased."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from feedback.pairs import UnpairedExample
from feedback.tombstones import Subject
from pawl import registry
from pawl.database import Database
from pawl.settings import EngineSettings, MixSettings, ModelSettings, RetrainSettings, ServingSettings, Settings
from retrain.errors import PreflightFailed
from retrain.pipeline import RoundInputs, RoundOptions, run_round
from retrain.thumbs import apart_from, thumb_of, turned, with_thumbs
from tests.feedback.people import eraser
from tests.retrain.tiny_model import TRAINING, make_pair

PAIRS = [make_pair(number) for number in range(45)]
ALL_NEW = RoundOptions(mix=MixSettings(new=1.0, original=0.0, earlier=0.0))


def thumb(number: int, *, user: str, text: str) -> UnpairedExample:
    pair = make_pair(number, user=user, text=text)
    interaction = f"{number:048x}"
    answer, liked = (pair.chosen, True) if number % 2 else (pair.rejected, False)
    return UnpairedExample(
        f"{number:032x}", "assistant", pair.prompt, answer, liked, interaction, "tiny", pair.principals, 2000.0
    )


ALONE = thumb(901, user="key/alone", text="is music kind")
OF_A_HELD_OUT_USER = thumb(902, user="key/user-0", text="is bread kind")
ASKED_IN_HOLDOUT = thumb(903, user="key/other", text="tell me about tea")
PHOTO = replace(thumb(904, user="key/photo", text=""), prompt=({"role": "user", "content": [{"type": "image_url"}]},))


def test_thumbs_stay_apart_from_the_hold_out() -> None:
    found = apart_from([ALONE, OF_A_HELD_OUT_USER, ASKED_IN_HOLDOUT, PHOTO], PAIRS[:1], similarity=0.9)
    assert found.kept == (ALONE,)
    assert found.left_out == {
        "thumbs_of_users_in_holdout": 1,
        "thumbs_prompt_in_holdout": 1,
        "thumbs_not_text": 1,
    }


def test_a_manifest_tells_sets_with_different_thumbs_apart() -> None:
    manifest = {"sha256": "a", "pair_ids": ["p"]}
    assert with_thumbs(manifest, ()) == manifest
    one, other = (with_thumbs(manifest, thumbs) for thumbs in ([ALONE], turned([ALONE])))
    assert one["sha256"] != other["sha256"] != "a"
    assert (one["pair_ids"], one["n_thumbs"]) == (["p", ALONE.id], 1)
    assert turned(turned([ALONE])) == (ALONE,)


def settings_of(base: Path, home: Path, objective: str) -> Settings:
    """Too little room for any example, so that a round ends before it trains."""
    training = TRAINING.model_copy(update={"objective": objective, "max_length": 6})
    places = {"adapters_dir": home / "adapters", "runs_dir": home / "runs"}
    return Settings(
        serving=ServingSettings(
            models={"assistant": ModelSettings(engines=["http://127.0.0.1:9"], champion="tiny")},
        ),
        engine=EngineSettings(model=str(base)),
        retrain=RetrainSettings(min_pairs=20, holdout_share=0.3, training=training, **places),
    )


@pytest.mark.training
@pytest.mark.parametrize("objective", ["kto", "dpo"])
def test_a_round_freezes_and_builds_with_thumbs_only_if_it_learns_from_them(
    database: Database, tiny_base: Path, tmp_path: Path, objective: str
) -> None:
    settings = settings_of(tiny_base, tmp_path, objective)
    inputs = RoundInputs(new=PAIRS, unpaired=[ALONE, ASKED_IN_HOLDOUT, PHOTO], now=lambda: 1000.0)
    with pytest.raises(PreflightFailed):
        run_round(database, settings, "assistant", inputs, ALL_NEW)
    (run,) = registry.list_runs(database)
    files = sorted((settings.retrain.runs_dir / run.id).glob("*/unpaired.jsonl"))
    manifest = json.loads((settings.retrain.runs_dir / run.id / "build" / "manifest.json").read_text())
    if objective == "dpo":
        assert files == []
        assert "n_thumbs" not in manifest
        return
    built, mined = ([thumb_of(json.loads(line)) for line in path.read_text().splitlines()] for path in files)
    assert mined == [ALONE, ASKED_IN_HOLDOUT, PHOTO]
    assert ALONE in built
    assert PHOTO not in built
    assert manifest["n_thumbs"] == len(built)
    assert ALONE.id in manifest["pair_ids"]
    assert manifest["left_out"]["thumbs_not_text"] == 1


@pytest.mark.training
def test_whoever_is_erased_is_in_no_file_of_thumbs(database: Database, tiny_base: Path, tmp_path: Path) -> None:
    at_work = eraser(database, tmp_path, clock=lambda: 2000.0)
    at_work.bury(at_work.tombstone(Subject("alone"), ""))
    settings = settings_of(tiny_base, tmp_path, "kto")
    inputs = RoundInputs(new=PAIRS, unpaired=[ALONE, ASKED_IN_HOLDOUT], forget=at_work.erase_late, now=lambda: 1000.0)
    with pytest.raises(PreflightFailed):
        run_round(database, settings, "assistant", inputs, ALL_NEW)
    texts = [path.read_text() for path in settings.retrain.runs_dir.rglob("unpaired.jsonl")]
    assert texts
    assert all(ALONE.id not in text for text in texts)
    assert any(ASKED_IN_HOLDOUT.id in text for text in texts)
