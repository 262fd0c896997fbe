"""Parts worked on in processes beside this one, each with its own connections to the database."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from itertools import chain, islice
from threading import Thread
from types import ModuleType
from typing import Self

from feedback.errors import WorkerLost
from feedback.part_work import Here, Piece, Result, Work
from pawl.database import Database, open_database
from pawl.settings import DatabaseSettings

FEW_PARTS = 8
"""So many are done sooner than other processes have started."""
AHEAD = 2
"""Parts that wait for a process, so that none waits for a part."""
FEW_COLLECTIONS = (50_000, 50, 50)
"""Rows and messages by the thousand have no cycles, and to look for some in them takes a seventh of the time."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's `mallopt`."""
KEPT_BLOCK_BYTES = 1 << 25
"""The largest that glibc takes for the second; for the first it takes twice that by itself, once so much was freed."""


@contextmanager
def few_collections() -> Iterator[None]:
    """For a process that goes through rows and messages by the thousand, until that is done."""
    before = gc.get_threshold()
    gc.set_threshold(*FEW_COLLECTIONS)
    try:
        yield
    finally:
        gc.set_threshold(*before)


def keep_freed_memory() -> None:
    """From here on as if this process had freed something very large before.

    At first glibc hands back whatever is freed, and then for every part gets it anew, zeroed.
    Other C libraries have nothing to be told.
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(M_MMAP_THRESHOLD, KEPT_BLOCK_BYTES)
        mallopt(M_TRIM_THRESHOLD, 2 * KEPT_BLOCK_BYTES)


class Processes:
    """So many processes beside this one; this one alone where there would be one, or where there is little to do.

    They end when the work is done; inside `with` they stay for more, and end with it.
    """

    def __init__(self, settings: DatabaseSettings, n: int, few_parts: int = FEW_PARTS) -> None:
        self._settings = settings
        self._n = n
        self._few_parts = few_parts
        self._pool: ProcessPoolExecutor | None = None
        self._stays = False

    def __enter__(self) -> Self:
        self._stays = True
        return self

    def __exit__(self, *_: object) -> None:
        self._stays = False
        self._end()

    def expect(self, work: Work[Piece, Result], n_parts: int) -> None:
        """Start the processes, where they are wanted and stay, so that they are there when the first part is."""
        if self._stays and self._n > 1 and n_parts >= self._few_parts and self._pool is None:
            self._pool = self._start(work)

    def each(self, work: Work[Piece, Result], parts: Iterable[Piece]) -> Iterator[Result]:
        """What `work` makes of each part, in the order of the parts.

        Raises:
            WorkerLost: a process ended before its part was done.
        """
        rest = iter(parts)
        first = list(islice(rest, self._few_parts)) if self._n > 1 else []
        if self._n > 1 and len(first) == self._few_parts:
            yield from self._each_elsewhere(work, chain(first, rest))
            return
        with closing(open_database(self._settings, reads_much=True)) as database:
            yield from Here(database).each(work, chain(first, rest))

    def _each_elsewhere(self, work: Work[Piece, Result], parts: Iterator[Piece]) -> Iterator[Result]:
        pool = self._pool = self._pool or self._start(work)
        waiting: deque[Future[Result]] = deque()
        is_whole = False
        try:
            waiting.extend(pool.submit(_do, work, part) for part in islice(parts, self._n + AHEAD))
            while waiting:
                result = waiting.popleft().result()
                waiting.extend(pool.submit(_do, work, part) for part in islice(parts, 1))
                yield result
            is_whole = True
        except BrokenProcessPool as exc:
            raise WorkerLost("a process that worked on feedback was ended from outside: out of memory?") from exc
        finally:
            if not (is_whole and self._stays):
                self._end()

    def _start(self, work: Work[Piece, Result]) -> ProcessPoolExecutor:
        spawn = multiprocessing.get_context("spawn")  # A fork would share the connections.
        pool = ProcessPoolExecutor(self._n, spawn, initializer=_begin, initargs=(self._settings,))
        with _nothing_to_repeat():
            for _ in range(self._n):  # A process is started for each of these.
                pool.submit(_get_ready, work)
        return pool

    def _end(self) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)
        self._pool = None


@contextmanager
def _nothing_to_repeat() -> Iterator[None]:
    """What is spawned imports the program that this process is running, for whatever it defines: here that is the whole
    command line, which takes as long as everything else, and none of it is used."""
    program = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = program


_databases: list[Database] = []
"""Of a process that works on parts: the one it reads."""


def _begin(settings: DatabaseSettings) -> None:
    """Once in every process, before its first part."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Who is interrupted is the parent: it ends this process.
    gc.set_threshold(*FEW_COLLECTIONS)
    keep_freed_memory()
    Thread(target=_leave_with_parent, daemon=True).start()
    _databases[:] = [open_database(settings, reads_much=True)]


def _get_ready(work: object) -> None:
    """To read what is to be done, a process imports the module that it is in."""


def _leave_with_parent() -> None:
    """However the parent ended: its end of the queue of parts would stay open in its other children."""
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


def _do(work: Work[Piece, Result], part: Piece) -> Result:
    return work(_databases[0], part)
