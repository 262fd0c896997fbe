"""Everything on one machine: engine, gateway and worker as supervised child processes with one configuration file."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType

import httpx2
import structlog
import yaml

from pawl.database import open_database, upgrade
from pawl.errors import ConfigurationError, PawlError, Unreachable
from pawl.settings import ENV_PREFIX, ModelSettings, Settings
from serving.children import ending_with_parent
from serving.engine_process import EngineProcess, served_name

log = structlog.get_logger()

DEFAULT_ALIAS = "assistant"
POLL_S = 0.2
READY_S = 60.0
STOP_MARGIN_S = 35.0
"""On top of the grace that running requests have: the gateway's supervisor ends its workers before this does."""
RESTART_PAUSES_S = (1.0, 2.0, 5.0, 10.0, 30.0)
SECRETS = {"auth": {"secret"}, "database": {"password"}}
"""Never written to the file: children inherit them through the environment they came in."""
SECRET_VARIABLES = frozenset(
    f"{ENV_PREFIX}{section}__{key}".upper() for section, keys in SECRETS.items() for key in keys
)


def is_inherited(variable: str) -> bool:
    """Whether a child gets this environment variable: all but settings, and of those the secrets."""
    return not variable.startswith(ENV_PREFIX) or variable in SECRET_VARIABLES


class Child:
    """One `pawl` command as a process of its own."""

    def __init__(self, name: str, config: Path, log_path: Path, *, stop_s: float) -> None:
        self.name = name
        self.stop_s = stop_s
        self._config = config
        self._log_path = log_path
        self._process: subprocess.Popen[bytes] | None = None
        self.n_restarts = 0

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def start(self) -> None:
        # The file says it all, and variables would win over it; but secrets are not in the file.
        inherited = {name: value for name, value in os.environ.items() if is_inherited(name)}
        environment = {**inherited, "PAWL_CONFIG": str(self._config)}
        command = [sys.executable, "-m", "pawl.cli.main", self.name]
        with self._log_path.open("ab") as output:
            self._process = subprocess.Popen(
                command,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=ending_with_parent(),
            )

    def has_ended(self) -> bool:
        return self._process is None or self._process.poll() is not None

    def stop(self) -> None:
        if self._process is None:
            return
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(self.stop_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(self.stop_s)


class Stack:
    """Engine, gateway and worker, started in order of need and stopped in the other."""

    def __init__(self, settings: Settings, directory: Path) -> None:
        if settings.engine.model is None:
            raise ConfigurationError("engine.model is not set")
        self.settings = settings
        self.directory = directory
        self.config = directory / "pawl.yaml"
        self._logs = directory / "logs"
        stop_s = settings.serving.drain_grace_s + STOP_MARGIN_S
        self.gateway = Child("serve", self.config, self._logs / "gateway.log", stop_s=stop_s)
        self.worker = Child("worker", self.config, self._logs / "worker.log", stop_s=stop_s)
        self.engine: EngineProcess | None = None
        self._n_engine_restarts = 0

    @property
    def url(self) -> str:
        return f"http://{self.settings.serving.host}:{self.settings.serving.port}"

    def start(self) -> None:
        """Start everything; return when the gateway is ready.

        Raises:
            PawlError: a part did not come up; says which, and its log says why.
        """
        self._logs.mkdir(parents=True, exist_ok=True)
        write_config(self.settings, self.config)
        database = open_database(self.settings.database)
        upgrade(database)
        database.close()
        self.start_engine()
        self.gateway.start()
        self.worker.start()
        self._wait(self.gateway, f"{self.url}/health/ready")

    def start_engine(self) -> None:
        """Start vLLM and wait until it answers."""
        assert self.settings.engine.model is not None
        engine = self.settings.engine
        if is_taken(engine.host, engine.port):
            raise ConfigurationError(f"engine.port {engine.port} is in use by another process")
        with (self._logs / "engine.log").open("ab") as output:
            self.engine = EngineProcess(self.settings.engine, self.settings.engine.model, log=output)
        self.engine.wait_until_ready()

    def restart_engine(self) -> None:
        """One attempt to start vLLM again, after a pause that grows; one that fails leaves no process behind."""
        pause_s = restart_pause_s(self._n_engine_restarts)
        log.warning("child_ended", child="engine", restart_in_s=pause_s)
        time.sleep(pause_s)
        self._n_engine_restarts += 1
        try:
            self.start_engine()
        except PawlError as exc:
            log.error("engine_not_restarted", reason=str(exc))
            if self.engine is not None:
                self.engine.stop()

    def stop(self) -> None:
        """Stop everything that runs."""
        self.gateway.stop()
        self.worker.stop()
        if self.engine is not None:
            self.engine.stop()

    def watch(self) -> None:
        """Start again what ends by itself, with growing pauses, for ever."""
        while True:
            for child in (self.gateway, self.worker):
                if child.has_ended():
                    pause_s = restart_pause_s(child.n_restarts)
                    log.warning("child_ended", child=child.name, restart_in_s=pause_s)
                    time.sleep(pause_s)
                    child.n_restarts += 1
                    child.start()
            if self.engine is not None and self.engine.has_ended():
                self.restart_engine()
            time.sleep(POLL_S)

    def _wait(self, child: Child, url: str) -> None:
        until = time.monotonic() + READY_S
        while time.monotonic() < until:
            with suppress(httpx2.HTTPError):
                if httpx2.get(url, timeout=2.0).status_code == 200:
                    return
            if child.has_ended():
                raise ConfigurationError(f"`pawl {child.name}` ended instead of starting: see {self._logs}")
            time.sleep(POLL_S)
        raise Unreachable(f"`pawl {child.name}` was not ready within {READY_S:g} s: see {self._logs}")


def restart_pause_s(n_restarts: int) -> float:
    """How long to wait before the next restart of a child that has been restarted so often."""
    return RESTART_PAUSES_S[min(n_restarts, len(RESTART_PAUSES_S) - 1)]


def is_taken(host: str, port: int) -> bool:
    """Whether something listens there already; it would be taken for our own engine."""
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex((host, port)) == 0


def write_config(settings: Settings, path: Path) -> None:
    """The settings as a file for the children, secrets left out."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tree = settings.model_dump(mode="json", exclude_defaults=True, exclude=SECRETS)
    path.write_text(yaml.safe_dump(tree, sort_keys=False))


def on_one_machine(settings: Settings, model: str | None, port: int | None) -> Settings:
    """The settings of a stack on this machine: where no alias is configured, `assistant` is the engine's model."""
    engine = settings.engine.model_copy(update={"model": model} if model else {})
    serving = settings.serving.model_copy(update={"port": port} if port else {})
    if not serving.models and engine.model is not None:
        url = f"http://{engine.host}:{engine.port}"
        alone = ModelSettings(engines=[url], champion=served_name(engine, engine.model))
        serving = serving.model_copy(update={"models": {DEFAULT_ALIAS: alone}})
    return settings.model_copy(update={"engine": engine, "serving": serving})


def run_until_signalled(stack: Stack, announce: Callable[[], None]) -> None:
    """Start a stack, say so, keep it up, and stop it on SIGINT or SIGTERM, while it starts too."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _interrupt)
    try:
        stack.start()
        announce()
        stack.watch()
    except KeyboardInterrupt:
        pass
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)  # Stopping takes its time, and must not be cut short.
        stack.stop()


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt
