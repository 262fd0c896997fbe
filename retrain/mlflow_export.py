"""A version for people who keep their models in MLflow: its files as a run's artifacts, and an entry in the registry.

By MLflow's REST interface alone (https://mlflow.org/docs/latest/rest-api.html), so that nothing of MLflow is installed.
The server must take artifacts itself, as `mlflow server` does by default. Exporting again only moves
the alias.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import httpx2

from pawl.adapter_files import MANIFEST, SEALED, Adapter
from pawl.errors import PublishFailed, Unreachable
from pawl.registry import SOLE, Model

EXPERIMENT = "pawl"
FOLDER = "adapter"
NAME_TAG = "pawl.name"
PROXY = "mlflow-artifacts:"
TIMEOUT_S = 60.0


class Exported(NamedTuple):
    """Where a version is now."""

    model: str
    """The registered model: Pawl's alias."""
    version: str
    is_new: bool


class MlflowServer:
    """One tracking server."""

    def __init__(self, address: str, token: str | None = None) -> None:
        self.address = address.rstrip("/")
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._client = httpx2.Client(base_url=self.address, headers=headers, timeout=TIMEOUT_S, trust_env=False)

    def close(self) -> None:
        self._client.close()

    def export(self, model: Model, adapter: Adapter) -> Exported:
        """Bring a version there, or find it there.

        Raises:
            PublishFailed: the server refuses something.
            Unreachable: it does not answer.
        """
        self._ensure_registered(model.alias)
        version = self._find(model)
        is_new = version is None
        if version is None:
            version = self._add(model, adapter)
        if model.state in SOLE:
            told = {"name": model.alias, "alias": str(model.state), "version": version}
            self._ask("POST", "registered-models/alias", told)
        return Exported(model.alias, version, is_new)

    def _ensure_registered(self, alias: str) -> None:
        try:
            self._ask("POST", "registered-models/create", {"name": alias})
        except PublishFailed as exc:
            if "RESOURCE_ALREADY_EXISTS" not in str(exc):
                raise

    def _find(self, model: Model) -> str | None:
        wanted = f"name = '{_quoted(model.alias)}' AND tag.`{NAME_TAG}` = '{_quoted(model.name)}'"
        found = self._ask("GET", "model-versions/search", {"filter": wanted}).get("model_versions", [])
        return str(found[0]["version"]) if found else None

    def _add(self, model: Model, adapter: Adapter) -> str:
        tags = _tags(model)
        run_id, artifacts = self._start_run(model.name, tags)
        for file in (*SEALED, MANIFEST):
            place = f"/api/2.0/mlflow-artifacts/artifacts/{artifacts.removeprefix(PROXY).strip('/')}/{FOLDER}/{file}"
            self._send("PUT", place, content=(adapter.path / file).read_bytes())
        self._ask("POST", "runs/update", {"run_id": run_id, "status": "FINISHED"})
        version = {"name": model.alias, "source": f"{artifacts}/{FOLDER}", "run_id": run_id, "tags": tags}
        return str(self._ask("POST", "model-versions/create", version)["model_version"]["version"])

    def _start_run(self, name: str, tags: list[dict[str, str]]) -> tuple[str, str]:
        fields = {"experiment_id": self._experiment(), "run_name": name, "tags": tags}
        info = self._ask("POST", "runs/create", fields)["run"]["info"]
        if not str(info["artifact_uri"]).startswith(PROXY):
            raise PublishFailed(f"{self.address} takes no artifacts itself: they go to {info['artifact_uri']}")
        return str(info["run_id"]), str(info["artifact_uri"])

    def _experiment(self) -> str:
        try:
            return str(self._ask("POST", "experiments/create", {"name": EXPERIMENT})["experiment_id"])
        except PublishFailed as exc:
            if "RESOURCE_ALREADY_EXISTS" not in str(exc):
                raise
        found = self._ask("GET", "experiments/get-by-name", {"experiment_name": EXPERIMENT})
        return str(found["experiment"]["experiment_id"])

    def _ask(self, method: str, path: str, fields: Mapping[str, Any]) -> dict[str, Any]:
        given = {"params": dict(fields)} if method == "GET" else {"json": dict(fields)}
        response = self._send(method, f"/api/2.0/mlflow/{path}", **given)
        try:
            content = response.json()
        except ValueError as exc:
            raise PublishFailed(f"{self.address}{path}: the answer is not JSON") from exc
        return content if isinstance(content, dict) else {}

    def _send(self, method: str, path: str, **given: Any) -> httpx2.Response:
        try:
            response = self._client.request(method, path, **given)
        except httpx2.TransportError as exc:
            raise Unreachable(f"{self.address}: {type(exc).__name__} {exc}".rstrip()) from exc
        if response.status_code != 200:
            raise PublishFailed(f"{self.address}{path}: {response.status_code} {response.text[:300]}")
        return response


def _tags(model: Model) -> list[dict[str, str]]:
    """Where it comes from."""
    fields = {
        NAME_TAG: model.name,
        "pawl.base": model.base,
        "pawl.parent": model.parent,
        "pawl.run": model.run_id,
        "pawl.sha256": model.sha256,
        "pawl.dataset_sha": model.dataset_sha,
    }
    return [{"key": key, "value": value} for key, value in fields.items() if value]


def _quoted(text: str) -> str:
    return text.replace("'", "''")
