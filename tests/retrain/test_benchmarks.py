"""An installed lm-evaluation-harness: what it is asked, what is read of its files, and what becomes of its failures."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from pawl.settings import LmEvalSettings
from retrain.benchmarks import lm_eval_command, pair, read_scores, run_benchmarks
from retrain.errors import EvaluationFailed

HARNESS = """\
import json, os, pathlib, sys
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
assert not any(name.startswith("PAWL_") for name in os.environ), "secrets"
model = dict(part.split("=", 1) for part in given["--model_args"].split(","))["model"]
if model == "broken":
    sys.exit("no such dataset")
output = pathlib.Path(given["--output_path"]) / "somewhere"
output.mkdir(parents=True)
directions = {task: {"acc": True, "acc_norm": True} for task in given["--tasks"].split(",")}
(output / "results_2026-01-01T00-00-00.000001.json").write_text(json.dumps({"higher_is_better": directions}))
for task in directions:
    rows = [
        {"doc_id": n, "filter": f, "metrics": ["acc", "acc_norm"], "acc": float(n < (3 if model == "parent" else 2))}
        for f in ("strict", "loose") for n in range(4)
    ]
    (output / f"samples_{task}_2026-01-01T00-00-00.000001.jsonl").write_text("\\n".join(map(json.dumps, rows)))
"""
"""As much of the harness as is seen from outside: the files that lm_eval 0.4.13 writes with --log_samples."""


@pytest.fixture
def harness(tmp_path: Path) -> str:
    path = tmp_path / "harness.py"
    path.write_text(HARNESS)
    return f"{sys.executable} {path}"


def test_a_task_is_compared_document_by_document(harness: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAWL_AUTH__SECRET", "s" * 16)
    settings = LmEvalSettings(tasks=["arc_easy", "gsm8k"], command=harness)
    found = run_benchmarks(settings, "http://engine", ["parent", "candidate"], "/base", tmp_path)
    assert set(found) == {"arc_easy", "gsm8k"}
    arc = found["arc_easy"]
    assert arc.units == tuple(f"arc_easy/{number}" for number in range(4))
    assert (arc.parent, arc.candidate) == ((1.0, 1.0, 1.0, 0.0), (1.0, 1.0, 0.0, 0.0))


def test_without_tasks_nothing_is_run(tmp_path: Path) -> None:
    settings = LmEvalSettings(command="/there/is/no/such/program")
    assert run_benchmarks(settings, "http://engine", ["parent", "candidate"], "/base", tmp_path) == {}


def test_a_harness_that_fails_is_an_error(harness: str, tmp_path: Path) -> None:
    settings = LmEvalSettings(tasks=["arc"], command=harness)
    with pytest.raises(EvaluationFailed, match="ended with 1: no such dataset"):
        run_benchmarks(settings, "http://engine", ["broken", "candidate"], "/base", tmp_path)
    absent = settings.model_copy(update={"command": "there-is-no-such-program"})
    with pytest.raises(EvaluationFailed, match="there is no program"):
        run_benchmarks(absent, "http://engine", ["parent", "candidate"], "/base", tmp_path)


def test_a_harness_that_hangs_is_stopped(tmp_path: Path) -> None:
    path = tmp_path / "hangs.py"
    path.write_text("import time\ntime.sleep(600)\n")
    settings = LmEvalSettings(tasks=["arc"], command=f"{sys.executable} {path}", timeout_s=0.5)
    with pytest.raises(EvaluationFailed, match=r"longer than 0\.5 s"):
        run_benchmarks(settings, "http://engine", ["parent", "candidate"], "/base", tmp_path)


def test_the_command_names_engine_model_and_tokenizer() -> None:
    settings = LmEvalSettings(tasks=["a", "b"], limit=7, extra_args=["--include_path", "/tasks"])
    command = lm_eval_command(settings, "http://engine:8000/", "tuned", "/base", Path("/out"))
    arguments = dict(zip(command[1::2], command[2::2], strict=False))
    assert (command[0], arguments["--model"], arguments["--tasks"]) == ("lm_eval", "local-completions", "a,b")
    assert "base_url=http://engine:8000/v1/completions" in arguments["--model_args"].split(",")
    assert "tokenizer=/base" in arguments["--model_args"].split(",")
    assert command[-4:] == ["--limit", "7", "--include_path", "/tasks"]
    chat = lm_eval_command(settings.model_copy(update={"is_chat": True}), "http://e", "m", "/base", Path("/out"))
    assert "local-chat-completions" in chat
    assert "--apply_chat_template" in chat


def write_samples(output: Path, task: str, rows: list[dict[str, Any]]) -> None:
    output.mkdir(parents=True, exist_ok=True)
    text = "\n".join(map(json.dumps, rows))
    (output / f"samples_{task}_2026-01-01T00-00-00.000001.jsonl").write_text(text)


def write_results(output: Path, results: dict[str, Any]) -> None:
    (output / "results_2026.json").write_text(json.dumps(results))


def test_of_a_document_s_metrics_the_first_counts_of_which_more_is_better(tmp_path: Path) -> None:
    """A lower perplexity is no loss of quality, but would have been taken for one."""
    metrics = {"word_perplexity": 31.5, "acc": 1.0, "acc_norm": 0.0}
    write_samples(tmp_path, "lambada", [{"doc_id": 0, "filter": "none", "metrics": list(metrics), **metrics}])
    write_results(
        tmp_path, {"higher_is_better": {"lambada": {"word_perplexity": False, "acc": True, "acc_norm": True}}}
    )
    assert read_scores(tmp_path, "lambada") == {"lambada/0": 1.0}


@pytest.mark.parametrize(
    "said", [{}, {"wikitext": {"byte_perplexity": False}}, {"wikitext": {"byte_perplexity": None}}]
)
def test_a_task_without_such_a_metric_is_refused(tmp_path: Path, said: dict[str, Any]) -> None:
    row = {"doc_id": 0, "filter": "none", "metrics": ["byte_perplexity"], "byte_perplexity": 2.5}
    write_samples(tmp_path, "wikitext", [row])
    write_results(tmp_path, {"higher_is_better": said})
    with pytest.raises(EvaluationFailed, match=r"wikitext has no metric of which more .*: byte_perplexity"):
        read_scores(tmp_path, "wikitext")


def test_a_group_is_all_of_its_tasks(tmp_path: Path) -> None:
    for task, score in (("mmlu_law", 1.0), ("mmlu_art", 0.0), ("mmlu_other_group", 1.0)):
        write_samples(tmp_path / "m", task, [{"doc_id": 0, "filter": "none", "metrics": ["acc"], "acc": score}])
    groups = {"mmlu": ["mmlu_humanities"], "mmlu_humanities": ["mmlu_law", "mmlu_art"]}
    more = {task: {"acc": True} for task in ("mmlu_law", "mmlu_art", "mmlu")}
    write_results(tmp_path / "m", {"group_subtasks": groups, "higher_is_better": more})
    assert read_scores(tmp_path, "mmlu") == {"mmlu_law/0": 1.0, "mmlu_art/0": 0.0}


def test_other_documents_compare_nothing() -> None:
    assert pair({}, {}) is None
    assert pair({"a": 1.0}, {"a": 1.0, "b": 0.0}) is None
    assert pair({"a": 1.0}, {"a": 0.0}) is not None


def test_something_else_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "samples_arc_2026.jsonl").write_text("not json")
    with pytest.raises(EvaluationFailed, match="not JSON"):
        read_scores(tmp_path, "arc")
