"""Everything of the gateway that is not hot, as a FastAPI application."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import PlainTextResponse
from starlette.exceptions import HTTPException

from monitoring.exposition import render
from pawl import ids
from pawl.clock import Clock
from serving.admin_api import add_admin
from serving.error_shapes import refusal_body
from serving.errors import ApiError, NotFound, Overloaded, error_body, type_for_status
from serving.feedback_adapters import Adapters, add_adapters
from serving.feedback_api import Answered
from serving.feedback_shapes import meanings_of
from serving.feedback_uuids import Uuids
from serving.openapi import (
    FEEDBACK_EXTRA,
    FeedbackRetracted,
    FeedbackTaken,
    Liveness,
    ModelCard,
    ModelCards,
    describe_everything,
)
from serving.routes import HOT_PATHS, BodyLimits, ScopeGuard, key_id_of
from serving.stored_api import StoredDesk, add_stored
from serving.wire import AsgiMessage, ClientGone, Scope, Send, headers_of, sane_request_id

if TYPE_CHECKING:
    from serving.gateway import Gateway

JSON = "application/json"
CLIENT_CLOSED_REQUEST = 499
RANDOMNESS = ids.Randomness()


def build_app(gateway: Gateway) -> FastAPI:
    """Everything that is not hot."""

    uuids = Uuids(gateway.secret, gateway.relay, gateway.database)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with gateway.running():
            with closing(uuids):
                yield

    app = FastAPI(
        title="Pawl gateway",
        version=version("pawl"),
        lifespan=lifespan,
        redirect_slashes=False,
        redoc_url=None,
        swagger_ui_oauth2_redirect_url=None,
    )
    _add_error_shapes(app)
    _add_health(app, gateway)
    _add_models(app, gateway)
    _add_feedback(app, gateway)
    add_adapters(app, Adapters(gateway.desk, uuids, meanings_of(gateway.settings.serving)), gateway.desk)
    add_stored(app, StoredDesk(secret=gateway.secret, database=gateway.database, clock=gateway.clock))
    add_admin(app, gateway)
    _add_hot_paths(app)
    _guard(app, gateway)
    describe_everything(app)
    return app


def _guard(app: FastAPI, gateway: Gateway) -> None:
    """Put the one check of keys and bodies before every route."""
    serving = gateway.settings.serving
    limits = BodyLimits(serving.max_body_bytes, serving.timeouts.request_body_s)
    app.add_middleware(ScopeGuard, routes=app.routes, keys=gateway.asked_keys, limits=limits)


def _add_error_shapes(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def api_error(request: Request, exc: ApiError) -> Response:
        return Response(refusal_body(request.url.path, exc), exc.status, exc.headers, JSON)

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
    @app.get("/health/live", tags=["operations"], response_model=Liveness)
    async def live() -> dict[str, str]:
        """The event loop turns."""
        return {"status": "ok"}

    @app.get("/health/ready", tags=["operations"], response_model=Liveness)
    async def ready() -> Response:
        """Whether this gateway will take work."""
        reason = gateway.why_not_ready()
        if reason is None:
            return Response(b'{"status":"ready"}', 200, None, JSON)
        return Response(error_body(reason, "overloaded_error", None, "not_ready"), 503, {"retry-after": "2"}, JSON)

    @app.get("/metrics", tags=["operations"], response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Prometheus text."""
        gateway.relay.flush()
        body, content_type = await render()
        return Response(body, 200, None, content_type)


def _add_models(app: FastAPI, gateway: Gateway) -> None:
    def described(alias: str) -> dict[str, Any]:
        route = gateway.routes.get(alias)
        if route is None:
            raise NotFound(f"the model {alias[:200]!r} does not exist", param="model", code="model_not_found")
        facts = {"created": gateway.started_at, "owned_by": "pawl", "root": route.champion, "parent": None}
        return {"id": alias, "object": "model", **facts}

    @app.get("/v1/models", tags=["models"], response_model=ModelCards)
    async def list_models() -> dict[str, Any]:
        """The names that clients may ask for."""
        return {"object": "list", "data": [described(alias) for alias in gateway.routes.aliases()]}

    @app.get("/v1/models/{alias:path}", tags=["models"], response_model=ModelCard)
    async def show_model(alias: str) -> dict[str, Any]:
        """One of them."""
        return described(alias)


def _add_feedback(app: FastAPI, gateway: Gateway) -> None:
    def answer(answered: Answered) -> Response:
        return Response(answered.body, answered.status, None, JSON)

    @app.post(
        "/v1/feedback", tags=["feedback"], status_code=201, response_model=FeedbackTaken, openapi_extra=FEEDBACK_EXTRA
    )
    async def give(request: Request) -> Response:
        """What a user says of a completion: `completion_id`, `type`, `value`; maybe `reason`, `comment`, `tags`."""
        raw = await request.body()
        return answer(await gateway.desk.take(headers_of(request.scope), raw, key_id_of(request.scope)))

    @app.delete("/v1/feedback/{feedback_id}", tags=["feedback"], response_model=FeedbackRetracted)
    async def retract(feedback_id: str, request: Request) -> Response:
        """Take it back; the history stays."""
        return answer(await gateway.desk.retract(headers_of(request.scope), feedback_id, key_id_of(request.scope)))


def _add_hot_paths(app: FastAPI) -> None:
    """The relay's routes are not FastAPI's, but it answers 405 for other methods of theirs."""
    for path in HOT_PATHS.values():
        app.add_api_route(path, _not_started, methods=["POST"], include_in_schema=False)


async def _not_started() -> Response:
    """What a completion route says in the moment before the relay stands."""
    raise Overloaded("the gateway is starting; try again", code="not_ready")


def with_request_id(scope: Scope, send: Send, clock: Clock) -> Send:
    """Add `x-request-id` to whatever is answered."""
    request_id = sane_request_id(headers_of(scope), "") or ids.uuid7(clock(), RANDOMNESS.take())

    async def send_with_id(message: AsgiMessage) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", []), (b"x-request-id", request_id.encode("latin-1"))]
        await send(message)

    return send_with_id
