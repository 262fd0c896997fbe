"""Counting requests in plain numbers, so that the hot path never takes a metric's lock.

The gateway adds to a `Tally` per request and per chunk; `flush` hands the sums to Prometheus a few times a second and
at every scrape. Used on one thread.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from typing import Final

from prometheus_client import Histogram

from monitoring.metrics import (
    DURATION_BUCKETS,
    FIRST_TOKEN_BUCKETS,
    GATEWAY_OVERHEAD,
    INTER_TOKEN,
    INTER_TOKEN_BUCKETS,
    OVERHEAD_BUCKETS,
    REQUEST_DURATION,
    REQUESTS,
    TIME_TO_FIRST_TOKEN,
)

bisect_left: Final = bisect.bisect_left


class Spread:
    """A histogram that has not been handed over yet."""

    __slots__ = ("_bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds: Final = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def add(self, value: float) -> None:
        """Count one value, in the bucket whose upper bound is the first not below it."""
        self.counts[bisect_left(self._bounds, value)] += 1
        self.total += value

    def move_to(self, histogram: Histogram) -> None:
        """Add everything to a Prometheus histogram of the same bounds, and start again at nothing.

        The client library has no public way to add many values at once; its buckets hold plain, not running, counts.
        """
        for bucket, count in zip(histogram._buckets, self.counts, strict=True):
            if count:
                bucket.inc(count)
        histogram._sum.inc(self.total)
        self.counts = [0] * len(self.counts)
        self.total = 0.0

    def __bool__(self) -> bool:
        return any(self.counts)


class Served:
    """The answers of one route, alias and variant."""

    __slots__ = ("duration", "outcomes")

    def __init__(self) -> None:
        self.outcomes: dict[str, int] = {}
        self.duration = Spread(DURATION_BUCKETS)


class StreamTimes:
    """What the streams of one alias and variant felt like."""

    __slots__ = ("first_token", "gap")

    def __init__(self) -> None:
        self.first_token = Spread(FIRST_TOKEN_BUCKETS)
        self.gap = Spread(INTER_TOKEN_BUCKETS)


class Tally:
    """The counts of one gateway process since the last flush."""

    def __init__(self) -> None:
        self._served: dict[tuple[str, str, str], Served] = {}
        self._streams: dict[tuple[str, str], StreamTimes] = {}
        self._overhead: dict[str, Spread] = {}

    def count(self, route: str, model: str, variant: str, outcome: str) -> Served:
        """One request has ended; the caller may add how long it took."""
        served = self._served.get((route, model, variant))
        if served is None:
            served = self._served[route, model, variant] = Served()
        served.outcomes[outcome] = served.outcomes.get(outcome, 0) + 1
        return served

    def overhead(self, route: str, seconds: float) -> None:
        """What the gateway itself took."""
        spread = self._overhead.get(route)
        if spread is None:
            spread = self._overhead[route] = Spread(OVERHEAD_BUCKETS)
        spread.add(seconds)

    def stream_times(self, model: str, variant: str) -> StreamTimes:
        """Where the chunks of one stream are counted."""
        times = self._streams.get((model, variant))
        if times is None:
            times = self._streams[model, variant] = StreamTimes()
        return times

    def flush(self) -> None:
        """Hand everything to Prometheus."""
        for (route, model, variant), served in self._served.items():
            for outcome, count in served.outcomes.items():
                REQUESTS.labels(route, model, variant, outcome).inc(count)
            served.outcomes.clear()
        for spread, histogram in self._waiting():
            spread.move_to(histogram)

    def _waiting(self) -> Iterator[tuple[Spread, Histogram]]:
        for labels, served in self._served.items():
            if served.duration:
                yield served.duration, REQUEST_DURATION.labels(*labels)
        for model_and_variant, times in self._streams.items():
            if times.first_token:
                yield times.first_token, TIME_TO_FIRST_TOKEN.labels(*model_and_variant)
            if times.gap:
                yield times.gap, INTER_TOKEN.labels(*model_and_variant)
        for route, spread in self._overhead.items():
            if spread:
                yield spread, GATEWAY_OVERHEAD.labels(route)
