"""The unmodified Node client of OpenAI against the gateway, part by part."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serving.keyed import keyed_gateway

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).parent / "node_sdk" / "conversation.mjs"
MODULE = ROOT / ".tools" / "node_modules" / "openai" / "index.mjs"
TEXT = "Water it in the morning."

Part = Callable[[str], Any]


@pytest.fixture(scope="module")
def part(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Part]:
    """Runs one part of the conversation; what Node tells of it."""
    node = shutil.which("node")
    assert node, "Node is missing: run scripts/install_tools.sh"
    assert MODULE.exists(), "OpenAI's client for Node is missing: run scripts/install_tools.sh"
    with keyed_gateway(tmp_path_factory.mktemp("node"), ["infer"]) as (served, keys):
        environment = {
            "PATH": os.environ["PATH"],
            "OPENAI_MODULE": MODULE.as_uri(),
            "GATEWAY": served.url,
            "API_KEY": keys["infer"],
        }

        def run(name: str) -> Any:
            command = [node, str(SCRIPT), name]
            ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
            assert ended.returncode == 0, ended.stderr
            return json.loads(ended.stdout)

        yield run


def test_chat(part: Part) -> None:
    told = part("chat")
    assert told["id"].startswith("chatcmpl-")
    assert told["hasRequestId"]
    assert told["whole"] == told["streamed"] == told["helper"] == told["plain"] == TEXT
    assert told["calls"] == [{"name": "water", "arguments": '{"plant": "fern"}'}]
    assert (told["choices"], told["logprob"]) == ([0, 1], -0.5)


def test_responses(part: Part) -> None:
    told = part("responses")
    assert told["whole"] == told["streamed"] == told["again"] == TEXT
    assert (told["gone"]["name"], told["gone"]["code"]) == ("NotFoundError", "completion_not_found")


def test_embeddings(part: Part) -> None:
    assert part("embeddings") == [[0.25, -0.5, 0.75]] * 2


def test_models(part: Part) -> None:
    assert part("models") == {"names": ["assistant"], "owner": "pawl"}


def test_stored_completions(part: Part) -> None:
    told = part("stored")
    assert told["isFound"]
    assert told["isListed"]
    assert told["asked"] == ["When do I water roses?"]
    assert told["metadata"] == {"page": "ferns"}
    assert told["deleted"]
    assert told["gone"]["name"] == "NotFoundError"


def test_errors(part: Part) -> None:
    told = part("errors")
    shown = {name: (error["name"], error["status"], error["code"]) for name, error in told.items()}
    assert shown == {
        "missing": ("NotFoundError", 404, "model_not_found"),
        "wrong": ("BadRequestError", 400, told["wrong"]["code"]),
        "key": ("AuthenticationError", 401, "invalid_api_key"),
    }
    assert told["wrong"]["param"] == "temperature"
    assert all(error["type"] == "invalid_request_error" and error["hasRequestId"] for error in told.values())
