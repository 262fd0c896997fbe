"""The parent of a gateway's processes: it owns the socket, starts the others, and serves nothing itself.

All workers accept from one listening socket that they inherit. Connections that the kernel has completed wait in that
socket's one queue until any worker takes them, so neither a worker's death nor a restart loses one. With a socket per
worker (`SO_REUSEPORT`) each would have a queue of its own, and closing it resets what waits there.

SIGTERM and SIGINT stop the workers in order, and a second one cuts them short. SIGHUP reads the configuration again and
replaces the workers one by one, each only after its successor is ready.
"""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import socket
import sys
import time
from asyncio.subprocess import Process
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import NamedTuple

import structlog

from monitoring.board import FIRST_PAGE, N_PAGES, Board
from pawl.errors import ConfigurationError, PawlError
from pawl.settings import Settings
from serving.children import ending_with_parent

log = structlog.get_logger()

BACKLOG = 2048
BIND_PATIENCE_S = 10.0
"""The workers of a parent that was killed need a moment to let go of the port."""
BIND_POLL_S = 0.05
RESTART_S = 0.1
"""For a child that had been ready; starting takes a second anyway."""
RESTART_PAUSES_S = (0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
"""For a child that ends at its start again and again."""
RETIRE = signal.SIGUSR1
STOP_MARGIN_S = 20.0
"""After the grace period, for error events, records and the last rows to the database; see `serving.server`."""
LINGER_S = 10.0
"""What a retiring worker may take longer; see `serving.server`."""
DRAIN_STOP_S = 10.0
START_S = 120.0
KILL_S = 10.0
"""For the end of a child that was killed. One that waits for a disk or a network file system may take for ever."""
LEFT_BEHIND = "the kernel does not let it end, most likely for a disk that hangs: see to that, or restart the machine"
CRASHED = 1
"""Our exit code for a child that ended without one of its own."""


class StartFailed(Exception):
    """A child ended instead of becoming ready, and has said why, or it was killed because it did neither."""

    def __init__(self, code: int) -> None:
        super().__init__(f"a child ended at its start with code {code}")
        self.code = code if code > 0 else CRASHED


class Role(NamedTuple):
    """What a child is for."""

    name: str
    module: str
    is_worker: bool
    """It accepts connections, and without it there is no gateway."""


WORKER = Role("worker", "serving.worker_process", is_worker=True)
DRAIN = Role("drain", "serving.drain_process", is_worker=False)


class Child(NamedTuple):
    """A process that runs or ran."""

    process: Process
    page: int
    """Where it writes its metrics."""
    is_ready: asyncio.Future[bool]
    """True once it has said so, false once it cannot any more."""

    def was_ready(self) -> bool:
        """Whether it had come that far."""
        return self.is_ready.done() and self.is_ready.result()


class Spawner:
    """Starts children with all that they inherit, and gives each a page for its metrics."""

    def __init__(self, listeners: Sequence[socket.socket], board: Board, environment: Mapping[str, str]) -> None:
        self._listeners = list(listeners)
        self._board = board
        self._environment = dict(environment)
        self._pages: set[int] = set()

    async def start(self, role: Role) -> Child:
        """A new process.

        Raises:
            OSError: the system has no room for another one.
        """
        page = next(number for number in range(FIRST_PAGE, N_PAGES) if number not in self._pages)
        self._pages.add(page)  # Before the first await: others may be starting at the same time.
        try:
            process, is_ready = await self._spawn(role, page)
        except BaseException:
            self._pages.discard(page)
            raise
        return Child(process, page, is_ready)

    async def _spawn(self, role: Role, page: int) -> tuple[Process, asyncio.Future[bool]]:
        listeners = [listener.fileno() for listener in self._listeners if role.is_worker]
        receiving, sending = os.pipe()
        is_ready = _said_down(receiving)
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                *("-m", role.module),
                *arguments_of(os.getpid(), listeners, sending, self._board.descriptor, page),
                env=self._environment,
                pass_fds=(*listeners, sending, self._board.descriptor),
                preexec_fn=ending_with_parent(),
                process_group=0,  # A terminal's Ctrl-C is for the parent, which passes it on once.
            )
        finally:
            os.close(sending)
        return process, is_ready

    def release(self, child: Child) -> None:
        """It is dead; what it counted stays."""
        self._board.bury(child.page)
        self._pages.discard(child.page)

    def stop_listening(self) -> None:
        """Let go of the sockets: once the workers have too, new connections are refused."""
        for listener in self._listeners:
            listener.close()


def arguments_of(parent: int, listeners: Sequence[int], ready: int, board: int, page: int) -> list[str]:
    """The numbers a child needs.

    >>> arguments_of(1, [5], 6, 7, 2)
    ['--parent=1', '--ready=6', '--board=7', '--page=2', '--listen=5']
    """
    numbers = {"parent": parent, "ready": ready, "board": board, "page": page}
    flags = [f"--{name}={number}" for name, number in numbers.items()]
    return [*flags, *(f"--listen={descriptor}" for descriptor in listeners)]


def _said_down(pipe: int) -> asyncio.Future[bool]:
    """Whether a byte came down a pipe before its other end was closed."""
    loop = asyncio.get_running_loop()
    said: asyncio.Future[bool] = loop.create_future()

    def hear() -> None:
        loop.remove_reader(pipe)
        said.set_result(bool(os.read(pipe, 1)))
        os.close(pipe)

    loop.add_reader(pipe, hear)
    return said


class Keeper:
    """Keeps one child: starts another when it ends, with growing pauses while none becomes ready."""

    def __init__(self, role: Role, spawner: Spawner) -> None:
        self._role = role
        self._spawner = spawner
        self._child: Child | None = None
        self._n_failures = 0
        self._has_started = asyncio.Event()
        self._is_over = asyncio.Event()
        self._task: asyncio.Task[int] | None = None

    def begin(self) -> None:
        """Start the child, and do not wait for it."""
        self._task = asyncio.create_task(self._keep())

    async def start(self) -> None:
        """Start a worker; return when it is ready. Only the first one may fail this way.

        Raises:
            StartFailed: it ended instead, or was not ready in time.
        """
        self.begin()
        assert self._task is not None
        waiting = asyncio.create_task(self._has_started.wait())
        await asyncio.wait([self._task, waiting], timeout=START_S, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if self._has_started.is_set():
            return
        if not self._task.done():
            log.error("child_not_ready", child=self._role.name, after_s=START_S)
            await self.stop(signal.SIGKILL, KILL_S)
        raise StartFailed(self._task.result() if self._task.done() else CRASHED)

    async def stop(self, number: int, within_s: float) -> None:
        """Send a signal and start no other; kill what has not ended in time, and do not wait long for that either."""
        self._is_over.set()
        self.send(number)
        if self._task is None:
            return
        await asyncio.wait([self._task], timeout=within_s)
        if not self._task.done():
            log.error("child_killed", child=self._role.name, after_s=within_s)
            self.send(signal.SIGKILL)
            await asyncio.wait([self._task], timeout=KILL_S)
        if not self._task.done():
            pid = self._child.process.pid if self._child is not None else None
            log.error("child_left_behind", child=self._role.name, pid=pid, after_s=KILL_S, advice=LEFT_BEHIND)

    def send(self, number: int) -> None:
        """Pass a signal on."""
        if self._child is not None and self._child.process.returncode is None:
            with suppress(ProcessLookupError):
                self._child.process.send_signal(number)

    async def _keep(self) -> int:
        while True:
            code = await self._run_child()
            if self._is_over.is_set() or (self._role.is_worker and not self._has_started.is_set()):
                return code
            if await self._is_over_within(self._pause_after(code)):
                return code

    async def _run_child(self) -> int:
        """Start a child and wait for its end; its exit code."""
        self._child = None
        try:
            self._child = child = await self._spawner.start(self._role)
        except OSError as exc:
            log.error("child_not_started", child=self._role.name, reason=str(exc))
            return CRASHED
        child.is_ready.add_done_callback(partial(self._note_ready, child.process.pid))
        if self._is_over.is_set():
            self.send(signal.SIGTERM)  # We were told while it was being started.
        code = await child.process.wait()
        self._spawner.release(child)
        return code

    def _note_ready(self, pid: int, is_ready: asyncio.Future[bool]) -> None:
        if is_ready.result():
            self._has_started.set()
            log.info("child_ready", child=self._role.name, pid=pid)

    def _pause_after(self, code: int) -> float:
        child = self._child
        self._n_failures = 0 if child is not None and child.was_ready() else self._n_failures + 1
        pause_s = RESTART_PAUSES_S[min(self._n_failures, len(RESTART_PAUSES_S)) - 1] if self._n_failures else RESTART_S
        pid = None if child is None else child.process.pid
        log.warning("child_ended", child=self._role.name, pid=pid, code=code, restart_in_s=pause_s)
        return pause_s

    async def _is_over_within(self, pause_s: float) -> bool:
        with suppress(TimeoutError):
            async with asyncio.timeout(pause_s):
                await self._is_over.wait()
        return self._is_over.is_set()


class Supervisor:
    """All children of one gateway."""

    def __init__(self, settings: Settings, spawner: Spawner, reload: Callable[[], Settings]) -> None:
        self._settings = settings
        self._spawner = spawner
        self._reload = reload
        self._workers: list[Keeper] = []
        self._drain = Keeper(DRAIN, spawner)
        self._retiring: dict[Keeper, asyncio.Task[None]] = {}
        self._is_told = asyncio.Event()
        self._must_roll = asyncio.Event()

    async def run(self) -> int:
        """Start everything, keep it up, and stop it when told; the exit code."""
        self._listen_to_signals()
        running = asyncio.create_task(self._run())
        told = asyncio.create_task(self._is_told.wait())
        await asyncio.wait([running, told], return_when=asyncio.FIRST_COMPLETED)
        told.cancel()
        running.cancel()
        code = 0
        try:
            await running
        except StartFailed as exc:
            code = exc.code
        except asyncio.CancelledError:
            pass
        await self._stop()
        return code

    def _listen_to_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._tell)
        loop.add_signal_handler(signal.SIGHUP, self._must_roll.set)

    def _tell(self) -> None:
        """The first signal stops in order; every later one tells the workers to hurry."""
        if self._is_told.is_set():
            for worker in (*self._workers, *self._retiring):
                worker.send(signal.SIGTERM)
        self._is_told.set()

    async def _run(self) -> None:
        await self._add_worker()  # Alone: when the configuration is wrong, one line says so, not one per worker.
        self._drain.begin()
        await asyncio.gather(*(self._add_worker() for _ in range(self._n_workers - 1)))
        log.info("gateway_started", workers=len(self._workers))
        while True:
            await self._must_roll.wait()
            self._must_roll.clear()
            await self._roll()

    @property
    def _n_workers(self) -> int:
        return self._settings.serving.workers

    async def _add_worker(self) -> None:
        worker = Keeper(WORKER, self._spawner)
        self._workers.append(worker)
        await worker.start()

    async def _roll(self) -> None:
        """Replace every worker by one with today's configuration; keep the old ones when that does not start."""
        try:
            self._settings = self._reload()
        except PawlError as exc:
            log.error("configuration_refused", reason=str(exc))
            return
        old = list(self._workers)
        for index in range(max(len(old), self._n_workers)):
            if index < self._n_workers and not await self._has_added_worker():
                return
            if index < len(old):
                self._retire(old[index])
        await self._drain.stop(signal.SIGTERM, DRAIN_STOP_S)
        self._drain = Keeper(DRAIN, self._spawner)
        self._drain.begin()
        log.info("gateway_restarted", workers=len(self._workers))

    async def _has_added_worker(self) -> bool:
        try:
            await self._add_worker()
        except StartFailed as exc:
            self._workers.pop()
            log.error("restart_abandoned", code=exc.code)
            return False
        return True

    def _retire(self, worker: Keeper) -> None:
        self._workers.remove(worker)
        task = asyncio.create_task(worker.stop(RETIRE, LINGER_S + self._stop_s))
        self._retiring[worker] = task
        task.add_done_callback(lambda _: self._retiring.pop(worker, None))

    @property
    def _stop_s(self) -> float:
        return self._settings.serving.drain_grace_s + STOP_MARGIN_S

    async def _stop(self) -> None:
        """Workers first, then the drain has one more try at what they left."""
        self._spawner.stop_listening()
        for worker in self._retiring:
            worker.send(signal.SIGTERM)
        stopping = (worker.stop(signal.SIGTERM, self._stop_s) for worker in self._workers)
        await asyncio.gather(*stopping, *self._retiring.values())
        await self._drain.stop(signal.SIGTERM, DRAIN_STOP_S)


def supervise(settings: Settings, environment: Mapping[str, str], reload: Callable[[], Settings]) -> int:
    """Run a gateway until it is told to stop; the exit code.

    Args:
        environment: Of the children, which read the configuration by it.
        reload: The configuration as it is now, when it is to be read again.

    Raises:
        ConfigurationError: the address cannot be listened on.
    """
    listeners = listen(settings.serving.host, settings.serving.port)
    spawner = Spawner(listeners, Board.create(), environment)
    return asyncio.run(Supervisor(settings, spawner, reload).run())


def listen(host: str, port: int) -> list[socket.socket]:
    """Sockets for every address of the host, IPv4 and IPv6.

    Raises:
        ConfigurationError: another process has the port, or the host is not ours.
    """
    until = time.monotonic() + BIND_PATIENCE_S
    while True:
        try:
            return _bound(host, port)
        except OSError as exc:
            if exc.errno != errno.EADDRINUSE:
                raise ConfigurationError(f"serving.host {host}, port {port}: {exc.strerror or exc}") from exc
            if time.monotonic() > until:
                raise ConfigurationError(f"serving.port {port} is in use by another process") from exc
        time.sleep(BIND_POLL_S)


def _bound(host: str, port: int) -> list[socket.socket]:
    found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    sockets: list[socket.socket] = []
    try:
        for family, address in dict.fromkeys((family, address) for family, _, _, _, address in found):
            sockets.append(_listening(family, address))
    except OSError:
        for opened in sockets:
            opened.close()
        raise
    return sockets


def _listening(family: int, address: tuple[object, ...]) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener
