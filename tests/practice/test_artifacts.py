from pathlib import Path

import pytest

from practice.artifacts import MANIFEST_NAME, Manifest, build_once, content_key


def write_greeting(work: Path) -> Manifest:
    (work / "greeting.txt").write_text("hello")
    return {"size": 5}


def must_not_build(_work: Path) -> Manifest:
    raise AssertionError("built twice")


def test_a_directory_is_built_once(tmp_path: Path) -> None:
    directory = tmp_path / "deep" / "artifact"
    assert build_once(directory, write_greeting) == {"size": 5}
    assert build_once(directory, must_not_build) == {"size": 5}
    assert (directory / "greeting.txt").read_text() == "hello"
    assert [entry.name for entry in directory.parent.iterdir()] == ["artifact"]


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def fail(work: Path) -> Manifest:
        (work / "half.txt").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        build_once(tmp_path / "artifact", fail)
    assert list(tmp_path.iterdir()) == []


def test_the_loser_of_a_race_takes_the_winners_work(tmp_path: Path) -> None:
    directory = tmp_path / "artifact"

    def overtaken(_work: Path) -> Manifest:
        build_once(directory, write_greeting)
        return {"size": 0}

    assert build_once(directory, overtaken) == {"size": 5}
    assert (directory / MANIFEST_NAME).exists()
    assert [entry.name for entry in tmp_path.iterdir()] == ["artifact"]


def test_a_key_changes_with_any_ingredient() -> None:
    assert content_key(1, {"steps": 2}) == content_key(1, {"steps": 2})
    assert len({content_key(1, {"steps": 2}), content_key(1, {"steps": 3}), content_key(2, {"steps": 2})}) == 3
