"""Where a gateway's completions are written to disk: beside the one that relays if there is a core for it."""

from __future__ import annotations

import pytest

from feedback.journal_line import as_process
from pawl.settings import Settings
from serving.gateway import writer_for


@pytest.mark.parametrize(
    ("cores", "workers", "drains_here", "is_process"),
    [(1, 1, False, False), (2, 1, False, True), (4, 4, False, False), (8, 4, False, True), (8, 1, True, False)],
)
def test_a_writer_has_a_process_where_a_core_is_left(
    cores: int, workers: int, drains_here: bool, is_process: bool
) -> None:
    settings = Settings.model_validate({"serving": {"workers": workers}})
    assert (writer_for(cores, settings, drains_here=drains_here) is as_process) == is_process
