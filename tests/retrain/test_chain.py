"""Rounds that are killed, frozen and raced by others, as real processes on both databases."""

from __future__ import annotations

import os
import shutil
import signal
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from pawl import clock, leases
from pawl.database import Database, open_database
from pawl.registry import ModelState
from pawl.settings import DatabaseSettings
from retrain.adapters import verify_adapter
from retrain.steps import PART, sha256_of
from tests.retrain.fake_engine import FakeEngine, serving
from tests.retrain.round_process import (
    LEASE,
    STALE_EXIT,
    Published,
    Scene,
    begin,
    end,
    is_stopped,
    published,
    well_behaved,
)
from tests.serving.waiting import eventually

SHORT_S = 1.0
"""Of a lease that is to run out."""
PATIENCE_S = 120.0
MakeScene = Callable[[str], tuple[Scene, Database]]


@pytest.fixture
def fake() -> Iterator[FakeEngine]:
    with serving(FakeEngine(answer=well_behaved)) as engine:
        yield engine


@pytest.fixture
def make_scene(
    request: pytest.FixtureRequest, tmp_path: Path, tiny_base: Path, fake: FakeEngine
) -> Iterator[MakeScene]:
    """A scene with a fresh database of the kind that is asked for."""
    opened: list[Database] = []

    def make(kind: str) -> tuple[Scene, Database]:
        if kind == "postgresql":
            server = request.getfixturevalue("postgresql")
            template = request.getfixturevalue("postgresql_template")
            url = server.create_database(f"test_{uuid.uuid4().hex}", template)
        else:
            shutil.copyfile(request.getfixturevalue("sqlite_template"), tmp_path / "shared.db")
            url = f"sqlite:///{tmp_path / 'shared.db'}"
        opened.append(open_database(DatabaseSettings(url=url)))
        return Scene(tmp_path, url, tiny_base, fake.url), opened[-1]

    yield make
    for database in opened:
        database.close()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, sqlite_template: Path) -> Published:
    """What a round publishes that nothing happens to."""
    directory = tmp_path_factory.mktemp("undisturbed")
    shutil.copyfile(sqlite_template, directory / "shared.db")
    url = f"sqlite:///{directory / 'shared.db'}"
    database = open_database(DatabaseSettings(url=url))
    with serving(FakeEngine(answer=well_behaved)) as engine:
        assert end(begin(Scene(directory, url, tiny_base, engine.url))) == 0
    found = published(database)
    database.close()
    return found


def files_of(directory: Path) -> dict[str, str]:
    """What finished steps and sealed adapters left: what is being written under another name does not count."""
    found = [
        path for path in directory.rglob("*") if path.is_file() and path.suffix in (".json", ".jsonl", ".safetensors")
    ]
    inside = ((path.relative_to(directory), path) for path in found)
    return {str(name): sha256_of(path) for name, path in inside if not any(part.endswith(PART) for part in name.parts)}


def test_an_undisturbed_round_publishes_one_adapter(undisturbed: Published) -> None:
    ((name, state, sha),) = undisturbed.models
    assert (state, undisturbed.rollouts) == (ModelState.CHALLENGER, (name,))
    assert name == f"tiny--r0001-{sha[:8]}"
    assert undisturbed.runs == (("r0001", "passed"),)


@pytest.mark.training
@pytest.mark.parametrize(
    ("kind", "moment"),
    [
        ("sqlite", "step 9"),
        ("sqlite", "before evaluate counts"),
        ("sqlite", "canary"),
        ("postgresql", "train counts"),
    ],
)
def test_a_killed_round_ends_as_an_undisturbed_one(
    make_scene: MakeScene, fake: FakeEngine, undisturbed: Published, kind: str, moment: str
) -> None:
    scene, database = make_scene(kind)
    assert end(begin(replace(scene, kill_at=moment, ttl_s=SHORT_S))) == -signal.SIGKILL
    assert end(begin(scene)) == 0
    assert published(database) == undisturbed
    ((name, _, _),) = undisturbed.models
    assert {*fake.loads} == {name}
    assert verify_adapter(Path(fake.adapters[name])).name == name


@pytest.mark.training
@pytest.mark.parametrize(("kind", "moment"), [("sqlite", "step 9"), ("postgresql", "before evaluate counts")])
def test_a_leader_that_slept_through_its_lease_changes_nothing_when_it_wakes(
    make_scene: MakeScene, fake: FakeEngine, undisturbed: Published, kind: str, moment: str
) -> None:
    scene, database = make_scene(kind)
    leader = begin(replace(scene, stop_at=moment, ttl_s=SHORT_S))
    try:
        eventually(lambda: is_stopped(leader), within_s=PATIENCE_S)
        assert end(begin(scene)) == 0
        before = (published(database), files_of(scene.directory), list(fake.loads), list(fake.unloads))
        assert before[0] == undisturbed
        os.kill(int(leader.pid or 0), signal.SIGCONT)
        assert end(leader) == STALE_EXIT
    finally:
        leader.kill()
    assert (published(database), files_of(scene.directory), list(fake.loads), list(fake.unloads)) == before
    assert leases.epoch_of(database, LEASE) == 2


@pytest.mark.training
def test_five_schedulers_at_once_publish_one_adapter(
    make_scene: MakeScene, fake: FakeEngine, undisturbed: Published
) -> None:
    scene, database = make_scene("sqlite")
    everybody = [begin(scene) for _ in range(5)]
    assert [end(process) for process in everybody] == [0] * 5
    assert published(database) == undisturbed
    assert len(fake.loads) == len({*fake.loads}) == 1
    assert leases.epoch_of(database, LEASE) == 5
    assert leases.holding(database, LEASE, clock.now()) is None
