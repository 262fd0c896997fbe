"""How long until a rollback has reached every gateway, and what happens when the controller or the database is gone?

    python -m bench.rollback [--rollbacks 200] [--gateways 3]

Several `pawl serve`, each a machine of its own but for the PostgreSQL that they share, before one stand-in for vLLM.
Users who are known to be in the treatment ask each gateway without a pause. Over and over a canary goes out and is
rolled back at a moment of chance; what counts is when each gateway last answered as the candidate, from the moment the
order was given (its transaction is a part of the time). Then, with users of both variants on the same gateways:

- the worker that holds the lease is killed (SIGKILL): the weights stay where they are, and the next worker takes over;
- a leader is stopped (SIGSTOP) in the middle of a tick that rolls back, after it has read and before it writes, and
  another takes the lease: when the first wakes it changes nothing;
- PostgreSQL is stopped: every gateway goes on with the last known weights, and obeys again when it is back.

Exits 1 unless a rollback has reached all gateways within a second at the 99th percentile, and all three hold.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import sqlalchemy as sa
import yaml
from rich.console import Console
from rich.table import Table

from ab_testing.assignment import assign
from ab_testing.controller import Controller, start_rollout
from ab_testing.experiment import CONTROL, TREATMENT, Route
from ab_testing.rollout_store import DecisionRecord, Rollout, get_rollout, list_decisions
from ab_testing.route_store import load_route
from bench.askers import PAUSE_S, Asker, asking
from bench.stopped_leader import REFUSED
from feedback.interactions import Status
from pawl import leases
from pawl.clock import now
from pawl.database import Database, open_database
from pawl.logs import configure_logging
from pawl.settings import DatabaseSettings, LogSettings, RolloutSettings
from serving.children import ending_with_parent
from tests.fake_vllm import FakeVLLM
from tests.gateway_configuration import configuration_of, make_schema
from tests.pawl.records import save, served
from tests.servers import PostgreSQL, free_port, private_postgresql, running
from tests.serving.gateway_process import GatewayProcess
from tests.serving.waiting import eventually

REPORT = Path("var/bench/rollback.json")
ALIAS, CHAMPION, CANDIDATE = "assistant", "base-model", "base-model--r0001-1a2b3c4d"
LEASE = f"rollout/{ALIAS}"
RULES = RolloutSettings(steps=[0.5], min_users=[1_000_000], tick_s=0.3)
"""Half of all users see the candidate, and no evidence is ever enough: people order what happens here."""
LEASE_S = 2.0
LONGEST_S = 1.0
"""The 99th percentile has to be below this."""
PATIENCE_S = 60.0
POLL_S = 0.5
"""How often a gateway reads its routes, by default: orders come at any moment between two looks."""
WATCH_S = 5.0
"""How long users are watched while something is gone."""
BOTH = (TREATMENT, CONTROL)
PERCENTILES: Mapping[str, float] = {"p50": 0.5, "p99": 0.99, "max": 1.0}
N_USERS = 8
"""Of each variant."""
SURE = 5
"""Answers in a row by which a gateway is known to have changed."""
N_FAILED = 600
"""Requests of the canary that failed: enough for the breaker, whatever else was answered in that minute."""


class Reached(NamedTuple):
    """One rollback at one gateway."""

    gateway: int
    seconds: float
    """Until the candidate's last answer came, from the order."""


class Held(NamedTuple):
    """Whether the weights stayed where they were while something was gone."""

    what: str
    is_right: bool
    says: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was found."""

    gateways: int
    rollbacks: int
    reached: tuple[Reached, ...]
    """Rollback by rollback, of each the gateways in their order."""
    held: tuple[Held, ...]
    failures: int
    """Requests without an answer while nothing was taken away."""

    def percentile(self, share: float, gateway: int | None = None) -> float:
        """Seconds until one gateway had obeyed, or the last of all."""
        times = np.array([one.seconds for one in self.reached]).reshape(-1, self.gateways)
        of_each = times.max(axis=1) if gateway is None else times[:, gateway]
        return float(np.quantile(of_each, share, method="higher"))

    @property
    def is_faultless(self) -> bool:
        return self.percentile(0.99) < LONGEST_S and not self.failures and all(one.is_right for one in self.held)


class Stage:
    """Gateways before one engine and one database, somebody who asks each of them, and the rollouts."""

    def __init__(
        self, directory: Path, server: PostgreSQL, engine_url: str, n_gateways: int, pause_s: float = PAUSE_S
    ) -> None:
        self.server = server
        url = server.create_database("rollback")
        make_schema(DatabaseSettings(url=url))
        self.database: Database = open_database(DatabaseSettings(url=url))
        configurations = [
            {**configuration_of(directory / f"gateway-{number}", engine_url), "database": {"url": url}}
            for number in range(n_gateways)
        ]
        self.gateways = [GatewayProcess(directory / f"gateway-{n}", one) for n, one in enumerate(configurations)]
        self.askers = [Asker(gateway.url, ALIAS, pause_s) for gateway in self.gateways]
        self.controller = Controller(self.database, clock=now)
        self._configuration = configurations[0]
        self.worker_config = directory / "worker.yaml"
        self.worker_log = directory / "worker.log"
        self.write_worker_config()

    def write_worker_config(self) -> None:
        """With a port that nobody had before."""
        configuration = worker_configuration(self._configuration, self.worker_config.parent)
        self.worker_config.write_text(yaml.safe_dump(configuration))

    def start(self) -> None:
        with ThreadPoolExecutor() as pool:
            list(pool.map(GatewayProcess.start, self.gateways))

    def close(self) -> None:
        for gateway in self.gateways:
            gateway.close()
        self.database.close()

    @property
    def epoch(self) -> int:
        return leases.epoch_of(self.database, LEASE)

    @property
    def route(self) -> Route:
        return load_route(self.database, ALIAS) or Route(ALIAS, 0, CHAMPION)

    def send_out(self, variants: Sequence[str]) -> Rollout:
        """Start a canary; users of these variants ask, and every gateway answers each of them as it should."""
        rollout = start_rollout(self.database, RULES, self.route, CANDIDATE, now=now(), epoch=self.epoch)
        users = users_of(self.route, variants)
        self.expect(users)
        # Twice each: a gateway that still obeys the rollout before this one has other users in the treatment.
        self.wait_until_all(lambda asker: asker.n_as_expected >= 2 * len(users))
        self.expect(users)
        return rollout

    def expect(self, users: Mapping[str, str]) -> None:
        for asker in self.askers:
            asker.expect(users)

    def roll_back(self) -> tuple[Reached, ...]:
        """Order it, and see when each gateway has obeyed."""
        ordered = time.monotonic()
        self.controller.act(ALIAS, "roll_back", "to see how long it takes", actor="operator:bench", epoch=self.epoch)
        self.wait_until_all(has_changed)
        last = [asker.seen_at.get(TREATMENT, ordered) for asker in self.askers]
        return tuple(Reached(number, max(at - ordered, 0.0)) for number, at in enumerate(last))

    def wait_until_all(self, is_so: Callable[[Asker], bool]) -> None:
        eventually(lambda: all(map(is_so, self.askers)), within_s=PATIENCE_S)

    def watch(self, seconds: float) -> str:
        """What was not as it should be while users of both variants asked for so long; empty when all was."""
        for asker in self.askers:
            asker.start_again()
        time.sleep(seconds)
        self.wait_until_all(lambda asker: asker.n_answers + len(asker.failures) >= SURE)
        wrong = sum(asker.n_unexpected for asker in self.askers)
        failed = [failure for asker in self.askers for failure in asker.failures]
        return f"{wrong} answers by the wrong variant, failures {failed[:3]}" if wrong or failed else ""

    def rows(self, rollout: Rollout) -> tuple[Rollout, list[DecisionRecord], Route]:
        """All that a leader may change."""
        return get_rollout(self.database, rollout.id), list_decisions(self.database, rollout.id), self.route


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print, write; 1 when a rollback took too long or something moved that had to stay."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollbacks", type=int, default=200)
    parser.add_argument("--gateways", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1, help="of the moments of the orders")
    parser.add_argument("--out", type=Path, default=REPORT)
    options = parser.parse_args(arguments)
    configure_logging(LogSettings(level="error"))
    outcome = run(options.gateways, options.rollbacks, options.seed)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report_of(outcome), indent=1) + "\n")
    print_outcome(outcome)
    return 0 if outcome.is_faultless else 1


def run(n_gateways: int, n_rollbacks: int, seed: int, *, watch_s: float = WATCH_S) -> Outcome:
    """Start everything, roll back so often, then take away what a canary needs."""
    with staged(n_gateways) as stage:
        rng = random.Random(seed)
        reached: list[Reached] = []
        failures = 0
        for _ in range(n_rollbacks):
            stage.send_out([TREATMENT])
            time.sleep(rng.uniform(0, POLL_S))
            reached += stage.roll_back()
            failures += sum(len(asker.failures) for asker in stage.askers)
            stage.expect({})
        held = (dead_controller(stage, watch_s), stopped_leader(stage), absent_database(stage, watch_s))
    return Outcome(n_gateways, n_rollbacks, tuple(reached), held, failures)


@contextmanager
def staged(n_gateways: int, pause_s: float = PAUSE_S) -> Iterator[Stage]:
    """Everything that runs, for as long as the block lasts."""
    engine = FakeVLLM(CHAMPION)
    engine.adapters[CANDIDATE] = "somewhere"
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pawl-rollback-")))
        server = stack.enter_context(private_postgresql())
        stage = Stage(directory, server, stack.enter_context(running(engine.app)), n_gateways, pause_s)
        stack.callback(stage.close)
        stage.start()
        stack.enter_context(asking(stage.askers))
        yield stage


def dead_controller(stage: Stage, watch_s: float, *, has_successor: bool = True) -> Held:
    """Kill the worker that has the lease; then let another come."""
    rollout = stage.send_out(BOTH)
    with worker(stage) as leader:
        holder = wait_for_leader(stage, leader, None)
        leader.kill()
        leader.wait(PATIENCE_S)
    route = stage.route
    problem = stage.watch(max(watch_s, LEASE_S))
    problem = problem or ("" if stage.route == route else "its route changed")
    if has_successor:
        with worker(stage) as successor:
            wait_for_leader(stage, successor, holder)
            problem = problem or stage.watch(RULES.tick_s * 3)
        is_as_before = stage.route == route and get_rollout(stage.database, rollout.id).state.step == 0
        problem = problem or ("" if is_as_before else "the next worker moved the weights")
    stage.roll_back()
    stage.expect({})
    return Held("the worker with the lease is killed", not problem, problem or "the weights stayed where they were")


def wait_for_leader(stage: Stage, process: subprocess.Popen[bytes], before: str | None) -> str:
    """Who holds the lease, once it is somebody else than before."""

    def look() -> str | None:
        assert process.poll() is None, stage.worker_log.read_text()[-2000:]
        holder = leases.holding(stage.database, LEASE, now())
        return holder if holder != before else None

    return eventually(look, within_s=PATIENCE_S)


def stopped_leader(stage: Stage) -> Held:
    """Stop a leader between reading and writing; another takes over; then wake it."""
    rollout = stage.send_out(BOTH)
    stage.expect({})
    let_the_canary_fail(stage, rollout)
    command = [sys.executable, "-m", "bench.stopped_leader", str(stage.worker_config), ALIAS, str(LEASE_S)]
    sleeper = subprocess.Popen(command, preexec_fn=ending_with_parent(), stdout=subprocess.PIPE, text=True)
    try:
        eventually(lambda: is_stopped(sleeper.pid) or sleeper.poll() is not None, within_s=PATIENCE_S)
        epoch = eventually(lambda: take_over(stage), within_s=PATIENCE_S)
        before = stage.rows(rollout)
        sleeper.send_signal(signal.SIGCONT)
        said, _ = sleeper.communicate(timeout=PATIENCE_S)
    finally:
        sleeper.kill()  # A stopped process obeys nothing else.
    problem = "" if sleeper.returncode == REFUSED else f"it was not refused, but {said.strip()}"
    problem = problem or ("" if stage.rows(rollout) == before else "it changed something")
    stage.expect(users_of(before[2], BOTH))
    problem = problem or stage.watch(POLL_S)
    stage.expect({})
    # That its tick had something to write: the new leader's, of the same records, rolls back.
    tick = Controller(stage.database, clock=now).tick(ALIAS, epoch=epoch)
    if tick is None or tick.decision.verdict != "roll_back":
        problem = problem or "there was nothing to decide"
    return Held("a leader stopped in the middle of a tick wakes", not problem, problem or said.strip())


def absent_database(stage: Stage, watch_s: float) -> Held:
    """Stop PostgreSQL, start it again, and roll back."""
    stage.send_out(BOTH)
    stage.server.stop()
    try:
        problem = stage.watch(watch_s)
    finally:
        stage.server.start()
    answered = sum(asker.n_answers for asker in stage.askers)
    eventually(lambda: can_be_read(stage), within_s=PATIENCE_S)
    slowest = max(one.seconds for one in stage.roll_back())
    stage.expect({})
    says = f"{answered} answers by the last known weights; then a rollback reached all in {slowest:.2f} s"
    return Held("PostgreSQL is stopped", not problem, problem or says)


@contextmanager
def worker(stage: Stage) -> Iterator[subprocess.Popen[bytes]]:
    """A `pawl worker`, killed at the end if it still runs."""
    stage.write_worker_config()
    with stage.worker_log.open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "pawl.cli.main", "worker"],
            env={**os.environ, "PAWL_CONFIG": str(stage.worker_config)},
            stdout=log,
            stderr=subprocess.STDOUT,
            preexec_fn=ending_with_parent(),
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait(PATIENCE_S)


def worker_configuration(gateway: Mapping[str, Any], directory: Path) -> dict[str, Any]:
    """A worker's beside these gateways; it has no scorer, which nothing here needs."""
    scoring = {"toxicity_checkpoint": str(directory / "no-scorer.ckpt"), "toxicity_config_dir": str(directory)}
    own = {"metrics_port": free_port(), "lease_s": LEASE_S, "scoring": scoring}
    return {**gateway, "worker": own, "rollout": {"tick_s": RULES.tick_s}}


def users_of(route: Route, variants: Sequence[str]) -> dict[str, str]:
    """Some users of each of these variants, who take turns."""
    by_variant: dict[str, list[str]] = {variant: [] for variant in variants}
    for name in (f"user-{number}" for number in count()):
        of_user = by_variant.get(assign(route, name).variant, [])
        if len(of_user) < N_USERS:
            of_user.append(name)
        if all(len(users) >= N_USERS for users in by_variant.values()):
            break
    turns = zip(*by_variant.values(), strict=True)
    return {user: variant for turn in turns for user, variant in zip(turn, by_variant, strict=True)}


def has_changed(asker: Asker) -> bool:
    """Whether a gateway is done with the candidate."""
    is_sure = asker.n_since_change >= SURE
    return is_sure and asker.seen_at.get(CONTROL, 0.0) > asker.seen_at.get(TREATMENT, 0.0)


def let_the_canary_fail(stage: Stage, rollout: Rollout) -> None:
    """Records by which the breaker has to roll back."""
    failed = [
        served(
            10_000 + number,
            created_at=now(),
            unit_id=f"failed-{number}",
            experiment=rollout.id,
            assigned_variant=TREATMENT,
            served_variant=TREATMENT,
            probability=0.5,
            is_analysed=True,
            model=CANDIDATE,
            status=Status.UPSTREAM_ERROR,
        )
        for number in range(N_FAILED)
    ]
    save(stage.database, failed)


def take_over(stage: Stage) -> int | None:
    """The lease for somebody else, once it has run out."""
    return leases.acquire(stage.database, LEASE, "another leader", ttl_s=PATIENCE_S, now=now())


def is_stopped(pid: int) -> bool:
    """Whether a process sleeps since a SIGSTOP."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def can_be_read(stage: Stage) -> bool:
    """Whether the database answers again."""
    try:
        return stage.route.experiment is not None
    except sa.exc.SQLAlchemyError:
        return False


def report_of(outcome: Outcome) -> dict[str, Any]:
    """For programs."""
    overall = {name: outcome.percentile(share) for name, share in PERCENTILES.items()}
    return {**asdict(outcome), "percentiles": overall, "is_faultless": outcome.is_faultless}


def print_outcome(outcome: Outcome) -> None:
    """For people."""
    table = Table("gateway", "rollbacks", *PERCENTILES, box=None, header_style="bold")
    for gateway in (*range(outcome.gateways), None):
        times = (f"{outcome.percentile(share, gateway):.3f} s" for share in PERCENTILES.values())
        table.add_row("all" if gateway is None else str(gateway + 1), str(outcome.rollbacks), *times)
    console = Console(width=160)
    console.print(table)
    console.print(f"{outcome.failures} requests without an answer")
    for one in outcome.held:
        console.print(f"{one.what}: {'as it should be' if one.is_right else 'WRONG'}: {one.says}")


if __name__ == "__main__":
    sys.exit(main())
