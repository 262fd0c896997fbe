"""What the page and the benchmark promise."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import ab_testing
from ab_testing import analysis
from bench import ab_analysis
from tests.docs.pages import ROOT, blocks


def test_the_pages_example_prints_a_row_per_effect(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = blocks(ROOT / "docs" / "experiments-analysis.md", "python")
    exec(compile(example, "experiments-analysis.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 * 3 + 1
    assert lines[0].startswith("thumbs_up_rate None")
    assert lines[-1] == "False"


def test_the_short_import_has_all_names_and_loads_no_statistics_before_they_are_used() -> None:
    assert set(ab_testing.__all__) == set(analysis.__all__) <= set(dir(ab_testing))
    assert all(getattr(ab_testing, name) is getattr(analysis, name) for name in analysis.__all__)
    with pytest.raises(AttributeError, match="nothing"):
        ab_testing.nothing  # noqa: B018
    code = "import sys, ab_testing.assignment; print('ab_testing.analysis' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout == "False\n"


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
