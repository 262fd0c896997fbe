"""The gate's report beside a run: what its files say, judged by given settings, as a page."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from feedback.erasure_files import write_whole
from feedback.pairs import PreferencePair
from pawl.settings import RetrainSettings
from retrain.errors import BadData
from retrain.evaluation import Contender, ProbeSets
from retrain.examination import probes_of
from retrain.gate import GateReport, report_as_dict
from retrain.gate_page import Example, changed, render
from retrain.generations import Probe
from retrain.measurements import Measurements, from_json
from retrain.steps import done

MEASUREMENTS = Path("evaluate", "measurements.json")
ANSWERS = Path("evaluate", "answers.jsonl")
HOLDOUT = Path("build", "holdout.jsonl")
PAGE = "gate.html"


def read_measurements(run: Path) -> Measurements | None:
    """What a run's evaluation measured, if it has come so far and its directory is here.

    Raises:
        BadData: the file is something else.
    """
    path = run / MEASUREMENTS
    return from_json(path.read_text()) if path.exists() else None


def read_holdout(run: Path) -> list[PreferencePair]:
    """The pairs that a run trained nothing on, but for those of people who were erased since."""
    path = run / HOLDOUT
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    tuples = ("prompt", "principals", "models")
    return [PreferencePair(**{**row, **{name: tuple(row[name]) for name in tuples}}) for row in rows]


def contenders_of(run: Path) -> tuple[Contender, Contender] | None:
    """Parent and candidate of a run; None before it has trained one."""
    mined, trained = done(run / "mine"), done(run / "train")
    if mined is None or trained is None:
        return None
    parent = Path(mined["parent_path"]) if mined["parent_path"] else None
    return Contender(mined["parent"], parent), Contender(trained["model"], Path(trained["path"]))


@contextmanager
def scratch_for_benchmarks() -> Iterator[Path]:
    """A directory that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="pawl-benchmarks-") as name:
        yield Path(name)


def write_page(run: Path, report: GateReport, measurements: Measurements, settings: RetrainSettings) -> Path:
    """Write the page into the run's directory, over an older one."""
    examples = changed(examples_of(run / ANSWERS, measurements, probes_of(settings, ())))
    page = render(report_as_dict(report), measurements, examples, settings.gate.model_dump(mode="json"))
    write_whole(run / PAGE, [page])
    return run / PAGE


def examples_of(answers: Path, measurements: Measurements, probes: ProbeSets) -> Iterator[Example]:
    """What both said first to the operator's own probes; nothing where the answers have been erased."""
    if not answers.exists():
        return
    kinds = {"harmful": probes.harmful, "harmless": probes.benign}
    known = {probe.id: (kind, probe) for kind, some in kinds.items() for probe in some}
    said = {(row["model"], row["probe_id"]): row for row in _first_answers(answers) if row["probe_id"] in known}
    for name, (kind, probe) in known.items():
        theirs, ours = said.get((measurements.parent, name)), said.get((measurements.candidate, name))
        if theirs and ours:
            yield Example(
                kind, _asked(probe), theirs["text"], theirs["response"], ours["text"], ours["response"]
            )  # fmt: skip


def _first_answers(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text().splitlines():
        try:
            row: Mapping[str, Any] = json.loads(line)
            generation = row["generation"]
            if generation["sample"] == 0:
                names = {name: str(generation[name]) for name in ("model", "probe_id", "text")}
                yield {**names, "response": str(row["response"])}
        except (ValueError, KeyError, TypeError) as exc:
            raise BadData(f"{path} is damaged") from exc


def _asked(probe: Probe) -> str:
    return " ".join(str(message.get("content", "")) for message in probe.prompt)
