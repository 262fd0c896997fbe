"""The gateway as people run it: `pawl serve` in a process of its own, to be killed and stopped."""

from __future__ import annotations

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

READY_S = 60.0


class GatewayProcess:
    """One `pawl serve` with a configuration file of its own."""

    def __init__(self, directory: Path, configuration: Mapping[str, Any]) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.url = f"http://127.0.0.1:{configuration['serving']['port']}"
        self.log = directory / "gateway.log"
        self._config = directory / "pawl.yaml"
        self._config.write_text(yaml.safe_dump(dict(configuration)))
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> float:
        """Start it; return how many seconds it took to become ready."""
        started = time.monotonic()
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "pawl.cli.main", "serve"],
                env={**os.environ, "PAWL_CONFIG": str(self._config)},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        while time.monotonic() - started < READY_S:
            assert self._process.poll() is None, self.log.read_text()
            with suppress(httpx2.HTTPError):
                if httpx2.get(f"{self.url}/health/ready", timeout=2.0).status_code == 200:
                    return time.monotonic() - started
            time.sleep(0.02)
        raise AssertionError(f"the gateway was not ready within {READY_S:g} s")

    def kill(self) -> None:
        """SIGKILL: no handler runs, nothing is flushed."""
        assert self._process is not None
        self._process.kill()
        self._process.wait(10)

    def terminate(self) -> None:
        """SIGTERM, and return at once."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)

    def wait(self, timeout_s: float) -> int:
        """The exit code, once it has ended."""
        assert self._process is not None
        return self._process.wait(timeout_s)

    def close(self) -> None:
        """Make sure that it is gone."""
        if self._process is not None and self._process.poll() is None:
            self.kill()
