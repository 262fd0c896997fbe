"""Versions brought to an MLflow server: one that answers as MLflow 3.17 was seen to."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from pawl.adapter_files import Adapter
from pawl.errors import PublishFailed, Unreachable
from pawl.registry import Model, ModelState
from retrain.mlflow_export import MlflowServer
from tests.retrain.sealed_samples import sealed_adapter

KNOWN = {"error_code": "RESOURCE_ALREADY_EXISTS", "message": "exists"}


@dataclass
class FakeMlflow:
    root: str = "mlflow-artifacts:"
    models: set[str] = field(default_factory=set)
    experiments: list[str] = field(default_factory=list)
    versions: list[dict[str, Any]] = field(default_factory=list)
    aliases: dict[str, str] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    runs: dict[str, str] = field(default_factory=dict)
    tokens: set[str] = field(default_factory=set)
    url: str = ""

    async def answer(self, request: web.Request) -> web.Response:
        self.tokens.add(request.headers.get("Authorization", ""))
        path = request.path.removeprefix("/api/2.0/")
        if path.startswith("mlflow-artifacts/artifacts/"):
            self.files[path.removeprefix("mlflow-artifacts/artifacts/")] = await request.read()
            return web.json_response({})
        body = await request.json() if request.method == "POST" else dict(request.query)
        status, answer = getattr(self, path.removeprefix("mlflow/").replace("-", "_").replace("/", "_"))(body)
        return web.json_response(answer, status=status)

    def registered_models_create(self, body: dict[str, Any]) -> tuple[int, Any]:
        is_known = body["name"] in self.models
        self.models.add(body["name"])
        return (400, KNOWN) if is_known else (200, {"registered_model": body})

    def registered_models_alias(self, body: dict[str, Any]) -> tuple[int, Any]:
        self.aliases[body["alias"]] = body["version"]
        return 200, {}

    def experiments_create(self, body: dict[str, Any]) -> tuple[int, Any]:
        if body["name"] in self.experiments:
            return 400, KNOWN
        self.experiments.append(body["name"])
        return 200, {"experiment_id": "1"}

    def experiments_get_by_name(self, body: dict[str, Any]) -> tuple[int, Any]:
        assert body["experiment_name"] in self.experiments
        return 200, {"experiment": {"experiment_id": "1"}}

    def runs_create(self, body: dict[str, Any]) -> tuple[int, Any]:
        run = f"run{len(self.runs)}"
        self.runs[run] = "RUNNING"
        uri = f"{self.root}/{body['experiment_id']}/{run}/artifacts"
        return 200, {"run": {"info": {"run_id": run, "artifact_uri": uri}}}

    def runs_update(self, body: dict[str, Any]) -> tuple[int, Any]:
        self.runs[body["run_id"]] = body["status"]
        return 200, {}

    def model_versions_search(self, body: dict[str, Any]) -> tuple[int, Any]:
        found = [one for one in self.versions if f"'{one['tags'][0]['value']}'" in body["filter"]]
        return 200, {"model_versions": found} if found else {}

    def model_versions_create(self, body: dict[str, Any]) -> tuple[int, Any]:
        self.versions.append({**body, "version": str(len(self.versions) + 1)})
        return 200, {"model_version": self.versions[-1]}


@pytest.fixture
def mlflow() -> Iterator[FakeMlflow]:
    fake, loop = FakeMlflow(), asyncio.new_event_loop()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", fake.answer)
    runner = web.AppRunner(app)
    loop.run_until_complete(runner.setup())
    loop.run_until_complete(web.TCPSite(runner, "127.0.0.1", 0).start())
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    fake.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield fake
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@pytest.fixture
def adapter(tmp_path: Path) -> Adapter:
    return sealed_adapter(tmp_path / "adapters")


def model_of(adapter: Adapter, state: ModelState = ModelState.CHAMPION) -> Model:
    path = str(adapter.path)
    return Model(
        adapter.name,
        "assistant",
        "tiny",
        "tiny",
        "r0042",
        path,
        adapter.sha256,
        None,
        state,
        adapter.manifest,
        1.0,
        1.0,
    )


def test_a_version_comes_with_its_files_its_origin_and_its_alias(mlflow: FakeMlflow, adapter: Adapter) -> None:
    with closing(MlflowServer(mlflow.url, "secret")) as server:
        assert server.export(model_of(adapter), adapter) == ("assistant", "1", True)
    (version,) = mlflow.versions
    assert version["source"] == "mlflow-artifacts:/1/run0/artifacts/adapter"
    assert {tag["key"]: tag["value"] for tag in version["tags"]} == {
        "pawl.name": adapter.name, "pawl.base": "tiny", "pawl.parent": "tiny", "pawl.run": "r0042",
        "pawl.sha256": adapter.sha256,
    }  # fmt: skip
    assert mlflow.files == {
        f"1/run0/artifacts/adapter/{path.name}": path.read_bytes() for path in adapter.path.iterdir()
    }
    assert (mlflow.aliases, mlflow.runs) == ({"champion": "1"}, {"run0": "FINISHED"})
    assert mlflow.tokens == {"Bearer secret"}


def test_exporting_again_only_moves_the_alias(mlflow: FakeMlflow, adapter: Adapter, tmp_path: Path) -> None:
    other = sealed_adapter(tmp_path / "adapters", seed=2.0, number=43)
    with closing(MlflowServer(mlflow.url)) as server:
        server.export(model_of(adapter, ModelState.CHALLENGER), adapter)
        assert server.export(model_of(other, ModelState.RETIRED), other).version == "2"
        assert server.export(model_of(adapter), adapter) == ("assistant", "1", False)
    assert len(mlflow.versions) == 2
    assert mlflow.aliases == {"challenger": "1", "champion": "1"}


def test_a_server_that_takes_no_artifacts_is_told_of(mlflow: FakeMlflow, adapter: Adapter) -> None:
    mlflow.root = "s3://bucket"
    with closing(MlflowServer(mlflow.url)) as server, pytest.raises(PublishFailed, match="takes no artifacts itself"):
        server.export(model_of(adapter), adapter)
    assert mlflow.versions == []


def test_one_that_is_away_is_unreachable(adapter: Adapter) -> None:
    with closing(MlflowServer("http://127.0.0.1:9")) as server, pytest.raises(Unreachable):
        server.export(replace(model_of(adapter)), adapter)
