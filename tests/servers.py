"""Real servers for tests: an ASGI application on a free port of the loopback interface, and a private PostgreSQL."""

from __future__ import annotations

import asyncio
import os
import pwd
import random
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import repeat
from pathlib import Path
from typing import Any, LiteralString

import psycopg
import uvicorn
from psycopg import sql

from serving.gateway import Gateway
from serving.server import GatewayServer, server_config

FIRST_PORT = 10_000
FIRST_EPHEMERAL_PORT = 32_768
"""Where the system does not say."""


def first_ephemeral_port() -> int:
    """The first of those that the system itself hands out."""
    try:
        return int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except OSError:
        return FIRST_EPHEMERAL_PORT


def _ports() -> Iterator[int]:
    """Each once, in an order of chance, and none that the system could give to somebody else before it is used.

    Nor while it is not used: some tests stop a server and start it again at the same port. Processes that share the
    tests have ports of their own, for neither sees what the other is about to use.
    """
    number = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    n_processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    ports = list(range(FIRST_PORT + number, first_ephemeral_port(), n_processes))
    random.SystemRandom().shuffle(ports)
    yield from ports
    yield from repeat(0)


_PORTS = _ports()


def free_port() -> int:
    """A port that was free a moment ago, and that no other call has been given."""
    while True:
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", next(_PORTS)))
            return int(probe.getsockname()[1])


class PromptAsyncio:
    """The `asyncio` that uvicorn uses in tests: a server looks ten times as often whether it is to stop.

    It looks at every tenth of a second, and lets another one pass before it ends. That is nothing to a service, and to
    a thousand tests that each start a gateway and an engine it is the better part of ten minutes.
    """

    def __getattr__(self, name: str) -> Any:
        return getattr(asyncio, name)

    async def sleep(self, delay: float) -> None:
        await asyncio.sleep(delay / 10)


@contextmanager
def running(app: Any, port: int = 0) -> Iterator[str]:
    """Serve `app` in a thread, a gateway as `pawl serve` does; yield its base URL."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", port or free_port()))
    server = _server_for(app)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    deadline = time.monotonic() + 30
    while not server.started and thread.is_alive() and time.monotonic() < deadline:
        time.sleep(0.002)
    assert server.started, "the server did not start"
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
        listener.close()


def _server_for(app: Any) -> uvicorn.Server:
    if isinstance(app, Gateway):
        config = server_config(app)
        config.timeout_graceful_shutdown = 3
        return GatewayServer(config, app)
    return uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=3, ws="none"))


class PostgreSQL:
    """A private server on a free port, in a directory of its own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.port = free_port()
        self._bin = _postgresql_bin()
        self._user = _unprivileged_user()
        directory.mkdir(parents=True, exist_ok=True)
        if self._user:
            shutil.chown(directory, self._user)
        self._run("initdb", "-D", str(directory / "data"), "-A", "trust", "-U", "pawl", "--no-sync", "-E", "UTF8")

    def start(self) -> None:
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": self.port,
            "unix_socket_directories": self.directory,
            "max_connections": 50,
            "fsync": "off",
        }
        options = " ".join(f"-c {name}={value}" for name, value in settings.items())
        log = str(self.directory / "log")
        self._run("pg_ctl", "-D", str(self.directory / "data"), "-l", log, "-w", "-o", options, "start")

    def stop(self, mode: str = "immediate") -> None:
        with suppress(subprocess.CalledProcessError):
            self._run("pg_ctl", "-D", str(self.directory / "data"), "-m", mode, "-w", "stop")

    def create_database(self, name: str, template: str = "template1") -> str:
        """A fresh database, a copy of another one; returns its URL."""
        self._execute("CREATE DATABASE {} TEMPLATE {}", name, template)
        return self._url(name)

    def drop_database(self, name: str) -> None:
        """Remove it, whoever is still connected; what is not removed now goes with the directory."""
        with suppress(psycopg.Error):
            self._execute("DROP DATABASE {} WITH (FORCE)", name)

    def _execute(self, statement: LiteralString, *names: str) -> None:
        with psycopg.connect(self._url("postgres"), autocommit=True, connect_timeout=60) as connection:
            connection.execute(sql.SQL(statement).format(*map(sql.Identifier, names)))

    def _url(self, name: str) -> str:
        return f"postgresql://pawl@127.0.0.1:{self.port}/{name}"

    def _run(self, program: str, *arguments: str) -> None:
        # PostgreSQL refuses to run as root.
        prefix = ["runuser", "-u", self._user, "--"] if self._user else []
        command = [*prefix, str(self._bin / program), *arguments]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd="/", timeout=120)


@contextmanager
def private_postgresql() -> Iterator[PostgreSQL]:
    """A running one, whose directory goes with it."""
    directory = Path(tempfile.mkdtemp(prefix="pawl-pg-"))
    directory.chmod(0o755)  # Its user is not ours.
    server = PostgreSQL(directory)
    server.start()
    try:
        yield server
    finally:
        server.stop()
        shutil.rmtree(directory, ignore_errors=True)


def _postgresql_bin() -> Path:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: float(path.parent.name))
    if found:
        return found[-1]
    on_path = shutil.which("initdb")
    assert on_path, "PostgreSQL is missing: run scripts/install_tools.sh"
    return Path(on_path).parent


def _unprivileged_user() -> str | None:
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        with suppress(KeyError):
            return pwd.getpwnam(name).pw_name
    raise AssertionError("no unprivileged user to run PostgreSQL as")
