"""The vLLM server: the command line Pawl needs, and its life as a child process."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

import httpx2

from pawl.errors import ConfigurationError, Unreachable
from pawl.settings import EngineSettings
from serving.children import ending_with_parent

POLL_S = 0.25
ENVIRONMENT = {
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}
CPU_CACHE_GIB = "1"
LLAMA_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""All but the output layer: see `engine.lora_target_modules`."""


def engine_python(settings: EngineSettings) -> Path:
    """The interpreter that has vLLM: the configured one, else `.venv-engine`, else this one."""
    if settings.python is not None:
        return settings.python
    beside = Path(".venv-engine/bin/python")
    return beside.absolute() if beside.exists() else Path(sys.executable)


def engine_command(settings: EngineSettings, model: str, *, on_cpu: bool) -> list[str]:
    """The vLLM server with runtime LoRA.

    On a CPU the tiny practice model runs in float32: bfloat16 with LoRA stops some CPU builds of vLLM 0.32 on the first
    request to the base model.
    """
    arguments = {
        "--model": model,
        "--served-model-name": served_name(settings, model),
        "--host": settings.host,
        "--port": str(settings.port),
        "--dtype": "float32" if on_cpu and settings.dtype == "auto" else settings.dtype,
        "--max-lora-rank": str(settings.max_lora_rank),
        "--max-loras": str(settings.max_loras),
        "--max-cpu-loras": str(settings.max_cpu_loras),
        "--shutdown-timeout": str(settings.shutdown_timeout_s),
    }
    if settings.max_model_len is not None:
        arguments["--max-model-len"] = str(settings.max_model_len)
    if settings.gpu_memory_utilization is not None and not on_cpu:
        arguments["--gpu-memory-utilization"] = str(settings.gpu_memory_utilization)
    flags = ["--enable-lora", "--disable-uvicorn-access-log"]
    if on_cpu:
        flags.append("--enforce-eager")
    if layers := settings.lora_target_modules or (LLAMA_LAYERS if on_cpu else ()):
        flags += ["--lora-target-modules", *layers]
    pairs = [text for pair in arguments.items() for text in pair]
    module = [str(engine_python(settings)), "-m", "vllm.entrypoints.openai.api_server"]
    return [*module, *pairs, *flags, *settings.extra_args]


def served_name(settings: EngineSettings, model: str) -> str:
    """The name the engine answers to: configured, else the last part of the model's path or hub name."""
    return settings.served_name or Path(model).name


def engine_environment(environ: Mapping[str, str], model: str, *, on_cpu: bool) -> dict[str, str]:
    """What vLLM needs in its environment; a model on disk needs no hub."""
    extra = dict(ENVIRONMENT)
    if Path(model).exists():
        extra["HF_HUB_OFFLINE"] = "1"
    if on_cpu:
        extra["VLLM_CPU_KVCACHE_SPACE"] = environ.get("VLLM_CPU_KVCACHE_SPACE", CPU_CACHE_GIB)
    return {**environ, **extra}


def has_gpu() -> bool:
    """Whether an NVIDIA driver shows a device. Looks at the device files, so nothing heavy is imported."""
    return any(Path("/dev").glob("nvidia[0-9]*"))


class EngineProcess:
    """vLLM as a child: started, waited for, stopped with everything it started."""

    def __init__(self, settings: EngineSettings, model: str, *, log: IO[bytes] | int = subprocess.DEVNULL) -> None:
        self.url = f"http://{settings.host}:{settings.port}"
        self._settings = settings
        self._log_name = "its log" if isinstance(log, int) else str(log.name)
        on_cpu = not has_gpu()
        command = engine_command(settings, model, on_cpu=on_cpu)
        try:
            self._process = subprocess.Popen(
                command,
                env=engine_environment(os.environ, model, on_cpu=on_cpu),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=ending_with_parent(),
            )
        except OSError as exc:
            raise ConfigurationError(f"engine.python {command[0]} cannot be run: {exc.strerror}") from exc

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_until_ready(self) -> float:
        """Return how many seconds it took.

        Raises:
            ConfigurationError: the engine ended instead of starting; its log says why.
            Unreachable: it did not answer within `engine.start_timeout_s`.
        """
        started = time.monotonic()
        while time.monotonic() - started < self._settings.start_timeout_s:
            if self._process.poll() is not None:
                code = self._process.returncode
                raise ConfigurationError(f"the engine ended with exit code {code}: see {self._log_name}")
            if is_healthy(self.url):
                return time.monotonic() - started
            time.sleep(POLL_S)
        raise Unreachable(f"the engine at {self.url} did not answer within {self._settings.start_timeout_s:g} s")

    def stop(self) -> None:
        """Let running requests finish within the engine's own grace period, then make an end of the whole group."""
        self._signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(self._settings.shutdown_timeout_s + 5)
        self._signal(signal.SIGKILL)
        self._process.wait(10)

    def has_ended(self) -> bool:
        """Whether the process is gone."""
        return self._process.poll() is not None

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)


def is_healthy(url: str) -> bool:
    """Whether an engine answers its health check."""
    try:
        return httpx2.get(f"{url}/health", timeout=2.0).status_code == 200
    except httpx2.HTTPError:
        return False


def describe_command(command: Sequence[str], environment: Mapping[str, str]) -> str:
    """The command as a shell would take it, with the environment Pawl adds."""
    names = [name for name in (*ENVIRONMENT, "VLLM_CPU_KVCACHE_SPACE", "HF_HUB_OFFLINE") if name in environment]
    # The name stays outside the quotes: a shell takes 'NAME=two words' for a program.
    settings = [f"{name}={shlex.quote(environment[name])}" for name in names]
    return " ".join([*settings, shlex.join(command)])
