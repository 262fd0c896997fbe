"""What every replica should serve against what it does: vLLM forgets adapters when it restarts, and tidies nothing.

Each replica is put right by itself: one that hangs or refuses keeps the others from nothing. A replica that has
forgotten an adapter which is being routed to gets it under a name that nobody asks for first, and under its own once
it has answered as it was trained to.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pawl.adapter_files import verify_adapter
from pawl.engines import Engine, prove, verify
from pawl.errors import PawlError, PublishFailed, Unreachable
from pawl.fingerprints import Fingerprint, fingerprint_of

PROOF = "pawl-proof--"
"""How the name begins under which an adapter is tried."""

Change = Literal["loaded", "unloaded", "refused"]
StillUnwanted = Callable[[str], bool]
"""Asked at the last moment: the name may have been taken up again meanwhile."""


@dataclass(frozen=True)
class Wanted:
    """An adapter that may be asked for."""

    name: str
    path: Path
    base: str
    sha256: str | None = None


@dataclass(frozen=True)
class Desired:
    """What one replica should and should not serve; what is in neither is none of our business."""

    wanted: tuple[Wanted, ...] = ()
    unwanted: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Failure:
    """A wish that could not be met."""

    engine: str
    name: str
    reason: str


@dataclass(frozen=True)
class Reconciliation:
    """What was put right at one replica."""

    engine: str
    changes: tuple[tuple[str, Change], ...]
    failures: tuple[Failure, ...]
    proven: frozenset[str]
    """Wanted adapters that this replica has been seen to serve as they were trained."""


@dataclass
class _Work:
    engine: Engine
    max_rank: int | None
    served: dict[str, str]
    proven: set[str]
    changes: list[tuple[str, Change]] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)

    def fail(self, name: str, reason: str) -> None:
        self.failures.append(Failure(self.engine.url, name, reason))


def reconcile(
    desired: Mapping[str, Desired],
    proven: Mapping[str, frozenset[str]],
    still_unwanted: StillUnwanted,
    *,
    max_rank: int | None = None,
    answer_timeout_s: float = 60.0,
) -> list[Reconciliation]:
    """Put every replica right, all at the same time.

    Args:
        desired: by the replica's address.
        proven: by the same, what an earlier call has proven.
        max_rank: the largest rank that the engines take.
        answer_timeout_s: for one answer; a replica that lets it pass is left alone until the next call.
    """

    found: dict[str, Reconciliation] = {}

    def put_right(url: str) -> None:
        try:
            with closing(Engine(url, answer_timeout_s=answer_timeout_s)) as engine:
                known = proven.get(url, frozenset())
                found[url] = reconcile_one(engine, desired[url], known, still_unwanted, max_rank=max_rank)
        except Exception as exc:  # noqa: BLE001 - one replica may not end the duty for the others
            found[url] = _nothing_done(url, desired[url], f"{type(exc).__name__}: {exc}")

    # Daemons: a worker that is told to stop does not wait for a replica that hangs.
    threads = [threading.Thread(target=put_right, args=(url,), name=f"replica {url}", daemon=True) for url in desired]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[url] for url in desired]


def reconcile_one(
    engine: Engine,
    desired: Desired,
    proven: frozenset[str],
    still_unwanted: StillUnwanted,
    *,
    max_rank: int | None = None,
) -> Reconciliation:
    """Put one replica right, as far as it answers."""
    try:
        served = engine.served()
    except PawlError as exc:
        return _nothing_done(engine.url, desired, str(exc))
    right = {one.name for one in desired.wanted if served.get(one.name) == str(one.path.absolute())}
    work = _Work(engine, max_rank, served, set(proven & right))
    try:
        _load_missing(work, desired.wanted)
        _unload_unwanted(work, desired.unwanted, still_unwanted)
    except Unreachable as exc:
        reached = work.proven | {failure.name for failure in work.failures}
        for name in [one.name for one in desired.wanted if one.name not in reached]:
            work.fail(name, str(exc))
    return Reconciliation(engine.url, tuple(work.changes), tuple(work.failures), frozenset(work.proven))


def _nothing_done(url: str, desired: Desired, reason: str) -> Reconciliation:
    return Reconciliation(url, (), tuple(Failure(url, one.name, reason) for one in desired.wanted), frozenset())


def _load_missing(work: _Work, wanted: Sequence[Wanted]) -> None:
    for one in wanted:
        if one.name in work.proven:
            continue
        try:
            _load(work, one)
            work.proven.add(one.name)
        except Unreachable:
            raise
        except PawlError as exc:
            work.changes.append((one.name, "refused"))
            work.fail(one.name, str(exc))


def _load(work: _Work, one: Wanted) -> None:
    """Load what is not there, prove what is; a name that stands for another path is never touched."""
    root = work.served.get(one.name)
    path = one.path.absolute()
    if root is not None and root != str(path):
        raise PublishFailed(f"{work.engine.url}: {one.name} is served from {root}, not from {path}")
    adapter = verify_adapter(one.path, work.max_rank, sha256=one.sha256)
    fingerprint = fingerprint_of(adapter.manifest)
    if root is None:
        _try_out(work.engine, one, fingerprint)
        work.engine.load(one.name, path)
        work.changes.append((one.name, "loaded"))
        prove(work.engine, one.name, one.base, fingerprint)
    else:  # It may be in use: whoever sees the alert decides about it.
        verify(work.engine, one.name, one.base, fingerprint)


def _try_out(engine: Engine, one: Wanted, fingerprint: Fingerprint | None) -> None:
    """See under another name whether the engine serves these files as they were trained.

    Raises:
        PublishFailed: it does not.
    """
    trial = PROOF + one.name
    try:
        engine.load(trial, one.path.absolute())
        verify(engine, trial, one.base, fingerprint)
    finally:
        engine.unload(trial)


def _unload_unwanted(work: _Work, unwanted: frozenset[str], still_unwanted: StillUnwanted) -> None:
    """Only what no request runs with or waits for."""
    leftovers = {name for name in work.served if name.startswith(PROOF)}
    candidates = sorted((unwanted | leftovers) & work.served.keys())
    if not candidates:
        return
    in_use = work.engine.adapters_in_use()
    for name in candidates:
        if name in in_use or (name not in leftovers and not still_unwanted(name)):
            continue
        try:
            work.engine.unload(name)
            work.changes.append((name, "unloaded"))
        except Unreachable:
            raise
        except PawlError as exc:
            work.fail(name, str(exc))
