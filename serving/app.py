"""The gateway's composition root: hot routes go straight to the relay, everything else through FastAPI."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from feedback.drain import Drain
from feedback.errors import SpoolUnavailable
from feedback.interactions import Interaction
from feedback.spool import Spool
from monitoring.metrics import BUILD_INFO, DEAD_LETTERS, LOOP_LAG, SPOOL_OLDEST, SPOOL_ROWS, TOKENS, render
from pawl import ids
from pawl.clock import Clock
from pawl.clock import now as wall_clock
from pawl.database import Database, open_database
from pawl.errors import ConfigurationError
from pawl.secrets import signing_secret
from pawl.settings import ServingSettings, Settings
from serving.completions import Relay
from serving.errors import ApiError, NotFound, Overloaded, error_body, type_for_status
from serving.feedback_api import Answered, FeedbackDesk
from serving.in_flight import InFlight
from serving.openapi import completion_paths
from serving.replicas import ReplicaSet
from serving.routing import RouteTable
from serving.upstream import PATHS, Engines
from serving.wire import AsgiMessage, ClientGone, Receive, Scope, Send, headers_of, read_body, sane_request_id

LAG_PROBE_S = 0.5
SPOOL_PROBE_S = 2.0
DRAIN_AT_STOP_S = 5.0
HOT_ROUTES = {path: route for route, path in PATHS.items()}
JSON = "application/json"
CLIENT_CLOSED_REQUEST = 499


class Gateway:
    """The ASGI application and the parts it is made of."""

    def __init__(self, settings: Settings, database: Database, spool: Spool, *, clock: Clock) -> None:
        serving = settings.serving
        self.settings = settings
        self.clock = clock
        self.secret = signing_secret(settings.auth, settings.state_dir)
        self.database = database
        self.spool = spool
        self.in_flight = InFlight(serving.max_in_flight)
        self.drain = Drain(spool, database, clock=clock, on_stored=count_tokens, on_dead_letters=DEAD_LETTERS.inc)
        self.routes = RouteTable(serving.models, database, spool, poll_s=serving.route_poll_s)
        self.desk = FeedbackDesk(
            secret=self.secret,
            spool=spool,
            drain=self.drain,
            database=database,
            in_flight=self.in_flight,
            join_window_s=serving.feedback_join_window_s,
            clock=clock,
        )
        self.relay: Relay | None = None
        self.started_at = int(clock())
        self.app = build_app(self)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Every request; the completion routes never see the framework."""
        if scope["type"] == "http" and scope["method"] == "POST" and self.relay is not None:
            route = HOT_ROUTES.get(scope["path"])
            if route is not None:
                await self.relay.answer(route, scope, receive, send)
                return
        await self.app(scope, receive, with_request_id(scope, send, self.clock))

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Start the parts in order of need; stop them so that the writer closes after the last record."""
        engines = Engines(self.settings.serving.timeouts)
        self.relay = self._make_relay(engines)
        await asyncio.to_thread(self.routes.start)
        self.drain.start()
        BUILD_INFO.labels(version=version("pawl")).set(1)
        probes = [asyncio.ensure_future(probe_loop_lag()), asyncio.ensure_future(self._probe_spool())]
        try:
            yield
        finally:
            await self._stop(engines, probes)

    async def _stop(self, engines: Engines, probes: Sequence[asyncio.Future[None]]) -> None:
        self.in_flight.is_draining = True
        self.in_flight.cut_off()
        await self.in_flight.wait_until_empty(DRAIN_AT_STOP_S)
        for probe in probes:
            probe.cancel()
        self.routes.stop()
        self.desk.close()
        await engines.close()
        await asyncio.to_thread(self.drain.stop, DRAIN_AT_STOP_S)
        await asyncio.to_thread(self.spool.close)
        self.database.close()

    def _make_relay(self, engines: Engines) -> Relay:
        serving = self.settings.serving
        return Relay(
            settings=serving,
            secret=self.secret,
            token_ttl_s=self.settings.auth.feedback_token_ttl_s,
            routes=self.routes,
            replicas={alias: ReplicaSet(alias, model.engines) for alias, model in serving.models.items()},
            engines=engines,
            spool=self.spool,
            drain=self.drain,
            in_flight=self.in_flight,
            clock=self.clock,
        )

    async def _probe_spool(self) -> None:
        while True:
            with suppress(SpoolUnavailable):
                size = await asyncio.wrap_future(self.spool.size())
                SPOOL_ROWS.set(size.rows)
                SPOOL_OLDEST.set(max(0.0, self.clock() - size.oldest_at) if size.oldest_at else 0.0)
            await asyncio.sleep(SPOOL_PROBE_S)

    def why_not_ready(self) -> str | None:
        """What keeps this gateway from taking work, if anything does. The database is not among it."""
        if self.in_flight.is_draining:
            return "stopping"
        if self.settings.serving.log_required and not self.spool.is_healthy:
            return "the spool cannot be written"
        return None


def create_app(settings: Settings, *, clock: Clock = wall_clock) -> Gateway:
    """Put the gateway together; nothing listens and nothing connects yet.

    Raises:
        ConfigurationError: no model is configured, or a secret cannot be read.
        SpoolUnavailable: the spool's file is in use or cannot be opened.
    """
    if not settings.serving.models:
        raise ConfigurationError("serving.models is empty: name at least one model and its engines")
    path = spool_path(settings)
    spool = Spool(path, orphans=sorted(other for other in path.parent.glob("gateway-*.db") if other != path))
    try:
        return Gateway(settings, open_database(settings.database), spool, clock=clock)
    except BaseException:
        spool.close()
        raise


def spool_path(settings: Settings) -> Path:
    """The one file this gateway process writes; the port tells gateways on one machine apart."""
    return settings.state_dir / "spool" / f"gateway-{settings.serving.port}.db"


def build_app(gateway: Gateway) -> FastAPI:
    """Everything that is not hot."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with gateway.running():
            yield

    app = FastAPI(title="Pawl gateway", version=version("pawl"), lifespan=lifespan, redirect_slashes=False)
    _add_error_shapes(app)
    _add_health(app, gateway)
    _add_models(app, gateway)
    _add_feedback(app, gateway)
    _document_hot_routes(app)
    return app


def _add_error_shapes(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def api_error(_: Request, exc: ApiError) -> Response:
        return Response(exc.body(), exc.status, exc.headers, JSON)

    @app.exception_handler(ClientGone)
    async def client_gone(_: Request, __: ClientGone) -> Response:
        return Response(status_code=CLIENT_CLOSED_REQUEST)  # Nobody reads it.

    @app.exception_handler(HTTPException)
    async def http_error(_: Request, exc: HTTPException) -> Response:
        code = {404: "not_found", 405: "method_not_allowed"}.get(exc.status_code)
        body = error_body(str(exc.detail), type_for_status(exc.status_code), None, code)
        return Response(body, exc.status_code, exc.headers, JSON)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, exc: RequestValidationError) -> Response:
        problem = exc.errors()[0]
        param = ".".join(str(part) for part in problem["loc"][1:]) or None
        return Response(error_body(problem["msg"], "invalid_request_error", param, "invalid_request"), 400, None, JSON)

    @app.exception_handler(Exception)
    async def unexpected(_: Request, __: Exception) -> Response:
        return Response(error_body("the gateway failed on this request", "server_error", None, None), 500, None, JSON)


def _add_health(app: FastAPI, gateway: Gateway) -> None:
    @app.get("/health/live", tags=["operations"])
    async def live() -> dict[str, str]:
        """The event loop turns."""
        return {"status": "ok"}

    @app.get("/health/ready", tags=["operations"])
    async def ready() -> Response:
        """Whether this gateway will take work."""
        reason = gateway.why_not_ready()
        if reason is None:
            return Response(b'{"status":"ready"}', 200, None, JSON)
        return Response(error_body(reason, "overloaded_error", None, "not_ready"), 503, {"retry-after": "2"}, JSON)

    @app.get("/metrics", tags=["operations"])
    async def metrics() -> Response:
        """Prometheus text."""
        body, content_type = render()
        return Response(body, 200, None, content_type)


def _add_models(app: FastAPI, gateway: Gateway) -> None:
    def described(alias: str) -> dict[str, Any]:
        route = gateway.routes.get(alias)
        if route is None:
            raise NotFound(f"the model {alias[:200]!r} does not exist", param="model", code="model_not_found")
        facts = {"created": gateway.started_at, "owned_by": "pawl", "root": route.champion, "parent": None}
        return {"id": alias, "object": "model", **facts}

    @app.get("/v1/models", tags=["models"])
    async def list_models() -> dict[str, Any]:
        """The names that clients may ask for."""
        return {"object": "list", "data": [described(alias) for alias in gateway.routes.aliases()]}

    @app.get("/v1/models/{alias:path}", tags=["models"])
    async def show_model(alias: str) -> dict[str, Any]:
        """One of them."""
        return described(alias)


def _add_feedback(app: FastAPI, gateway: Gateway) -> None:
    serving: ServingSettings = gateway.settings.serving

    def answer(answered: Answered) -> Response:
        return Response(answered.body, answered.status, None, JSON)

    @app.post("/v1/feedback", tags=["feedback"], status_code=201)
    async def give(request: Request) -> Response:
        """What a user says of a completion: `completion_id`, `type`, `value`; maybe `reason`, `comment`, `tags`."""
        headers = headers_of(request.scope)
        raw = await read_body(request.receive, headers, serving.max_body_bytes, serving.timeouts.request_body_s)
        return answer(await gateway.desk.take(headers, raw))

    @app.delete("/v1/feedback/{feedback_id}", tags=["feedback"])
    async def retract(feedback_id: str, request: Request) -> Response:
        """Take it back; the history stays."""
        return answer(await gateway.desk.retract(headers_of(request.scope), feedback_id))


def _document_hot_routes(app: FastAPI) -> None:
    """The completion routes are not FastAPI's, but they belong in its OpenAPI document, and it answers 405 for them."""
    for path in HOT_ROUTES:
        app.add_api_route(path, _not_started, methods=["POST"], include_in_schema=False)
    described = app.openapi

    def openapi() -> dict[str, Any]:
        document = described()
        document["paths"] |= completion_paths()
        return document

    app.openapi = openapi  # type: ignore[method-assign]


async def _not_started() -> Response:
    """What a completion route says in the moment before the relay stands."""
    raise Overloaded("the gateway is starting; try again", code="not_ready")


def with_request_id(scope: Scope, send: Send, clock: Clock) -> Send:
    """Add `x-request-id` to whatever FastAPI answers."""
    if scope["type"] != "http":
        return send
    request_id = sane_request_id(headers_of(scope), "") or ids.uuid7(clock(), os.urandom(10))

    async def send_with_id(message: AsgiMessage) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", []), (b"x-request-id", request_id.encode("latin-1"))]
        await send(message)

    return send_with_id


def count_tokens(stored: Sequence[Interaction]) -> None:
    """Tokens as the engine counted them, once the record is in the database."""
    TOKENS.labels(direction="input").inc(sum(interaction.prompt_tokens or 0 for interaction in stored))
    TOKENS.labels(direction="output").inc(sum(interaction.completion_tokens or 0 for interaction in stored))


async def probe_loop_lag() -> None:
    """Measure how late the event loop wakes a task that slept."""
    while True:
        before = time.perf_counter()
        await asyncio.sleep(LAG_PROBE_S)
        LOOP_LAG.observe(max(0.0, time.perf_counter() - before - LAG_PROBE_S))
