"""Steps are there whole or not at all, and what was done to them afterwards is noticed."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from pawl.errors import StaleWrite
from retrain.errors import BadData
from retrain.steps import MANIFEST, Manifest, Terms, _put_in_place, begin, digest_of, done, finish, once

ROWS = [json.dumps({"id": n}) + "\n" for n in range(5)]


def work(directory: Path) -> Manifest:
    (directory / "rows.jsonl").write_text("".join(ROWS))
    (directory / "inner").mkdir(exist_ok=True)
    (directory / "inner" / "weights.bin").write_bytes(b"\x00\x01")
    return {"n": 5}


def refuse(_directory: Path) -> Manifest:
    raise AssertionError("this step was done")


def test_a_step_is_done_once_and_names_all_its_files(tmp_path: Path) -> None:
    manifest = once(tmp_path / "build", work)
    assert (manifest["n"], sorted(manifest["files"])) == (5, ["inner/weights.bin", "rows.jsonl"])
    assert once(tmp_path / "build", refuse) == manifest
    assert [path.name for path in tmp_path.iterdir()] == ["build"]


def test_a_step_that_breaks_is_not_done_and_starts_in_an_empty_directory(tmp_path: Path) -> None:
    def broken(directory: Path) -> Manifest:
        (directory / "half").write_text("half")
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        once(tmp_path / "build", broken)
    assert done(tmp_path / "build") is None
    assert "half" not in once(tmp_path / "build", work)["files"]
    assert [path.name for path in tmp_path.iterdir()] == ["build"]


def test_a_step_that_keeps_its_part_goes_on_with_what_an_earlier_holder_left(tmp_path: Path) -> None:
    (begin(tmp_path / "train", 1, keeps_part=True) / "checkpoint").write_text("step 9")
    (begin(tmp_path / "train", 4, keeps_part=True) / "later").write_text("of a later lease")
    found: list[str] = []

    def go_on(directory: Path) -> Manifest:
        found.extend(sorted(path.name for path in directory.iterdir()))
        return {}

    once(tmp_path / "train", go_on, Terms(epoch=6, keeps_part=True))
    assert found == ["checkpoint", "later"]
    assert [path.name for path in tmp_path.iterdir()] == ["train"]


def test_an_old_holder_takes_nothing_from_a_later_one(tmp_path: Path) -> None:
    later = begin(tmp_path / "train", 4, keeps_part=True)
    older = begin(tmp_path / "train", 3, keeps_part=True)
    assert later.exists()
    finish(later, tmp_path / "train", {"by": 4})
    with pytest.raises(StaleWrite, match="by another process"):
        finish(older, tmp_path / "train", {"by": 3})
    assert (done(tmp_path / "train") or {})["by"] == 4


def test_what_was_done_is_kept_where_it_cannot_be_put_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(_self: Path, _target: Path) -> Path:
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", read_only)
        with pytest.raises(OSError, match="Read-only"):
            _put_in_place(begin(tmp_path / "train", 1, keeps_part=True), tmp_path / "train")
    older = begin(tmp_path / "train", 1, keeps_part=True)
    begin(tmp_path / "train", 2, keeps_part=True)
    with pytest.raises(StaleWrite, match="by another process"):
        _put_in_place(older, tmp_path / "train")


def test_a_step_does_not_count_when_the_lease_is_lost(tmp_path: Path) -> None:
    def lost() -> None:
        raise StaleWrite("the lease has passed to another")

    with pytest.raises(StaleWrite):
        once(tmp_path / "build", work, Terms(check_lease=lost))
    assert list(tmp_path.iterdir()) == []


def cut(directory: Path) -> None:
    (directory / "rows.jsonl").write_text("".join(ROWS)[:-3])


def change(directory: Path) -> None:
    (directory / "inner" / "weights.bin").write_bytes(b"\x00\x02")


def lose(directory: Path) -> None:
    (directory / "inner" / "weights.bin").unlink()


def add(directory: Path) -> None:
    (directory / "rows.jsonl").write_text("".join([*ROWS, '{"id": 9}\n']))


def swap(directory: Path) -> None:
    (directory / "rows.jsonl").write_text("".join(reversed(ROWS)))


def garble(directory: Path) -> None:
    (directory / MANIFEST).write_text("{")


@pytest.mark.parametrize("damage", [cut, change, lose, add, swap, garble])
@pytest.mark.parametrize("is_erased", [False, True])
def test_damage_is_noticed_and_says_what_to_do(tmp_path: Path, damage: Callable[[Path], None], is_erased: bool) -> None:
    once(tmp_path / "build", work)
    damage(tmp_path / "build")
    with pytest.raises(BadData, match=r"delete .*build, and the steps that came after it"):
        once(tmp_path / "build", refuse, Terms(may_be_erased=lambda: is_erased))


@pytest.mark.parametrize("kept", [[], [0, 2, 4], [4]])
def test_rows_may_be_missing_only_where_somebody_was_erased(tmp_path: Path, kept: list[int]) -> None:
    once(tmp_path / "build", work)
    (tmp_path / "build" / "rows.jsonl").write_text("".join(ROWS[n] for n in kept))
    with pytest.raises(BadData):
        once(tmp_path / "build", refuse)
    assert once(tmp_path / "build", refuse, Terms(may_be_erased=lambda: True))["n"] == 5


def test_the_mark_of_an_erasure_is_not_a_change_of_the_manifest() -> None:
    assert digest_of({"n": 1, "erased": {"at": 3.0}}) == digest_of({"n": 1})
    assert digest_of({"n": 2}) != digest_of({"n": 1})


def test_what_an_older_version_left_half_done_is_done_anew(tmp_path: Path) -> None:
    (tmp_path / "build").mkdir()
    (tmp_path / "build" / "half").write_text("half")
    assert "half" not in once(tmp_path / "build", work)["files"]
