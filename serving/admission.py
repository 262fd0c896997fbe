"""Who may ask an engine now, who waits for a free place, and who is told to come back later.

`Gate` decides and is told the time; `Admission` wakes those who wait; `InFlight` bounds the number of requests under
way in the process, and shuts all entrances when the gateway stops.

Overload is met at the entrance. The line is kept as short as its wait: by Little's law (1961) the time a newcomer
would wait is the length of the line divided by the rate at which places become free. Half of `max_wait_s` of that is
good for a burst; a line that has been standing for `max_wait_s` is no burst, and a standing line only makes everybody
slow (Nichols and Jacobson 2012, "Controlling queue delay"), so it is then held to a tenth, which still keeps every
place taken. Facebook's servers switch their timeouts on the same signal (Maurer 2015, "Fail at scale"). Unlike
both, whoever is refused is refused on arrival, while another gateway may still help, and not after having waited; order
stays first come, first served within a priority. Only higher priorities can put somebody out of the line.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from math import ceil
from typing import Final, Generic, Literal, TypeVar

from monitoring.metrics import IN_FLIGHT, QUEUE_WAIT, QUEUE_WAITING, RATE_LIMITED
from pawl.settings import QueueSettings
from serving.errors import Overloaded
from serving.replicas import ReplicaSet

HIGHEST_PRIORITY: Final = 9
BURST_SHARE: Final = 0.5
"""Of `max_wait_s`: what the wait may be expected to be; the rest is for luck, so that hardly anybody waits in vain."""
STANDING_SHARE: Final = 0.1
"""The same for a line that has been standing for longer than a burst."""
SHORTEST_STANDING: Final = 4
"""So many may stand in any case if they need not wait longer than in a burst: else places stay empty by chance."""
KEPT_PER_SECOND: Final = 0.9
"""Of what was measured a second before; half is forgotten in 6.6 seconds."""
MAX_RETRY_AFTER_S: Final = 60
WaitState = Literal["waiting", "settled", "told", "gone"]
W = TypeVar("W")


class Line(Generic[W]):
    """Those who wait: the highest priority first, within it first come, first served."""

    def __init__(self) -> None:
        self._by_priority: list[OrderedDict[W, None]] = [OrderedDict() for _ in range(HIGHEST_PRIORITY + 1)]
        self._n = 0

    def __len__(self) -> int:
        return self._n

    def add(self, waiter: W, priority: int) -> None:
        self._by_priority[priority][waiter] = None
        self._n += 1

    def discard(self, waiter: W, priority: int) -> bool:
        """Whether it was there."""
        if waiter not in self._by_priority[priority]:
            return False
        del self._by_priority[priority][waiter]
        self._n -= 1
        return True

    def pop_first(self) -> W | None:
        """Who is next."""
        for waiting in reversed(self._by_priority):
            if waiting:
                self._n -= 1
                return waiting.popitem(last=False)[0]
        return None

    def pop_last_below(self, priority: int) -> W | None:
        """The newest of the lowest priority, if that is lower than `priority`."""
        for waiting in self._by_priority[:priority]:
            if waiting:
                self._n -= 1
                return waiting.popitem()[0]
        return None


class ServiceRate:
    """How many requests a second the places can serve when all are taken, from how those inside have fared lately.

    Little's law: requests inside, summed over time, divided by those that ended is the time one takes; the places
    divided by that is the rate. Nobody has to be timed, and it is right before the places are full, too.
    """

    __slots__ = ("_at", "_faded_at", "_n_ended", "_time_inside", "n_turned_away")

    def __init__(self) -> None:
        self._time_inside = 0.0
        self._n_ended = 0.0
        self.n_turned_away = 0.0
        self._at = 0.0
        self._faded_at = 0.0

    def passed(self, n_inside: int, now_s: float) -> None:
        """`n_inside` were inside since the last call."""
        if now_s - self._faded_at >= 1.0:
            self._fade(now_s)
        self._time_inside += n_inside * (now_s - self._at)
        self._at = now_s

    def ended(self) -> None:
        """One of them has come out."""
        self._n_ended += 1.0

    def _fade(self, now_s: float) -> None:
        """Forget a part of what is past."""
        kept = KEPT_PER_SECOND ** (now_s - self._faded_at)
        self._time_inside *= kept
        self._n_ended *= kept
        self.n_turned_away *= kept
        self._faded_at = now_s

    def of(self, n_places: int) -> float:
        """Requests per second. One end is assumed on top, so that the first ones do not find a rate of nothing."""
        return n_places * (self._n_ended + 1.0) / self._time_inside if self._time_inside > 0.0 else float("inf")


class Gate(Generic[W]):
    """A number of places and the line before them; no clock, no waiting of its own."""

    def __init__(self, n_places: int, queue: QueueSettings) -> None:
        self.n_places = n_places
        self.n_inside = 0
        self.line: Line[W] = Line()
        self.rate = ServiceRate()
        self._queue = queue
        self._standing_since = 0.0

    def try_enter(self, now_s: float) -> bool:
        """Take a place if one is free and nobody has been waiting for it."""
        if self.n_inside >= self.n_places or self.line:
            return False
        self.rate.passed(self.n_inside, now_s)
        self.n_inside += 1
        return True

    def leave(self, now_s: float) -> None:
        """A place becomes free; see `next_in`."""
        self.rate.passed(self.n_inside, now_s)
        self.n_inside -= 1
        self.rate.ended()

    def next_in(self, now_s: float) -> W | None:
        """Give a free place to whoever is first in the line."""
        if self.n_inside >= self.n_places or not self.line:
            return None
        self.rate.passed(self.n_inside, now_s)
        self.n_inside += 1
        return self.line.pop_first()

    def line_up(self, waiter: W, priority: int, now_s: float) -> W | None:
        """Put somebody in the line; return who is turned away for it: nobody, a lower priority or the newcomer."""
        if not self.line:
            self._standing_since = now_s
        turned_away: W | None = None
        if len(self.line) >= self.longest_line(now_s):
            turned_away = self.line.pop_last_below(priority)
            self.rate.n_turned_away += 1.0
            if turned_away is None:
                return waiter
        self.line.add(waiter, priority)
        return turned_away

    def longest_line(self, now_s: float) -> int:
        """As many as can be served within the wait that is allowed now; one at least."""
        self.rate.passed(self.n_inside, now_s)
        longest = self._served_within(self._queue.max_wait_s * BURST_SHARE)
        if self.line and now_s - self._standing_since > self._queue.max_wait_s:
            standing = self._served_within(self._queue.max_wait_s * STANDING_SHARE)
            longest = min(longest, max(standing, SHORTEST_STANDING))
        return min(max(1, longest), self._queue.max_waiting)

    def _served_within(self, wait_s: float) -> int:
        return int(min(self.rate.of(self.n_places) * wait_s, self._queue.max_waiting))

    def wait_s(self, now_s: float) -> float:
        """How long it takes to serve those who wait and those who were lately turned away: they will be back."""
        self.rate.passed(self.n_inside, now_s)
        n_ahead = len(self.line) + self.rate.n_turned_away
        return n_ahead / self.rate.of(self.n_places) if self.n_places else float("inf")


class InFlight:
    """How many requests are under way in this process, and the most there may be."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.n_entered = 0
        self.is_draining = False
        self.admissions: list[Admission] = []

    def left(self) -> None:
        """One request has given its place back."""
        was_full = self.n_entered == self.limit
        self.n_entered -= 1
        if was_full:
            self._let_somebody_in()

    def _let_somebody_in(self) -> None:
        """Ask the entrances in turn, so that none has to wait for another's line to end."""
        for admission in self.admissions:
            admission.let_in()
        self.admissions.append(self.admissions.pop(0))

    def drain(self) -> None:
        """Let nobody in any more, and tell those who wait."""
        self.is_draining = True
        for admission in self.admissions:
            admission.refuse_all()

    def publish(self) -> None:
        """Set the gauge that is not worth setting at every request."""
        IN_FLIGHT.set(self.n_entered)


class Place:
    """Somebody's place in the line."""

    __slots__ = ("_admission", "_done", "_timer", "loop", "priority", "refusal", "state", "waits_since")

    def __init__(self, admission: Admission, priority: int, done: Callable[[Overloaded | None], None]) -> None:
        self._admission = admission
        self._done = done
        self.priority = priority
        self.loop = asyncio.get_running_loop()
        self.state: WaitState = "waiting"
        self.refusal: Overloaded | None = None
        self.waits_since = self.loop.time()
        self._timer: asyncio.TimerHandle | None = None

    def bound(self, max_wait_s: float) -> None:
        """Wait no longer than this."""
        self._timer = self.loop.call_later(max_wait_s, self._admission.has_waited_enough, self)

    def settle(self, refusal: Overloaded | None) -> None:
        """The wait is over; tell so as soon as whoever freed the place is through with its own work."""
        self._stop_waiting("settled")
        self.refusal = refusal
        self.loop.call_soon(self._tell)

    def _tell(self) -> None:
        if self.state == "settled":
            self.state = "told"
            self._done(self.refusal)

    def give_up(self) -> None:
        """Whoever waits has left. A place just won goes to the next one; after `done` this does nothing."""
        if self.state == "waiting":
            self._admission.gate.line.discard(self, self.priority)
            self._stop_waiting("gone")
        elif self.state == "settled":
            self.state = "gone"
            if self.refusal is None:
                self._admission.leave()

    def _stop_waiting(self, state: WaitState) -> None:
        self.state = state
        if self._timer is not None:
            self._timer.cancel()
        QUEUE_WAITING.dec()
        QUEUE_WAIT.observe(self.loop.time() - self.waits_since)


class Admission:
    """The entrance to the replicas of one or several aliases; used on one event loop.

    Whoever has entered, by `try_enter`, `enter` or `line_up`, calls `leave` exactly once.
    """

    def __init__(
        self,
        in_flight: InFlight,
        queue: QueueSettings,
        *,
        capacity: int = 0,
        clock: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
    ) -> None:
        self.gate: Gate[Place] = Gate(min(capacity, in_flight.limit), queue)
        self._in_flight = in_flight
        self._queue = queue
        self._clock = clock
        self._rng = rng or random.Random()
        in_flight.admissions.append(self)

    def try_enter(self) -> bool:
        """Take a place at once, if that is possible."""
        in_flight = self._in_flight
        if in_flight.n_entered >= in_flight.limit or in_flight.is_draining or not self.gate.try_enter(self._clock()):
            return False
        in_flight.n_entered += 1
        return True

    async def enter(self, priority: int) -> None:
        """Take a place, after waiting for it where that is worth it; a cancelled wait leaves nothing behind.

        Raises:
            Overloaded: there is no place and no hope of one, or the gateway is stopping.
        """
        if self.try_enter():
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        place = self.line_up(priority, lambda refusal: self._end_wait(turn, refusal))
        try:
            await turn
        except asyncio.CancelledError:
            place.give_up()
            if not turn.cancelled() and turn.exception() is None:  # Told of its place, cancelled before it woke.
                self.leave()
            raise

    def _end_wait(self, turn: asyncio.Future[None], refusal: Overloaded | None) -> None:
        if refusal is not None and not turn.done():
            turn.set_exception(refusal)
        elif refusal is None and not turn.done():
            turn.set_result(None)
        elif refusal is None:  # Cancelled, and not yet awake to say so.
            self.leave()

    def line_up(self, priority: int, done: Callable[[Overloaded | None], None]) -> Place:
        """Wait without a coroutine: `done` is called once, later, with None for a place or with the refusal.

        Args:
            priority: from 0, the lowest, to 9.

        Raises:
            Overloaded: refused at once.
        """
        if self._in_flight.is_draining:
            raise _stopping()
        place = Place(self, min(max(priority, 0), HIGHEST_PRIORITY), done)
        turned_away = self.gate.line_up(place, place.priority, self._clock())
        if turned_away is place:
            raise self._refusal("too many requests are waiting for an engine; try again")
        if turned_away is not None:
            turned_away.settle(self._refusal("requests of a higher priority need the engine; try again"))
        place.bound(self._queue.max_wait_s)
        QUEUE_WAITING.inc()
        self.let_in()
        return place

    def leave(self) -> None:
        """Give the place to the next one."""
        self.gate.leave(self._clock())
        self._in_flight.left()
        if self.gate.line:
            self.let_in()

    def resize(self, capacity: int) -> None:
        """The engines take more or fewer requests at once than before."""
        self.gate.n_places = min(capacity, self._in_flight.limit)
        self.let_in()

    def let_in(self) -> None:
        """Give free places to those who wait."""
        in_flight = self._in_flight
        while in_flight.n_entered < in_flight.limit and (place := self.gate.next_in(self._clock())) is not None:
            in_flight.n_entered += 1
            place.settle(None)

    def has_waited_enough(self, place: Place) -> None:
        """Refuse somebody whose time in the line is over."""
        if self.gate.line.discard(place, place.priority):
            place.settle(self._refusal("no engine became free in time; try again"))

    def refuse_all(self) -> None:
        """Tell everybody in the line that the gateway is stopping."""
        while (place := self.gate.line.pop_first()) is not None:
            place.settle(_stopping())

    def _refusal(self, message: str) -> Overloaded:
        RATE_LIMITED.labels(reason="queue").inc()
        return Overloaded(message, retry_after_s=self.retry_after_s())

    def retry_after_s(self) -> int:
        """When a refused request has a chance, in whole seconds and spread, so that not all come back at once."""
        wait_s = max(1.0, self.gate.wait_s(self._clock())) * self._rng.uniform(1.0, 2.0)
        return min(ceil(wait_s), MAX_RETRY_AFTER_S) if wait_s < MAX_RETRY_AFTER_S else MAX_RETRY_AFTER_S


def admissions_for(
    sets: Mapping[str, ReplicaSet],
    in_flight: InFlight,
    queue: QueueSettings,
    *,
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, Admission]:
    """An entrance for each alias; aliases with the same engines share theirs."""
    by_engines: dict[frozenset[object], Admission] = {}
    for replicas in sets.values():
        engines = frozenset(replicas.replicas)
        if engines not in by_engines:
            by_engines[engines] = admission = Admission(in_flight, queue, clock=clock)
            replicas.follow(admission.resize)
    return {alias: by_engines[frozenset(replicas.replicas)] for alias, replicas in sets.items()}


def _stopping() -> Overloaded:
    return Overloaded("the gateway is stopping; try again", code="shutting_down")
