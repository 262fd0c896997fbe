"""Where the processes of one gateway leave their metrics for each other: pages of shared memory behind one descriptor.

Not files: on a full disk a memory-mapped file kills the process that writes to it, and these processes must outlive
a full disk. Nothing is written per request. A process writes its page when one of them is being scraped (`ask`), and
now and then without, so that a crash loses seconds of counting. What dead processes had counted is added up on one page
by the parent; a reader reads the living first and that page last, and skips processes it already contains, so that no
counter is ever seen to fall.
"""

from __future__ import annotations

import os
import struct
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import orjson

PAGE_BYTES = 8 * 1024 * 1024
"""Only what is written takes memory."""
N_PAGES = 160
"""Two generations of 64 workers, and then some."""
QUESTION_PAGE = 0
PAST_PAGE = 1
FIRST_PAGE = 2
QUESTION = struct.Struct("<Q")
HEADER = struct.Struct("<QQII")
"""Process, the question it has answered, length and checksum of what follows."""
ATTEMPTS = 5
"""At a page that is being written."""
REMEMBERED = 512
"""Dead processes that the page of the past names."""
COUNTED = ("counter", "histogram")
"""Types whose samples stay true when their process is gone."""

Sample = tuple[str, Mapping[str, str], float]
"""Name, labels, value."""
Families = Mapping[str, tuple[str, list[Sample]]]
"""By name: type and samples."""


class Page(NamedTuple):
    """What one process had counted."""

    process: int
    answered: int
    families: Families
    past_of: list[int]
    """On the page of the past: the processes it contains."""


NOBODY = Page(0, 0, {}, [])


class Board:
    """The shared pages; the descriptor is inherited by the children."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    @classmethod
    def create(cls) -> Board:
        """A new one, empty."""
        if hasattr(os, "memfd_create"):
            return cls(os.memfd_create("pawl-metrics"))
        with tempfile.TemporaryFile() as file:
            return cls(os.dup(file.fileno()))

    def ask(self, question: int) -> None:
        """Let every process write its page soon."""
        os.pwrite(self.descriptor, QUESTION.pack(question), QUESTION_PAGE * PAGE_BYTES)

    def asked(self) -> int:
        """The newest question."""
        raw = os.pread(self.descriptor, QUESTION.size, QUESTION_PAGE * PAGE_BYTES)
        return int(QUESTION.unpack(raw)[0]) if len(raw) == QUESTION.size else 0

    def write(self, number: int, page: Page) -> None:
        """Replace a page; only one process may write it."""
        body = orjson.dumps([page.families, page.past_of])
        if HEADER.size + len(body) <= PAGE_BYTES:
            header = HEADER.pack(page.process, page.answered, len(body), zlib.crc32(body))
            os.pwrite(self.descriptor, header + body, number * PAGE_BYTES)

    def clear(self, number: int) -> None:
        """Nobody writes this page now."""
        os.pwrite(self.descriptor, bytes(HEADER.size), number * PAGE_BYTES)

    def read(self, number: int) -> Page:
        """A page as it was last written whole; empty if it never was, or its writer died over it."""
        for _ in range(ATTEMPTS):
            process, answered, length, checksum = self._header(number)
            if process == 0:
                return NOBODY
            body = os.pread(self.descriptor, length, number * PAGE_BYTES + HEADER.size)
            if zlib.crc32(body) == checksum:
                families, past_of = orjson.loads(body)
                return Page(process, answered, families, past_of)
        return NOBODY

    def has_answered(self, question: int, *, but: int) -> bool:
        """Whether every process has answered this question, but for the one that writes page `but`."""
        headers = (self._header(number) for number in range(FIRST_PAGE, N_PAGES) if number != but)
        return all(answered >= question for process, answered, _, _ in headers if process)

    def others(self, but: int) -> list[Families]:
        """What all other processes, the dead included, have counted."""
        living = [self.read(number) for number in range(FIRST_PAGE, N_PAGES) if number != but]
        past = self.read(PAST_PAGE)  # Last: see the top of this file.
        contained = {0, *past.past_of}
        return [past.families, *(page.families for page in living if page.process not in contained)]

    def bury(self, number: int) -> None:
        """The process that wrote this page is dead: add its counts to the past and clear the page."""
        dead, past = self.read(number), self.read(PAST_PAGE)
        if dead.process:
            counted = {name: family for name, family in dead.families.items() if family[0] in COUNTED}
            past_of = [*past.past_of, dead.process][-REMEMBERED:]
            self.write(PAST_PAGE, Page(1, 0, added([past.families, counted]), past_of))
        self.clear(number)

    def _header(self, number: int) -> tuple[int, int, int, int]:
        raw = os.pread(self.descriptor, HEADER.size, number * PAGE_BYTES)
        if len(raw) < HEADER.size:
            return 0, 0, 0, 0
        process, answered, length, checksum = HEADER.unpack(raw)
        return process, answered, length, checksum


def sample_key(sample: Sample) -> tuple[str, frozenset[tuple[str, str]]]:
    """What tells samples of one family apart."""
    return sample[0], frozenset(sample[1].items())


def added(parts: Iterable[Families]) -> Families:
    """The sums of all samples.

    >>> added([{"n": ("counter", [("n_total", {}, 1.0)])}, {"n": ("counter", [("n_total", {}, 2.0)])}])
    {'n': ('counter', [('n_total', {}, 3.0)])}
    """
    kinds: dict[str, str] = {}
    sums: dict[str, dict[tuple[str, frozenset[tuple[str, str]]], Sample]] = {}
    for name, kind, sample in _samples(parts):
        kinds[name] = kind
        family = sums.setdefault(name, {})
        key = sample_key(sample)
        before = family.get(key)
        family[key] = combined(before, sample) if before else sample
    return {name: (kinds[name], list(family.values())) for name, family in sums.items()}


def combined(one: Sample, other: Sample) -> Sample:
    """Two counts as one; of two times of creation the earlier."""
    value = min(one[2], other[2]) if one[0].endswith("_created") else one[2] + other[2]
    return one[0], one[1], value


def _samples(parts: Iterable[Families]) -> Iterator[tuple[str, str, Sample]]:
    for families in parts:
        for name, (kind, samples) in families.items():
            for sample in samples:
                yield name, kind, (sample[0], sample[1], sample[2])
