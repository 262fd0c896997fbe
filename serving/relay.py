"""The relay: a completion from the client to an engine and back, its record durable before the client's last byte.

One request is one `Call`. What can be done at once is done at once, on the event loop and without a task: check the
key and the request, take a place, choose the variant and the replica, write to a pooled connection. Only what must wait
(a key that is not known yet, a limit that another process counts, a full house, a very large body) gets a task. From
then on the call is driven by events, see `serving.call`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Final, Protocol

import structlog

from ab_testing.assignment import assign, force
from ab_testing.experiment import CONTROL
from feedback.interactions import Status
from monitoring.metrics import CLIENT_RETRIES, RECORDS_DROPPED, UNKNOWN_MODEL, UPSTREAM_ERRORS, Outcome
from monitoring.tally import Tally
from pawl import ids
from pawl.clock import Clock
from pawl.settings import ServingSettings
from serving.admission import Admission, InFlight
from serving.answers import error_body_for, error_lines, outcome_of, records_refused
from serving.assignments import AssignmentCache
from serving.call import ENGINE_ERROR, Call, Phase
from serving.call_record import meta_of, texts_of
from serving.client import EVENT_STREAM, Client, header_value
from serving.engine_errors import THE_REQUESTS_FAULT, engine_refusal, is_about_the_model, overloaded_engine
from serving.errors import (
    ApiError,
    BadRequest,
    Forbidden,
    NotFound,
    Overloaded,
    UpstreamFailed,
)
from serving.identity import credential_of, header_text, is_sane, principal_from, unit_of
from serving.keys import ANONYMOUS, ApiKey
from serving.limits import NO_LIMITS, Limiter
from serving.recently_served import RecentlyServed
from serving.replicas import Replica, ReplicaSet, RequestEnd, RetryBudget, conversation_of
from serving.request_fields import CompletionRequest, FieldLimits, parse_request, upstream_body
from serving.routes import HOT_PATHS
from serving.routing import RouteTable
from serving.sse import EventFilter, error_event
from serving.usage import estimated_tokens, tokens_used

if TYPE_CHECKING:
    from ab_testing.assignment import Assignment
    from serving.connections import Sent
    from serving.guards.guards import Guards
    from serving.guards.injection import Finding

log = structlog.get_logger()
seconds: Final = time.perf_counter

ENGINE_PATHS: Final = {route: path.encode() for route, path in HOT_PATHS.items()}
INFER: Final = "infer"
ADMIN: Final = "admin"
SDK_RETRIES: Final = b"x-stainless-retry-count"
"""What OpenAI's and Anthropic's clients say of a request that they send again."""
MAX_FAILED: Final = 2
"""Replicas that may fail one request: a failed one is replaced once."""
MAX_ASKED: Final = 6
"""Replicas that may say that they do not have the model."""
PARSE_HERE_BYTES: Final = 64 * 1024
"""Larger bodies are parsed on a thread: a megabyte takes milliseconds."""
OK: Final = Outcome.OK
MAX_VARIANTS: Final = 1_000
"""Whose head lines are kept ready."""
SWEEP_S: Final = 0.2
FLUSH_S: Final = 0.25
END_AFTER_LAST_EVENT_S: Final = 0.5
"""How long an engine may take to end a stream whose last event it has sent, before its connection is given up."""


class Records(Protocol):
    """Where records go: the journal."""

    @property
    def is_healthy(self) -> bool:
        """Whether the disk takes records."""

    @property
    def is_full(self) -> bool:
        """Whether as many wait as the settings allow."""

    def append(self, meta: bytes, request: bytes, response: bytes, done: Callable[[bool], None]) -> None:
        """Keep one record; `done` is called on the loop when it is durable, or when it cannot be kept."""


class Keys(Protocol):
    """Who may call."""

    def known(self, credential: str) -> ApiKey | None:
        """The key, if it is known at the moment."""

    async def look_up(self, credential: str) -> ApiKey:
        """The key.

        Raises:
            ApiError: there is none, or nobody can say.
        """


class Relay:
    """Answers the completion routes. Everything happens on the event loop's thread."""

    def __init__(
        self,
        *,
        settings: ServingSettings,
        secret: bytes,
        token_ttl_s: int,
        routes: RouteTable,
        replicas: Mapping[str, ReplicaSet],
        retries: RetryBudget,
        admissions: Mapping[str, Admission],
        in_flight: InFlight,
        keys: Keys | None,
        limiter: Limiter,
        records: Records | None,
        guards: Guards | None = None,
        clock: Clock,
    ) -> None:
        """`keys` None lets everybody in; `records` None keeps none; `guards` None checks nothing."""
        self._settings = settings
        self._secret = secret
        self._token_ttl_s = token_ttl_s
        self._routes = routes
        self._replicas = replicas
        self._retries = retries
        self._admissions = admissions
        self._in_flight = in_flight
        self._keys = keys
        self._limiter = limiter
        self._records = records
        self._guards = guards
        self._input_guards = guards if guards is not None and guards.is_active_on_input else None
        self._clock = clock
        self._field_limits = FieldLimits(
            max_json_depth=settings.max_json_depth,
            max_choices=settings.max_choices,
            max_output_tokens=settings.max_output_tokens,
            allow_fields=tuple(settings.allow_fields),
        )
        self._assignments = AssignmentCache()
        self._randomness = ids.Randomness()
        self._timers: list[asyncio.TimerHandle] = []
        self._recently_served = RecentlyServed()
        self._is_log_required = settings.log_required
        self._variant_lines: dict[tuple[str, str], bytes] = {}
        self._is_empty: asyncio.Event | None = None
        self.timeouts = settings.timeouts
        self.max_answer_bytes = settings.max_answer_bytes
        self.keep_alive_s = settings.stream_keep_alive_s
        self.max_body_bytes = settings.max_body_bytes
        self.tally = Tally()
        self.calls: dict[str, Call] = {}
        """Calls under way by the unique part of their ids."""

    @property
    def is_draining(self) -> bool:
        """Whether nobody is let in any more."""
        return self._in_flight.is_draining

    # Life of the relay.

    def start(self) -> None:
        """Begin to watch the clock."""
        loop = asyncio.get_running_loop()

        def every(seconds: float, work: Callable[[], None], slot: int) -> None:
            try:
                work()
            except Exception as exc:
                log.error("relay_timer_failed", reason=type(exc).__name__, exc_info=exc)
            self._timers[slot] = loop.call_later(seconds, every, seconds, work, slot)

        for slot, (seconds, work) in enumerate(((SWEEP_S, self._sweep), (FLUSH_S, self.flush))):
            self._timers.append(loop.call_later(seconds, every, seconds, work, slot))

    def stop(self) -> None:
        """Stop watching the clock."""
        for timer in self._timers:
            timer.cancel()
        self.flush()

    def drain(self) -> None:
        """Let nobody in any more, and tell those who wait."""
        self._in_flight.drain()

    def cut_off(self) -> None:
        """End what still runs: each client gets an error, each call keeps its record."""
        self.drain()
        for call in list(self.calls.values()):
            stopping = Overloaded("the gateway is stopping; try again", code="shutting_down")
            if call.phase == Phase.ADMITTING:
                if call.task is not None:
                    call.task.cancel()
                self._turn_away(call, stopping)
            elif call.phase < Phase.KEEPING:
                self._settle(call, Status.SHUTDOWN, stopping)

    async def wait_until_empty(self, timeout_s: float) -> bool:
        """Whether every call had ended in time."""
        self._is_empty = asyncio.Event()
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                if self.calls:
                    await self._is_empty.wait()
        return not self.calls

    def is_answering(self, suffix: str) -> bool:
        """Whether the completion is being made here at this moment."""
        return suffix[:32] in self.calls

    def recently_served(self, suffix: str) -> tuple[str, str] | None:
        """Alias and assigned variant of a completion this process made a short while ago."""
        return self._recently_served.find(suffix)

    def flush(self) -> None:
        """Bring the metrics up to date."""
        self.tally.flush()
        self._in_flight.publish()

    def _sweep(self) -> None:
        now = seconds()
        for call in list(self.calls.values()):
            try:
                call.check_time(now)
            except Exception as exc:  # noqa: BLE001 - the others' time passes too
                self._give_up(call, exc)

    # Letting a request in.

    def begin(self, route: str, headers: dict[bytes, bytes], raw: bytes, client: Client, started: float) -> Call:
        """Take one request, whatever becomes of it: the client hears of everything.

        Args:
            route: one of `HOT_PATHS`.
            headers: by lower-case name.
            raw: the whole body.
            client: who gets the answer.
            started: `time.perf_counter` when the request's first byte came.
        """
        unique = ids.uuid7(self._clock(), self._randomness.take())
        inbound = headers.get(b"x-request-id")
        request_id = inbound if inbound and is_sane(inbound) else unique.encode()
        if headers.get(SDK_RETRIES, b"0") != b"0":
            CLIENT_RETRIES.labels(route=route).inc()
        call = Call(self, client, route, headers, raw, unique, request_id, started)
        self.calls[unique] = call
        try:
            if self._admit_now(call):
                self._ask(call)
            else:
                call.task = asyncio.get_running_loop().create_task(self._admit_patiently(call))
        except ApiError as exc:
            self._turn_away(call, exc)
        except Exception as exc:  # noqa: BLE001 - the log gets the reason, the client our shape of an error
            self._give_up(call, exc)
        return call

    def _admit_now(self, call: Call) -> bool:
        """Let the request in without waiting for anything; False when something must be waited for."""
        if self.is_draining:
            raise Overloaded("the gateway is stopping; try again", code="shutting_down")
        if self._keys is not None:
            key = self._keys.known(credential_of(call.headers))
            if key is None:
                return False
            self._accept_key(call, key)
        if len(call.raw) > PARSE_HERE_BYTES:
            return False
        self._understand(call, parse_request(call.raw, call.route, self._field_limits))
        if self._input_guards is not None:
            self._heed(self._input_guards, call, self._input_guards.check_input(call.request))
        if call.key.limits is not None:
            tokens = estimated_tokens(call.request, call.raw)
            reservation = self._limiter.try_reserve(call.key, call.principal.user, tokens)
            if reservation is None:
                return False
            call.reservation = reservation
        call.is_admitted = self._admissions[call.request.alias].try_enter()
        return call.is_admitted

    async def _admit_patiently(self, call: Call) -> None:
        """The same, from where it stopped, with every wait bounded by whoever is waited for."""
        try:
            if self._keys is not None and call.key is ANONYMOUS:
                self._accept_key(call, await self._keys.look_up(credential_of(call.headers)))
            if not call.suffix:
                parsed = await asyncio.to_thread(parse_request, call.raw, call.route, self._field_limits)
                self._understand(call, parsed)
                if self._input_guards is not None:
                    finding = await asyncio.to_thread(self._input_guards.check_input, parsed)
                    self._heed(self._input_guards, call, finding)
            if call.reservation is NO_LIMITS and call.key.limits is not None:
                tokens = estimated_tokens(call.request, call.raw)
                call.reservation = await self._limiter.reserve(call.key, call.principal.user, tokens)
            await self._admissions[call.request.alias].enter(call.key.priority)
            call.is_admitted = True
            self._ask(call)
        except ApiError as exc:
            self._turn_away(call, exc)
        except Exception as exc:  # noqa: BLE001 - as in `begin`
            self._give_up(call, exc)

    def _accept_key(self, call: Call, key: ApiKey) -> None:
        if INFER not in key.scopes:
            raise Forbidden("this API key has no scope 'infer'", code="insufficient_scope")
        call.key = key

    def _understand(self, call: Call, request: CompletionRequest) -> None:
        """Find where the request's model leads, who asks, and which variant serves them.

        Raises:
            ApiError: why the request is not served.
        """
        known = self._routes.get(request.alias)
        if known is None:
            raise NotFound(f"the model {request.alias[:200]!r} does not exist", param="model", code="model_not_found")
        records = self._records
        if records is not None and self._is_log_required and (records.is_full or not records.is_healthy):
            raise records_refused()
        principal = principal_from(call.headers.get(b"x-pawl-user", b""), request.body, key_id=call.key.id)
        unit = unit_of(principal)
        call.request, call.known, call.principal = request, known, principal
        header = call.headers.get(b"x-pawl-regenerate-of")
        if header or request.regenerate_of:
            named = header.decode("latin-1") if header else str(request.regenerate_of)
            call.regenerate_of = self._regenerated(named, principal)
        forced = call.headers.get(b"x-pawl-variant")
        if forced is not None:
            assignment = self._forced(call, forced)
        else:
            assignment = self._assignments.of(known, unit) if unit else assign(known, None, random_unit=call.unique)
        call.assignment = assignment
        call.variant, call.model = assignment.variant, assignment.model
        call.replicas = self._replicas[request.alias]
        call.created_at = self._clock()
        call.suffix = ids.make_completion_suffix(self._secret, call.unique, principal)

    def _forced(self, call: Call, header: bytes) -> Assignment:
        """The variant that a request asks for by its name, if its sender may."""
        allowed, key = self._settings.forced_variants, call.key
        is_admin = allowed.admin_keys and key is not ANONYMOUS and ADMIN in key.scopes
        if not (is_admin or call.principal.user in allowed.users or key.id in allowed.keys):
            raise Forbidden("x-pawl-variant is not allowed here: serving.forced_variants", code="variant_not_allowed")
        assignment = force(call.known, header_text(header))
        if assignment is None:
            raise BadRequest("no such variant runs", param="x-pawl-variant", code="variant_not_found")
        return assignment

    def _heed(self, guards: Guards, call: Call, finding: Finding | None) -> None:
        if finding is not None and guards.is_refused(call, finding):
            call.finding = finding
            call.assignment = call.assignment._replace(is_analysed=False)  # No variant answers it.

    def _regenerated(self, named: str, principal: ids.Principal) -> str:
        """The interaction this one is to replace, which must be the caller's own."""
        suffix = ids.completion_suffix(named)
        if suffix is None:
            raise BadRequest("regenerate_of is not a completion id", param="metadata.regenerate_of")
        if not ids.owns(self._secret, suffix, principal):
            raise NotFound(
                "no such completion to regenerate", param="metadata.regenerate_of", code="completion_not_found"
            )
        return suffix

    def _turn_away(self, call: Call, error: ApiError) -> None:
        """A request that was not let in: it is answered and counted, and leaves no record."""
        call.error = error
        alias = call.request.alias if call.suffix else UNKNOWN_MODEL
        self.tally.count(call.route, alias, "none", outcome_of(error))
        self._tell(call, error)
        self._forget(call, refund=True)

    def _give_up(self, call: Call, exc: Exception) -> None:
        log.error("relay_failed", reason=type(exc).__name__, exc_info=exc)
        failure = ApiError("the gateway failed on this request")
        if call.phase == Phase.ADMITTING:
            self._turn_away(call, failure)
        else:
            self.fail(call, failure, "gateway")

    # Asking an engine.

    def _ask(self, call: Call) -> None:
        """Send the request to the best replica that has the assigned variant, else to one that has the control."""
        call.phase = Phase.ASKING
        if call.finding is not None and self._guards is not None:
            self._refuse_by_guard(self._guards, call)
            return
        replica = self._choose(call)
        if replica is None:
            unavailable = Overloaded("no engine can serve the model now; try again", code="engine_unavailable")
            self._settle(call, Status.UPSTREAM_ERROR, unavailable)
            return
        request = call.request
        call.n_attempts += 1
        call.replica = replica
        if call.n_attempts > 1:
            call.parts, call.size, call.first_byte_at, call.has_engine_ended = [], 0, 0.0, False
        if request.is_stream:
            call.events = EventFilter(call.route, drop_usage=not request.wants_usage)
            call.times = self.tally.stream_times(request.alias, call.variant)
        call.asked_at = call.last_byte_at = seconds()
        replica.started()
        if call.n_attempts == 1:
            self._retries.note_request()
        if self._guards is not None:
            call.guard = self._guards.guard_of(call)
        body = upstream_body(request, call.model, call.key.cache_salt or None, call.suffix)
        headers = b"x-request-id: " + call.suffix.encode() + b"\r\n"
        call.sent = replica.pool.send(ENGINE_PATHS[call.route], headers, body, call)

    def _refuse_by_guard(self, guards: Guards, call: Call) -> None:
        """Answer in the engine's place, and as it would."""
        call.asked_at = seconds()
        call.phase, call.has_engine_ended = Phase.ANSWERING, True
        if call.request.is_stream:
            call.events = EventFilter(call.route, drop_usage=False)
        call.on_body(guards.refusal(call))
        if not call.request.is_stream:
            call.on_end()

    def _choose(self, call: Call) -> Replica | None:
        affinity = 0 if call.replicas.is_single else conversation_of(call.request)
        if call.variant != CONTROL and not call.replicas.has_model(call.model, call.tried):
            call.variant, call.model = CONTROL, call.known.control_model(call.assignment.experiment)
        return call.replicas.pick(affinity, call.model, call.tried)

    def connection_failed(self, call: Call, reason: str) -> None:
        """The connection to the engine could not be made, or broke."""
        if reason == "stale" and not call.was_stale:
            call.was_stale = True
            self._release_replica(call, "neutral")  # It closed an idle connection, as it may: nobody's failure.
            self._ask(call)
        elif reason in ("connect", "connect_timeout"):
            down = Overloaded("the engine cannot be reached; try again", code="engine_unavailable")
            self.attempt_failed(call, reason, down)
        else:
            self.attempt_failed(call, reason, UpstreamFailed("the engine broke off", code=ENGINE_ERROR))

    def refused_by_engine(self, call: Call, raw: bytes) -> None:
        """The engine answered with an error of its own."""
        status = call.engine_status
        is_missing = status == 404 and is_about_the_model(raw)
        if is_missing and call.replica is not None and call.n_attempts < MAX_ASKED:
            UPSTREAM_ERRORS.labels(reason="model_missing").inc()
            call.replica.lacks(call.model)
            self._release_replica(call, "neutral")
            self._ask(call)
        elif status in THE_REQUESTS_FAULT or (status == 404 and not is_missing):
            self._release_replica(call, "ok")
            refusal = engine_refusal(status, raw)
            self._settle(call, Status.REJECTED, refusal)
        elif status in (429, 503):
            self.attempt_failed(call, f"http_{status}", overloaded_engine())
        else:
            failure = UpstreamFailed("the engine failed on this request", code=ENGINE_ERROR)
            self.attempt_failed(call, f"http_{status}", failure)

    def attempt_failed(self, call: Call, reason: str, error: ApiError) -> None:
        """Ask another replica if nothing has reached the client and the retry budget allows, else fail."""
        if call.is_started or call.replica is None:
            self.fail(call, error, reason)
            return
        call.tried = (*call.tried, call.replica)
        self._blame(call, reason)
        models = (call.model, call.known.control_model(call.assignment.experiment))
        can_go_on = any(call.replicas.has_model(model, call.tried) for model in models)
        if len(call.tried) < MAX_FAILED and can_go_on and self._retries.may_retry():
            self._ask(call)
        else:
            self.fail(call, error, reason)

    def _blame(self, call: Call, reason: str) -> None:
        UPSTREAM_ERRORS.labels(reason=reason).inc()
        self._hang_up(call)
        self._release_replica(call, "failed")

    def _release_replica(self, call: Call, outcome: RequestEnd) -> None:
        if call.replica is not None:
            call.replica.ended(outcome)
            call.replica = None

    def _leave(self, call: Call) -> None:
        if call.is_admitted:
            call.is_admitted = False
            self._admissions[call.request.alias].leave()

    def _hang_up(self, call: Call) -> None:
        """Close the connection to an engine that is still at work: it stops generating."""
        sent, call.sent = call.sent, None
        if sent is not None and not call.has_engine_ended:
            sent.abort()

    # Outcomes.

    def answered(self, call: Call) -> None:
        """The engine has done its part."""
        call.engine_done_at = seconds()
        if call.events is None:
            call.head = self._lines(call)
        sent, call.sent = call.sent, None
        if sent is not None and not call.has_engine_ended:  # Its end mostly lies in the same read.
            asyncio.get_running_loop().call_soon(await_end, call, sent)
        self._release_replica(call, "ok")
        if call.guard is None:
            self._keep(call)
        else:
            call.phase = Phase.CHECKING
            call.guard.finish()

    def checked(self, call: Call) -> None:
        """A guard has let the answer pass, or has put another in its place."""
        if call.phase == Phase.CHECKING:
            self._keep(call)

    def cut_short(self, call: Call, passed: list[bytes], ending: bytes) -> None:
        """A guard ends a stream: the client and the record get what has passed, and why there is no more."""
        if call.phase >= Phase.KEEPING or call.events is None:
            return
        call.engine_done_at = seconds()
        self._hang_up(call)
        self._release_replica(call, "ok")
        call.parts = [*passed, ending]
        call.events.last_event = ending
        self._keep(call)

    def fail(self, call: Call, error: ApiError, reason: str) -> None:
        """The answer cannot be completed: the record says so, and the client is told."""
        if call.phase >= Phase.KEEPING:
            return
        if call.replica is not None:
            self._blame(call, reason)
        self._settle(call, Status.UPSTREAM_ERROR, error)

    def abandon(self, call: Call) -> None:
        """The client has left: the engine stops, and what there is of the answer is recorded."""
        if call.phase == Phase.ADMITTING:
            if call.task is not None:
                call.task.cancel()
            alias = call.request.alias if call.suffix else UNKNOWN_MODEL
            self.tally.count(call.route, alias, "none", Outcome.CANCELLED)
            self._forget(call, refund=True)
        elif call.phase < Phase.KEEPING:
            self._settle(call, Status.CLIENT_DISCONNECTED, None)

    def drop_slow_reader(self, call: Call) -> None:
        """A client that stopped reading has left; its slowness must not count against the variant that served it."""
        client, call.client = call.client, None
        self.abandon(call)
        if client is not None:
            client.drop()

    def _settle(self, call: Call, status: Status, error: ApiError | None) -> None:
        """The outcome is known and is not a whole answer."""
        if call.phase >= Phase.KEEPING:
            return
        call.status, call.error = status, error
        call.engine_done_at = seconds()
        self._hang_up(call)
        self._release_replica(call, "neutral")
        self._keep(call)

    # Keeping the record, then telling the client.

    def _keep(self, call: Call) -> None:
        call.phase = Phase.KEEPING
        self._leave(call)
        if self._records is None:
            self.kept(call, True)
            return
        if call.size > PARSE_HERE_BYTES and not call.request.is_stored:
            call.task = asyncio.get_running_loop().create_task(self._keep_counts(call, self._records))
        else:
            request, response = texts_of(call)
            self._records.append(meta_of(call), request, response, call.on_kept)

    async def _keep_counts(self, call: Call, records: Records) -> None:
        """Of a long answer that is not to be stored: reading it takes a while."""
        request, response = await asyncio.to_thread(texts_of, call)
        records.append(meta_of(call), request, response, call.on_kept)

    def kept(self, call: Call, is_kept: bool) -> None:
        """The record is durable, or cannot be kept: what that means for the client is `log_required`."""
        if call.phase == Phase.OVER:
            return
        if is_kept:
            self._recently_served.note(call.suffix, call.request.alias, call.assignment.variant)
        else:
            RECORDS_DROPPED.inc()
            if self._is_log_required and call.error is None:
                call.error = records_refused()
        try:
            if call.error is not None:
                self._tell(call, call.error)
            elif call.client is not None:
                self._deliver(call, call.client)
            self._count(call)
        finally:
            self._forget(call, refund=False)

    def _deliver(self, call: Call, client: Client) -> None:
        events = call.events
        if events is None:
            lines = b"".join((call.head, b"content-type: ", call.answer_type, b"\r\n"))
            client.send_whole(200, lines, b"".join(call.parts))
        else:
            if not call.is_started:
                client.start_stream(self.stream_lines(call), b"")
            client.end_stream(events.last_event)

    def _tell(self, call: Call, error: ApiError) -> None:
        """Tell a client that still listens what went wrong: as the whole answer, or as an event of a stream."""
        client = call.client
        if client is None:
            return
        if call.is_started:
            client.end_stream(error_event(call.route, error_body_for(call.route, error)))
        else:
            lines = call.reservation.headers + error_lines(call.request_id, error)
            client.send_whole(error.status, lines, error_body_for(call.route, error))

    def refuse_upload(self, route: str, headers: Mapping[bytes, bytes], error: ApiError, client: Client) -> None:
        """Answer a request whose body has not come, or comes too slowly, or is too large."""
        inbound = headers.get(b"x-request-id")
        unique = ids.uuid7(self._clock(), self._randomness.take()).encode()
        self.tally.count(route, UNKNOWN_MODEL, "none", outcome_of(error))
        request_id = inbound if inbound and is_sane(inbound) else unique
        client.send_whole(error.status, error_lines(request_id, error), error_body_for(route, error))

    def stream_lines(self, call: Call) -> bytes:
        """The head of a streamed answer."""
        return self._lines(call) + EVENT_STREAM

    def _lines(self, call: Call) -> bytes:
        token = ids.make_feedback_token(self._secret, call.suffix, int(call.created_at) + self._token_ttl_s)
        named = self._variant_lines.get((call.variant, call.model)) or self._name_variant(call.variant, call.model)
        return b"".join((b"x-request-id: ", call.request_id, named, token.encode(), b"\r\n", call.reservation.headers))

    def _name_variant(self, variant: str, model: str) -> bytes:
        """The lines about who answered, from the end of the one before to the beginning of the one after."""
        lines = (b"\r\nx-pawl-variant: ", header_value(variant), b"\r\nx-pawl-model: ", header_value(model))
        named = b"".join((*lines, b"\r\nx-pawl-feedback-token: "))
        if len(self._variant_lines) >= MAX_VARIANTS:
            self._variant_lines.clear()
        self._variant_lines[variant, model] = named
        return named

    def _count(self, call: Call) -> None:
        now = seconds()
        error = call.error
        if call.status == Status.CLIENT_DISCONNECTED:
            outcome = Outcome.CANCELLED
        else:
            outcome = OK if error is None else outcome_of(error)
        served = self.tally.count(call.route, call.request.alias, call.variant, outcome)
        served.duration.add(now - call.started)
        waited_s = call.engine_done_at - call.asked_at
        self.tally.overhead(call.route, max(0.0, now - call.started - waited_s))

    def _forget(self, call: Call, *, refund: bool) -> None:
        """Give back whatever the call still holds."""
        call.phase = Phase.OVER
        self._leave(call)
        if call.reservation is not NO_LIMITS:
            was_refused = call.error is not None and not call.is_started
            if refund or was_refused or call.status in (Status.REJECTED, Status.UPSTREAM_ERROR):
                call.reservation.refund()
            else:
                used = tokens_used(call.parts, call.raw, is_stream=call.request.is_stream)
                call.reservation.settle(min(used, estimated_tokens(call.request, call.raw)) if call.error else used)
        call.client = call.sent = call.task = call.guard = None
        self.calls.pop(call.unique, None)
        if self._is_empty is not None and not self.calls:
            self._is_empty.set()


def await_end(call: Call, sent: Sent) -> None:
    """Give an engine that has sent its last event a moment to end the answer, so that its connection can be kept."""
    if not call.has_engine_ended:
        asyncio.get_running_loop().call_later(END_AFTER_LAST_EVENT_S, sent.abort)
