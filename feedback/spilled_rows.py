"""Rows of an export on disk until their order is known: of each only where it lies is held."""

from __future__ import annotations

import json
import tempfile
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Self

from feedback.export_parquet import Row


class SpilledRows:
    """Rows by number, from 0, as lines of JSON."""

    def __init__(self, directory: Path) -> None:
        # It has no name: whatever becomes of this process, no text stays behind.
        self._file = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115
        self._ends = array("q", [0])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __len__(self) -> int:
        return len(self._ends) - 1

    def add(self, row: Row) -> None:
        """As the next number."""
        line = f"{json.dumps(row)}\n".encode()
        self._file.write(line)
        self._ends.append(self._ends[-1] + len(line))

    def lines(self, numbers: Iterable[int]) -> Iterator[bytes]:
        """These rows, one at a time."""
        for number in numbers:
            start, end = self._ends[number : number + 2]
            self._file.seek(start)
            yield self._file.read(end - start)

    def rows(self, numbers: Iterable[int]) -> Iterator[Row]:
        """The same, read."""
        return map(json.loads, self.lines(numbers))
