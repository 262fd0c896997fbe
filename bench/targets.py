"""What is measured: the fake engine itself, the gateways others made, and Pawl in several forms.

Each is started fresh for every set of measures, on the core for gateways, and stopped with all its children.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import yaml

from bench.pawl_gateway import make_key, pawl_configuration, pawl_serve
from bench.processes import Seat
from bench.servers import Command, running_command
from tests.servers import free_port

STOP_S = 2.0
"""Its records are thrown away, so nobody waits until they are in the database."""
MAX_CONCURRENCY = 4096
"""Where nothing is to be protected: the others have no such bound, or one far off."""
PEERS = Path(".venv-bench/bin")
"""Where `scripts/install_bench.sh` puts the gateways that pip installs."""


@dataclass(frozen=True, slots=True)
class Running:
    """A gateway that takes requests."""

    port: int
    pid: int | None
    """None: there is no gateway between load and engine."""
    headers: tuple[str, ...] = ()
    health_path: str = "/health"


class Overload(NamedTuple):
    """What a gateway shall protect an engine with: so many requests at once, so many in line."""

    at_once: int
    in_line: int


class Place(NamedTuple):
    """Where a gateway is put."""

    engine_port: int
    directory: Path
    """For its files."""
    seat: Seat
    overload: Overload | None = None
    """How it shall protect the engine; None: not at all."""


class Target(Protocol):
    """A gateway that can be measured."""

    @property
    def name(self) -> str: ...

    def why_missing(self) -> str | None:
        """What keeps it from being measured here, if anything does."""
        ...

    def running(self, place: Place) -> AbstractContextManager[Running]:
        """The gateway, up and ready, for as long as the context lasts."""
        ...


class Direct:
    """No gateway at all."""

    name = "direct"

    def why_missing(self) -> str | None:
        return None

    @contextmanager
    def running(self, place: Place) -> Iterator[Running]:
        yield Running(place.engine_port, None)


class HAProxy:
    """The physical limit: a proxy in C that looks at headers and moves bytes."""

    name = "haproxy"

    def why_missing(self) -> str | None:
        return None if shutil.which("haproxy") else "haproxy is not installed"

    @contextmanager
    def running(self, place: Place) -> Iterator[Running]:
        port = free_port()
        config = place.directory / "haproxy.cfg"
        config.write_text(haproxy_configuration(port, place.engine_port, place.overload))
        command = Command(["haproxy", "-db", "-q", "-f", str(config)], f"http://127.0.0.1:{port}/health", {})
        with running_command(command, place.directory, place.seat) as pid:
            yield Running(port, pid)


def haproxy_configuration(port: int, engine_port: int, overload: Overload | None) -> str:
    """One thread, connections to the engine kept and shared; `http-no-delay`, or small chunks wait for 200 ms."""
    bound = f" maxconn {overload.at_once} maxqueue {overload.in_line}" if overload else ""
    return f"""
global
  nbthread 1
  maxconn 8000
defaults
  mode http
  timeout connect 5s
  timeout client 120s
  timeout server 120s
  timeout queue 5s
  option http-keep-alive
  option http-no-delay
  http-reuse always
frontend clients
  bind 127.0.0.1:{port}
  default_backend engines
backend engines
  server engine 127.0.0.1:{engine_port}{bound}
"""


class VllmRouter:
    """vLLM's own router, in Rust."""

    name = "vllm-router"

    def why_missing(self) -> str | None:
        return None if (PEERS / "vllm-router").exists() else "vllm-router is not installed"

    @contextmanager
    def running(self, place: Place) -> Iterator[Running]:
        port = free_port()
        options = {
            "--host": "127.0.0.1",
            "--port": port,
            "--worker-urls": f"http://127.0.0.1:{place.engine_port}",
            "--policy": "round_robin",
            "--log-level": "error",
            "--prometheus-port": free_port(),
        }
        if bound := place.overload:
            options |= {"--max-concurrent-requests": bound.at_once, "--queue-size": bound.in_line}
        flags = [str(word) for option in options.items() for word in option]
        command = Command([str(PEERS / "vllm-router"), *flags], f"http://127.0.0.1:{port}/health", {})
        with running_command(command, place.directory, place.seat) as pid:
            yield Running(port, pid)


class LiteLLM:
    """LiteLLM's proxy as its documentation tunes it: one worker, no logging, no database, no retries."""

    name = "litellm"

    def why_missing(self) -> str | None:
        return None if (PEERS / "litellm").exists() else "litellm is not installed"

    @contextmanager
    def running(self, place: Place) -> Iterator[Running]:
        port = free_port()
        config = place.directory / "litellm.yaml"
        config.write_text(yaml.safe_dump(litellm_configuration(place.engine_port, place.overload)))
        options = {"--config": config, "--host": "127.0.0.1", "--port": port, "--num_workers": 1, "--telemetry": False}
        flags = [str(word) for option in options.items() for word in option]
        environment = {
            "LITELLM_MODE": "PRODUCTION",
            "LITELLM_LOG": "ERROR",
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
            "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",
        }
        ready = f"http://127.0.0.1:{port}/health/liveliness"
        command = Command([str(PEERS / "litellm"), *flags], ready, environment)
        with running_command(command, place.directory, place.seat) as pid:
            yield Running(port, pid, health_path="/health/liveliness")


def litellm_configuration(engine_port: int, overload: Overload | None) -> dict[str, Any]:
    """One model behind the name that the requests ask for."""
    engine: dict[str, Any] = {
        "model": "hosted_vllm/base-model",
        "api_base": f"http://127.0.0.1:{engine_port}/v1",
        "api_key": "none",
    }
    if overload:
        engine["max_parallel_requests"] = overload.at_once
    return {
        "model_list": [{"model_name": "assistant", "litellm_params": engine}],
        "litellm_settings": {"turn_off_message_logging": True, "telemetry": False, "num_retries": 0},
        "general_settings": {"disable_spend_logs": True, "disable_error_logs": True},
        "router_settings": {"num_retries": 0},
    }


@dataclass(frozen=True, slots=True)
class Pawl:
    """This project's gateway, with keys, assignment to one of two variants, and metrics always on."""

    name: str
    serving: Mapping[str, Any]
    """What this form of it sets under `serving`."""

    def why_missing(self) -> str | None:
        return None

    @contextmanager
    def running(self, place: Place) -> Iterator[Running]:
        port = free_port()
        bound = place.overload
        serving = {**self.serving, "replicas": {"max_concurrency": bound.at_once if bound else MAX_CONCURRENCY}}
        if bound:
            serving["queue"] = {"max_waiting": bound.in_line}
        engines = [f"http://127.0.0.1:{place.engine_port}"]
        configuration = pawl_configuration(place.directory, port, engines, serving)
        key = make_key(configuration)
        with pawl_serve(configuration, place.directory, place.seat, stop_s=STOP_S) as pid:
            yield Running(port, pid, (f"authorization: Bearer {key}",), "/health/live")


RECORDS_ON = "pawl"
RECORDS_OFF = "pawl, records off"
SLOW_LANE = "pawl, ASGI lane"

TARGETS: tuple[Target, ...] = (
    Direct(),
    HAProxy(),
    VllmRouter(),
    LiteLLM(),
    Pawl(RECORDS_ON, {}),
    Pawl(RECORDS_OFF, {"records": "off"}),
    Pawl(SLOW_LANE, {"fast_lane": False}),
)
