"""How many cores a process may use, in a container too."""

from __future__ import annotations

from pathlib import Path

import pytest

from pawl.cores import usable_cores


@pytest.mark.parametrize(
    ("quota", "most"), [("150000 100000", 1), ("50000 100000", 1), ("100000000 100000", None), ("max 100000", None)]
)
def test_a_container_s_quota_bounds_the_cores(tmp_path: Path, quota: str, most: int | None) -> None:
    (tmp_path / "cpu.max").write_text(quota + "\n")
    everything = usable_cores(tmp_path / "missing")
    assert everything >= 1
    assert usable_cores(tmp_path / "cpu.max") == (most or everything)
