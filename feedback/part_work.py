"""Where the parts of a history are worked on: here, in processes beside this one, or on other machines.

Parts are independent of each other, so the place changes how long it takes and never what comes of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol, TypeVar

from pawl.database import Database

Piece = TypeVar("Piece")
Result = TypeVar("Result")
Work = Callable[[Database, Piece], Result]
"""What is done with one part: a function of a module, so that another process finds it by its name."""


class Workplace(Protocol):
    """Something that works on parts. Each brings its own connections to the database."""

    def expect(self, work: Work[Piece, Result], n_parts: int) -> None:
        """Get ready for this, if that takes time: about so many parts are coming."""

    def each(self, work: Work[Piece, Result], parts: Iterable[Piece]) -> Iterator[Result]:
        """What `work` makes of each part, in any order; of few parts at once, however many there are."""


@dataclass(frozen=True)
class Here:
    """This process, one part after the other."""

    database: Database

    def expect(self, work: Work[Piece, Result], n_parts: int) -> None:
        """Ready."""

    def each(self, work: Work[Piece, Result], parts: Iterable[Piece]) -> Iterator[Result]:
        return (work(self.database, part) for part in parts)
