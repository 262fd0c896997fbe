"""What the pages tell people to run, run against a real gateway."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import sqlalchemy as sa
import yaml

from monitoring.metrics import REGISTRY
from pawl.database import open_database
from pawl.schema import feedback_events, interactions
from pawl.settings import load_settings
from serving.admin.rollouts import VerdictView
from serving.gateway import Gateway
from serving.routes import ROUTES
from tests.docs.pages import PAGES, ROOT, blocks
from tests.fake_vllm import FakeVLLM
from tests.serving.waiting import eventually

DOCUMENTED = "http://127.0.0.1:8080"
README = ROOT / "README.md"
API = ROOT / "docs" / "api.md"
FEEDBACK_TYPES = {"thumbs", "rating", "edit", "choice", "regenerate", "report", "copy", "comment"}


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)


def stored(gateway: Gateway, table: sa.Table, n: int) -> Sequence[sa.Row[tuple[object, ...]]]:
    """The first `n` rows, once they have reached the shared database."""
    database = open_database(gateway.settings.database)

    def look() -> Sequence[sa.Row[tuple[object, ...]]] | None:
        with database.engine.connect() as connection:
            rows = connection.execute(sa.select(table).order_by(table.c.created_at)).all()
        return rows if len(rows) >= n else None

    try:
        return eventually(look)
    finally:
        database.close()


def assert_tells_of_two_attempts(gateway: Gateway, engine: FakeVLLM) -> None:
    first, second = stored(gateway, interactions, 2)
    assert second.regenerate_of == first.id
    votes = stored(gateway, feedback_events, 2)
    assert [(vote.interaction_id, json.loads(vote.value)) for vote in votes] == [(first.id, "down"), (second.id, "up")]
    assert "user" not in engine.seen[0], "the engine does not learn who asked"


def test_the_readmes_example_makes_a_regeneration_and_two_votes(
    gateway_url: str, gateway: Gateway, engine: FakeVLLM
) -> None:
    (example,) = blocks(README, "python")
    assert DOCUMENTED in example
    done = run_python("-c", example.replace(DOCUMENTED, gateway_url))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == engine.behaviour.text
    assert_tells_of_two_attempts(gateway, engine)


def test_the_example_script_does_the_same(gateway_url: str, gateway: Gateway, engine: FakeVLLM) -> None:
    done = run_python("examples/chat_with_feedback.py", "--base-url", f"{gateway_url}/v1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [engine.behaviour.text] * 2
    assert_tells_of_two_attempts(gateway, engine)


@pytest.mark.skipif(shutil.which("curl") is None, reason="the page's examples are for curl")
def test_the_api_pages_examples_run_one_after_the_other(gateway_url: str, gateway: Gateway) -> None:
    script = "\n".join(["set -euo pipefail", *blocks(API, "sh")]).replace(DOCUMENTED, gateway_url)
    command = ["bash", "-c", f"export no_proxy=127.0.0.1\n{script}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    (promised,) = blocks(API, "json")
    assert json.loads(done.stdout[done.stdout.rindex('{"error"') :]) == json.loads(promised)
    assert done.stdout.count('"error"') == 1, "only the example of an error is one"
    assert "data: [DONE]" in done.stdout
    kinds = {event.type for event in stored(gateway, feedback_events, 11)}
    assert kinds == FEEDBACK_TYPES


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda path: path.name)
def test_example_configurations_load(path: Path) -> None:
    settings = load_settings(path, {})
    assert settings.serving.models["assistant"].engines


@pytest.mark.parametrize("page", [README, ROOT / "docs" / "gpu.md"], ids=lambda page: page.name)
def test_configurations_on_pages_load(page: Path, tmp_path: Path) -> None:
    found = blocks(page, "yaml")
    assert found
    for number, text in enumerate(found):
        path = tmp_path / f"{number}.yaml"
        path.write_text(text)
        assert load_settings(path, {}).serving.models


def test_every_yaml_block_is_yaml() -> None:
    found = [text for page in PAGES for text in blocks(page, "yaml")]
    assert all(isinstance(yaml.safe_load(text), dict) for text in found)


def test_what_other_controllers_ask_for_is_there() -> None:
    """Their own schemas are not at hand; what they ask of Pawl must exist."""
    argo = yaml.safe_load((ROOT / "examples" / "delivery" / "argo-rollouts.yaml").read_text())
    (metric,) = argo["spec"]["metrics"]
    url, field = metric["provider"]["web"]["url"], metric["provider"]["web"]["jsonPath"]
    assert urlsplit(url).path in {spec.path for spec in ROUTES}
    assert field.strip("{$.}") in VerdictView.model_fields
    flagger, *_ = yaml.safe_load_all((ROOT / "examples" / "delivery" / "flagger.yaml").read_text())
    names = re.findall(r"pawl_[a-z_]+", flagger["spec"]["query"])
    assert names
    assert set(names) <= {metric.name for metric in REGISTRY.collect()}
