"""`/metrics` of a gateway that runs as several processes: whichever is asked answers for all of them.

Counters and histograms are added up, and so are the gauges that count something of this process; the table says what
becomes of the others. A process that stands alone exposes itself.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from typing import Final

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.metrics_core import Metric

from monitoring.board import Board, Families, Page, Sample, combined, sample_key
from monitoring.metrics import REGISTRY

WAIT_S = 0.6
"""For the others to bring their pages up to date; one that is too busy is shown as it was some seconds ago."""
POLL_S = 0.02
UNASKED_EVERY_S = 5.0


class Joint(Enum):
    """What one gauge of several processes is."""

    SUM = "sum"
    MAX = "max"
    OLDEST = "oldest"
    """Of times: the earliest that is set."""
    OWN = "own"
    """The same in every process, or soon will be: whoever is asked says its own."""


GAUGES: Final = {
    "pawl_requests_in_flight": Joint.SUM,
    "pawl_spool_rows": Joint.SUM,
    "pawl_spool_oldest_seconds": Joint.MAX,
    "pawl_engine_ejected": Joint.MAX,
    "pawl_engine_views": Joint.SUM,
    "pawl_replica_requests_running": Joint.SUM,
    "pawl_queue_waiting": Joint.SUM,
    "pawl_keys_read_timestamp_seconds": Joint.OLDEST,
    "pawl_build_info": Joint.MAX,
    "pawl_retrain_last_success_timestamp_seconds": Joint.MAX,
    "pawl_adapters_missing": Joint.OWN,
    "pawl_rollout_weight": Joint.OWN,
    "pawl_rollout_blind": Joint.OWN,
    "pawl_rollout_state": Joint.OWN,
}
"""A gauge that is missing here is added up."""


class Place:
    """This process's page on the board."""

    def __init__(self, board: Board, page: int) -> None:
        self.board = board
        self.page = page
        self._process = time.time_ns()
        self._answered = 0
        self._next_unasked = 0.0

    def tick(self) -> None:
        """Write the page if somebody asks or it has grown old. Call it several times a second; mostly it only looks."""
        asked = self.board.asked()
        if asked > self._answered or time.monotonic() >= self._next_unasked:
            self.publish(asked)

    def publish(self, asked: int = 0) -> None:
        """Write the page now."""
        self._write(list(REGISTRY.collect()), asked)

    def _write(self, collected: Sequence[Metric], asked: int) -> None:
        self._answered = max(asked, self._answered)
        self._next_unasked = time.monotonic() + UNASKED_EVERY_S
        self.board.write(self.page, Page(self._process, self._answered, families_of(collected), []))

    async def merged(self) -> list[Metric]:
        """Everybody's metrics, up to date if the others answer in time."""
        question = time.time_ns()
        self.board.ask(question)
        until = time.monotonic() + WAIT_S
        while not self.board.has_answered(question, but=self.page) and time.monotonic() < until:  # noqa: ASYNC110 - other processes set no event
            await asyncio.sleep(POLL_S)
        own = list(REGISTRY.collect())
        self._write(own, question)  # What has been shown once must not be forgotten when we die.
        return merged(own, self.board.others(self.page))


_place: list[Place] = []


def join(place: Place) -> None:
    """From now on this process's `/metrics` speaks for all that share the board."""
    _place[:] = [place]
    place.publish()


@contextmanager
def published(place: Place, every_s: float = 0.25) -> Iterator[None]:
    """Keep the page of a process without an event loop up to date, on a thread."""
    is_over = threading.Event()

    def run() -> None:
        while not is_over.wait(every_s):
            place.tick()

    thread = threading.Thread(target=run, name="metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
        place.publish()


async def render() -> tuple[bytes, str]:
    """The exposition of all processes, and its content type."""
    if not _place:
        return generate_latest(REGISTRY), CONTENT_TYPE_LATEST
    return generate_latest(_Collected(await _place[0].merged())), CONTENT_TYPE_LATEST


async def samples_of(family: Gauge | Counter) -> list[Sample]:
    """The samples of one family, of all processes together."""
    (own,) = family.collect()
    found = [own]
    if _place:
        found = [each for each in await _place[0].merged() if each.name == own.name]
    return [(sample.name, sample.labels, sample.value) for each in found for sample in each.samples]


class _Collected(CollectorRegistry):
    """Metrics that have been collected already, for `generate_latest`."""

    def __init__(self, metrics: Sequence[Metric]) -> None:
        super().__init__()
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        return iter(self._metrics)


def families_of(collected: Iterable[Metric]) -> Families:
    """Metrics as plain values."""
    return {
        family.name: (family.type, [(one.name, one.labels, one.value) for one in family.samples])
        for family in collected
    }


def merged(own: Iterable[Metric], others: Sequence[Families]) -> list[Metric]:
    """Our metrics and those of other processes as one; families that we do not know are left out."""
    return [_merged_family(family, others) for family in own]


def _merged_family(own: Metric, others: Sequence[Families]) -> Metric:
    joint = GAUGES.get(own.name, Joint.SUM) if own.type == "gauge" else Joint.SUM
    samples: list[Sample] = [(one.name, one.labels, one.value) for one in own.samples]
    if joint is not Joint.OWN:
        theirs = (sample for families in others if own.name in families for sample in families[own.name][1])
        samples = _joined(samples, theirs, joint)
    family = Metric(own.name, own.documentation, own.type)
    for name, labels, value in samples:
        family.add_sample(name, dict(labels), value)
    return family


def _joined(own: Iterable[Sample], theirs: Iterable[Sample], joint: Joint) -> list[Sample]:
    found = {sample_key(sample): sample for sample in own}
    for sample in theirs:
        key = sample_key(sample)
        before = found.get(key)
        found[key] = sample if before is None else _one_of_two(before, sample, joint)
    return list(found.values())


def _one_of_two(one: Sample, other: Sample, joint: Joint) -> Sample:
    if joint is Joint.MAX:
        return max(one, other, key=_value)
    if joint is Joint.OLDEST:
        return min(one, other, key=lambda sample: sample[2] or float("inf"))
    return combined(one, other)


def _value(sample: Sample) -> float:
    return sample[2]
