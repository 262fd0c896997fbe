"""Kill a retraining round with SIGKILL at random moments, on both databases, and compare what comes out in the end.

Each moment is a round of its own: a process begins it and is killed, another one takes over and ends it. The weights
must be those of a round that nothing happened to, and nothing else may have been loaded into an engine, registered, or
put before users. The model is a tiny Llama, the engine a fake one that keeps account.

`python -m bench.retrain_kill --kills 30` is the long form.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pawl.database import Database, open_database
from pawl.settings import DatabaseSettings
from retrain.steps import done
from tests.gateway_configuration import make_schema
from tests.retrain.fake_engine import FakeEngine, serving
from tests.retrain.round_process import ALIAS, Published, Scene, begin, end, published, the_run, well_behaved
from tests.retrain.tiny_model import make_model
from tests.servers import PostgreSQL, private_postgresql

REPORT = Path("var/bench/retrain_kill.json")
SHORT_S = 0.5
"""Of the lease of a process that is going to be killed: its successor waits for it."""
OVER = "over"
TRIES = 9
"""To find a moment before the round is over."""
MakeDatabase = Callable[[str, Path], str]
"""Given a name and a directory, makes a database with the schema and returns its URL."""


@dataclass(frozen=True)
class Killed:
    """One round that was killed and brought to its end."""

    database: str
    moment_s: float
    """After the process began."""
    step: str
    """Where it was."""
    resumed_at: int | None
    """The optimiser step that the training went on from, if it did."""
    is_equal: bool
    """The same weights, and the same records, as those of an undisturbed round."""
    orphans: tuple[str, ...]
    """What was loaded, registered or put before users besides the one adapter."""
    seconds: float
    """Until the second process was done."""

    @property
    def is_faultless(self) -> bool:
        return self.is_equal and not self.orphans


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print a table, write the figures; 1 when a round came out otherwise, or an orphan was published."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=3, help="on each database")
    parser.add_argument("--seed", type=int, default=None, help="of the moments; drawn when left out")
    parser.add_argument("--out", type=Path, default=REPORT)
    options = parser.parse_args(arguments)
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(2**32)
    with tempfile.TemporaryDirectory(prefix="pawl-retrain-kill-") as name, private_postgresql() as server:
        found = run(Path(name), makers(server), options.kills, seed)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"seed": seed, "kills": [asdict(one) for one in found]}, indent=2) + "\n")
    print_table(found)
    return 0 if all(one.is_faultless for one in found) else 1


def makers(server: PostgreSQL) -> dict[str, MakeDatabase]:
    """For each kind of database."""

    def sqlite(name: str, directory: Path) -> str:
        return f"sqlite:///{directory / name}.db"

    return {"sqlite": sqlite, "postgresql": lambda name, _: server.create_database(name.replace("-", "_"))}


def run(directory: Path, databases: dict[str, MakeDatabase], kills: int, seed: int) -> list[Killed]:
    base = make_model(directory / "base")
    found: list[Killed] = []
    for kind, make in databases.items():
        rng = random.Random(f"{seed} {kind}")
        with scene_in(directory / f"{kind}-undisturbed", base, make) as (scene, database, _):
            started = time.monotonic()
            end(begin(scene))
            first_s = time.monotonic() - started
            expected = published(database)
        with scene_in(directory / f"{kind}-timed", base, make) as (scene, _, _):
            started = time.monotonic()
            end(begin(scene))  # The first one had to wait for the server of processes.
            whole_s = min(first_s, time.monotonic() - started)
        found += [
            kill_somewhere(f"{kind}-{number}", directory, base, make, expected, rng, whole_s) for number in range(kills)
        ]
    return found


def kill_somewhere(
    name: str,
    directory: Path,
    base: Path,
    make: MakeDatabase,
    expected: Published,
    rng: random.Random,
    whole_s: float,
) -> Killed:
    """At a random moment; another one if the round was over by then."""
    killed: Killed | None = None
    for attempt in range(TRIES):
        with scene_in(directory / f"{name}-{attempt}", base, make) as (scene, database, engine):
            killed = kill_once(name.partition("-")[0], scene, database, engine, expected, rng.uniform(0.0, whole_s))
        print(killed, file=sys.stderr)
        if killed.step != OVER or not killed.is_faultless:
            break
    assert killed is not None
    return killed


@contextmanager
def scene_in(directory: Path, base: Path, make: MakeDatabase) -> Iterator[tuple[Scene, Database, FakeEngine]]:
    """A fresh one, whose files go with it."""
    directory.mkdir()
    url = make(directory.name, directory)
    make_schema(DatabaseSettings(url=url))
    database = open_database(DatabaseSettings(url=url))
    with serving(FakeEngine(answer=well_behaved)) as engine:
        yield Scene(directory, url, base, engine.url), database, engine
    database.close()
    shutil.rmtree(directory)


def kill_once(
    kind: str, scene: Scene, database: Database, engine: FakeEngine, expected: Published, moment_s: float
) -> Killed:
    started = time.monotonic()
    first = begin(replace(scene, ttl_s=SHORT_S))
    time.sleep(moment_s)
    first.kill()
    code = end(first)
    step = place_of(database, scene.directory) if code == -signal.SIGKILL else OVER
    second = end(begin(scene))
    final = published(database)
    train = done(scene.directory / "runs" / "r0001" / "train") or {}
    return Killed(
        database=kind,
        moment_s=round(moment_s, 3),
        step=step,
        resumed_at=train.get("result", {}).get("resumed_at"),
        is_equal=second == 0 and final == expected,
        orphans=orphans(final, engine, expected),
        seconds=round(time.monotonic() - started, 2),
    )


def place_of(database: Database, directory: Path) -> str:
    """The step in which the round was killed."""
    run = the_run(database)
    if run is None:
        return "before the run"
    is_done = (directory / "runs" / run.id / run.step / "manifest.json").exists()
    return f"after {run.step}" if is_done else run.step or "before the run"


def orphans(final: Published, engine: FakeEngine, expected: Published) -> tuple[str, ...]:
    """Names that are not the one that was to be published."""
    ours = {name for name, _, _ in expected.models}
    seen = {*engine.loads, *engine.adapters, *final.rollouts, *(name for name, _, _ in final.models)}
    doubled = tuple(f"second rollout of {ALIAS}" for _ in final.rollouts[1:])
    return tuple(sorted(seen - ours)) + doubled


def print_table(found: Sequence[Killed]) -> None:
    """What happened where, and what came of it."""
    columns = (
        "database",
        "killed at",
        "rounds",
        "weights and records equal",
        "training resumed at",
        "orphans published",
    )
    table = Table(*columns, box=None, header_style="bold")
    for place in sorted({(one.database, one.step) for one in found}):
        here = [one for one in found if (one.database, one.step) == place]
        resumed = sorted({one.resumed_at for one in here if one.resumed_at is not None})
        n_equal, n_orphans = sum(one.is_equal for one in here), sum(len(one.orphans) for one in here)
        told = ", ".join(map(str, resumed)) or "-"
        table.add_row(*place, str(len(here)), f"{n_equal} of {len(here)}", told, str(n_orphans))
    Console().print(table)
    n_equal, n_orphans = sum(one.is_equal for one in found), sum(len(one.orphans) for one in found)
    print(f"{n_equal} of {len(found)} rounds ended as the undisturbed one; {n_orphans} orphans were published")


if __name__ == "__main__":
    sys.exit(main())
