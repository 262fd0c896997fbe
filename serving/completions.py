"""The relay: one completion from the client to an engine and back, with its record durable before the last byte."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import product
from typing import NamedTuple

import aiohttp
import orjson
import structlog

from ab_testing.assignment import Assignment, assign
from ab_testing.experiment import Route
from feedback.drain import Drain
from feedback.errors import SpoolUnavailable
from feedback.interactions import Status
from feedback.recording import Exchange, exchange_to_json, parse_answer
from feedback.spool import Spool, SpoolRecord
from monitoring.metrics import (
    GATEWAY_OVERHEAD,
    INTER_TOKEN,
    RECORDS_DROPPED,
    REQUEST_DURATION,
    REQUESTS,
    TIME_TO_FIRST_TOKEN,
    UNKNOWN_MODEL,
    Outcome,
)
from pawl import ids
from pawl.clock import Clock
from pawl.settings import ServingSettings
from serving.errors import ApiError, BadRequest, NotFound, Overloaded, UpstreamFailed, UpstreamTimeout
from serving.identity import principal_of, unit_of
from serving.in_flight import InFlight
from serving.replicas import Replica, ReplicaSet, conversation_of
from serving.request_fields import CompletionRequest, parse_completion_request, upstream_body
from serving.routing import RouteTable
from serving.sse import DONE, EVENT_END, EventFilter, error_event
from serving.upstream import EngineRefused, Engines, ModelMissing, count_failure
from serving.wire import (
    AsgiMessage,
    ClientGone,
    Receive,
    Scope,
    Send,
    headers_of,
    read_body,
    sane_request_id,
    send_error,
    send_whole,
    start_response,
)

log = structlog.get_logger()

ID_PREFIXES = {"chat.completions": "chatcmpl-", "completions": "cmpl-"}
REGENERATE_HEADER = "x-pawl-regenerate-of"
CONTROL = "control"
ENGINE_ERROR = "engine_error"
MOST_REPLICAS = 2
"""That one request may ask: a failed replica is replaced once."""
END_AFTER_DONE_S = 0.5
LAST_WORDS_S = 2.0
"""How long a client may take to read an error after which nothing comes."""


class Arrival(NamedTuple):
    """A request as it came."""

    route: str
    headers: Mapping[str, str]
    raw: bytes
    unique: str
    request_id: str
    started: float


@dataclass
class Call:
    """One completion under way."""

    exchange: Exchange
    request: CompletionRequest
    assignment: Assignment
    control_model: str
    raw_request: bytes
    headers: list[tuple[str, str]]
    """Of every answer to this call."""
    started: float
    raw_response: bytearray = field(default_factory=bytearray)
    is_started: bool = False
    """The status line has gone to the client."""
    upstream_s: float = 0.0
    """Spent waiting for the engine."""
    replica: Replica | None = None
    """Whose answer is being waited for."""
    error: ApiError | None = None
    is_recorded: bool = False


class Relay:
    """Answers the completion routes."""

    def __init__(
        self,
        *,
        settings: ServingSettings,
        secret: bytes,
        token_ttl_s: int,
        routes: RouteTable,
        replicas: Mapping[str, ReplicaSet],
        engines: Engines,
        spool: Spool,
        drain: Drain,
        in_flight: InFlight,
        clock: Clock,
    ) -> None:
        self._settings = settings
        self._secret = secret
        self._token_ttl_s = token_ttl_s
        self._routes = routes
        self._replicas = replicas
        self._engines = engines
        self._spool = spool
        self._drain = drain
        self._in_flight = in_flight
        self._clock = clock

    async def answer(self, route: str, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, whatever happens to it."""
        started = time.perf_counter()
        headers = headers_of(scope)
        unique = ids.uuid7(self._clock(), os.urandom(10))
        request_id = sane_request_id(headers, unique)
        limits = self._settings
        model = UNKNOWN_MODEL
        try:
            raw = await read_body(receive, headers, limits.max_body_bytes, limits.timeouts.request_body_s)
            request, known = self._resolve(route, raw)
            model = request.alias
            call = self._admit(Arrival(route, headers, raw, unique, request_id, started), request, known)
            with self._in_flight.slot(call.exchange.id):
                await self._run(call, receive, send)
        except ClientGone:
            return
        except ApiError as exc:
            REQUESTS.labels(route=route, model=model, variant="none", outcome=outcome_of(exc)).inc()
            await send_error(send, exc, [("x-request-id", request_id)])
        except Exception as exc:  # The edge: the log gets the reason, the client our shape of an error.
            log.error("relay_failed", reason=type(exc).__name__, exc_info=True)
            with suppress(RuntimeError):  # An answer has begun; the server closes the connection on it.
                await send_error(send, ApiError("the gateway failed on this request"), [("x-request-id", request_id)])

    def _resolve(self, route: str, raw: bytes) -> tuple[CompletionRequest, Route]:
        """Check the request and find where its model leads.

        Raises:
            BadRequest, NotFound: what is wrong with it.
        """
        limits = self._settings
        request = parse_completion_request(raw, route, max_depth=limits.max_json_depth, max_choices=limits.max_choices)
        known = self._routes.get(request.alias)
        if known is None:
            raise NotFound(f"the model {request.alias[:200]!r} does not exist", param="model", code="model_not_found")
        return request, known

    def _admit(self, arrival: Arrival, request: CompletionRequest, known: Route) -> Call:
        """Name the caller, choose the variant.

        Raises:
            ApiError: why the request is not served.
        """
        if self._settings.log_required and not self._spool.is_healthy:
            self._drain.wake()  # Its next look at the spool is what finds out that the disk is back.
            raise Overloaded("records cannot be kept at the moment; try again", code="spool_unavailable")
        principal = principal_of(arrival.headers, request.body)
        suffix = ids.make_completion_suffix(self._secret, arrival.unique, principal)
        assignment = assign(known, unit_of(principal), random_unit=arrival.unique)
        exchange = Exchange(
            id=suffix,
            completion_id=ID_PREFIXES[arrival.route] + suffix,
            route=arrival.route,
            created_at=self._clock(),
            alias=request.alias,
            key_id=principal.key_id,
            user_id=principal.user or None,
            unit_id=unit_of(principal) or arrival.unique,
            experiment=assignment.experiment,
            assigned_variant=assignment.variant,
            served_variant=assignment.variant,
            probability=assignment.probability,
            is_analysed=assignment.is_analysed,
            phase=assignment.phase,
            route_version=known.version,
            model=assignment.model,
            regenerate_of=self._regenerated(arrival.headers, request, principal),
            is_stream=request.is_stream,
            is_stored=request.is_stored,
        )
        headers = [("x-request-id", arrival.request_id)]
        return Call(exchange, request, assignment, control_model_of(known), arrival.raw, headers, arrival.started)

    def _regenerated(
        self, headers: Mapping[str, str], request: CompletionRequest, principal: ids.Principal
    ) -> str | None:
        """The interaction this one is to replace, if the request names one and it is the caller's own."""
        named = headers.get(REGENERATE_HEADER) or request.regenerate_of
        if not named:
            return None
        suffix = ids.completion_suffix(named)
        if suffix is None:
            raise BadRequest("regenerate_of is not a completion id", param="metadata.regenerate_of")
        if not ids.owns(self._secret, suffix, principal):
            raise NotFound(
                "no such completion to regenerate", param="metadata.regenerate_of", code="completion_not_found"
            )
        return suffix

    async def _run(self, call: Call, receive: Receive, send: Send) -> None:
        """Relay until done, or until the client leaves or the gateway stops; then make sure of the record."""
        relay = asyncio.ensure_future(self._relay(call, send))
        self._in_flight.attach(call.exchange.id, relay)
        gone = asyncio.ensure_future(wait_for_disconnect(receive))
        try:
            await asyncio.wait({relay, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not relay.done():
                call.exchange.status = Status.CLIENT_DISCONNECTED
                relay.cancel()
            await asyncio.wait({relay})
            if relay.cancelled():
                await self._finish_cut_off(call, send)
            else:
                relay.result()
        finally:
            gone.cancel()
            relay.cancel()
            await asyncio.shield(self._ensure_recorded(call))
            self._count(call)

    async def _finish_cut_off(self, call: Call, send: Send) -> None:
        """The relay was cancelled: tell a client that still listens why."""
        if call.exchange.status == Status.CLIENT_DISCONNECTED:
            return
        call.exchange.status = Status.SHUTDOWN
        call.error = Overloaded("the gateway is stopping; try again", code="shutting_down")
        await self._ensure_recorded(call)
        await self._tell(call, send, call.error)

    async def _relay(self, call: Call, send: Send) -> None:
        try:
            async with asyncio.timeout(self._settings.timeouts.total_s):
                response = await self._open(call)
                try:
                    await (self._stream if call.request.is_stream else self._whole)(call, response, send)
                finally:
                    response.close()
        except TimeoutError:
            self._blame_replica(call, "timeout")
            await self._fail(call, send, UpstreamTimeout("the engine did not finish in time", code="timeout"))
        except ClientGone:
            call.exchange.status = Status.CLIENT_DISCONNECTED
        except aiohttp.ClientError:
            self._blame_replica(call, "broken_off")
            await self._fail(call, send, UpstreamFailed("the engine broke off", code=ENGINE_ERROR))
        except ApiError as exc:
            await self._fail(call, send, exc)
        except Exception as exc:  # Caught here so that the record does not say the client got its answer.
            log.error("relay_failed", reason=type(exc).__name__, exc_info=True)
            await self._fail(call, send, ApiError("the gateway failed on this request"))

    def _blame_replica(self, call: Call, reason: str) -> None:
        """Count a failure after the answer began, unless the replica had done its part."""
        if call.replica is not None:
            count_failure(self._replicas[call.exchange.alias], call.replica, reason)
            call.replica = None

    def _credit_replica(self, call: Call) -> None:
        """The replica has answered in full: what comes now is not its doing."""
        if call.replica is not None:
            self._replicas[call.exchange.alias].note_success(call.replica)
            call.replica = None

    async def _open(self, call: Call) -> aiohttp.ClientResponse:
        """Ask for the assigned variant, and for the control where no replica that answers has it."""
        replicas = self._replicas[call.exchange.alias]
        wanted = (call.assignment.variant, call.assignment.model)
        control = (CONTROL, call.control_model)
        order = replicas.in_order(conversation_of(call.request))[:MOST_REPLICAS]
        failure: ApiError = Overloaded("no engine can serve the model now; try again", code="engine_unavailable")
        failed: set[str] = set()
        for (variant, model), replica in product(dict.fromkeys((wanted, control)), order):
            if replica.url in failed:
                continue
            try:
                return await self._ask(call, replicas, replica, variant, model)
            except ModelMissing:
                continue
            except EngineRefused:
                raise
            except ApiError as exc:
                failure = exc
                failed.add(replica.url)
        raise failure

    async def _ask(
        self, call: Call, replicas: ReplicaSet, replica: Replica, variant: str, model: str
    ) -> aiohttp.ClientResponse:
        """One attempt.

        Raises:
            ModelMissing: the replica does not have the model.
            ApiError: as `Engines.open` says.
        """
        exchange = call.exchange
        exchange.served_variant, exchange.model = variant, model
        call.replica = replica
        before = time.perf_counter()
        try:
            body = upstream_body(call.request, model)
            return await self._engines.open(
                replicas, replica, exchange.route, body, exchange.id, is_stream=exchange.is_stream
            )
        finally:
            call.upstream_s += time.perf_counter() - before

    async def _whole(self, call: Call, response: aiohttp.ClientResponse, send: Send) -> None:
        before = time.perf_counter()
        call.raw_response += await response.read()
        call.upstream_s += time.perf_counter() - before
        self._credit_replica(call)
        content_type = response.headers.get("content-type", "application/json")
        headers = [*self._answer_headers(call), ("content-type", content_type)]
        await self._record(call)
        call.is_started = True
        await send_whole(self._patiently(send), 200, headers, bytes(call.raw_response))

    async def _stream(self, call: Call, response: aiohttp.ClientResponse, send: Send) -> None:
        headers = [
            *self._answer_headers(call),
            ("content-type", "text/event-stream; charset=utf-8"),
            ("cache-control", "no-cache"),
            ("x-accel-buffering", "no"),
        ]
        send = self._patiently(send)
        await start_response(send, 200, headers)
        call.is_started = True
        events = EventFilter(drop_usage=not call.request.wants_usage)
        await self._pass_chunks(call, response, events, send)
        if events.has_failed or not events.has_ended:
            self._blame_replica(call, "stream_error" if events.has_failed else "broken_off")
            raise UpstreamFailed("the engine broke off in the middle of the answer", code=ENGINE_ERROR)
        self._credit_replica(call)
        await self._record(call)
        await send({"type": "http.response.body", "body": DONE + EVENT_END, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def _pass_chunks(self, call: Call, response: aiohttp.ClientResponse, events: EventFilter, send: Send) -> None:
        labels = {"model": call.exchange.alias, "variant": call.exchange.served_variant}
        gaps = INTER_TOKEN.labels(**labels)
        last: float | None = None
        while chunk := await self._next_chunk(call, response, events):
            now = time.perf_counter()
            if last is None:
                call.exchange.first_byte_ms = (now - call.started) * 1000
                TIME_TO_FIRST_TOKEN.labels(**labels).observe(now - call.started)
            else:
                gaps.observe(now - last)
            last = now
            call.raw_response += chunk
            if passed := events.feed(chunk):
                await send({"type": "http.response.body", "body": passed, "more_body": True})

    def _patiently(self, send: Send) -> Send:
        """Send to a client that may stall for a while, but not for ever: one that does has left.

        Its slowness is not the engine's, and must not count against the variant that served it.
        """

        async def send_in_time(message: AsgiMessage) -> None:
            try:
                async with asyncio.timeout(self._settings.timeouts.stalled_reader_s):
                    await send(message)
            except TimeoutError as exc:
                raise ClientGone from exc

        return send_in_time

    async def _next_chunk(self, call: Call, response: aiohttp.ClientResponse, events: EventFilter) -> bytes:
        """What the engine sends next, empty at its end: awaited past `[DONE]` so that the connection can be reused."""
        before = time.perf_counter()
        wait_s = END_AFTER_DONE_S if events.has_ended else self._settings.timeouts.between_chunks_s
        try:
            async with asyncio.timeout(wait_s):
                return await response.content.readany()
        except (TimeoutError, aiohttp.ClientError):
            if events.has_ended:
                return b""
            raise
        finally:
            call.upstream_s += time.perf_counter() - before

    def _answer_headers(self, call: Call) -> list[tuple[str, str]]:
        expires_at = int(call.exchange.created_at) + self._token_ttl_s
        return [
            *call.headers,
            ("x-pawl-variant", call.exchange.served_variant),
            ("x-pawl-model", call.exchange.model),
            ("x-pawl-feedback-token", ids.make_feedback_token(self._secret, call.exchange.id, expires_at)),
        ]

    async def _fail(self, call: Call, send: Send, error: ApiError) -> None:
        """Keep the record, then tell the client: as the whole answer, or as an event in a stream that has begun."""
        call.error = error
        exchange = call.exchange
        exchange.status = Status.REJECTED if isinstance(error, EngineRefused) else Status.UPSTREAM_ERROR
        exchange.http_status = error.status
        await self._ensure_recorded(call)
        await self._tell(call, send, error)

    async def _tell(self, call: Call, send: Send, error: ApiError) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(LAST_WORDS_S):
                if not call.is_started:
                    await send_error(send, error, call.headers)
                elif call.request.is_stream:
                    await send({"type": "http.response.body", "body": error_event(error.body()), "more_body": False})

    async def _ensure_recorded(self, call: Call) -> None:
        """Keep what there is, once; a disk that refuses is counted, since there is nobody left to tell."""
        try:
            await self._record(call)
        except ApiError:
            RECORDS_DROPPED.inc()
            log.error("record_dropped", id=call.exchange.id)

    async def _record(self, call: Call) -> None:
        """Make the interaction durable.

        Raises:
            Overloaded: the disk refuses and the configuration requires records.
        """
        if call.is_recorded:
            return
        call.is_recorded = True
        call.exchange.latency_ms = (time.perf_counter() - call.started) * 1000
        try:
            await asyncio.wrap_future(self._spool.append(spool_record(call)))
            self._drain.wake()
        except SpoolUnavailable as exc:
            if self._settings.log_required:
                raise Overloaded(
                    "the record cannot be kept at the moment; try again", code="spool_unavailable"
                ) from exc
            RECORDS_DROPPED.inc()

    def _count(self, call: Call) -> None:
        exchange = call.exchange
        elapsed_s = time.perf_counter() - call.started
        labels = {"route": exchange.route, "model": exchange.alias, "variant": exchange.served_variant}
        REQUESTS.labels(outcome=outcome_of_call(call), **labels).inc()
        REQUEST_DURATION.labels(**labels).observe(elapsed_s)
        GATEWAY_OVERHEAD.labels(route=exchange.route).observe(max(0.0, elapsed_s - call.upstream_s))


def spool_record(call: Call) -> SpoolRecord:
    """What is kept of a call. Without consent to store, the texts never reach the disk: only the counts do."""
    request, response = call.raw_request, bytes(call.raw_response)
    if not call.exchange.is_stored:
        request, response = b"", _without_text(response, call.exchange.is_stream)
    exchange = call.exchange
    return SpoolRecord(
        0, "interaction", exchange.id, exchange.id, exchange.created_at, exchange_to_json(exchange), request, response
    )


def _without_text(response: bytes, is_stream: bool) -> bytes:
    answer = parse_answer(response, is_stream)
    usage = {"prompt_tokens": answer.prompt_tokens, "completion_tokens": answer.completion_tokens}
    counted = orjson.dumps({"choices": [{"finish_reason": answer.finish_reason}], "usage": usage})
    return b"data: " + counted + EVENT_END if is_stream else counted


def control_model_of(route: Route) -> str:
    """What is served when the assigned variant cannot be."""
    for variant in route.experiment.variants if route.experiment else ():
        if variant.name == CONTROL:
            return variant.model
    return route.champion


def outcome_of(error: ApiError) -> Outcome:
    """The `outcome` label of an error."""
    if isinstance(error, Overloaded):
        return Outcome.OVERLOADED
    if isinstance(error, UpstreamTimeout):
        return Outcome.TIMEOUT
    if isinstance(error, UpstreamFailed):
        return Outcome.UPSTREAM_ERROR
    return Outcome.CLIENT_ERROR if error.status < 500 else Outcome.SERVER_ERROR


def outcome_of_call(call: Call) -> Outcome:
    """The `outcome` label of a call that was admitted."""
    if call.exchange.status == Status.CLIENT_DISCONNECTED:
        return Outcome.CANCELLED
    return outcome_of(call.error) if call.error else Outcome.OK


async def wait_for_disconnect(receive: Receive) -> None:
    """Return when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass
