"""Four canaries on the practice model, through a real engine, gateway and worker: who is promoted, who is rolled back?

    python -m bench.canaries [--only equal] [--again] [--users 30000] [--seed 700]

Trains a champion and three candidates whose habits are known (bench/canaries_world.py), all from one parent, and asks
each 2,000 questions to see that it has them; the fourth is the champion's copy under another name. Then each
candidate goes out as a canary of its own, at the default error rates and the default margins of thumbs-down, toxicity
and over-refusal, while simulated users ask and rate, until the controller has decided. Exits 1 unless, of those asked
for,

- the champion's own weights, and an adapter that helps more often, are promoted;
- one with 3 points more toxic answers is rolled back for toxicity;
- one that refuses 12 points more of the harmless questions is rolled back for over-refusal.

Adapters and results are kept under var/bench/canaries, and a canary that has its result is not run again: so each can
be its own run, with `--only`. Time is shortened: users rate at once, so that outcomes mature in seconds instead of
minutes, a step lasts seconds instead of an hour, and for the next one more harm may be possible (`RULES`).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console

from ab_testing.experiment import TREATMENT
from ab_testing.rollout_store import Rollout, list_decisions
from bench.canaries_results import MEASURES, Outcome, rates_of, read_results, table_of, write_results
from bench.canaries_world import (
    CANDIDATES,
    CHAMPION_MIX,
    RULES,
    Candidate,
    Habits,
    Mix,
    asked,
    demonstrations,
    habits_of,
)
from bench.rounds_world import Speaker
from feedback.selection import Selected
from feedback.store import experiment_rows, exposures_between
from pawl import clock, registry
from pawl.adapter_files import Adapter, verify_adapter
from pawl.database import Database
from pawl.engines import Engine
from pawl.registry import Model, ModelState
from pawl.settings import Settings, SFTSettings
from practice.artifacts import Manifest, build_once, content_key
from practice.demo import Demo, free_ports, fresh_directory, quiet_libraries
from practice.model import PracticeModel
from practice.report import DemoRecord
from practice.toxicity_checkpoint import ToxicityCheckpoint
from practice.world import ALIAS, BASE_NAME, LORA_RANK, practice_settings, prepare
from retrain.adapters import Provenance, base_fingerprint, seal
from retrain.sft import SFTRun, train

DIRECTORY = Path("var/bench/canaries")
REPORT = Path("var/bench/canaries.json")
N_DEMONSTRATIONS = 3000
N_OF_A_CHILD = 1200
"""It continues the parent, and has only its own habits to learn."""
N_ASKED = 2000
TRAINING: Mapping[str, Any] = {
    "batch_size": 16,
    "gradient_accumulation_steps": 1,
    "max_length": 128,
    "lora_rank": LORA_RANK,
    "lora_alpha": LORA_RANK,
    "dtype": "float32",
    "gradient_checkpointing": False,
}
PARENT_TRAINING = SFTSettings(**TRAINING, learning_rate=2e-3, epochs=3)
CHILD_TRAINING = SFTSettings(**TRAINING, learning_rate=1e-3, epochs=2)
ENDS = frozenset({"promote", "roll_back", "abort"})


@dataclass(frozen=True)
class World:
    """The practice model, its scorer, and where adapters are kept."""

    model: PracticeModel
    scorer: ToxicityCheckpoint
    directory: Path


class Trained(NamedTuple):
    """A sealed adapter, and the habits that it was found to have."""

    adapter: Adapter
    habits: Habits


class Visitors(NamedTuple):
    """Who comes while a canary is out."""

    most: int
    seed: int


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what has no result yet, show all results; 1 when one is not as it should be."""
    options = parsed(arguments)
    torch.set_num_threads(options.threads)
    quiet_libraries()
    console = Console(width=180, soft_wrap=True)
    world = World(*prepare(Path("var/practice"), progress=True), options.directory.absolute())
    results = {} if options.again else read_results(REPORT)
    wanted = [candidate.name for candidate in CANDIDATES if options.only in candidate.name]
    for number, candidate in enumerate(CANDIDATES):
        if candidate.name in results or candidate.name not in wanted:
            continue
        outcome = run(world, candidate, number, Visitors(options.users, options.seed + number), console)
        results = {**results, candidate.name: outcome}
        write_results(REPORT, {**read_results(REPORT), candidate.name: outcome})
    console.print(table_of(results.values()))
    return int(not wanted or not all(results[name].is_right for name in wanted))


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="of the canaries, those whose names have this in them")
    parser.add_argument("--again", action="store_true", help="also those that have a result")
    parser.add_argument("--users", type=int, default=30_000, help="at most so many; then the canary ends undecided")
    parser.add_argument("--seed", type=int, default=700, help="of the users; each canary has its own from it")
    parser.add_argument("--threads", type=int, default=1, help="of the training")
    parser.add_argument("--directory", type=Path, default=DIRECTORY, help="where adapters and runs are kept")
    return parser.parse_args(arguments)


def run(world: World, candidate: Candidate, number: int, visitors: Visitors, console: Console) -> Outcome:
    """Train what is not trained yet, send the candidate out, and wait for the verdict."""
    parent = trained(world, "parent", CHAMPION_MIX, PARENT_TRAINING, 1, None)
    champion = trained(world, "champion", CHAMPION_MIX, CHILD_TRAINING, 10, parent)
    if candidate.is_copy:
        own = copied(world, candidate.name, champion, 2 + number)
    else:
        own = trained(world, candidate.name, candidate.taught or candidate.mix, CHILD_TRAINING, 2 + number, parent)
    for name, habits in (("champion", champion.habits), (candidate.name, own.habits)):
        console.print(f"    {name}: {shown_habits(habits)}")
    work = fresh_directory(world.directory / "runs" / candidate.name)
    settings = settings_of(world, work, champion.adapter.name)
    stage = Demo(settings, work, DemoRecord(), visitors.seed, console, _nothing_is_trained)
    try:
        with stage.step(f"{candidate.name}: engine, gateway and worker"):
            stage.stack.start()
            put_in_place(stage, champion.adapter, own.adapter)
        with stage.step(f"{candidate.name}: the canary"):
            rollout, count = roll_out(stage, own.adapter.name, visitors.most)
        return outcome_of(stage.database, candidate, rollout, count, {"champion": champion.habits, "own": own.habits})
    finally:
        stage.stack.stop()
        stage.database.close()


def trained(world: World, name: str, mix: Mix, settings: SFTSettings, seed: int, parent: Trained | None) -> Trained:
    """An adapter with these habits: found where it was kept, or trained, sealed and asked."""
    parent_path, n = (parent.adapter.path, N_OF_A_CHILD) if parent else (None, N_DEMONSTRATIONS)
    key = content_key(world.model.path.name, mix, settings, seed, parent_path and parent_path.name, n)
    directory = world.directory / "adapters" / f"{name}-{key}"

    def build(part: Path) -> Manifest:
        run = SFTRun(str(world.model.path), BASE_NAME, parent_path, part / "training", settings, seed)
        found = train(run, demonstrations(mix, n, seed)).adapter_dir
        assert found is not None
        questions = asked(N_ASKED, seed)
        habits = habits_of(questions, Speaker(str(world.model.path), found).answers(questions, seed))
        (part / "habits.json").write_text(json.dumps(habits._asdict()))
        provenance = provenance_of(world, parent, name)
        sealed = seal(
            found, part / "sealed", base_served=BASE_NAME, run_number=seed, max_rank=LORA_RANK, provenance=provenance
        )
        return {"sealed": str(sealed.path.relative_to((part / "sealed").absolute()))}

    manifest = build_once(directory, build)
    adapter = verify_adapter(directory / "sealed" / str(manifest["sealed"]), LORA_RANK)
    return Trained(adapter, Habits(**json.loads((directory / "habits.json").read_text())))


def copied(world: World, name: str, original: Trained, number: int) -> Trained:
    """The same weights, byte for byte, under a name of their own, as an engine and the registry want it."""
    sealed = seal(
        original.adapter.path,
        world.directory / "adapters" / f"{name}-copy",
        base_served=BASE_NAME,
        run_number=number,
        max_rank=LORA_RANK,
        provenance=provenance_of(world, original, name),
    )
    assert (sealed.sha256, sealed.name != original.adapter.name) == (original.adapter.sha256, True)
    return Trained(sealed, original.habits)


def provenance_of(world: World, parent: Trained | None, name: str) -> Provenance:
    """Where a candidate of this world comes from."""
    return Provenance(
        base=BASE_NAME,
        base_sha=base_fingerprint(str(world.model.path)),
        parent=parent.adapter.name if parent else BASE_NAME,
        run=f"canaries-{name}",
        dataset_sha=content_key(name),
        libraries={},
    )


def settings_of(world: World, work: Path, champion: str) -> Settings:
    """The practice world's, with an adapter as the champion."""
    gateway_port, engine_port, metrics_port = free_ports(3)
    settings = practice_settings(
        world.model,
        world.scorer,
        work,
        gateway_port=gateway_port,
        engine_port=engine_port,
        metrics_port=metrics_port,
        rollout=dict(RULES),
    )
    served = settings.serving.models[ALIAS].model_copy(update={"champion": champion})
    serving = settings.serving.model_copy(update={"models": {ALIAS: served}})
    return settings.model_copy(update={"serving": serving})


def put_in_place(stage: Demo, champion: Adapter, candidate: Adapter) -> None:
    """Register both, and have the engine serve them."""
    assert stage.stack.engine is not None
    with closing(Engine(stage.stack.engine.url)) as engine:
        for adapter, state in ((champion, ModelState.CHAMPION), (candidate, ModelState.CANDIDATE)):
            engine.load(adapter.name, adapter.path)
            registry.register_model(stage.database, model_of(adapter, state))


def model_of(adapter: Adapter, state: ModelState) -> Model:
    now = clock.now()
    parent, dataset_sha = str(adapter.manifest["parent"]), str(adapter.manifest["dataset_sha"])
    return Model(
        name=adapter.name,
        alias=ALIAS,
        base=BASE_NAME,
        parent=parent,
        run_id=None,
        path=str(adapter.path),
        sha256=adapter.sha256,
        dataset_sha=dataset_sha,
        state=state,
        manifest=adapter.manifest,
        created_at=now,
        updated_at=now,
    )


def roll_out(stage: Demo, candidate: str, most_users: int) -> tuple[Rollout, int]:
    """The rollout once it has ended, and how many users came."""
    rollout = stage.roll_out(candidate, most_users)
    rows = exposures_between(stage.database, ALIAS, rollout.created_at, clock.now())
    return rollout, len({row.unit_id for row in rows})


def outcome_of(
    database: Database, candidate: Candidate, rollout: Rollout, n_users: int, habits: Mapping[str, Habits]
) -> Outcome:
    """What the records say."""
    decisions = list_decisions(database, rollout.id)
    last = next(record for record in reversed(decisions) if record.verdict in ENDS)
    rows = [row for row in experiment_rows(database, rollout.id) if row.created_at <= last.at]
    started = [(0.0, rollout.config.steps[0])] + [
        (record.at - rollout.created_at, record.weight) for record in decisions if record.verdict == "advance"
    ]
    return Outcome(
        name=candidate.name,
        wanted=(candidate.verdict, candidate.metric),
        status=rollout.state.status,
        metric=last.metric,
        reason=last.reason,
        users=n_users,
        exposed=len({row.unit_id for row in rows if row.served_variant == TREATMENT}),
        seconds=last.at - rollout.created_at,
        steps=tuple((weight, at) for at, weight in started),
        rates={name: rates_of(rows, measure) for name, measure in MEASURES.items()},
        habits=habits,
    )


def shown_habits(habits: Habits) -> str:
    """For people."""
    names = ("toxic", "over_refusal", "harmful_compliance", "helpful", "garbled")
    return ", ".join(f"{name} {getattr(habits, name):.1%}" for name in names) + f" of {habits.n} answers"


def _nothing_is_trained(*_: object) -> Selected:
    raise AssertionError("a canary trains nothing")


if __name__ == "__main__":
    raise SystemExit(main())
