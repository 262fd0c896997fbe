"""Published benchmarks by an installed lm-evaluation-harness, run against the engine that serves both models.

Checked with lm_eval 0.4.13. Both models answer the same documents, so that the comparison is paired by document and a
benchmark of a few hundred is worth as much here as thousands would be for two separate scores.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pawl.settings import LmEvalSettings
from retrain.errors import EvaluationFailed
from retrain.measurements import Paired

CONCURRENCY = 8
SECRETS = "PAWL_"
"""How the names of our own settings in the environment begin; no other program gets those."""
LAST_CHARS = 400

Scores = Mapping[str, float]
"""By document."""


def run_benchmarks(
    settings: LmEvalSettings, engine_url: str, models: Sequence[str], base_model: str, directory: Path
) -> dict[str, Paired]:
    """Every task with parent and candidate, in this order; tasks that gave no score are left out, and so fail.

    Raises:
        EvaluationFailed: the program is not there, fails, or takes too long.
    """
    if not settings.tasks:
        return {}
    found = []
    for place, model in enumerate(models):
        output = directory / f"lm_eval-{place}"
        _run(lm_eval_command(settings, engine_url, model, base_model, output), settings.timeout_s)
        found.append({task: read_scores(output, task) for task in settings.tasks})
    parent, candidate = found
    return {task: paired for task in settings.tasks if (paired := pair(parent[task], candidate[task])) is not None}


def lm_eval_command(settings: LmEvalSettings, engine_url: str, model: str, base_model: str, output: Path) -> list[str]:
    """The harness's command line for one model."""
    kind, path = (
        ("local-chat-completions", "chat/completions") if settings.is_chat else ("local-completions", "completions")
    )
    arguments = {
        "model": model,
        "base_url": f"{engine_url.rstrip('/')}/v1/{path}",
        "num_concurrent": CONCURRENCY,
        "max_retries": 3,
        "tokenized_requests": False,
        "tokenizer_backend": "huggingface",
        "tokenizer": settings.tokenizer or base_model,
    }
    command = [
        *shlex.split(settings.command),
        *("--model", kind, "--model_args", ",".join(f"{name}={value}" for name, value in arguments.items())),
        *("--tasks", ",".join(settings.tasks), "--output_path", str(output), "--log_samples"),
    ]
    limit = ["--limit", str(settings.limit)] if settings.limit else []
    return [*command, *(["--apply_chat_template"] if settings.is_chat else []), *limit, *settings.extra_args]


def read_scores(output: Path, task: str) -> dict[str, float]:
    """Each document's score on a task, or on the tasks of a group.

    A document counts by the first of its metrics of which the harness says that more is better, under the first filter
    of the file.

    Raises:
        EvaluationFailed: of no metric of a task does the harness say so, as of a perplexity: what has fallen may be an
            improvement there.
    """
    results = [_object(path.read_text()) for path in sorted(output.rglob("results_*.json"))]
    names = {task, *_subtasks(results, task)}
    files = sorted(path for path in output.rglob("samples_*.jsonl") if _task_of(path) in names)
    gains = _where_more_is_better(results)
    return {document: score for path in files for document, score in _scores(path, gains.get(_task_of(path), set()))}


def pair(parent: Scores, candidate: Scores) -> Paired | None:
    """The documents that both have answered; None when one model has answered others, which compares nothing."""
    if not parent or parent.keys() != candidate.keys():
        return None
    documents = sorted(parent)
    return Paired(
        tuple(documents),
        tuple(parent[document] for document in documents),
        tuple(candidate[document] for document in documents),
    )


def _run(command: Sequence[str], timeout_s: float) -> None:
    if shutil.which(command[0]) is None:
        raise EvaluationFailed(f"retrain.gate.lm_eval.command: there is no program {command[0]}")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(SECRETS)}
    with subprocess.Popen(
        command,
        env=environment,
        start_new_session=True,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:
        try:
            said, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired as exc:
            raise EvaluationFailed(f"the benchmarks took longer than {timeout_s:g} s") from exc
        finally:
            if process.poll() is None:  # It starts processes of its own.
                os.killpg(process.pid, signal.SIGKILL)
    if process.returncode != 0:
        raise EvaluationFailed(f"the benchmarks ended with {process.returncode}: {said.strip()[-LAST_CHARS:]}")


def _task_of(path: Path) -> str:
    """The task in `samples_<task>_<date>.jsonl`; dates have no underscores."""
    return path.stem.removeprefix("samples_").rpartition("_")[0]


def _subtasks(results: Sequence[Mapping[str, Any]], task: str) -> Iterator[str]:
    for result in results:
        groups: Mapping[str, Sequence[str]] = result.get("group_subtasks", {})
        waiting, seen = list(groups.get(task, ())), {task}
        while waiting:
            name = waiting.pop()
            if name not in seen:
                seen.add(name)
                yield name
                waiting += groups.get(name, ())


def _where_more_is_better(results: Sequence[Mapping[str, Any]]) -> dict[str, set[str]]:
    """By task, the metrics of which a larger value is the better one."""
    found: dict[str, set[str]] = {}
    for result in results:
        for task, metrics in (result.get("higher_is_better") or {}).items():
            found.setdefault(task, set()).update(name for name, is_gain in metrics.items() if is_gain is True)
    return found


def _scores(path: Path, gains: Collection[str]) -> Iterator[tuple[str, float]]:
    first_filter: object = None
    for number, line in enumerate(path.read_text().rstrip("\n").split("\n")):
        row = _object(line)
        first_filter = row.get("filter") if number == 0 else first_filter
        if row.get("filter") != first_filter:
            continue
        named = list(map(str, row.get("metrics") or ()))
        metric = next((name for name in named if name in gains), None)
        if named and metric is None:
            raise EvaluationFailed(
                f"the benchmark {_task_of(path)} has no metric of which more is known to be better: {', '.join(named)}"
            )
        score = row.get(metric) if metric else None
        if isinstance(score, int | float):
            yield f"{_task_of(path)}/{row.get('doc_id')}", float(score)


def _object(text: str) -> Mapping[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as exc:
        raise EvaluationFailed("the benchmarks wrote something that is not JSON") from exc
    if not isinstance(found, dict):
        raise EvaluationFailed("the benchmarks wrote something that is not an object")
    return found
