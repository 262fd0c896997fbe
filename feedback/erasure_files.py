"""A person's rows in the files that retraining runs keep: taken out, and the manifests say that they are.

The files are kept for the sake of the rows that stay: an unfinished run goes on with them, a finished one can still be
explained. A manifest's hash is that of what was trained on; marked `erased`, it no longer promises that the file beside
it has that hash. The mark is made before the first row goes, and the files that rows are recognised by are changed
last, so whoever is interrupted finds everything again.

A round writes these files while people are erased. Both do so alone, the round from reading to writing: so an erasure
sees a step's files whole or not at all, and the round looks for who was erased meanwhile when they are there.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
import structlog

from feedback.erasure import is_pair_of, made_at
from feedback.erasure_store import erased_among
from feedback.tombstones import Erased, Person
from pawl import registry
from pawl.database import Database
from pawl.durability import sync_directory
from pawl.schema import models

log = structlog.get_logger()

Row = Mapping[str, Any]
Pick = Callable[[Sequence[Row]], set[str]]
"""The ids of those rows that are to go."""

SIDES = ("chosen_interaction", "rejected_interaction", "interaction")
MINED = "mine"
"""The step whose files say whose every pair is."""
ANSWERS = "evaluate*/answers.jsonl"
"""Quotes prompts of the hold-out, under names of its own; also of a step that was killed before it had its name."""
OPAQUE = (".parquet", ".arrow")
"""Data that is only removed as a whole."""
PART = ".part"
"""At the end of the name of a file that is being written."""
LOOK_UP_ROWS = 500


def picker(database: Database, erased: Erased, persons: Sequence[Person], secret: bytes) -> Pick:
    """Picks rows by the names in them, by whose their completions prove to be, and by what the database says."""

    def pick(rows: Sequence[Row]) -> set[str]:
        sides = sorted({side for row in rows for side in sides_of(row)})
        with database.read() as connection:
            gone = {
                one
                for start in range(0, len(sides), LOOK_UP_ROWS)
                for one in erased_among(connection, sides[start : start + LOOK_UP_ROWS])
            }
        return {
            id_of(row)
            for row in rows
            if not gone.isdisjoint(sides_of(row))
            or is_named(erased, row)
            or any(is_pair_of(person, secret, row) for person in persons)
        }

    return pick


def sides_of(row: Row) -> list[str]:
    return [str(row[name]) for name in SIDES if row.get(name)]


def id_of(row: Row) -> str:
    return str(row.get("pair_id") or row.get("id") or "")


def is_named(erased: Erased, row: Row) -> bool:
    """Whether somebody who made this row was erased, and it was made before."""
    oldest = min(map(made_at, sides_of(row)), default=0.0)
    names = [str(principal).partition("/") for principal in row["principals"]]
    return any(user and erased.until(key_id, user) >= oldest for key_id, _, user in names)


def erase_in_runs(runs_dir: Path, pick: Pick, now: float) -> dict[str, int]:
    """Take rows out of the files of every run; how many each run had trained on, by run."""
    if not runs_dir.is_dir():
        return {}
    found = {run.name: erase_in_run(run, pick, now) for run in sorted(runs_dir.iterdir()) if run.is_dir()}
    return {run: n for run, n in found.items() if n}


@contextmanager
def alone_in(run: Path) -> Iterator[None]:
    """Nobody else changes this run's files meanwhile."""
    run.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(run.with_name(f".{run.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def erase_in_run(run: Path, pick: Pick, now: float) -> int:
    """The same for one run."""
    with alone_in(run):
        for part in run.rglob(f"*.jsonl{PART}"):
            part.unlink()  # Its writer was killed, or it would not be alone.
        return _erase_alone(run, pick, now)


def _erase_alone(run: Path, pick: Pick, now: float) -> int:
    files = sorted(run.rglob("*.jsonl"), key=lambda path: (path.parent.name == MINED, path))
    gone = {one for path in files for one in picked(path, pick)}
    if not gone:
        drop_late_answers(run)
        return 0
    n_trained = mark_manifest(run / "build" / "manifest.json", gone, now)
    for path in data_files(run):
        path.unlink()
    for path in files:
        if path.exists():
            rewrite_without(path, gone)
    log.info("erased_in_run", run=run.name, pairs=len(gone), trained=n_trained)
    return n_trained


def data_files(run: Path) -> list[Path]:
    """What cannot be changed row by row."""
    opaque = [path for path in run.rglob("*") if path.suffix in OPAQUE]
    return [*opaque, *run.glob(ANSWERS)]


def drop_late_answers(run: Path) -> None:
    """Somebody may have been erased from the hold-out when it had been read, and before it was quoted."""
    path = run / "build" / "manifest.json"
    found = list(run.glob(ANSWERS))
    if found and path.exists():
        manifest = json.loads(path.read_text())
        if not erased_of(manifest).isdisjoint(manifest.get("holdout_ids", ())):
            for answers in found:
                answers.unlink()


def erased_of(manifest: Mapping[str, Any]) -> set[str]:
    """The pairs that have ever been erased from a training set."""
    return set(manifest.get("erased", {}).get("pair_ids", ()))


def picked(path: Path, pick: Pick) -> set[str]:
    rows: list[Row] = []
    found: set[str] = set()
    for row in rows_in(path):
        if "principals" not in row:
            continue
        rows.append(row)
        if len(rows) == LOOK_UP_ROWS:
            found |= pick(rows)
            rows = []
    return found | pick(rows) if rows else found


def rows_in(path: Path) -> Iterator[Row]:
    for _, row in lines_in(path):
        if row is not None:
            yield row


def lines_in(path: Path) -> Iterator[tuple[str, Row | None]]:
    """Each line, and the object on it."""
    with path.open() as file:
        for line in file:
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            yield line, row if isinstance(row, dict) else None


def rewrite_without(path: Path, gone: Collection[str]) -> None:
    """Leave out the rows of these ids; the file is the old one or the new one, never a part."""
    kept = [line for line, row in lines_in(path) if row is None or id_of(row) not in gone]
    write_whole(path, kept)


def mark_manifest(path: Path, gone: Collection[str], now: float) -> int:
    """Say in a training set's manifest which pairs are no longer there; how many of `gone` were trained on."""
    if not path.exists():
        return 0
    manifest = json.loads(path.read_text())
    known = {*manifest.get("pair_ids", ()), *manifest.get("holdout_ids", ())}
    before = erased_of(manifest)
    erased = before | known.intersection(gone)
    if erased != before:
        manifest["erased"] = {"at": now, "pair_ids": sorted(erased)}
        write_whole(path, [json.dumps(manifest, indent=2, sort_keys=True, allow_nan=False) + "\n"])
    return len(set(gone).intersection(manifest.get("pair_ids", ())))


def write_whole(path: Path, lines: Iterable[str]) -> None:
    """The file is the old one, or the new one; it is on disk afterwards."""
    part = path.with_name(path.name + PART)
    with part.open("w") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())
    part.rename(path)
    sync_directory(path.parent)


def mark_late_models(database: Database, runs_dir: Path, now: float) -> list[str]:
    """Mark what a run made of a training set that somebody was erased from while it trained."""
    marked: list[str] = []
    manifests = sorted(runs_dir.glob("*/build/manifest.json"))
    for path in manifests:
        manifest = json.loads(path.read_text())
        n_trained = len(erased_of(manifest).intersection(manifest.get("pair_ids", ())))
        if n_trained:
            marked += _mark_missing(database, path.parents[1].name, n_trained, now)
    return marked


def _mark_missing(database: Database, run_id: str, n_trained: int, now: float) -> list[str]:
    """Of models that were there when somebody was erased, the marks count that already."""
    with database.write() as connection:
        after = registry.models_after(connection, run_id)
        query = sa.select(models.c.name, models.c.manifest).where(models.c.name.in_(list(after)))
        rows = connection.execute(query.order_by(models.c.name).with_for_update()).all()
        marks = {row.name: json.loads(row.manifest).get("erased", {}) for row in rows}
        counted = min((marks[name].get("pairs", 0) for name in after if after[name] is None), default=n_trained)
        if counted >= n_trained and all(marks.values()):
            return []
        return registry.mark_erased(connection, run_id, max(n_trained - counted, 0), now=now)
