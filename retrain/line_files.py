"""Files with one thing a line, read so that whoever wrote a line wrong is told which."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from retrain.errors import BadData


def numbered_lines(path: Path, what: str) -> Iterator[tuple[str, str]]:
    """Each line that is not blank, and where it stands.

    Raises:
        BadData: the file cannot be read, or holds nothing.
    """
    try:
        lines = path.read_text().split("\n")  # Not `splitlines`: JSON may hold other line ends as they are.
    except (OSError, UnicodeDecodeError) as exc:
        raise BadData(f"cannot read the {what} {path}: {exc}") from exc
    if not any(map(str.strip, lines)):
        raise BadData(f"the {what} {path} is empty")
    yield from ((line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip())
