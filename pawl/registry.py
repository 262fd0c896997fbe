"""Runs and models in the shared database; every query on those two tables is here."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any

import sqlalchemy as sa

from pawl.audit import AuditEvent, note
from pawl.database import Database
from pawl.errors import NegativeVerdict, RunConflict, StaleWrite, UnknownModel
from pawl.schema import models, runs
from pawl.webhook_events import RETRAIN, announce


class RunStatus(StrEnum):
    """How a run stands."""

    RUNNING = "running"
    PASSED = "passed"
    FAILED = "failed"
    """The gate said no."""
    CANNOT_TELL = "cannot_tell"
    SKIPPED = "skipped"
    """Too little new feedback to train on."""
    ERROR = "error"
    """A step broke; the next attempt resumes there."""
    GIVEN_UP = "given_up"
    """The same step broke again and again; nobody comes back to it."""

    @property
    def is_final(self) -> bool:
        return self not in {RunStatus.RUNNING, RunStatus.ERROR}


class ModelState(StrEnum):
    """Where a model is in its life."""

    CANDIDATE = "candidate"
    REJECTED = "rejected"
    CHALLENGER = "challenger"
    CHAMPION = "champion"
    RETIRED = "retired"


SOLE = (ModelState.CHAMPION, ModelState.CHALLENGER)
"""States that one model of an alias has at most; who comes into one retires who was there."""
RESTING = (ModelState.RETIRED, ModelState.REJECTED)
"""States of models that nobody is to be served by."""
DEFAULT_ACTOR = "pawl"
FILES_DELETED_AT = "files_deleted_at"
"""In the manifest of a model whose files are gone, when they went."""


@dataclass(frozen=True)
class Run:
    """One retraining round."""

    id: str
    alias: str
    cycle: str
    """What the round is for, such as a week; an alias has one run per cycle."""
    status: RunStatus
    step: str
    detail: Mapping[str, Any]
    epoch: int
    """The lease epoch of the process that works on it; an older holder's writes are refused."""
    created_at: float
    updated_at: float

    @property
    def number(self) -> int:
        return int(self.id.removeprefix("r"))


@dataclass(frozen=True)
class Model:
    """One model version: a base, or an adapter on it."""

    name: str
    alias: str
    base: str
    parent: str | None
    run_id: str | None
    path: str | None
    """The adapter's directory; None for a base model."""
    sha256: str | None
    dataset_sha: str | None
    state: ModelState
    manifest: Mapping[str, Any]
    created_at: float
    updated_at: float


def create_run(database: Database, alias: str, cycle: str, *, epoch: int, now: float) -> Run:
    """Start the run of this cycle.

    Raises:
        RunConflict: the cycle has its run already.
    """
    of_cycle = sa.select(runs.c.id).where(runs.c.alias == alias, runs.c.cycle == cycle)
    with database.write() as connection:
        while connection.execute(of_cycle).first() is None:
            known = connection.execute(sa.select(runs.c.id)).scalars()
            number = 1 + max((int(run_id.removeprefix("r")) for run_id in known), default=0)
            run = Run(f"r{number:04d}", alias, cycle, RunStatus.RUNNING, "", {}, epoch, now, now)
            if database.insert_new(connection, runs, [_row(run, "detail")]):
                return run  # Else another alias's run, begun in the same moment, has the number.
    raise RunConflict(f"{alias} already has a run for cycle {cycle}")


def find_run(database: Database, alias: str, cycle: str) -> Run | None:
    """The run of this cycle, if it was started."""
    row = database.first_row(sa.select(runs).where(runs.c.alias == alias, runs.c.cycle == cycle))
    return _run(row) if row else None


def get_run(database: Database, run_id: str) -> Run:
    """One run.

    Raises:
        UnknownModel: there is none of this id.
    """
    row = database.first_row(sa.select(runs).where(runs.c.id == run_id))
    if row is None:
        raise UnknownModel(f"there is no run {run_id}")
    return _run(row)


def list_runs(database: Database, alias: str | None = None) -> list[Run]:
    """Runs, newest first."""
    query = sa.select(runs).order_by(runs.c.created_at.desc(), runs.c.id.desc())
    if alias is not None:
        query = query.where(runs.c.alias == alias)
    with database.read() as connection:
        return [_run(row) for row in connection.execute(query).mappings()]


def unfinished_run(database: Database, alias: str) -> Run | None:
    """The alias's newest run that has not ended: it is resumed before another starts."""
    return next((run for run in list_runs(database, alias) if not run.status.is_final), None)


def adopt_run(database: Database, run: Run, *, epoch: int, now: float) -> Run:
    """Take over a run that another process left.

    Raises:
        RunConflict: a holder with a newer lease works on it.
    """
    changes = {"epoch": epoch, "status": str(RunStatus.RUNNING), "updated_at": now}
    with database.write() as connection:
        update = sa.update(runs).where(runs.c.id == run.id, runs.c.epoch <= epoch).values(**changes)
        if connection.execute(update).rowcount != 1:
            raise RunConflict(f"run {run.id} belongs to a process with a newer lease")
    return get_run(database, run.id)


def update_run(
    database: Database, run: Run, *, now: float, step: str, status: RunStatus, detail: Mapping[str, Any]
) -> Run:
    """Record progress; entries of `detail` are laid over those that are there.

    Raises:
        RunConflict: another process took the run over.
    """
    with database.write() as connection:
        mine = sa.and_(runs.c.id == run.id, runs.c.epoch == run.epoch)
        stored = connection.execute(sa.select(runs.c.detail).where(mine)).scalar_one_or_none()
        if stored is None:
            raise RunConflict(f"another process took run {run.id} over")
        merged = json.dumps({**json.loads(stored), **detail}, sort_keys=True, allow_nan=False)
        changes = {"step": step, "status": str(status), "detail": merged, "updated_at": now}
        connection.execute(sa.update(runs).where(mine).values(**changes))
        if status is not RunStatus.RUNNING:
            _tell_of_outcome(connection, run, step, status, now)
    return get_run(database, run.id)


def _tell_of_outcome(connection: sa.Connection, run: Run, step: str, status: RunStatus, now: float) -> None:
    data = {"run": run.id, "model": run.alias, "cycle": run.cycle, "step": step, "status": str(status)}
    announce(connection, f"{RETRAIN}.{status}", data, now)


def register_model(database: Database, model: Model, *, actor: str = DEFAULT_ACTOR) -> None:
    """Add a model; one that is there stays as it is."""
    with database.write() as connection:
        if database.insert_new(connection, models, [_row(model, "manifest")]):
            detail = {"alias": model.alias, "sha256": model.sha256, "run": model.run_id, "state": str(model.state)}
            note(connection, AuditEvent(model.created_at, actor, "model.register", model.name, detail))


def get_model(database: Database, name: str) -> Model:
    """One model.

    Raises:
        UnknownModel: there is none of this name.
    """
    row = database.first_row(sa.select(models).where(models.c.name == name))
    if row is None:
        raise UnknownModel(f"no model is registered as {name}")
    return _model(row)


def list_models(database: Database, alias: str, state: ModelState | None = None) -> list[Model]:
    """An alias's models, newest first."""
    query = sa.select(models).where(models.c.alias == alias).order_by(models.c.created_at.desc(), models.c.name)
    if state is not None:
        query = query.where(models.c.state == str(state))
    with database.read() as connection:
        return [_model(row) for row in connection.execute(query).mappings()]


def set_state(
    database: Database,
    name: str,
    state: ModelState,
    *,
    now: float,
    actor: str = DEFAULT_ACTOR,
    expected: Collection[ModelState] | None = None,
) -> bool:
    """Move a model on in its life, and write that down; True if that changed anything.

    A new champion or challenger retires the old one in the same transaction. For a lease's holder pass a
    `leases.FencedDatabase`: then nothing is changed once another has the lease.

    Args:
        expected: leave a model alone that is in another state than these.

    Raises:
        UnknownModel: there is none of this name.
        StaleWrite: another process moved a model of this alias in the same moment.
    """
    try:
        with database.write() as connection:
            return move(connection, name, state, now=now, actor=actor, expected=expected)
    except sa.exc.IntegrityError as exc:  # Of two that came at once into a state for one.
        raise StaleWrite(f"another {state} of the same alias came in this moment: nothing was changed") from exc


def move(
    connection: sa.Connection,
    name: str,
    state: ModelState,
    *,
    now: float,
    actor: str,
    expected: Collection[ModelState] | None = None,
) -> bool:
    """As `set_state`, inside the caller's transaction."""
    query = sa.select(models.c.alias, models.c.state).where(models.c.name == name).with_for_update()
    found = connection.execute(query).first()
    if found is None:
        raise UnknownModel(f"no model is registered as {name}")
    if found.state == state or (expected is not None and found.state not in expected):
        return False
    if state in SOLE:
        of_alias = sa.and_(models.c.alias == found.alias, models.c.state == str(state))
        for other in list(connection.execute(sa.select(models.c.name).where(of_alias).with_for_update()).scalars()):
            _write_state(connection, other, str(state), ModelState.RETIRED, now=now, actor=actor)
    _write_state(connection, name, found.state, state, now=now, actor=actor)
    return True


def is_registered(connection: sa.Connection, name: str) -> bool:
    """Whether it is a model of ours: an engine's own need not be."""
    return connection.execute(sa.select(models.c.name).where(models.c.name == name)).first() is not None


def retire_model(database: Database, name: str, *, now: float, actor: str) -> Model:
    """Take a version out of consideration, and write down who did.

    Raises:
        UnknownModel: there is none of this name.
        NegativeVerdict: it is in service.
    """
    with database.write() as connection:
        query = sa.select(models.c.state).where(models.c.name == name).with_for_update()
        if connection.execute(query).scalar_one_or_none() in SOLE:
            raise NegativeVerdict(f"{name} is in service: promote another model, or roll it back, first")
        move(connection, name, ModelState.RETIRED, now=now, actor=actor)
    return get_model(database, name)


def take_up(database: Database, name: str, *, now: float) -> None:
    """A model is about to be sent out: whoever tidies engines and files counts its rest from now on.

    Raises:
        UnknownModel: there is none of this name.
        NegativeVerdict: its files have been deleted.
    """
    this = models.c.name == name
    with database.write() as connection:
        manifest = connection.execute(sa.select(models.c.manifest).where(this).with_for_update()).scalar_one_or_none()
        if manifest is None:
            raise UnknownModel(f"no model is registered as {name}")
        if FILES_DELETED_AT in json.loads(manifest):
            raise NegativeVerdict(f"the files of {name} have been deleted")
        connection.execute(sa.update(models).where(this).values(updated_at=now))


def mark_files_deleted(database: Database, name: str, *, rested_since: float, now: float, actor: str) -> bool:
    """Write down that a resting model's files go, before they do; False if it has been taken up again.

    Raises:
        UnknownModel: there is none of this name.
    """
    this = models.c.name == name
    with database.write() as connection:
        found = connection.execute(sa.select(models).where(this).with_for_update()).first()
        if found is None:
            raise UnknownModel(f"no model is registered as {name}")
        if found.state not in RESTING or found.updated_at > rested_since:
            return False
        manifest = json.dumps(json.loads(found.manifest) | {FILES_DELETED_AT: now}, sort_keys=True, allow_nan=False)
        connection.execute(sa.update(models).where(this).values(manifest=manifest))
        note(connection, AuditEvent(now, actor, "model.delete_files", name, {}))
    return True


def _write_state(
    connection: sa.Connection, name: str, before: str, state: ModelState, *, now: float, actor: str
) -> None:
    values = {"state": str(state), "updated_at": now}
    connection.execute(sa.update(models).where(models.c.name == name).values(**values))
    note(connection, AuditEvent(now, actor, _ACTIONS[state], name, {"state_before": before}))


_ACTIONS = {
    ModelState.CANDIDATE: "model.reopen",
    ModelState.REJECTED: "model.reject",
    ModelState.CHALLENGER: "model.challenge",
    ModelState.CHAMPION: "model.promote",
    ModelState.RETIRED: "model.retire",
}
"""What the audit trail calls coming into a state."""


def promoted(database: Database, alias: str) -> Model | None:
    """The alias's champion: the only model that may become a parent by itself."""
    return next(iter(list_models(database, alias, ModelState.CHAMPION)), None)


def lineage(database: Database, name: str) -> list[Model]:
    """The model and its ancestors that are registered, youngest first.

    Raises:
        UnknownModel: there is none of this name.
    """
    found = [get_model(database, name)]
    while (parent := found[-1].parent) is not None and parent not in {model.name for model in found}:
        try:
            found.append(get_model(database, parent))
        except UnknownModel:
            break
    return found


def models_after(connection: sa.Connection, run_id: str) -> dict[str, str | None]:
    """What a run made and all that descends from it, each with the parent through which; None for its own."""
    rows = connection.execute(sa.select(models.c.name, models.c.parent, models.c.run_id)).all()
    found: dict[str, str | None] = {row.name: None for row in rows if row.run_id == run_id}
    while new := {row.name: row.parent for row in rows if row.parent in found and row.name not in found}:
        found |= new
    return found


def mark_erased(connection: sa.Connection, run_id: str, n_pairs: int, *, now: float) -> list[str]:
    """Write into the records of a run's models, and of their descendants, that pairs they learned from were erased."""
    after = models_after(connection, run_id)
    query = sa.select(models.c.name, models.c.manifest).where(models.c.name.in_(list(after))).order_by(models.c.name)
    for name, text in connection.execute(query.with_for_update()).all():
        manifest = json.loads(text)
        mark = {"pairs": 0, "through": None, **manifest.get("erased", {}), "at": now}
        mark |= {"pairs": mark["pairs"] + n_pairs} if after[name] is None else {"through": after[name]}
        changed = json.dumps(manifest | {"erased": mark}, sort_keys=True, allow_nan=False)
        connection.execute(sa.update(models).where(models.c.name == name).values(manifest=changed, updated_at=now))
    return sorted(after)


def _row(record: Run | Model, json_field: str) -> dict[str, Any]:
    row = {field.name: getattr(record, field.name) for field in fields(record)}
    enums = {name: str(value) for name, value in row.items() if isinstance(value, StrEnum)}
    return {**row, **enums, json_field: json.dumps(row[json_field], sort_keys=True, allow_nan=False)}


def _run(row: sa.RowMapping) -> Run:
    return Run(**{**_plain(row), "status": RunStatus(row["status"]), "detail": json.loads(row["detail"])})


def _model(row: sa.RowMapping) -> Model:
    return Model(**{**_plain(row), "state": ModelState(row["state"]), "manifest": json.loads(row["manifest"])})


def _plain(row: sa.RowMapping) -> dict[str, Any]:
    return {str(name): value for name, value in row.items()}
