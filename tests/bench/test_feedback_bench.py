"""The benchmark of feedback works: votes are sent, taken and found in the database; their number is not judged."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest

from bench.feedback import EARLY, KEYED, MEASURES, STORED, main
from bench.native_tools import EngineOptions, Load, ToolFailed, compile_tools

NEEDS_COMPILER = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")


@NEEDS_COMPILER
def test_a_short_round_measures_everything_and_loses_nothing(tmp_path: Path) -> None:
    assert main(["--quick", "--connections", "8", "--out", str(tmp_path / "feedback.json")]) == 0
    written = json.loads((tmp_path / "feedback.json").read_text())
    samples = {sample["measure"]: sample for sample in written["samples"]}
    assert set(samples) == set(MEASURES)
    assert all(sample["errors"] == 0 for sample in samples.values())
    assert any(sample["per_s"] > 0 for sample in samples.values()), "in windows so short a busy machine may miss some"
    for measure in (STORED, KEYED):
        assert set(samples[measure]["statuses"]) <= {"200", "201"}
    assert set(samples[EARLY]["statuses"]) <= {"202"}
    statuses = sum((Counter(samples[measure]["statuses"]) for measure in (STORED, KEYED, EARLY)), Counter[str]())
    assert max(statuses["201"], statuses["202"]) > 1, "each line of the file is another vote"
    assert written["lost"] == 0


@NEEDS_COMPILER
@pytest.mark.parametrize("text", ["", "one\nlonger\n"])
def test_bodies_must_be_equally_long(tmp_path: Path, text: str) -> None:
    tools, bodies = compile_tools(tmp_path), tmp_path / "bodies"
    bodies.write_text(text)
    with tools.running_engine(EngineOptions()) as port, pytest.raises(ToolFailed):
        tools.run_load(Load(port, seconds=0.1, warmup_s=0.0, bodies=bodies))
