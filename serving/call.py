"""One completion under way: what is known of it, and what each event does to it.

Events come from three sides, all on the event loop: the engine's connection (`on_head`, `on_body`, `on_end`,
`on_failure`), the client (`client_left`, `client_paused`, `client_resumed`) and the clock (`check_time`). A call that
is over ignores them. What follows from an event is the relay's to decide.
"""

from __future__ import annotations

import time
from asyncio import Task
from typing import TYPE_CHECKING, Final

import structlog

from feedback.interactions import Status
from pawl.ids import Principal
from serving.errors import ApiError, UpstreamFailed, UpstreamTimeout
from serving.keys import ANONYMOUS, ApiKey
from serving.limits import NO_LIMITS, Reservation
from serving.sse import COMMENT, EventFilter

if TYPE_CHECKING:
    from ab_testing.assignment import Assignment
    from ab_testing.experiment import Route
    from monitoring.tally import StreamTimes
    from serving.client import Client
    from serving.connections import Sent
    from serving.guards.injection import Finding
    from serving.guards.output import AnswerGuard
    from serving.relay import Relay
    from serving.replicas import Replica, ReplicaSet
    from serving.request_fields import CompletionRequest

log = structlog.get_logger()
seconds: Final = time.perf_counter

MAX_REFUSAL_BYTES: Final = 64 * 1024
KEEPING_S: Final = 15.0
"""How long the disk may take over a record; a disk that hangs is one that refuses."""
ENGINE_ERROR: Final = "engine_error"


class Phase:
    """How far a call has come: plain numbers, of which the compiler makes constants."""

    ADMITTING: Final = 0
    """It has not been let in; nothing is recorded if it ends here."""
    ASKING: Final = 1
    """An engine has the request; its answer has not begun."""
    ANSWERING: Final = 2
    """The engine said 200."""
    REFUSED: Final = 3
    """The engine said something else, and is saying what."""
    CHECKING: Final = 4
    """The engine has done its part; a guard reads what it said."""
    KEEPING: Final = 5
    """The outcome is settled; the record is on its way to the disk, and after it the client's last bytes."""
    OVER: Final = 6


class Call:
    """One completion under way. Times are of `time.perf_counter`, in seconds."""

    request: CompletionRequest
    known: Route
    principal: Principal
    assignment: Assignment
    replicas: ReplicaSet
    # Defaults stand in the class: most calls never write most of them.
    suffix = ""
    """The completion's id without its prefix; empty until the request is understood."""
    model = ""
    variant = "none"
    """Who serves it, which is the control where no replica has what was assigned."""
    created_at = 0.0
    regenerate_of: str | None = None
    is_admitted = False
    task: Task[None] | None = None
    """What waits for a key, a limit or a place, if anything has to."""
    replica: Replica | None = None
    tried: tuple[Replica, ...] = ()
    """Replicas that failed it."""
    n_attempts = 0
    was_stale = False
    """A connection that had been idle died under it once."""
    sent: Sent | None = None
    events: EventFilter | None = None
    """Of a stream."""
    times: StreamTimes | None = None
    finding: Finding | None = None
    """What the input guard found."""
    guard: AnswerGuard | None = None
    """Who reads the answer before the client does, if anybody."""
    size = 0
    engine_status = 0
    answer_type = b"application/json"
    head = b""
    """Of a whole answer, made before the record that says it was given."""
    has_engine_ended = False
    is_started = False
    """The client has been sent a head."""
    error: ApiError | None = None
    first_byte_at = 0.0
    engine_done_at = 0.0
    paused_at = 0.0

    def __init__(
        self,
        relay: Relay,
        client: Client,
        route: str,
        headers: dict[bytes, bytes],
        raw: bytes,
        unique: str,
        request_id: bytes,
        started: float,
    ) -> None:
        self.relay = relay
        self.client: Client | None = client
        self.route = route
        self.headers = headers
        self.raw = raw
        self.unique = unique
        """The time-ordered first part of the completion's id."""
        self.request_id = request_id
        self.started = self.asked_at = self.last_byte_at = self.last_sent_at = started
        self.parts: list[bytes] = []
        self.phase: int = Phase.ADMITTING
        self.key: ApiKey = ANONYMOUS
        self.reservation: Reservation = NO_LIMITS
        self.status = Status.OK

    # The engine's side.

    def on_head(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        """The engine's status and headers."""
        if self.phase != Phase.ASKING:
            return
        self.engine_status = status
        self.last_byte_at = seconds()
        self.phase = Phase.ANSWERING if status == 200 else Phase.REFUSED
        for name, value in headers:
            if name == b"content-type":
                self.answer_type = value

    def on_body(self, data: bytes) -> None:
        """Bytes of the engine's answer."""
        try:
            if self.phase == Phase.ANSWERING:
                self._take(data)
            elif self.phase == Phase.REFUSED and self.size < MAX_REFUSAL_BYTES:
                self.size += len(data)
                self.parts.append(data)
        except Exception as exc:  # noqa: BLE001 - the record must not say that the client got its answer
            self._stumble(exc)

    def _take(self, data: bytes) -> None:
        now = seconds()
        self.size += len(data)
        self.parts.append(data)
        if self.size > self.relay.max_answer_bytes:
            self.relay.fail(self, UpstreamFailed("the engine's answer is too long", code=ENGINE_ERROR), "too_long")
        elif self.events is None:
            self.last_byte_at = now
        else:
            self._pass_on(self.events, data, now)

    def _pass_on(self, events: EventFilter, data: bytes, now: float) -> None:
        times = self.times
        if times is not None:
            if self.first_byte_at:
                times.gap.add(now - self.last_byte_at)
            else:
                self.first_byte_at = now
                times.first_token.add(now - self.started)
        self.last_byte_at = now
        if passed := events.feed(data):
            if self.guard is None:
                self.pass_to_client(passed, now)
            else:
                self.guard.take(passed)
        if events.has_ended:
            self._end_stream(events)

    def pass_to_client(self, part: bytes, now: float) -> None:
        """Stream bytes to the client, behind the head if they are the first."""
        self.last_sent_at = now
        client = self.client
        if client is None:
            return
        if self.is_started:
            client.send_part(part)
        else:
            lines = self.relay.stream_lines(self)
            self.is_started = True
            client.start_stream(lines, part)

    def _end_stream(self, events: EventFilter) -> None:
        if events.has_failed:
            self.relay.fail(self, broken_off(), "stream_error")
        else:
            self.relay.answered(self)

    def on_end(self) -> None:
        """The engine's answer is complete."""
        self.has_engine_ended = True
        try:
            if self.phase == Phase.REFUSED:
                self.relay.refused_by_engine(self, b"".join(self.parts))
            elif self.phase == Phase.ANSWERING and self.events is None and self.size:
                self.relay.answered(self)
            elif self.phase == Phase.ANSWERING:
                self.relay.attempt_failed(self, "broken_off", broken_off())
        except Exception as exc:  # noqa: BLE001 - as above
            self._stumble(exc)

    def on_failure(self, reason: str, was_sent: bool) -> None:  # noqa: ARG002 - part of the connection's interface
        """The connection could not be made or broke; nothing more comes."""
        self.has_engine_ended = True
        if self.phase in (Phase.ASKING, Phase.ANSWERING, Phase.REFUSED):
            self.relay.connection_failed(self, reason)

    def _stumble(self, exc: Exception) -> None:
        log.error("relay_failed", reason=type(exc).__name__, exc_info=exc)
        self.relay.fail(self, ApiError("the gateway failed on this request"), "gateway")

    # The client's side.

    def client_left(self) -> None:
        """The client's connection is gone."""
        self.client = None
        self.relay.abandon(self)

    def client_paused(self) -> None:
        """The client reads too slowly: hold the engine back."""
        if not self.paused_at:
            self.paused_at = seconds()
            if self.sent is not None:
                self.sent.pause()

    def client_resumed(self) -> None:
        """The client has caught up."""
        if self.paused_at:
            self.paused_at = 0.0
            self.last_byte_at = seconds()
            if self.sent is not None:
                self.sent.resume()

    # The clock's side.

    def check_time(self, now: float) -> None:
        """End what has taken too long; keep a silent stream alive."""
        if self.phase not in (Phase.ASKING, Phase.ANSWERING, Phase.REFUSED):
            if self.phase == Phase.KEEPING and now - self.engine_done_at > KEEPING_S:
                self.relay.kept(self, False)
            return
        timeouts = self.relay.timeouts
        if now - self.started > timeouts.total_s:
            self.relay.fail(self, too_slow("finish"), "timeout")
        elif self.paused_at:
            if now - self.paused_at > timeouts.stalled_reader_s:
                self.relay.drop_slow_reader(self)
        elif self.events is not None:
            self._check_stream(now)

    def _check_stream(self, now: float) -> None:
        timeouts = self.relay.timeouts
        if not self.first_byte_at and now - self.asked_at > timeouts.first_byte_s:
            self.relay.attempt_failed(self, "timeout", too_slow("answer"))
        elif self.first_byte_at and now - self.last_byte_at > timeouts.between_chunks_s:
            self.relay.fail(self, too_slow("go on"), "timeout")
        elif self.phase == Phase.ANSWERING and now - self.last_sent_at > self.relay.keep_alive_s:
            self.pass_to_client(COMMENT, now)

    def on_kept(self, is_kept: bool) -> None:
        """The record is durable, or cannot be kept."""
        self.relay.kept(self, is_kept)


def broken_off() -> UpstreamFailed:
    """The engine stopped in the middle."""
    return UpstreamFailed("the engine broke off in the middle of the answer", code=ENGINE_ERROR)


def too_slow(what: str) -> UpstreamTimeout:
    """The engine took longer than the settings allow."""
    return UpstreamTimeout(f"the engine did not {what} in time", code="timeout")
