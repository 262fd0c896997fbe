"""A person's rows leave the files of retraining runs, and the manifests say so."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from feedback import erasure_files
from feedback.erasure_files import alone_in, erase_in_runs, mark_late_models, picker, write_whole
from feedback.pairs import PreferencePair
from feedback.store import load_pairs
from feedback.tombstones import Erased, Person, Subject
from pawl.database import Database
from pawl.registry import get_model
from tests.feedback.people import ADAPTER, CHILD, NOW, SECRET, eraser, fill, history_of, train


def lines(rows: Iterable[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def make_run(runs: Path, name: str, new: list[PreferencePair], held: list[PreferencePair]) -> Path:
    """What the steps of a round leave."""
    run = runs / name
    for step in ("mine", "build", "evaluate"):
        (run / step).mkdir(parents=True)
    (run / "mine" / "new.jsonl").write_text(lines(map(asdict, new + held)))
    (run / "mine" / "earlier.jsonl").write_text(lines(map(asdict, new[:1])))
    examples = [{"pair_id": pair.id, "origin": "new", "prompt": pair.prompt, "chosen": pair.chosen} for pair in new]
    own = {"pair_id": "the owner's", "origin": "original", "prompt": [], "chosen": {}}
    (run / "build" / "training.jsonl").write_text(lines([*examples, own]))
    (run / "build" / "training.parquet").write_bytes(str(new).encode())
    (run / "build" / "holdout.jsonl").write_text(lines(map(asdict, held)))
    (run / "evaluate" / "answers.jsonl").write_text(lines({"text": f"to {pair.prompt}"} for pair in held))
    (run / "evaluate" / "measurements.json").write_text("{}")
    manifest = {
        "sha256": "0" * 64,
        "pair_ids": [pair.id for pair in new] + ["the owner's"],
        "holdout_ids": [pair.id for pair in held],
    }
    (run / "build" / "manifest.json").write_text(json.dumps(manifest))
    return run


@pytest.fixture
def runs(database: Database, tmp_path: Path) -> Path:
    """One run that learned from ann and bob, and one that knows bob alone."""
    fill(database, history_of("ann", 10, 3), history_of("bob", 30, 3))
    pairs = load_pairs(database, "assistant")
    ann = [pair for pair in pairs if pair.principals == ("/ann",)]
    bob = [pair for pair in pairs if pair.principals == ("/bob",)]
    make_run(tmp_path / "runs", "r0001", ann[:2] + bob[:2], ann[2:] + bob[2:])
    make_run(tmp_path / "runs", "r0002", bob[:2], bob[2:])
    return tmp_path / "runs"


def contents(directory: Path) -> dict[str, str]:
    return {
        str(path.relative_to(directory)): path.read_text() for path in sorted(directory.rglob("*")) if path.is_file()
    }


def erase_files(
    database: Database, runs: Path, *, user: str = "ann", persons: tuple[Person, ...] = (), directory: Path
) -> dict[str, int]:
    stone = eraser(database, directory).tombstone(Subject(user), "")
    return erase_in_runs(runs, picker(database, Erased(SECRET, [stone]), persons, SECRET), NOW)


def test_one_persons_rows_go(database: Database, runs: Path, tmp_path: Path) -> None:
    before = contents(runs)
    assert erase_files(database, runs, directory=tmp_path) == {"r0001": 2}
    after = contents(runs)
    assert "ann" in str(before["r0001/build/training.jsonl"])
    assert not any("ann" in text for text in after.values())
    assert [before[name] == text for name, text in after.items() if name.startswith("r0002")].count(False) == 0
    kept = [json.loads(line) for line in after["r0001/build/training.jsonl"].splitlines()]
    assert len(kept) == 3
    assert kept[-1]["pair_id"] == "the owner's"
    manifest = json.loads(after["r0001/build/manifest.json"])
    assert manifest["sha256"] == "0" * 64
    assert manifest["erased"]["at"] == NOW
    assert len(manifest["erased"]["pair_ids"]) == 3
    assert len(manifest["pair_ids"]) == 5
    assert "r0001/build/training.parquet" not in after
    assert "r0001/evaluate/answers.jsonl" not in after
    assert "r0001/evaluate/measurements.json" in after
    assert erase_files(database, runs, directory=tmp_path) == {}
    assert contents(runs) == after


def test_each_erasure_counts_its_own(database: Database, runs: Path, tmp_path: Path) -> None:
    assert erase_files(database, runs, directory=tmp_path) == {"r0001": 2}
    assert erase_files(database, runs, user="bob", directory=tmp_path) == {"r0001": 2, "r0002": 2}
    manifest = json.loads((runs / "r0001" / "build" / "manifest.json").read_text())
    assert len(manifest["erased"]["pair_ids"]) == 6


def test_a_report_and_the_marks_add_up_to_what_was_erased(database: Database, runs: Path, tmp_path: Path) -> None:
    """The files alone know that this run trained on them."""
    train(database, "nobody")
    at_work = eraser(database, tmp_path, runs_dir=runs)
    reports = [
        at_work.erase(at_work.bury(at_work.tombstone(Subject(user), "")), Subject(user)) for user in ("ann", "bob")
    ]
    assert [report.runs["r0001"] for report in reports] == [2, 2]
    assert get_model(database, ADAPTER).manifest["erased"]["pairs"] == 4
    assert mark_late_models(database, runs, NOW) == []


def test_what_a_killed_writer_left_goes(database: Database, runs: Path, tmp_path: Path) -> None:
    part = runs / "r0002" / "mine" / "new.jsonl.part"
    part.write_text("of ann, perh")
    erase_files(database, runs, directory=tmp_path)
    assert not part.exists()


@pytest.mark.parametrize("step", ["evaluate", "evaluate.3.part"], ids=["done", "killed"])
def test_answers_to_an_erased_prompt_go_though_they_came_later(
    database: Database, runs: Path, tmp_path: Path, step: str
) -> None:
    erase_files(database, runs, directory=tmp_path)
    for run in ("r0001", "r0002"):
        (runs / run / step).mkdir(exist_ok=True)
        (runs / run / step / "answers.jsonl").write_text(lines([{"text": "to what was read before"}]))
    assert erase_files(database, runs, directory=tmp_path) == {}
    assert not (runs / "r0001" / step / "answers.jsonl").exists()
    assert (runs / "r0002" / step / "answers.jsonl").exists()


def test_who_erases_waits_for_a_step_that_is_writing(database: Database, runs: Path, tmp_path: Path) -> None:
    found: list[dict[str, int]] = []
    erasing = threading.Thread(target=lambda: found.append(erase_files(database, runs, directory=tmp_path)))
    training = runs / "r0001" / "build" / "training.jsonl"
    with alone_in(runs / "r0001"):
        erasing.start()
        erasing.join(0.3)
        assert erasing.is_alive()
        write_whole(training, [*training.read_text().splitlines(keepends=True), '{"pair_id": "one more"}\n'])
    erasing.join()
    assert found == [{"r0001": 2}]
    assert '"one more"' in training.read_text()
    assert "ann" not in training.read_text()


class Stopped(BaseException):
    pass


@contextmanager
def stopped_at(change: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Stop where the n-th file was about to be changed."""
    really_write, really_unlink = erasure_files.write_whole, Path.unlink
    n_changes = 0

    def counted() -> None:
        nonlocal n_changes
        n_changes += 1
        if n_changes == change:
            raise Stopped

    def write(path: Path, text: Iterable[str]) -> None:
        counted()
        really_write(path, text)

    def unlink(path: Path, missing_ok: bool = False) -> None:
        counted()
        really_unlink(path, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(erasure_files, "write_whole", write)
        patch.setattr(Path, "unlink", unlink)
        yield


def test_it_goes_on_wherever_it_was_stopped(
    database: Database, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = {name: (runs / name).read_bytes() for name in contents(runs)}
    erase_files(database, runs, directory=tmp_path)
    wanted = contents(runs)
    change = 0
    while True:
        change += 1
        for name, content in full.items():
            (runs / name).write_bytes(content)
        with stopped_at(change, monkeypatch):
            try:
                erase_files(database, runs, directory=tmp_path)
            except Stopped:
                pass
            else:
                break
        assert contents(runs) != wanted
        assert erase_files(database, runs, directory=tmp_path) == {"r0001": 2}
        assert contents(runs) == wanted
    assert change > 6


def test_rows_are_known_by_what_the_database_erased(database: Database, runs: Path, tmp_path: Path) -> None:
    """Whatever the rows themselves say of their voters."""
    path = runs / "r0001" / "mine" / "new.jsonl"
    path.write_text(path.read_text().replace('"/ann"', '"/"'))
    for other in (runs / "r0001" / "build" / "holdout.jsonl", runs / "r0001" / "mine" / "earlier.jsonl"):
        other.unlink()
    stone = eraser(database, tmp_path)
    stone.erase(stone.bury(stone.tombstone(Subject("ann"), "")), Subject("ann"))
    assert "ann" not in str(contents(runs))


def test_or_by_the_ids_of_completions(database: Database, runs: Path, tmp_path: Path) -> None:
    path = runs / "r0001" / "mine" / "new.jsonl"
    path.write_text(path.read_text().replace('"/ann"', '"/"'))
    assert erase_files(database, runs, persons=(Person("ann", None, NOW),), directory=tmp_path) == {"r0001": 2}
    assert "ann" not in str(contents(runs))


def test_a_model_that_was_being_trained_is_marked_when_it_is_there(
    database: Database, runs: Path, tmp_path: Path
) -> None:
    erase_files(database, runs, directory=tmp_path)
    assert mark_late_models(database, runs, NOW) == []
    train(database, "nobody")
    assert mark_late_models(database, runs, NOW) == [ADAPTER, CHILD]
    assert get_model(database, ADAPTER).manifest["erased"]["pairs"] == 2
    assert mark_late_models(database, runs, NOW) == []
    erase_files(database, runs, user="bob", directory=tmp_path)
    assert set(mark_late_models(database, runs, NOW)) == {ADAPTER, CHILD}
    assert get_model(database, ADAPTER).manifest["erased"]["pairs"] == 4
    assert get_model(database, CHILD).manifest["erased"] == {"pairs": 2, "through": ADAPTER, "at": NOW}
    assert mark_late_models(database, runs, NOW) == []


def test_there_need_not_be_any_runs(database: Database, tmp_path: Path) -> None:
    assert erase_files(database, tmp_path / "nowhere", directory=tmp_path) == {}
    assert mark_late_models(database, tmp_path / "nowhere", NOW) == []
