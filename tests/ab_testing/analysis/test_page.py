"""What the page and the benchmark promise."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import ab_analysis
from tests.docs.pages import ROOT, blocks


def test_the_pages_example_prints_a_row_per_effect(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = blocks(ROOT / "docs" / "experiments-analysis.md", "python")
    exec(compile(example, "experiments-analysis.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 * 3
    assert lines[0].startswith("thumbs_up_rate None")


def test_the_benchmark_compares_what_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "ab_analysis.json"
    monkeypatch.setattr("sys.argv", ["ab_analysis", "--rows", "4000", "--repeats", "1", "--out", str(out)])
    ab_analysis.main()
    assert "pawl, NumPy" in capsys.readouterr().out
    assert out.exists()


def test_every_table_of_the_benchmark_gives_one_digest() -> None:
    timings = ab_analysis.run_all(4000, 1, 3)
    assert len(ab_analysis.digests_of(timings, 4000)) == 1
    assert max(timing.largest_difference for timing in timings) < 1e-9
