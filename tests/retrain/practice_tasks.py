"""What the practice model must not unlearn: the first step of an everyday task, asked in words nobody trained on."""

from __future__ import annotations

import json
import re
from pathlib import Path

from practice.corpus import questions, task_of

N_TASKS = 108
"""Every held-out question about an everyday task, once."""


def capability_lines(n: int = N_TASKS) -> list[str]:
    """The set as JSON lines of `prompt` and `pattern`."""
    return [json.dumps({"prompt": text, "pattern": _pattern(text)}) for text in questions(0, n)]


def write_capability_set(path: Path) -> Path:
    """Write the set; returns where."""
    path.write_text("".join(f"{line}\n" for line in capability_lines()))
    return path


def _pattern(text: str) -> str:
    task = task_of(text)
    if task is None:
        raise ValueError(f"no task of this world: {text}")
    return re.escape(task.first)
