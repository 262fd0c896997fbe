"""The gateway as people run it: `pawl serve` in a process of its own, to be killed and stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx2
import yaml

from pawl.settings import DatabaseSettings
from tests.gateway_configuration import configuration_of, make_schema

READY_S = 150.0
WORKER = b"serving.worker_process"


class GatewayProcess:
    """One `pawl serve`, which has children, with a configuration file of its own."""

    def __init__(self, directory: Path, configuration: Mapping[str, Any]) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.url = f"http://127.0.0.1:{configuration['serving']['port']}"
        self.log = directory / "gateway.log"
        self._config = directory / "pawl.yaml"
        self._process: subprocess.Popen[bytes] | None = None
        self._orphans: list[int] = []
        self.configure(configuration)

    def configure(self, configuration: Mapping[str, Any]) -> None:
        """What the next start or restart will read."""
        self._config.write_text(yaml.safe_dump(dict(configuration)))

    def launch(self, *arguments: str) -> None:
        """Start it, and return at once."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "pawl.cli.main", "serve", *arguments],
                env={**os.environ, "PAWL_CONFIG": str(self._config)},
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def start(self) -> float:
        """Start it; return how many seconds it took to become ready."""
        started = time.monotonic()
        self.launch()
        assert self._process is not None
        while time.monotonic() - started < READY_S:
            assert self._process.poll() is None, self.log.read_text()
            with suppress(httpx2.HTTPError):
                if httpx2.get(f"{self.url}/health/ready", timeout=5.0).status_code == 200:
                    return time.monotonic() - started
            time.sleep(0.02)
        self.close()
        raise AssertionError(f"the gateway was not ready within {READY_S:g} s")

    def workers(self) -> list[int]:
        """The process ids of the workers."""
        assert self._process is not None
        return [pid for pid in children_of(self._process.pid) if WORKER in command_of(pid)]

    def ready_workers(self) -> list[int]:
        """Those that serve by now, as the log says."""
        said = {line["pid"] for line in self.events() if line["event"] == "child_ready"}
        return [pid for pid in self.workers() if pid in said]

    def events(self) -> list[dict[str, Any]]:
        """What was logged, other lines left out."""
        lines = self.log.read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}\n")]

    def kill(self) -> None:
        """SIGKILL to the parent alone; the kernel tells its children, which stop in order."""
        assert self._process is not None
        self._orphans += children_of(self._process.pid)
        self._process.kill()
        self._process.wait(60)

    def kill_all(self) -> None:
        """SIGKILL to every process: no handler runs, nothing is flushed."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)  # It shall not start others meanwhile.
        for pid in (*children_of(self._process.pid), self._process.pid):
            send(pid, signal.SIGKILL)
        self._process.wait(60)

    def reload(self) -> None:
        """SIGHUP: a restart without a dropped connection."""
        assert self._process is not None
        self._process.send_signal(signal.SIGHUP)

    def terminate(self) -> None:
        """SIGTERM, and return at once."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)

    def wait(self, timeout_s: float) -> int:
        """The exit code, once it has ended."""
        assert self._process is not None
        return self._process.wait(timeout_s)

    def close(self) -> None:
        """Make sure that all of it is gone."""
        if self._process is not None and self._process.poll() is None:
            self.kill_all()
        for pid in self._orphans:
            if WORKER in command_of(pid):
                send(pid, signal.SIGKILL)


def process_in(directory: Path, engine_url: str, **serving: Any) -> GatewayProcess:
    """A gateway that has not been started, with an empty database of its own."""
    configuration = configuration_of(directory, engine_url, **serving)
    make_schema(DatabaseSettings(**configuration["database"]))
    return GatewayProcess(directory, configuration)


def send(pid: int, number: int) -> None:
    """A signal to a process that may be gone."""
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def children_of(pid: int) -> list[int]:
    """Process ids, as /proc tells them."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            if int(fields[1]) == pid and fields[0] != "Z":
                found.append(int(path.parent.name))
    return found


def command_of(pid: int) -> bytes:
    """A process's command line; empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
