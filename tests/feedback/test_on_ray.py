"""Mining on a Ray cluster gives what mining here gives, to the byte."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from bench.mining_history import ALIAS, Size, build_history
from feedback.errors import NoCluster
from feedback.export import ExportFormat, write_export
from feedback.mining import mine_alias
from feedback.store import load_pairs
from pawl.database import Database, open_database, upgrade
from pawl.schema import pairs
from pawl.settings import DatabaseSettings
from tests.servers import PostgreSQL

SIZE = Size(interactions=2000, signals=400, users=100)
PART_ROWS = 100
MINED_AT = 100.0
ATTEMPTS = 3
"""Ray gives a node half a minute to start, which may be too little on a loaded machine."""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_workers_of_a_cluster_find_what_this_process_finds(postgresql: PostgreSQL, tmp_path: Path) -> None:
    url = postgresql.create_database("mined_on_ray")
    database = open_database(DatabaseSettings(url=url))
    try:
        upgrade(database)
        build_history(database, SIZE, 1)
        mined = mine_alias(database, ALIAS, MINED_AT, part_rows=PART_ROWS)
        here = exported(database, tmp_path / "here")
        with database.write() as connection:
            connection.execute(pairs.delete())
        assert mine_on_ray(url) == asdict(mined)
        assert exported(database, tmp_path / "ray") == here
        assert mined.n_added > 0
    finally:
        database.close()
        postgresql.drop_database("mined_on_ray")


def exported(database: Database, directory: Path) -> list[bytes]:
    """Whole pairs as files."""
    directory.mkdir()
    paths = [directory / "pairs.jsonl", directory / "pairs.parquet"]
    for path in paths:
        write_export(path, load_pairs(database, ALIAS), layout=ExportFormat.PAWL)
    return [path.read_bytes() for path in paths]


def mine_on_ray(url: str) -> object:
    """What a process that mines on Ray prints."""
    command = [sys.executable, "-m", "tests.feedback.mined_on_ray", url, str(MINED_AT), str(PART_ROWS)]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    for _ in range(ATTEMPTS):
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=280)
        if done.returncode != NoCluster.exit_code:
            break
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)
