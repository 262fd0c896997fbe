"""`pawl demo`: one full turn of the wheel on real parts, with simulated users and a report.

The story: feedback alone teaches the model to stop refusing harmful requests, and the gate stops that adapter; with the
filter on refusals back on and the original preferences mixed back in the next one passes, goes out as a canary and
wins; a second round continues from it; an adapter trained on the opposite of what people preferred is forced past the
gate, and the canary rolls it back.
"""

from __future__ import annotations

import asyncio
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx2
import psutil
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from ab_testing.canary import weight_of
from ab_testing.controller import Controller, start_rollout
from ab_testing.experiment import Route
from ab_testing.rollout_store import Rollout, get_rollout, running_rollout
from ab_testing.route_store import load_route
from feedback.mining import Mined, mine_alias
from feedback.pair_stream import PairsById
from feedback.selection import Selected
from monitoring.scoring import ScoreToxicity
from monitoring.toxicity import ToxicityScorer, load_scorer
from pawl import clock, leases, registry
from pawl.database import Database, open_database
from pawl.errors import PawlError
from pawl.settings import MixSettings, Settings
from practice.evidence import Period, count_unscored
from practice.report import DemoRecord, RoundRecord, check_story, write_report
from practice.traffic import TrafficCount, Visit, send_users
from practice.users import population
from practice.world import ALIAS, as_people_say_it, at_full_rate, practice_settings, prepare
from retrain.pipeline import RoundInputs, RoundOptions, RunOutcome, run_round
from retrain.progress import Report, ignore, reporting
from serving.engine_process import has_gpu
from serving.stack import Stack

CONCURRENCY = 24
ROLLOUT_LEASE = f"rollout/{ALIAS}"
COLLECT_USERS = 900
QUESTIONS_EACH = 2
MOST_CANARY_USERS = 9000
SECOND_CANARY_S = 30.0
"""How long the second round's canary is shown; two good models take far longer to tell apart than a demo has."""
SCORES_S = 90.0
MEMORY_POLL_S = 2.0
ROLLOUT = {
    "min_dwell_s": 2.0,
    "maturity_s": 3.0,
    "tick_s": 0.5,
    "min_users": [4, 15, 40],
    "harm_budget": 0.05,
    "harmful_compliance_margin": 0.05,
    "toxicity_margin": 0.05,
    "auto_start": True,
}
"""A canary in a minute: outcomes mature in seconds, since simulated users rate at once."""
ONLY_NEW = MixSettings(new=1.0, original=0.0, earlier=0.0)
REPLAY = MixSettings(new=0.5, original=0.5, earlier=0.0)


Select = Callable[[Database, Settings, str, ScoreToxicity | None], Selected]
"""What an alias's round may train on by these settings."""


@dataclass
class MemoryWatch:
    """The most memory that the demo and everything it started had in use at once."""

    peak_mb: float = 0.0
    _is_over: threading.Event = field(default_factory=threading.Event)

    def start(self) -> None:
        threading.Thread(target=self._run, daemon=True).start()

    def stop(self) -> None:
        self._is_over.set()

    def _run(self) -> None:
        me = psutil.Process()
        while not self._is_over.wait(MEMORY_POLL_S):
            family = [me, *me.children(recursive=True)]
            self.peak_mb = max(self.peak_mb, sum(_resident_mb(process) for process in family))


def _resident_mb(process: psutil.Process) -> float:
    try:
        return float(process.memory_info().rss) / 2**20
    except psutil.NoSuchProcess:
        return 0.0


class Demo:
    """The stage: settings, the running stack, the database, and the record of what happened."""

    def __init__(
        self, settings: Settings, directory: Path, record: DemoRecord, seed: int, console: Console, select: Select
    ) -> None:
        self.settings = settings
        self._select = select
        self.directory = directory
        self.record = record
        self.console = console
        self.stack = Stack(settings, directory)
        self.database: Database = open_database(settings.database)
        self._next_seed = seed * 1000
        self._scorer: ToxicityScorer | None = None

    @contextmanager
    def step(self, title: str) -> Iterator[None]:
        """One step of the story, announced and timed."""
        self.console.print(f"[bold]{len(self.record.steps) + 1:2}. {title}[/bold]")
        started = time.monotonic()
        yield
        seconds = time.monotonic() - started
        self.record.steps.append((title, seconds))
        self.console.print(f"    [dim]{seconds:.0f} s[/dim]")

    def say(self, text: str) -> None:
        self.console.print(f"    {text}")

    def collect(self, n_users: int) -> tuple[Period, TrafficCount]:
        """Let users ask and rate; wait until everything they did is stored and scored."""
        since = clock.now()
        count = self._send(n_users, QUESTIONS_EACH, "users", lambda: False)
        period = Period(since, clock.now())
        self._wait_for_records(period, count)
        self.say(
            f"{count.users} users, {count.interactions} answers, {count.feedback} ratings, {count.failures} failures"
        )
        return period, count

    def _send(self, n_users: int, questions_each: int, what: str, should_stop: Callable[[], bool]) -> TrafficCount:
        self._next_seed += 1
        users = population(self._next_seed, n_users)
        visit = Visit(self.stack.url, ALIAS, questions_each, self._next_seed)
        columns = (
            TextColumn("    {task.description}"),
            BarColumn(),
            TextColumn("{task.completed}"),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=self.console, transient=True) as bar:
            task = bar.add_task(what, total=n_users)
            return asyncio.run(
                send_users(
                    visit,
                    users,
                    concurrency=CONCURRENCY,
                    should_stop=should_stop,
                    on_user=lambda count: bar.update(task, completed=count.users),
                )
            )

    def _wait_for_records(self, period: Period, count: TrafficCount) -> None:
        until = time.monotonic() + SCORES_S
        while time.monotonic() < until:
            n_stored, n_unscored = count_unscored(self.database, ALIAS, period)
            if n_stored >= count.interactions and n_unscored == 0:
                return
            time.sleep(0.3)
        raise PawlError(
            f"{SCORES_S:g} s after the traffic not every answer is stored and scored: see {self.directory}/logs"
        )

    def mine(self) -> Mined:
        mined = mine_alias(self.database, ALIAS, clock.now())
        sources = ", ".join(f"{n} by {source}" for source, n in sorted(mined.by_source.items()))
        skipped = ", ".join(f"{n} {reason}" for reason, n in sorted(mined.skipped.items()))
        self.say(f"{mined.n_pairs} preference pairs ({sources}); no pair from: {skipped or 'none'}")
        return mined

    def train(
        self, options: RoundOptions, *, selected_by: Settings | None = None, trained_by: Settings | None = None
    ) -> RunOutcome:
        """One retraining round up to its verdict; nothing is rolled out here.

        Args:
            selected_by: other settings than the stage's, for what is selected.
            trained_by: other ones for the round.
        """
        if self._scorer is None:
            scoring = self.settings.worker.scoring
            self._scorer = load_scorer(scoring.toxicity_checkpoint, scoring.toxicity_config_dir)
        score = self._scorer.score
        selected = self._select(self.database, selected_by or self.settings, ALIAS, score)
        left_out = ", ".join(f"{n} {reason}" for reason, n in sorted(selected.left_out.items()))
        self.say(f"{len(selected.new)} new pairs to train on; left out: {left_out or 'none'}")
        with training_shown(self.console) as report:
            inputs = RoundInputs(
                new=PairsById(self.database, selected.new),
                earlier=PairsById(self.database, selected.earlier),
                score_toxicity=score,
                skipped=selected.left_out,
                report=report,
            )
            outcome = run_round(self.database, trained_by or self.settings, ALIAS, inputs, options)
        self.say(f"gate: [bold]{outcome.gate['verdict'] if outcome.gate else 'none'}[/bold]: {outcome.reason}")
        return outcome

    def roll_out(self, candidate: str, most_users: int, most_s: float = 3600.0) -> Rollout:
        """Open the canary and send fresh users until it has decided, or until the limits."""
        route = load_route(self.database, ALIAS) or Route(ALIAS, 0, self.settings.serving.models[ALIAS].champion)
        epoch = leases.epoch_of(self.database, ROLLOUT_LEASE)
        rollout = start_rollout(self.database, self.settings.rollout, route, candidate, now=clock.now(), epoch=epoch)
        registry.set_state(self.database, candidate, registry.ModelState.CHALLENGER, now=clock.now())
        until = time.monotonic() + most_s
        watcher = _Watcher(self.database, rollout.id)
        self._send(most_users, 1, "canary users", lambda: watcher.is_over() or time.monotonic() > until)
        ended = self._settled(rollout.id, most_s)
        self.say(
            f"canary of {candidate}: [bold]{ended.state.status}[/bold] at {weight_of(ended.state, ended.config):.0%}"
        )
        return ended

    def _settled(self, rollout_id: str, most_s: float) -> Rollout:
        """Give the controller the time to count the last users; end what has not decided by hand, and say so."""
        until = time.monotonic() + min(most_s, 15.0)
        while time.monotonic() < until and running_rollout(self.database, ALIAS) is not None:
            time.sleep(0.3)
        if running_rollout(self.database, ALIAS) is not None:
            epoch = leases.epoch_of(self.database, ROLLOUT_LEASE)
            controller = Controller(self.database, clock=clock.now)
            controller.act(ALIAS, "abort", "the demo ends here; nothing was decided", actor="demo", epoch=epoch)
            ended = get_rollout(self.database, rollout_id)
            if ended.state.status == "aborted":
                registry.set_state(self.database, ended.candidate, registry.ModelState.RETIRED, now=clock.now())
        return get_rollout(self.database, rollout_id)


class _Watcher:
    """Asks the database at most twice a second whether a rollout is over."""

    def __init__(self, database: Database, rollout_id: str) -> None:
        self._database = database
        self._rollout_id = rollout_id
        self._next_look = 0.0
        self._is_over = False

    def is_over(self) -> bool:
        if not self._is_over and time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + 0.5
            self._is_over = get_rollout(self._database, self._rollout_id).state.is_final
        return self._is_over


def run_demo(directory: Path, *, seed: int, select: Select) -> list[str]:
    """Play the whole story; write `report.json` and `report.html`; return what did not happen as it should.

    Args:
        select: How `pawl retrain run` finds what to train on.
    """
    console = Console(soft_wrap=True)
    quiet_libraries()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    started = time.monotonic()
    record = DemoRecord()
    memory = MemoryWatch()
    memory.start()
    demo = _set_up(directory, record, seed, console, select)
    broken: list[str] = []
    try:
        _play(demo)
    except PawlError as exc:
        broken.append(str(exc))
    finally:
        demo.stack.stop()
        memory.stop()
    record.seconds = time.monotonic() - started
    record.peak_resident_mb = memory.peak_mb
    problems = broken or check_story(record, demo.database)
    write_report(record, demo.database, demo.settings, directory, problems)
    demo.database.close()
    _summarise(console, record, directory, problems)
    return problems


def _set_up(directory: Path, record: DemoRecord, seed: int, console: Console, select: Select) -> Demo:
    console.print("[bold] 1. Practice model and scorer[/bold] (trained once, then kept)")
    started = time.monotonic()
    model, scorer = prepare(directory.parent / "practice", progress=True)
    record.steps.append(("Practice model and scorer", time.monotonic() - started))
    record.model_parameters, record.model_train_seconds = model.n_parameters, model.train_seconds
    work = fresh_directory(directory)
    first_port = free_ports(3)
    settings = practice_settings(
        model,
        scorer,
        work,
        gateway_port=first_port[0],
        engine_port=first_port[1],
        metrics_port=first_port[2],
        rollout=ROLLOUT,
    )
    return Demo(settings, work, record, seed, console, select)


def _play(demo: Demo) -> None:
    record = demo.record
    with demo.step("Engine, gateway and worker"):
        demo.stack.start()
        record.engine_version = engine_version(demo.stack)
        record.on_gpu = has_gpu()
    with demo.step("Round 1: people use the base model and rate it"):
        before, count = demo.collect(COLLECT_USERS)
        first = RoundRecord(before=before, traffic=count, mined=demo.mine())
        record.rounds.append(first)
    with demo.step("Round 1: an adapter from people's pairs alone"):
        unmixed = RoundOptions(cycle="demo-1-unmixed", mix=ONLY_NEW)
        record.unmixed = demo.train(unmixed, selected_by=as_people_say_it(demo.settings))
    with demo.step("Round 1: an adapter with the original preferences mixed back in"):
        first.outcome = demo.train(RoundOptions(cycle="demo-1", mix=REPLAY))
    if first.outcome.status != registry.RunStatus.PASSED or first.outcome.model is None:
        return
    with demo.step("Round 1: the canary"):
        first.rollout = demo.roll_out(first.outcome.model, MOST_CANARY_USERS)
    with demo.step("Round 2: people use the new model and rate it"):
        after, count = demo.collect(COLLECT_USERS)
        first.after = after
        second = RoundRecord(before=after, traffic=count, mined=demo.mine())
        record.rounds.append(second)
    with demo.step("Round 2: continue from the first adapter"):
        second.outcome = demo.train(RoundOptions(cycle="demo-2"))
    if second.outcome.status == registry.RunStatus.PASSED and second.outcome.model is not None:
        with demo.step("Round 2: the canary, for as long as a demo may last"):
            second.rollout = demo.roll_out(second.outcome.model, MOST_CANARY_USERS, SECOND_CANARY_S)
    with demo.step("Drill: an adapter that learned the opposite, forced past the gate"):
        options = RoundOptions(
            cycle="demo-drill",
            mix=ONLY_NEW,
            force=True,
            swap_preferences=True,
            publish_despite_gate=True,
            note="a drill: trained on swapped preferences to show that the canary catches it",
        )
        record.bad = demo.train(options, trained_by=at_full_rate(demo.settings))
    if record.bad.model is not None:
        with demo.step("Drill: its canary"):
            record.bad_rollout = demo.roll_out(record.bad.model, MOST_CANARY_USERS)


@contextmanager
def training_shown(console: Console) -> Iterator[Report]:
    """A progress bar on a terminal; in a log the figures come with the verdict."""
    if not console.is_terminal:
        yield ignore
        return
    with reporting(sys.stdout) as report:
        yield report


def engine_version(stack: Stack) -> str:
    """What the engine says it is."""
    assert stack.engine is not None
    try:
        return str(httpx2.get(f"{stack.engine.url}/version", timeout=10).json().get("version", "unknown"))
    except httpx2.HTTPError:
        return "unknown"


def fresh_directory(directory: Path) -> Path:
    """A directory of its own for this run's database and files; those of earlier runs go.

    Never a path that was used before: a process left over from an earlier run would share journal files with this one.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for old in directory.glob("run-*"):
        shutil.rmtree(old, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix="run-", dir=directory))


def quiet_libraries() -> None:
    """No bars for loading weights between the steps of the story."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def free_ports(n: int) -> list[int]:
    """Ports that were free a moment ago."""
    probes = [socket.socket() for _ in range(n)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [int(probe.getsockname()[1]) for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def _summarise(console: Console, record: DemoRecord, directory: Path, problems: list[str]) -> None:
    console.print()
    for title, seconds in record.steps:
        console.print(f"  {seconds:6.0f} s  {title}")
    console.print(f"  {record.seconds:6.0f} s  in all, at most {record.peak_resident_mb / 1024:.1f} GiB resident")
    console.print(f"report: {directory / 'report.html'} and {directory / 'report.json'}")
    for problem in problems:
        console.print(f"[red]not as it should be: {problem}[/red]")
    if not problems:
        console.print("[green]the wheel has turned once, and did not slip back[/green]")
