"""Small tasks with known answers: whatever else a candidate learns, it must not unlearn these.

One task per line: `{"prompt": "...", "answer": "..."}` for exactly this text, or `{"prompt": "...", "pattern": "..."}`
for a regular expression that is found somewhere in the answer. `prompt` is a text or a list of messages; `id` is
optional.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from monitoring.refusal import strip_thinking
from retrain.errors import BadData
from retrain.generations import Probe
from retrain.line_files import numbered_lines


@dataclass(frozen=True)
class Task:
    """One of them."""

    probe: Probe
    answer: str | None
    pattern: re.Pattern[str] | None


def load_tasks(path: Path) -> tuple[Task, ...]:
    """Read a file of tasks.

    Raises:
        BadData: it is something else; says which line.
    """
    return tuple(_task(line, place) for line, place in numbered_lines(path, "capability set"))


def is_solved(task: Task, answer: str) -> bool:
    """Whether an answer is right; what a model thought before it does not count."""
    said = strip_thinking(answer)
    if task.pattern is not None:
        return task.pattern.search(said) is not None
    return said == task.answer


def messages_of(prompt: object, where: str) -> tuple[Mapping[str, Any], ...]:
    """A prompt as messages.

    Raises:
        BadData: it is neither a text nor a list of messages.
    """
    if isinstance(prompt, str) and prompt.strip():
        return ({"role": "user", "content": prompt},)
    if isinstance(prompt, Sequence) and prompt and all(_is_message(one) for one in prompt):
        return tuple(prompt)
    raise BadData(f"{where}: expected a text or a list of messages with role and content")


def name_of(prompt: Sequence[Mapping[str, Any]]) -> str:
    """A short name for a prompt that has none."""
    text = json.dumps(list(prompt), sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _task(line: str, where: str) -> Task:
    try:
        row = json.loads(line)
    except ValueError as exc:
        raise BadData(f"{where}: not JSON") from exc
    if not isinstance(row, dict):
        raise BadData(f"{where}: expected an object with prompt, and answer or pattern")
    prompt = messages_of(row.get("prompt"), where)
    answer, pattern = row.get("answer"), row.get("pattern")
    if (answer is None) == (pattern is None) or not isinstance(answer or pattern, str):
        raise BadData(f"{where}: expected either answer or pattern, as text")
    probe = Probe(str(row.get("id") or name_of(prompt)), prompt)
    return Task(probe, None if answer is None else answer.strip(), _compiled(pattern, where))


def _compiled(pattern: str | None, where: str) -> re.Pattern[str] | None:
    try:
        return None if pattern is None else re.compile(pattern)
    except re.error as exc:
        raise BadData(f"{where}: pattern is no regular expression: {exc}") from exc


def _is_message(one: object) -> bool:
    return isinstance(one, dict) and isinstance(one.get("role"), str) and isinstance(one.get("content"), str)
