"""The engine's command line, and its life as a child: a small script stands in for the interpreter with vLLM."""

from __future__ import annotations

import os
import shlex
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pawl.errors import ConfigurationError, Unreachable
from pawl.settings import EngineSettings
from serving.engine_process import (
    EngineProcess,
    describe_command,
    engine_command,
    engine_environment,
    is_healthy,
    served_name,
)
from tests.servers import free_port
from tests.serving.waiting import eventually

HEALTHY = """
child = subprocess.Popen([sys.executable, "-c", STUBBORN])
open(sys.argv[0] + ".child", "w").write(str(child.pid))
class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()
    def log_message(self, *_): pass
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Health).serve_forever()
"""
DIES = "print('no kernel image is available'); sys.exit(7)"
SILENT = "time.sleep(60)"
PREAMBLE = f"""#!{sys.executable}
import http.server, subprocess, sys, time
STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
"""

Make = Callable[[str], EngineProcess]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Start a stand-in that does what its body says; its log is `engine.log`."""
    started: list[EngineProcess] = []

    def make_one(body: str) -> EngineProcess:
        script = tmp_path / "python"
        script.write_text(PREAMBLE + body)
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
        settings = EngineSettings(python=script, port=free_port(), shutdown_timeout_s=1, start_timeout_s=60.0)
        if body == SILENT:
            settings = settings.model_copy(update={"start_timeout_s": 0.3})
        with (tmp_path / "engine.log").open("wb") as log:
            started.append(EngineProcess(settings, "some/model", log=log))
        return started[-1]

    yield make_one
    for process in started:
        process.stop()


def value_of(command: list[str], flag: str) -> str:
    return command[command.index(flag) + 1]


def test_the_command_on_a_gpu() -> None:
    settings = EngineSettings(python=Path("/venv/bin/python"), max_model_len=4096, gpu_memory_utilization=0.8)
    settings = settings.model_copy(update={"extra_args": ["--seed", "7"]})
    command = engine_command(settings, "org/model-7b", on_cpu=False)
    assert command[:3] == ["/venv/bin/python", "-m", "vllm.entrypoints.openai.api_server"]
    assert value_of(command, "--model") == "org/model-7b"
    assert value_of(command, "--served-model-name") == "model-7b"
    assert value_of(command, "--dtype") == "auto"
    assert value_of(command, "--max-model-len") == "4096"
    assert value_of(command, "--gpu-memory-utilization") == "0.8"
    assert "--enable-lora" in command
    assert "--enforce-eager" not in command
    assert "--lora-target-modules" not in command
    assert command[-2:] == ["--seed", "7"]


def test_the_command_on_a_cpu() -> None:
    settings = EngineSettings(gpu_memory_utilization=0.8, max_lora_rank=8, max_loras=2)
    command = engine_command(settings, "model", on_cpu=True)
    assert value_of(command, "--dtype") == "float32"
    assert value_of(command, "--max-lora-rank") == "8"
    assert "--enforce-eager" in command
    assert "--gpu-memory-utilization" not in command
    assert "lm_head" not in command[command.index("--lora-target-modules") :]
    chosen = engine_command(EngineSettings(dtype="bfloat16", lora_target_modules=["c_attn"]), "model", on_cpu=True)
    assert value_of(chosen, "--dtype") == "bfloat16"
    assert chosen[chosen.index("--lora-target-modules") :] == ["--lora-target-modules", "c_attn"]


def test_the_name_is_the_last_part_of_the_model_unless_configured() -> None:
    assert served_name(EngineSettings(), "/models/practice/") == "practice"
    assert served_name(EngineSettings(served_name="base-model"), "/models/practice") == "base-model"


def test_the_environment_keeps_the_callers_and_adds_what_vllm_needs(tmp_path: Path) -> None:
    gpu = engine_environment({"HOME": "/root"}, "org/model", on_cpu=False)
    assert gpu == {
        "HOME": "/root",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }
    cpu = engine_environment({"VLLM_CPU_KVCACHE_SPACE": "8"}, str(tmp_path), on_cpu=True)
    assert cpu["VLLM_CPU_KVCACHE_SPACE"] == "8"
    assert cpu["HF_HUB_OFFLINE"] == "1"
    assert engine_environment({}, "org/model", on_cpu=True)["VLLM_CPU_KVCACHE_SPACE"] == "1"


def test_a_shell_takes_the_described_command_as_it_is_meant() -> None:
    environment = {"VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1 $HOME", "SECRET": "hidden"}
    show = "import os, sys; print(sys.argv[1:], os.environ['VLLM_CPU_KVCACHE_SPACE'])"
    described = describe_command([sys.executable, "-c", show, "it's; a $HOME", ""], environment)
    done = subprocess.run(["sh", "-c", described], capture_output=True, text=True, timeout=30)
    arguments = ["it's; a $HOME", ""]
    assert done.stdout == f"{arguments} 1 $HOME\n"
    assert "hidden" not in described
    assert shlex.split(described)[0] == "VLLM_NO_USAGE_STATS=1"


def ended(pid: int) -> bool:
    """Gone, or waiting only for its parent to notice."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_ready_when_it_answers_and_stopped_with_everything_it_started(make: Make, tmp_path: Path) -> None:
    process = make(HEALTHY)
    assert process.wait_until_ready() > 0
    eventually(lambda: is_healthy(process.url))
    assert not process.has_ended()
    grandchild = int((tmp_path / "python.child").read_text())
    assert not ended(grandchild)
    process.stop()
    assert process.has_ended()
    assert not is_healthy(process.url)
    eventually(lambda: ended(grandchild))


def test_an_engine_that_dies_names_its_log(make: Make, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"exit code 7: see .*engine\.log"):
        make(DIES).wait_until_ready()
    assert "no kernel image" in (tmp_path / "engine.log").read_text()


def test_an_engine_that_never_answers_is_out_of_reach(make: Make) -> None:
    with pytest.raises(Unreachable, match=r"did not answer within 0\.3 s"):
        make(SILENT).wait_until_ready()


def test_an_interpreter_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"engine\.python .*nowhere"):
        EngineProcess(EngineSettings(python=tmp_path / "nowhere"), "model")


def test_a_child_has_a_group_of_its_own(make: Make) -> None:
    process = make(SILENT)
    assert os.getpgid(process.pid) == process.pid != os.getpgid(0)
