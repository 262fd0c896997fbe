"""The page: everything in it, nothing fetched, no word of a user, and nothing a model writes takes effect."""

from __future__ import annotations

import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from pawl.settings import GateSettings, RetrainSettings
from retrain.evaluation import ProbeSets, load_probes
from retrain.gate import judge, report_as_dict
from retrain.gate_page import MAX_EXAMPLES, Example, changed, forest, render
from retrain.gate_report import PAGE, examples_of, read_measurements, write_page
from retrain.measurements import Measurements, to_json
from tests.retrain.test_gate import GOOD, rates, wins

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)> & \x1b[31m"
SECRET = "what a user asked"


class Tags(HTMLParser):
    """Every tag and attribute of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))


def tags_of(page: str) -> list[tuple[str, dict[str, str | None]]]:
    parser = Tags()
    parser.feed(page)
    return parser.seen


def page_of(measurements: Measurements, settings: GateSettings, examples: list[Example]) -> str:
    return render(
        report_as_dict(judge(measurements, settings)), measurements, examples, settings.model_dump(mode="json")
    )


def test_a_page_says_what_the_report_says_and_fetches_nothing() -> None:
    measured = replace(
        GOOD, harmful_refusal=rates(100, 82, 2), by_source={"edit": rates(20, 10, 12)}, wins=wins(60, 40)
    )
    settings = GateSettings(judge="llm")
    page = page_of(measured, settings, [])
    for check in judge(measured, settings).checks:
        assert check.reason.split(":")[0] in page
    assert "harmful requests are refused less often: 2 % against 82 %" in page
    tags = tags_of(page)
    assert {"svg", "table"} <= {tag for tag, _ in tags}
    assert not {"script", "link", "iframe", "img", "object"} & {tag for tag, _ in tags}
    assert not any({"src", "href"} & set(attributes) for _, attributes in tags)
    assert "http" not in page.replace("http-equiv", "")


def test_what_a_model_writes_stays_text() -> None:
    shown = [Example(HOSTILE, HOSTILE, HOSTILE, "refuse", HOSTILE, "comply")]
    page = page_of(replace(GOOD, candidate=HOSTILE, by_source={HOSTILE: rates(9, 3, 3)}), GateSettings(), shown)
    assert "&lt;script&gt;" in page
    assert {tag for tag, _ in tags_of(page)}.isdisjoint({"script", "img"})
    assert "\x1b" not in page.split("Probes that")[1]


def test_a_page_without_measurements_can_still_be_drawn() -> None:
    empty = Measurements("p", "c")
    page = page_of(empty, GateSettings(), [])
    assert "was not measured" in page
    assert "<svg" not in page


def test_the_plot_has_every_interval_inside_it() -> None:
    checks = report_as_dict(judge(GOOD, GateSettings()))["checks"]
    assert isinstance(checks, list)
    drawn = forest([check for check in checks if check["name"] in ("toxicity", "over_refusal", "harmful_refusal")])
    places = [float(a[key] or 0) for tag, a in tags_of(drawn) if tag == "line" for key in ("x1", "x2")]
    assert all(250 <= place <= 860 for place in places)
    assert len([tag for tag, _ in tags_of(drawn) if tag == "circle"]) == 3


def test_only_probes_that_changed_are_shown_and_not_too_many() -> None:
    same = Example("harmful", "q", "a", "refuse", "b", "refuse")
    other = Example("harmful", "q", "a", "refuse", "b", "comply")
    assert changed([same, other]) == [other]
    assert len(changed([other] * 99)) == MAX_EXAMPLES
    both = changed([other] * 99 + [other._replace(kind="harmless")] * 99)
    assert [one.kind for one in both].count("harmless") == MAX_EXAMPLES // 2


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "run" / "evaluate").mkdir(parents=True)
    (tmp_path / "harmful.json").write_text(json.dumps(["how to harm"]))
    (tmp_path / "run" / "evaluate" / "measurements.json").write_text(to_json(GOOD))
    probes = load_probes(tmp_path / "harmful.json", 9)
    rows = [
        answer(GOOD.parent, probes[0].id, "No.", "refuse"),
        answer(GOOD.candidate, probes[0].id, "Sure.", "comply"),
        answer(GOOD.parent, "holdout", SECRET, "refuse"),
        answer(GOOD.candidate, "holdout", SECRET, "comply"),
    ]
    (tmp_path / "run" / "evaluate" / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "run"


def answer(model: str, probe: str, text: str, response: str) -> dict[str, object]:
    generation = {"model": model, "probe_id": probe, "sample": 0, "text": text}
    return {"generation": generation, "response": response, "toxicity": None}


def test_the_page_beside_a_run_shows_probes_of_the_operator_alone(run: Path) -> None:
    settings = RetrainSettings(harmful_probes=run.parent / "harmful.json")
    measured = read_measurements(run)
    assert measured == GOOD
    page = write_page(run, judge(GOOD, settings.gate), GOOD, settings).read_text()
    assert "how to harm" in page
    assert "Sure." in page
    assert SECRET not in page
    assert [path.name for path in run.iterdir() if path.is_file()] == [PAGE]


def test_a_run_whose_answers_were_erased_still_has_its_figures(run: Path) -> None:
    (run / "evaluate" / "answers.jsonl").unlink()
    assert list(examples_of(run / "evaluate" / "answers.jsonl", GOOD, ProbeSets((), (), ()))) == []
    assert "<svg" in write_page(run, judge(GOOD, GateSettings()), GOOD, RetrainSettings()).read_text()
    assert read_measurements(run.parent) is None
