"""Trainings outside the rounds: supervised, of a reward model, by reward. Each leaves a directory as a round does.

`<runs>/<kind>-<time>-<random>/{mine,build,train}`: the pairs it was given, which of them it learned from, and what came
out. The names are those of a round, so that erasing a person finds their rows, and finds the models that learned them.
Nothing here is put into service: a candidate is registered, and goes out through a canary like any other.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from transformers import AutoTokenizer

from feedback.chat_messages import calls_tools
from feedback.erasure_files import alone_in, write_whole
from feedback.filters.holdout import HoldoutRules, is_held_out, latest_share, prompt_key, split_holdout
from feedback.pairs import PreferencePair
from pawl import registry
from pawl.clock import Clock
from pawl.database import Database
from pawl.errors import ConfigurationError
from pawl.registry import Model, ModelState
from pawl.settings import Settings
from retrain import grpo, preflight, reward_training, sft
from retrain.adapters import Provenance, base_fingerprint, seal, verify_adapter
from retrain.answer_scores import ScoreAnswers
from retrain.base_layers import linear_layers
from retrain.dataset import TrainingExample, canonical_json, drop_leaks, untrainable
from retrain.demonstrations import Demonstration, from_edits
from retrain.errors import BadData, TrainingFailed
from retrain.fingerprint import take_fingerprint
from retrain.progress import Report, ignore
from retrain.prompts import Prompt, distinct
from retrain.sealed_files import seal_files, sweep
from retrain.steps import Manifest, once
from retrain.trl_training import Course

Preference = TypeVar("Preference", bound=PreferencePair | TrainingExample)

OUTSIDE_ROUNDS = 0
"""The number in the names of adapters that no round made."""


class Kind(StrEnum):
    """What is trained, and the first part of the run's id."""

    SFT = "sft"
    REWARD = "reward"
    GRPO = "grpo"


@dataclass(frozen=True)
class Place:
    """Where a training happens, and for which alias."""

    database: Database
    settings: Settings
    alias: str
    base: str
    """Directory or hub name to train on."""
    base_served: str
    """What the engines call it."""
    forget: Callable[[Path], None]
    """Takes out of a run's files whoever was erased since the pairs were read."""
    now: Clock
    report: Report = ignore


@dataclass(frozen=True)
class Parent:
    """What is continued."""

    name: str
    path: Path | None
    """None for the base."""


@dataclass(frozen=True)
class Trained:
    """What came of it, as it is shown."""

    run: str
    kind: Kind
    name: str
    path: Path
    parent: str
    detail: dict[str, Any]


def new_run_id(kind: Kind, at: float) -> str:
    """Sorts by time, and fits into the registry's 32 characters.

    >>> new_run_id(Kind.SFT, 0.0)[:-4]
    'sft-19700101T000000-'
    """
    return f"{kind}-{datetime.fromtimestamp(at, UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(2)}"


def parent_of(place: Place, name: str | None) -> Parent:
    """The base, or a registered model of the alias, its files looked through.

    Raises:
        UnknownModel: there is none of this name.
        ConfigurationError: it is a version of another alias.
        BadAdapter: its files are not those that were sealed.
    """
    if name is None or name == place.base_served:
        return Parent(place.base_served, None)
    model = registry.get_model(place.database, name)
    if model.alias != place.alias:
        raise ConfigurationError(f"{name} is a version of {model.alias}, not of {place.alias}")
    if model.path is None:
        return Parent(name, None)
    return Parent(name, verify_adapter(Path(model.path), place.settings.engine.max_lora_rank).path)


def train_sft(
    place: Place, given: Sequence[Demonstration], pairs: Collection[PreferencePair], parent: Parent
) -> Trained:
    """Train on demonstrations and on what users made of answers, and register the candidate.

    Args:
        pairs: of which the edits are learned; whoever they come from can be erased from the run.

    Raises:
        RetrainError: there is nothing to learn from, or no usable weights came out.
    """
    directory, kept = _frozen(place, Kind.SFT, [pair for pair in pairs if pair.source == "edit"])
    demonstrations = [*given, *from_edits(kept)]
    settings = place.settings.retrain.sft
    sha = _digest([asdict(one) for one in demonstrations])
    _build(place, directory, sha, kept, detail={"n_demonstrations": len(given), "n_edits": len(kept)})

    def work(part: Path) -> Manifest:
        run = sft.SFTRun(place.base, _serving(place), parent.path, part, settings, place.settings.retrain.seed)
        result = sft.train(run, demonstrations, place.report)
        counts = {name: value for name, value in vars(result.prepared).items() if name != "rows"}
        found: dict[str, Any] = {"prepared": counts, **_course(result.course)}
        if result.adapter_dir is not None:
            libraries = result.course.libraries
            found |= _sealed(place, _Made(directory.name, parent, result.adapter_dir, sha, libraries, settings.dtype))
        return found

    trained = once(directory / "train", work)
    if settings.full:
        return Trained(
            directory.name, Kind.SFT, directory.name, directory / "train" / "model", parent.name, {**trained}
        )
    _register(place, directory.name, parent, trained, sha)
    return Trained(directory.name, Kind.SFT, trained["model"], Path(trained["path"]), parent.name, {**trained})


def train_reward(place: Place, pairs: Collection[PreferencePair], originals: Sequence[TrainingExample]) -> Trained:
    """Train a reward model, measure it on people it has not seen, and seal it.

    Args:
        originals: preferences from files; those that ask what the hold-out asks are not learned from.

    Raises:
        RetrainError: there is nothing to learn from, or no usable weights came out.
    """
    settings = place.settings.retrain
    sweep(settings.reward.rewards_dir, place.now())
    directory, kept = _frozen(place, Kind.REWARD, pairs)
    fit_originals = trainable(place.base, originals)
    learned, holdout = split(kept, fit_originals, settings.holdout_share, rules_of(place, kept))
    sha = _digest([asdict(one) for one in learned])
    ids = [one.id for one in holdout if isinstance(one, PreferencePair)]
    _build(place, directory, sha, [one for one in learned if isinstance(one, PreferencePair)], holdout_ids=ids)

    def work(part: Path) -> Manifest:
        run = reward_training.RewardRun(place.base, part, settings.reward, settings.seed)
        result = reward_training.train(run, learned, holdout, place.report)
        fields = {
            "base": _serving(place),
            "base_sha": base_fingerprint(place.base),
            "dataset_sha": sha,
            "run": directory.name,
            "max_length": settings.reward.max_length,
            "holdout": {**result.accuracy._asdict(), "beats_chance": result.accuracy.beats_chance},
            "libraries": dict(result.course.libraries),
        }
        sealed = seal_files(result.directory, settings.reward.rewards_dir, Kind.REWARD, fields)
        shown = {"model": sealed.name, "path": str(sealed), "holdout": fields["holdout"]}
        return {**shown, "n_shortened": result.n_shortened, **_course(result.course)}

    trained = once(directory / "train", work)
    return Trained(directory.name, Kind.REWARD, trained["model"], Path(trained["path"]), place.base_served, {**trained})


def train_grpo(
    place: Place,
    given: Sequence[Prompt],
    pairs: Collection[PreferencePair],
    score: ScoreAnswers,
    parent: Parent,
    *,
    reward_name: str,
) -> Trained:
    """Train by reward on prompts from a file and from feedback, and register the candidate.

    Args:
        pairs: of which the prompts are asked, but for those of the hold-out.
        reward_name: what is recorded as the reward.

    Raises:
        RetrainError: there is no prompt, the reward fails, or no usable weights came out.
    """
    directory, kept = _frozen(place, Kind.GRPO, pairs)
    asked = split_holdout(kept, rules_of(place, kept)).training
    prompts = distinct([*given, *(pair.prompt for pair in asked)])
    if not prompts:
        raise BadData("there is no prompt to train on: give some with --prompts")
    settings = place.settings.retrain.grpo
    sha = _digest([prompts, reward_name])
    _build(place, directory, sha, asked, detail={"n_prompts": len(prompts), "reward": reward_name})

    def work(part: Path) -> Manifest:
        run = grpo.GRPORun(place.base, _serving(place), parent.path, part, settings, place.settings.retrain.seed)
        result = grpo.train(run, prompts, score, place.report)
        rewards = {"reward_first": result.reward_first, "reward_last": result.reward_last, "kl_last": result.kl_last}
        found = {**rewards, "generation": result.generation, "n_left_out": result.n_left_out, "reward": reward_name}
        libraries = result.course.libraries
        sealed = _sealed(place, _Made(directory.name, parent, result.adapter_dir, sha, libraries, settings.dtype))
        return {**found, **sealed, **_course(result.course)}

    trained = once(directory / "train", work)
    _register(place, directory.name, parent, trained, sha)
    return Trained(directory.name, Kind.GRPO, trained["model"], Path(trained["path"]), parent.name, {**trained})


def rules_of(place: Place, pairs: Sequence[PreferencePair]) -> HoldoutRules:
    """Those of the rounds: a user whom the gate judges by is nowhere learned from."""
    settings = place.settings.retrain
    since = None if settings.holdout_latest is None else latest_share(pairs, settings.holdout_latest)
    return HoldoutRules(settings.holdout_share, settings.seed, since, settings.holdout_similarity)


def split(
    pairs: Sequence[PreferencePair], originals: Sequence[TrainingExample], share: float, rules: HoldoutRules
) -> tuple[list[PreferencePair | TrainingExample], list[PreferencePair | TrainingExample]]:
    """What is learned from and what is measured on: pairs by user, preferences from files by prompt."""
    parted = split_holdout(pairs, rules)
    held = [one for one in originals if is_held_out(prompt_key(one.prompt), share, rules.seed)]
    names = {one.pair_id for one in held}
    learned = drop_leaks((one for one in originals if one.pair_id not in names), parted.holdout)
    return [*parted.training, *learned], [*parted.holdout, *held]


def _frozen(place: Place, kind: Kind, pairs: Iterable[PreferencePair]) -> tuple[Path, list[PreferencePair]]:
    """The run's directory, and the pairs in it without whoever was erased since they were read."""
    directory = place.settings.retrain.runs_dir.absolute() / new_run_id(kind, place.now())

    def work(part: Path) -> Manifest:
        write_whole(part / "new.jsonl", (canonical_json(asdict(pair)) + "\n" for pair in pairs))
        return {"alias": place.alias, "kind": str(kind)}

    with alone_in(directory):
        once(directory / "mine", work)
    place.forget(directory)
    with alone_in(directory):
        lines = (directory / "mine" / "new.jsonl").read_text().splitlines()
    return directory, trainable(place.base, [_pair(json.loads(line)) for line in lines])


def trainable(base: str, given: Sequence[Preference]) -> list[Preference]:
    """Those that the base model's chat template can show, as a round picks them."""
    with_tools = any(calls_tools((*one.prompt, one.chosen, one.rejected)) for one in given)
    reads_tools = with_tools and preflight.reads_tools(AutoTokenizer.from_pretrained(base))
    return [one for one in given if untrainable(one, reads_tools=reads_tools) is None]


def _build(
    place: Place,
    directory: Path,
    sha: str,
    learned: Sequence[PreferencePair],
    *,
    holdout_ids: Sequence[str] = (),
    detail: dict[str, Any] | None = None,
) -> None:
    """What the training set is, by ids: erasure marks it there, and the models that were made of it."""
    ids = {"pair_ids": [pair.id for pair in learned], "holdout_ids": list(holdout_ids)}
    with alone_in(directory):
        once(directory / "build", lambda _: {"sha256": sha, **ids, **(detail or {})})
    place.forget(directory)


class _Made(NamedTuple):
    """An adapter that was trained, and what of."""

    run_id: str
    parent: Parent
    adapter_dir: Path
    dataset_sha: str
    libraries: Mapping[str, str]
    dtype: str


def _sealed(place: Place, made: _Made) -> dict[str, Any]:
    provenance = Provenance(
        base=_serving(place),
        base_sha=base_fingerprint(place.base),
        parent=made.parent.name,
        run=made.run_id,
        dataset_sha=made.dataset_sha,
        libraries=made.libraries,
    )
    tolerance = place.settings.retrain.fingerprint_tolerance
    adapter = seal(
        made.adapter_dir,
        place.settings.retrain.adapters_dir,
        base_served=place.base_served,
        run_number=OUTSIDE_ROUNDS,
        max_rank=place.settings.engine.max_lora_rank,
        provenance=provenance,
        layers=linear_layers(place.base),
        fingerprint=take_fingerprint(
            place.base, made.adapter_dir, made.parent.path, dtype=made.dtype, tolerance=tolerance
        ),
    )
    if adapter.path == made.parent.path:
        raise TrainingFailed(f"nothing was learned: the weights are those of {made.parent.name}")
    return {"model": adapter.name, "path": str(adapter.path)}


def _register(place: Place, run_id: str, parent: Parent, trained: Manifest, sha: str) -> None:
    adapter = verify_adapter(Path(trained["path"]), place.settings.engine.max_lora_rank)
    at = place.now()
    model = Model(
        name=adapter.name,
        alias=place.alias,
        base=place.base_served,
        parent=parent.name,
        run_id=run_id,
        path=str(adapter.path),
        sha256=adapter.sha256,
        dataset_sha=sha,
        state=ModelState.CANDIDATE,
        manifest=adapter.manifest,
        created_at=at,
        updated_at=at,
    )
    registry.register_model(place.database, model)


def _serving(place: Place) -> str:
    return place.settings.engine.model or place.base


def _course(course: Course) -> dict[str, Any]:
    return {**asdict(course), "history": [dict(row) for row in course.history], "libraries": dict(course.libraries)}


def _digest(value: object) -> str:
    return hashlib.sha256(canonical_json(value).encode("utf-8", "surrogatepass")).hexdigest()


def _pair(row: dict[str, Any]) -> PreferencePair:
    return PreferencePair(**row | {name: tuple(row[name]) for name in ("prompt", "principals", "models")})
