"""One retraining round: mine, build, preflight, train, evaluate, gate, publish, canary.

Each step leaves a directory under the run's own, renamed into place when it is whole. A round that was killed is run
again with the same cycle and goes on at the step it was in, the training at its last checkpoint; steps that finished
are checked, not repeated. The candidate is loaded into the engines before it is evaluated, so that what is judged is
what would be served, but nothing is routed to it before the gate.

With a `FencedDatabase` every side effect carries the epoch of the lease: what is written proves it in its own
transaction, and engines are told nothing without asking first. A process that slept through its lease changes nothing.
"""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import structlog
from transformers import AutoTokenizer

from feedback.candidates import Source
from feedback.chat_messages import calls_tools
from feedback.erasure_files import alone_in, write_whole
from feedback.filters.holdout import HoldoutRules, LeftOut, find_leaks, latest_share, split_holdout
from feedback.pairs import PreferencePair, UnpairedExample
from pawl import clock, registry
from pawl.clock import Clock
from pawl.database import AWAY, Database
from pawl.engines import Engine, load_verified, unload_everywhere
from pawl.errors import ConfigurationError, PawlError, RunConflict, StaleWrite, UnknownModel, Unreachable
from pawl.registry import Model, ModelState, Run, RunStatus
from pawl.settings import MixSettings, Settings
from retrain import distributed, dpo, preflight
from retrain.adapters import Adapter, Provenance, base_fingerprint, seal, verify_adapter
from retrain.base_layers import linear_layers
from retrain.beginning import begin, read_plan
from retrain.dataset import (
    Mixed,
    Origin,
    OriginalSplit,
    TrainingExample,
    Untrainable,
    canonical_json,
    check_no_leak,
    dataset_manifest,
    drop_leaks,
    example_of,
    half_life_of,
    mix,
    parse_originals,
    shares_of,
    split_originals,
    swap_preferences,
    untrainable,
)
from retrain.drift import Drift, Plan, Start, record_of
from retrain.drift_measurement import measure_drift
from retrain.errors import BadData, CanaryTaken, DataLeak, PreflightFailed, TrainingInterrupted
from retrain.evaluation import Contender, ScoreToxicity
from retrain.examination import chances_of, examine, plan_of, probes_of
from retrain.explaining import what_it_did
from retrain.fingerprint import take_fingerprint
from retrain.gate import Verdict, judge, report_as_dict
from retrain.gate_report import write_page
from retrain.measurements import from_json, to_json
from retrain.objectives import Family, agreement_in, choose_objective, estimate_flip_rate
from retrain.progress import LoggedStep, Report, ignore
from retrain.steps import MANIFEST, Manifest, Terms, digest_of, done, nobody_was_erased, once, remedy
from retrain.thumbs import Thumbs, apart_from, thumb_of, turned, with_thumbs

log = structlog.get_logger()

OpenCanary = Callable[[str], str | None]
"""Given the candidate's name, open a rollout for it, or find the one it has already, and return its id.

Raises `CanaryTaken` while another candidate's rollout runs.
"""

Forget = Callable[[Path], None]
"""Given a run's directory, takes out of its files whoever was erased since the pairs were read."""

THUMBS = "unpaired.jsonl"
JUDGED_BY_VOTERS = frozenset({Source.CHOICE.value, Source.EDIT.value, Source.REGENERATION.value})
"""Sources of pairs of which every voter looked at both answers; thumbs may be of different people on each side."""

OUT_OF_REACH = (httpx2.HTTPError, ConnectionError, TimeoutError, *AWAY)
"""Errors of others that say no more than `Unreachable`."""

LEASE_CHECK_S = 5.0
"""How often a training that goes on asks whether the round is still its own."""

_STATUS = {
    Verdict.PASS: RunStatus.PASSED,
    Verdict.FAIL: RunStatus.FAILED,
    Verdict.CANNOT_TELL: RunStatus.CANNOT_TELL,
}


@dataclass(frozen=True)
class RoundOptions:
    """What one round does differently from the settings. Everything here is recorded in the run."""

    cycle: str | None = None
    """What the round is for; without it that of the newest unfinished run, else this ISO week. One run per cycle."""
    force: bool = False
    """Train on fewer pairs than `retrain.min_pairs`."""
    mix: MixSettings | None = None
    parent: str | None = None
    """A registered model, or the base, instead of the champion."""
    swap_preferences: bool = False
    """Train on the opposite of what people preferred: a drill that must end in a refusal or a rollback."""
    publish_despite_gate: bool = False
    note: str = ""


def keep(_run: Path) -> None:
    """Forgets nobody."""


@dataclass(frozen=True)
class RoundInputs:
    """What a round works with besides the settings."""

    new: Collection[PreferencePair]
    """Pairs no promoted model has learned from."""
    earlier: Collection[PreferencePair] = ()
    score_toxicity: ScoreToxicity | None = None
    """Without it toxicity is not measured, and the gate says no."""
    open_canary: OpenCanary | None = None
    skipped: Mapping[str, int] = field(default_factory=dict)
    """Candidates of this mining that gave no pair, by reason; kept with the run."""
    unpaired: Collection[UnpairedExample] = ()
    """Single thumbs, which only the objective `kto` learns from."""
    forget: Forget = keep
    may_be_erased: Callable[[], bool] = nobody_was_erased
    """Whether anybody ever was: their rows may be missing from what finished steps left."""
    report: Report = ignore
    now: Clock = field(default=clock.now)
    epoch: int = 0
    """The lease epoch of this process."""


@dataclass(frozen=True)
class RunOutcome:
    """How a round ended."""

    run_id: str
    status: RunStatus
    model: str | None
    """The candidate's name, once there is one."""
    parent: str
    directory: Path
    new_pair_ids: tuple[str, ...]
    """New pairs that were trained on."""
    gate: Mapping[str, Any] | None
    """The gate's report, as `gate.report_as_dict` writes it."""
    rollout_id: str | None
    reason: str


def run_round(
    database: Database, settings: Settings, alias: str, inputs: RoundInputs, options: RoundOptions | None = None
) -> RunOutcome:
    """Train a candidate from the feedback, judge it, and publish it if it passes.

    Calling it again for the same cycle resumes the run, or returns its outcome once it has one. Without a cycle an
    unfinished run is resumed, however old it is.

    Raises:
        PawlError: a step failed; the run is marked so and can be resumed, unless this was once too often.
    """
    chosen = options or RoundOptions()
    resolve_base(settings, alias)
    cycle = chosen.cycle or iso_week(inputs.now())
    unfinished = None if chosen.cycle else registry.unfinished_run(database, alias)
    run = unfinished or registry.find_run(database, alias, cycle)
    if run is None:
        run = registry.create_run(database, alias, cycle, epoch=inputs.epoch, now=inputs.now())
    elif not run.status.is_final:
        run = registry.adopt_run(database, run, epoch=inputs.epoch, now=inputs.now())
    return _Round(database, settings, run, inputs, chosen).go()


def iso_week(at: float) -> str:
    """The default name of a cycle.

    >>> iso_week(0.0)
    '1970-W01'
    """
    year, week, _ = datetime.fromtimestamp(at, UTC).isocalendar()
    return f"{year}-W{week:02d}"


def resolve_base(settings: Settings, alias: str) -> tuple[str, str]:
    """What to train on, and the name the engines serve it by.

    Raises:
        ConfigurationError: the alias or the base model is not configured.
    """
    if alias not in settings.serving.models:
        raise ConfigurationError(f"serving.models has no {alias!r}")
    base = settings.retrain.base_model or settings.engine.model
    if base is None:
        raise ConfigurationError("retrain.base_model is not set, and neither is engine.model")
    return str(base), settings.engine.served_name or settings.serving.models[alias].champion


class _OwnEngine(Engine):
    """An engine that is told nothing once another process has taken the round over."""

    def __init__(self, url: str, check_lease: Callable[[], None]) -> None:
        super().__init__(url)
        self._check_lease = check_lease

    def load(self, name: str, path: Path) -> None:
        self._check_lease()
        super().load(name, path)

    def unload(self, name: str) -> None:
        self._check_lease()
        super().unload(name)


class _Round:
    """One run and everything its steps share; the steps are methods in the order they happen."""

    def __init__(
        self, database: Database, settings: Settings, run: Run, inputs: RoundInputs, options: RoundOptions
    ) -> None:
        self.database = database
        self.settings = settings
        self.retrain = settings.retrain
        self.run = run
        self.inputs = inputs
        self.options = options
        self.base, self.base_served = resolve_base(settings, run.alias)
        self.directory = self.retrain.runs_dir.absolute() / run.id
        self.candidate: str | None = None

    def go(self) -> RunOutcome:
        if self.run.status.is_final:
            return self._outcome(self.run.status)
        try:
            return self._steps()
        except (StaleWrite, RunConflict):
            raise  # The run is another process's now, and so is its record.
        except TrainingInterrupted:
            raise  # Nothing went wrong: the run stays as it is, to be continued at its optimiser step.
        except PawlError as exc:
            self._record_failure(str(exc), counts=exc.exit_code != Unreachable.exit_code)
            raise
        except Exception as exc:
            self._record_failure(f"{type(exc).__name__}: {exc}", counts=not isinstance(exc, OUT_OF_REACH))
            raise

    def _record_failure(self, error: str, *, counts: bool) -> None:
        """What broke is tried again, but not for ever: nothing else would be trained meanwhile.

        Args:
            counts: not so what was out of reach: it comes back, and says nothing about the round.
        """
        before = self.run.detail.get("failures", {})
        n = (before["n"] if before.get("step") == self.run.step else 0) + int(counts)
        detail: dict[str, Any] = {"error": error, "failures": {"step": self.run.step, "n": n}}
        if n < self.retrain.max_failures or not counts:
            self._record(self.run.step, RunStatus.ERROR, detail)
            return
        detail["reason"] = f"given up after {n} failures at {self.run.step}: {error}"
        detail["model"] = self._manifest_or_nothing("train").get("model")
        self._record(self.run.step, RunStatus.GIVEN_UP, detail)
        self._reject_candidate(detail["model"])

    def _manifest_or_nothing(self, step: str) -> Manifest:
        try:
            return self._manifest(step)
        except BadData:  # That may be why the round is given up.
            return {}

    def _reject_candidate(self, name: str | None) -> None:
        """The worker takes it out of the engines, once nothing can be under way with it."""
        still = (ModelState.CANDIDATE,)  # A person may have sent it out after all.
        with suppress(UnknownModel):
            if name is not None:
                registry.set_state(self.database, name, ModelState.REJECTED, now=self.inputs.now(), expected=still)

    def _steps(self) -> RunOutcome:
        mined = self._once_alone("mine", self._mine)
        self._record("mine", RunStatus.RUNNING, {"skipped": mined.get("skipped", {})})
        if mined["is_too_few"]:
            return self._finish(RunStatus.SKIPPED)
        built = self._once_alone("build", self._build)
        self._record("build", RunStatus.RUNNING, {"left_out": built.get("left_out", {})})
        self._once("preflight", self._preflight)
        trained = self._once("train", self._train, keeps_part=True)
        adapter = self._register(mined, trained)
        with self._engines() as engines:
            if done(self.directory / "evaluate") is None:
                self._enter("load")
                self._load(engines, mined, adapter)
            self._once("evaluate", self._evaluate)
            gate = self._once("gate", self._gate)
            if not gate["is_published"]:
                return self._reject(engines, gate)
            self._once("publish", lambda _: self._publish(engines, adapter))
        self._once("canary", lambda _: self._canary(adapter))
        return self._finish(_STATUS[Verdict(gate["report"]["verdict"])])

    def _mine(self, directory: Path) -> Manifest:
        """Freeze the pairs and the parent, so that a resumed run works with the same ones."""
        n_new = _write_lines(directory / "new.jsonl", self.inputs.new)
        n_earlier = _write_lines(directory / "earlier.jsonl", self.inputs.earlier)
        if self._learns_from_thumbs():
            _write_lines(directory / THUMBS, self.inputs.unpaired)
        parent, plan = self._beginning()
        return {
            "n_new": n_new,
            "n_earlier": n_earlier,
            "is_too_few": n_new < self.retrain.min_pairs and not self.options.force,
            "min_pairs": self.retrain.min_pairs,
            "skipped": dict(self.inputs.skipped),
            **parent,
            "plan": plan,
            "options": {**asdict(replace(self.options, mix=None)), "mix": self._mix(plan["start"]).model_dump()},
        }

    def _build(self, directory: Path) -> Manifest:
        """Split off the hold-out and draw the training set."""
        new, earlier, given = self._pairs("new"), self._pairs("earlier"), self._originals()
        everything: list[PreferencePair | TrainingExample] = [*new, *earlier, *given]
        why_not = self._why_not_trainable(everything)
        fit = [pair for pair in (*new, *earlier) if why_not(pair) is None]
        fit_originals = [one for one in given if why_not(one) is None]
        unfit = Counter(map(why_not, everything))
        rules = self._holdout_rules(fit)
        split = split_holdout(fit, rules)
        is_new = {pair.id for pair in new}
        given_split = self._split_originals(fit_originals)
        holdout = (*split.holdout, *given_split.holdout)
        said = [example_of(p, Origin.NEW if p.id in is_new else Origin.EARLIER) for p in split.training]
        mined = drop_leaks(said, given_split.holdout, self.retrain.holdout_similarity)
        originals = drop_leaks(given_split.training, split.holdout)
        settings = self._mix(self._plan().start)
        shares, half_life_s = shares_of(settings), half_life_of(settings)
        pool, most, seed = [*mined, *originals], self.retrain.max_pairs, self.retrain.seed
        mixed = mix(pool, shares, max_pairs=most, seed=seed, half_life_s=half_life_s)
        if self.options.swap_preferences:
            mixed = Mixed(swap_preferences(mixed.examples), mixed.counts, mixed.shortfalls)
        check_no_leak(mixed.examples, holdout)
        if leaks := find_leaks(split.training, split.holdout, rules):
            first = f"{leaks[0].kind} of pair {leaks[0].pair_id}"  # Not what it is: users have names.
            raise DataLeak(f"{len(leaks)} things of the hold-out are in the training set, first the {first}")
        _write_lines(directory / "training.jsonl", mixed.examples)
        _write_lines(directory / "holdout.jsonl", holdout)
        is_swapped = self.options.swap_preferences
        manifest = dataset_manifest(
            mixed, holdout, seed=seed, shares=shares, is_swapped=is_swapped, half_life_s=half_life_s
        )
        thumbs = self._thumbs_apart_from(holdout)
        if thumbs.kept:
            _write_lines(directory / THUMBS, thumbs.kept)
        left_out = {
            **{reason.value: unfit[reason] for reason in Untrainable},
            "users_of_both_sides": split.left_out[LeftOut.MIXED_USERS],
            "other_side_of_the_time": split.left_out[LeftOut.WRONG_TIME],
            "prompt_in_holdout": split.left_out[LeftOut.HELD_OUT_PROMPT],
            "prompt_in_original_holdout": len(said) - len(mined),
            "original_prompt_in_holdout": len(given_split.training) - len(originals),
            "original_near_original_holdout": given_split.n_near,
            **thumbs.left_out,
        }
        return {**with_thumbs(manifest, thumbs.kept), "left_out": left_out}

    def _learns_from_thumbs(self) -> bool:
        return choose_objective(self.retrain.training).family is Family.UNPAIRED

    def _thumbs_apart_from(self, holdout: Sequence[PreferencePair]) -> Thumbs:
        given = self._thumbs("mine")
        if self.options.swap_preferences:
            given = list(turned(given))
        return apart_from(given, holdout, similarity=self.retrain.holdout_similarity)

    def _thumbs(self, step: str) -> list[UnpairedExample]:
        """None where the objective learns from none."""
        path = self.directory / step / THUMBS
        return [thumb_of(row) for row in _read_lines(path)] if path.exists() else []

    def _flip_rate(self) -> float:
        """How often preferences seem to be the wrong way round, by this round's own pairs and what was left out."""
        judged = [pair.n_voters for pair in self._pairs("new") if pair.source in JUDGED_BY_VOTERS]
        return estimate_flip_rate(agreement_in(judged, self._manifest("mine")["skipped"]))

    def _why_not_trainable(
        self, examples: Iterable[PreferencePair | TrainingExample]
    ) -> Callable[[PreferencePair | TrainingExample], Untrainable | None]:
        """`untrainable` with what the base model reads, which is looked up only where one of these calls tools."""
        with_tools = (calls_tools((*one.prompt, one.chosen, one.rejected)) for one in examples)
        reads_tools = any(with_tools) and preflight.reads_tools(AutoTokenizer.from_pretrained(self.base))
        return partial(untrainable, reads_tools=reads_tools)

    def _holdout_rules(self, pairs: Sequence[PreferencePair]) -> HoldoutRules:
        latest = self.retrain.holdout_latest
        since = None if latest is None else latest_share(pairs, latest)
        return HoldoutRules(self.retrain.holdout_share, self.retrain.seed, since, self.retrain.holdout_similarity)

    def _preflight(self, _directory: Path) -> Manifest:
        continued = self._continued()
        report = preflight.check_round(
            self.base,
            self._examples(),
            verify_adapter(continued).manifest if continued else None,
            max_length=self.retrain.training.max_length,
            limits=self.retrain.preflight,
        )
        if report.problems:
            raise PreflightFailed("; ".join(report.problems))
        chances = chances_of(probes_of(self.retrain, self._holdout()), self.retrain.gate)
        return {**asdict(report), "gate_chances": chances}

    def _train(self, directory: Path) -> Manifest:
        run = self._training(directory)
        result = distributed.train(
            run,
            self._examples(),
            self._watched(self.inputs.report),
            settings=self.retrain.distributed,
            unpaired=self._thumbs("build"),
        )
        adapter = self._seal(run, result)
        shutil.rmtree(directory / "trainer", ignore_errors=True)  # Checkpoints have served their purpose.
        trained = {**asdict(result), "adapter_dir": result.adapter_dir.relative_to(directory).as_posix()}
        described = {**dpo.describe(run), "output_dir": str(self.directory / "train")}
        return {
            "run": described,
            "result": trained,
            "model": adapter.name,
            "path": str(adapter.path),
            "incremental": adapter.manifest["incremental"],
        }

    def _training(self, directory: Path) -> dpo.DPORun:
        """What is trained, the adapter that it begins with looked through."""
        continued = self._continued()
        if continued is not None:
            verify_adapter(continued, self.settings.engine.max_lora_rank)
        return dpo.DPORun(
            base_model=self.base,
            serving_base=self.settings.engine.model or self.base,
            parent_adapter=continued,
            output_dir=directory,
            training=self.retrain.training,
            seed=self.retrain.seed,
            reference=self.retrain.reference,
            flip_rate=self._flip_rate(),
        )

    def _seal(self, run: dpo.DPORun, result: dpo.TrainingResult) -> Adapter:
        """The adapter where it stays, under the name that it is served by."""
        return seal(
            result.adapter_dir,
            self.retrain.adapters_dir,
            base_served=self.base_served,
            run_number=self.run.number,
            max_rank=self.settings.engine.max_lora_rank,
            provenance=self._provenance(run, result),
            layers=linear_layers(self.base),
            fingerprint=take_fingerprint(
                self.base,
                result.adapter_dir,
                self._parent_path(),
                dtype=self.retrain.training.dtype,
                tolerance=self.retrain.fingerprint_tolerance,
            ),
        )

    def _provenance(self, run: dpo.DPORun, result: dpo.TrainingResult) -> Provenance:
        return Provenance(
            base=run.serving_base,
            base_sha=base_fingerprint(self.base),
            parent=self._manifest("mine")["parent"],
            run=self.run.id,
            dataset_sha=self._manifest("build")["sha256"],
            libraries=result.libraries,
            tokenizer_sha=preflight.tokenizer_fingerprint(AutoTokenizer.from_pretrained(self.base)),
            incremental=record_of(self._plan(), self.retrain.reference, self._drift(result.adapter_dir)),
        )

    def _register(self, mined: Manifest, trained: Manifest) -> Adapter:
        adapter = verify_adapter(Path(trained["path"]), self.settings.engine.max_lora_rank)
        self.candidate = adapter.name
        now = self.inputs.now()
        registry.register_model(
            self.database,
            Model(
                name=adapter.name,
                alias=self.run.alias,
                base=self.base_served,
                parent=mined["parent"],
                run_id=self.run.id,
                path=str(adapter.path),
                sha256=adapter.sha256,
                dataset_sha=str(adapter.manifest["dataset_sha"]),
                state=ModelState.CANDIDATE,
                manifest=adapter.manifest,
                created_at=now,
                updated_at=now,
            ),
        )
        return adapter

    def _load(self, engines: Sequence[Engine], mined: Manifest, adapter: Adapter) -> None:
        """Put both contenders into the engines; the parent may be missing from one that was restarted."""
        if mined["parent_path"]:
            load_verified(engines, mined["parent"], Path(mined["parent_path"]), self.base_served)
        self._prove(engines, adapter)

    def _prove(self, engines: Sequence[Engine], adapter: Adapter) -> None:
        rank, sha256 = self.settings.engine.max_lora_rank, adapter.sha256
        load_verified(engines, adapter.name, adapter.path, self.base_served, max_rank=rank, sha256=sha256)

    def _evaluate(self, directory: Path) -> Manifest:
        mined, trained = self._manifest("mine"), self._manifest("train")
        holdout = self._holdout()
        parent = Contender(mined["parent"], self._parent_path())
        contenders = parent, Contender(trained["model"], Path(trained["path"]))
        plan = plan_of(self.settings, self.run.alias, (self.base, self.base_served), contenders, holdout)
        found = examine(self.settings, plan, holdout, self.inputs.score_toxicity, directory)
        (directory / "measurements.json").write_text(to_json(found.measurements))
        with alone_in(self.directory):
            _write_lines(directory / "answers.jsonl", found.answers)
        return {"n_answers": len(found.answers), "n_holdout": len(holdout)}

    def _gate(self, _directory: Path) -> Manifest:
        measurements = from_json((self.directory / "evaluate" / "measurements.json").read_text())
        report = judge(measurements, self.retrain.gate)
        write_page(self.directory, report, measurements, self.retrain)
        passed = report.verdict == Verdict.PASS
        overruled = self.options.publish_despite_gate and not passed
        return {"report": report_as_dict(report), "is_published": passed or overruled, "is_overruled": overruled}

    def _publish(self, engines: Sequence[Engine], adapter: Adapter) -> Manifest:
        """Again, on every replica: one may have been restarted since the evaluation."""
        self._prove(engines, adapter)
        return {"model": adapter.name, "engines": [engine.url for engine in engines]}

    def _canary(self, adapter: Adapter) -> Manifest:
        """Safe to repeat: a round may have been killed after the rollout was opened, even after it ended.

        Which pairs it used is known before: whoever promotes it marks them, though the round has not ended.
        """
        self._record("canary", RunStatus.RUNNING, {"new_pair_ids": self._new_pair_ids()})
        try:
            rollout = self.inputs.open_canary(adapter.name) if self.inputs.open_canary else None
        except CanaryTaken as exc:
            log.warning("canary_waits", model=adapter.name, reason=str(exc))
            return {"rollout_id": None, "waits": str(exc)}
        is_fresh = registry.get_model(self.database, adapter.name).state == ModelState.CANDIDATE
        if rollout is not None and is_fresh:
            registry.set_state(self.database, adapter.name, ModelState.CHALLENGER, now=self.inputs.now())
        return {"rollout_id": rollout}

    def _reject(self, engines: Sequence[Engine], gate: Manifest) -> RunOutcome:
        name = self._manifest("train")["model"]
        self._reject_candidate(name)
        if registry.get_model(self.database, name).state == ModelState.REJECTED:
            unload_everywhere(engines, name)
        return self._finish(_STATUS[Verdict(gate["report"]["verdict"])])

    def _beginning(self) -> tuple[dict[str, str | None], dict[str, Any]]:
        """The model to go on from: the one asked for, else the champion, else the base; and how."""
        asked = self.options.parent
        model = registry.get_model(self.database, asked) if asked and asked != self.base_served else None
        if asked is None:
            model = registry.promoted(self.database, self.run.alias)
        plan = begin(self.database, model, self.retrain.rebase)
        if model is None:
            return {"parent": self.base_served, "parent_path": None}, plan
        return {"parent": model.name, "parent_path": model.path}, plan

    def _plan(self) -> Plan:
        mined = self._manifest("mine")
        return read_plan(mined.get("plan"), has_parent=bool(mined.get("parent_path")))

    def _parent_path(self) -> Path | None:
        """The adapter that the candidate is compared with; None for the base."""
        path = self._manifest("mine")["parent_path"]
        return Path(path) if path else None

    def _continued(self) -> Path | None:
        """The adapter that the new one starts as; the parent may have one that is left behind."""
        return Path(self._manifest("mine")["parent_path"]) if self._plan().start == Start.CONTINUE else None

    def _drift(self, adapter: Path) -> Drift | None:
        """From the base, on the original hold-out; on what users said where there is none."""
        holdout, training = self._holdout(), self.retrain.training
        pairs = [pair for pair in holdout if pair.source == Origin.ORIGINAL] or holdout
        if not pairs:
            return None
        lengths = {"max_length": training.max_length, "batch_size": training.batch_size}
        return measure_drift(self.base, adapter, pairs, dtype=training.dtype, **lengths)

    def _split_originals(self, originals: Sequence[TrainingExample]) -> OriginalSplit:
        share, similarity = self.retrain.original_holdout_share, self.retrain.holdout_similarity
        return split_originals(originals, share=share, seed=self.retrain.seed, similarity=similarity)

    def _mix(self, start: str) -> MixSettings:
        return self.options.mix or (self.retrain.rebase.mix if start == Start.REBASE else self.retrain.mix)

    def _originals(self) -> list[TrainingExample]:
        path = self.retrain.original_preferences
        return parse_originals(path.read_text().split("\n")) if path else []

    def _pairs(self, name: str) -> list[PreferencePair]:
        return [_pair(row) for row in _read_lines(self.directory / "mine" / f"{name}.jsonl")]

    def _holdout(self) -> list[PreferencePair]:
        return [_pair(row) for row in _read_lines(self.directory / "build" / "holdout.jsonl")]

    def _examples(self) -> list[TrainingExample]:
        return [_example(row) for row in _read_lines(self.directory / "build" / "training.jsonl")]

    @contextmanager
    def _engines(self) -> Iterator[list[Engine]]:
        urls = self.settings.serving.models[self.run.alias].engines
        engines: list[Engine] = [_OwnEngine(url, self._check_lease) for url in urls]
        try:
            yield engines
        finally:
            for engine in engines:
                engine.close()

    def _once(self, name: str, work: Callable[[Path], Manifest], *, keeps_part: bool = False) -> Manifest:
        self._enter(name)
        self._check_record(name)
        started = time.monotonic()
        terms = Terms(self.run.epoch, keeps_part, self._check_lease, self.inputs.may_be_erased)
        manifest = once(self.directory / name, work, terms)
        self._note(name, manifest, time.monotonic() - started)
        return manifest

    def _once_alone(self, name: str, work: Callable[[Path], Manifest]) -> Manifest:
        """A step that copies pairs: who is erased meanwhile waits for the copy, or is taken out of it afterwards."""
        with alone_in(self.directory):
            manifest = self._once(name, work)
        self.inputs.forget(self.directory)
        return manifest

    def _check_record(self, name: str) -> None:
        """A finished step's manifest says what the run's record remembers of it: files prove only what it names."""
        recorded = self.run.detail.get("steps", {}).get(name)
        manifest = done(self.directory / name)
        if recorded and manifest is not None and digest_of(manifest) != recorded["sha256"]:
            directory = self.directory / name
            raise BadData(f"{directory / MANIFEST} is not the manifest that the step left; {remedy(directory)}")

    def _note(self, name: str, manifest: Manifest, seconds: float) -> None:
        """Remember that a step is done; one that is found done keeps the time it took then."""
        steps: dict[str, Any] = dict(self.run.detail.get("steps", {}))
        digest = digest_of(manifest)
        if steps.get(name, {}).get("sha256") != digest:
            did = what_it_did(name, manifest)
            steps[name] = {"did": did, "sha256": digest, "seconds": round(seconds, 3), "at": self.inputs.now()}
            self._record(name, RunStatus.RUNNING, {"steps": steps})

    def _check_lease(self) -> None:
        """Raises `StaleWrite` where the database is fenced and another process has the lease: it refuses any write."""
        with self.database.write():
            pass

    def _watched(self, report: Report) -> Report:
        """The same, and a training that has lost its lease stops."""
        checked = time.monotonic()

        def watched(logged: LoggedStep) -> None:
            nonlocal checked
            if time.monotonic() - checked >= LEASE_CHECK_S:
                self._check_lease()
                checked = time.monotonic()
            report(logged)

        return watched

    def _enter(self, step: str) -> None:
        self._record(step, RunStatus.RUNNING, {"note": self.options.note} if self.options.note else {})

    def _manifest(self, step: str) -> Manifest:
        return done(self.directory / step) or {}

    def _record(self, step: str, status: RunStatus, detail: Mapping[str, Any]) -> None:
        self.run = registry.update_run(
            self.database, self.run, now=self.inputs.now(), step=step, status=status, detail=detail
        )

    def _finish(self, status: RunStatus) -> RunOutcome:
        self.inputs.forget(self.directory)
        outcome = self._outcome(status)
        detail = {
            "error": None,
            "model": outcome.model,
            "parent": outcome.parent,
            "gate": outcome.gate,
            "rollout_id": outcome.rollout_id,
            "reason": outcome.reason,
            "new_pair_ids": list(outcome.new_pair_ids),
        }
        self._record(self.run.step, status, detail)
        return outcome

    def _new_pair_ids(self) -> list[str]:
        """The new pairs of the training set."""
        built = set(self._manifest("build").get("pair_ids", ()))
        return [pair.id for pair in self._pairs("new") if pair.id in built]

    def _outcome(self, status: RunStatus) -> RunOutcome:
        mined, gate, canary = (self._manifest(step) for step in ("mine", "gate", "canary"))
        report = gate.get("report")
        return RunOutcome(
            run_id=self.run.id,
            status=status,
            model=self._manifest("train").get("model"),
            parent=str(mined.get("parent", "")),
            directory=self.directory,
            new_pair_ids=tuple(self._new_pair_ids()),
            gate=report,
            rollout_id=canary.get("rollout_id"),
            reason=self._why_given_up() or _reason(status, mined, gate, canary),
        )

    def _why_given_up(self) -> str:
        return str(self.run.detail["reason"]) if self.run.status == RunStatus.GIVEN_UP else ""


def _reason(status: RunStatus, mined: Manifest, gate: Manifest, canary: Manifest) -> str:
    if status == RunStatus.SKIPPED:
        return f"{mined['n_new']} new pairs are too few to train on; {mined['min_pairs']} are needed"
    reasons = "; ".join(gate.get("report", {}).get("reasons", ()))
    verdict = f"published against the gate: {reasons}" if gate.get("is_overruled") else reasons or "every check passed"
    return f"{verdict}; no canary was opened: {canary['waits']}" if canary.get("waits") else verdict


def _write_lines(path: Path, records: Iterable[Any]) -> int:
    """Returns how many there were: of pairs that stream by, some may be erased after they were named."""
    write_whole(path, (canonical_json(asdict(record)) + "\n" for record in records))
    with path.open() as file:
        return sum(1 for _ in file)


def _read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _pair(row: Mapping[str, Any]) -> PreferencePair:
    names = [name for name in ("prompt", "principals", "models", "tools") if row.get(name) is not None]
    return PreferencePair(**{**row, **{name: tuple(row[name]) for name in names}})


def _example(row: Mapping[str, Any]) -> TrainingExample:
    lists = {name: tuple(row[name]) for name in ("prompt", "tools") if row.get(name) is not None}
    return TrainingExample(**{**row, "origin": Origin(row["origin"]), **lists})
