"""Every route of the gateway and what a caller needs to use it: one table, and the guard that holds callers to it.

A route that is missing from the table does not exist for callers: the guard refuses it, and a test fails.
"""

from __future__ import annotations

import base64
from collections.abc import Awaitable, Callable, Mapping, Sequence
from enum import StrEnum
from typing import NamedTuple, Protocol

from starlette.routing import BaseRoute, Match

from serving.error_shapes import LANGFUSE_PATHS, TENSORZERO_PATH, refusal_body
from serving.errors import ApiError, Forbidden, NotFound, Unauthorized
from serving.feedback_tokens import tokens_of
from serving.wire import AsgiMessage, ClientGone, Receive, Send, headers_of, read_body, send_whole
from serving.wire import Scope as AsgiScope

Asgi = Callable[[AsgiScope, Receive, Send], Awaitable[None]]

KEY_ID = "pawl.key_id"
"""Where the guard leaves the id of the caller's key for the routes behind it."""


SHORT_BODY_BYTES = 64 * 1024
"""For bodies of a few names and numbers. The framework checks all of a body on the event loop and writes down all that
is wrong with it, which took three seconds for four megabytes of wrong names."""
FEEDBACK_BODY_BYTES = 1536 * 1024
"""Enough for a text of 1 MiB beside all the rest; one that is written in escapes may be shorter."""


class BodyLimits(NamedTuple):
    """What a request's body may be."""

    max_bytes: int
    within_s: float


class Scope(StrEnum):
    """What a route asks of the API key, while `auth.required` is on."""

    OPEN = "open"
    """Nothing: probes have no key, and the API's description is the same for every installation."""
    INFER = "infer"
    FEEDBACK = "feedback"
    ADMIN = "admin"
    METRICS = "metrics"


class RouteSpec(NamedTuple):
    """One method of one path."""

    method: str
    path: str
    """As the framework writes it, parameters in braces."""
    scope: Scope
    is_hot: bool = False
    """Answered by the relay, which looks at the key itself."""


ACCEPTED: Mapping[Scope, frozenset[str]] = {
    Scope.OPEN: frozenset(),
    Scope.INFER: frozenset({"infer"}),
    Scope.FEEDBACK: frozenset({"feedback", "infer"}),  # Who may ask may also say how good the answer was.
    Scope.ADMIN: frozenset({"admin"}),
    Scope.METRICS: frozenset({"metrics"}),
}
"""The scopes of a key of which each route asks one."""

HOT_PATHS: Mapping[str, str] = {
    "chat.completions": "/v1/chat/completions",
    "completions": "/v1/completions",
    "responses": "/v1/responses",
    "embeddings": "/v1/embeddings",
    "messages": "/v1/messages",
}
"""What the relay answers, by the name that records and metrics know."""

CHAT_LIST = "/v1/chat/completions"
CHAT_ONE = "/v1/chat/completions/{completion_id}"
CHAT_MESSAGES = "/v1/chat/completions/{completion_id}/messages"
RESPONSE_ONE = "/v1/responses/{response_id}"
ADMIN = "/admin/v1"
FEEDBACK_PATH = "/v1/feedback"
SCORES = LANGFUSE_PATHS + "scores"
SCORE_ONE = SCORES + "/{score_id}"
INGESTION = LANGFUSE_PATHS + "ingestion"
FEEDBACK_POSTS = frozenset({FEEDBACK_PATH, TENSORZERO_PATH, SCORES, INGESTION})


def _admin(*routes: tuple[str, str]) -> tuple[RouteSpec, ...]:
    return tuple(RouteSpec(method, ADMIN + path, Scope.ADMIN) for method, path in routes)


ROUTES: tuple[RouteSpec, ...] = (
    *(RouteSpec("POST", path, Scope.INFER, is_hot=True) for path in HOT_PATHS.values()),
    RouteSpec("GET", "/v1/models", Scope.INFER),
    RouteSpec("GET", "/v1/models/{alias:path}", Scope.INFER),
    RouteSpec("GET", CHAT_LIST, Scope.INFER),
    RouteSpec("GET", CHAT_ONE, Scope.INFER),
    RouteSpec("POST", CHAT_ONE, Scope.INFER),
    RouteSpec("DELETE", CHAT_ONE, Scope.INFER),
    RouteSpec("GET", CHAT_MESSAGES, Scope.INFER),
    RouteSpec("GET", RESPONSE_ONE, Scope.INFER),
    RouteSpec("DELETE", RESPONSE_ONE, Scope.INFER),
    RouteSpec("POST", FEEDBACK_PATH, Scope.FEEDBACK),
    RouteSpec("DELETE", "/v1/feedback/{feedback_id}", Scope.FEEDBACK),
    RouteSpec("POST", TENSORZERO_PATH, Scope.FEEDBACK),
    RouteSpec("POST", SCORES, Scope.FEEDBACK),
    RouteSpec("DELETE", SCORE_ONE, Scope.FEEDBACK),
    RouteSpec("POST", INGESTION, Scope.FEEDBACK),
    RouteSpec("GET", "/health/live", Scope.OPEN),
    RouteSpec("GET", "/health/ready", Scope.OPEN),
    RouteSpec("GET", "/metrics", Scope.METRICS),
    RouteSpec("GET", "/docs", Scope.OPEN),
    RouteSpec("GET", "/openapi.json", Scope.OPEN),
    *_admin(
        ("GET", "/keys"),
        ("POST", "/keys"),
        ("GET", "/keys/{key_id}"),
        ("DELETE", "/keys/{key_id}"),
        ("POST", "/keys/{key_id}/rotate"),
        ("GET", "/experiments"),
        ("GET", "/experiments/{key}/report"),
        ("GET", "/rollouts"),
        ("POST", "/rollouts"),
        ("GET", "/rollouts/{rollout_id}"),
        ("POST", "/rollouts/{rollout_id}/{action}"),
        ("GET", "/verdict"),
        ("GET", "/models"),
        ("GET", "/models/{name:path}"),
        ("POST", "/models/promote"),
        ("POST", "/models/retire"),
        ("GET", "/pairs"),
        ("GET", "/pairs/counts"),
        ("GET", "/pairs/{pair_id}"),
        ("GET", "/assignments"),
        ("GET", "/engines"),
        ("GET", "/spool"),
        ("GET", "/audit"),
    ),
)

_BY_ROUTE = {(spec.method, spec.path): spec for spec in ROUTES}


def spec_of(method: str, path: str) -> RouteSpec | None:
    """The line of the table for a method and a path template; a HEAD asks for what its GET asks for.

    >>> spec_of("HEAD", "/metrics").scope.value
    'metrics'
    """
    return _BY_ROUTE.get(("GET" if method == "HEAD" else method, path))


class Key(Protocol):
    """What the guard wants to know of an API key."""

    @property
    def id(self) -> str: ...

    @property
    def scopes(self) -> frozenset[str]: ...


class Keys(Protocol):
    """Who knows the keys."""

    def known(self, credential: str) -> Key | None: ...

    async def look_up(self, credential: str) -> Key: ...


class ScopeGuard:
    """Stands before every route of the framework: first it knows who asks, and has read the body, which is bounded."""

    def __init__(
        self, app: Asgi, *, routes: Sequence[BaseRoute], keys: Callable[[], Keys | None], limits: BodyLimits
    ) -> None:
        self._app = app
        self._routes = routes
        self._keys = keys
        self._limits = limits

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = headers_of(scope)
        try:
            scope[KEY_ID] = await self._admit(scope, headers)
            receive = await self._with_body(scope, headers, receive)
        except ApiError as error:
            shown = [("content-type", "application/json"), *error.headers.items()]
            await send_whole(send, error.status, shown, refusal_body(scope["path"], error))
        except ClientGone:
            pass
        else:
            await self._app(scope, receive, send)

    async def _admit(self, scope: AsgiScope, headers: Mapping[str, str]) -> str:
        """The id of the caller's key; empty where none is needed.

        Raises:
            Unauthorized, Forbidden: the key is missing, wrong, or has another scope.
            NotFound: the table of routes lacks this one.
        """
        path = self._path_of(scope)
        keys = self._keys()
        if path is None or keys is None:
            return ""  # Nobody answers here but the framework, with a 404 or 405; or keys are not asked for.
        spec = spec_of(scope["method"], path)
        if spec is None:
            raise NotFound("this route is not open to anybody", code="not_found")
        return await key_id_for(keys, headers, spec.scope)

    def _path_of(self, scope: AsgiScope) -> str | None:
        """The template of the route that will answer."""
        for route in self._routes:
            if route.matches(scope)[0] is Match.FULL:
                return str(getattr(route, "path", ""))
        return None

    async def _with_body(self, scope: AsgiScope, headers: Mapping[str, str], receive: Receive) -> Receive:
        if scope["method"] in ("GET", "HEAD"):
            return receive
        most = longest_body(scope["path"], self._limits.max_bytes)
        return replayed(await read_body(receive, headers, most, self._limits.within_s), receive)


def longest_body(path: str, most: int) -> int:
    """How many bytes a route of the framework takes, `most` at most.

    >>> [longest_body(path, 4_000_000) for path in ("/admin/v1/keys", "/v1/feedback", "/v1/other")]
    [65536, 1572864, 4000000]
    >>> longest_body("/api/public/ingestion", 4_000_000)
    1572864
    """
    if path.startswith((ADMIN, CHAT_LIST + "/")):
        return min(most, SHORT_BODY_BYTES)
    return min(most, FEEDBACK_BODY_BYTES) if path in FEEDBACK_POSTS else most


async def key_id_for(keys: Keys, headers: Mapping[str, str], scope: Scope) -> str:
    """The id of the caller's key; empty where none is needed: the route is open, or a feedback token stands for it.

    Raises:
        Unauthorized, Forbidden: see `admitted`.
    """
    is_feedback = scope is Scope.FEEDBACK
    if scope is Scope.OPEN or (is_feedback and tokens_of(headers)):
        return ""
    return (await admitted(keys, with_bearer(headers) if is_feedback else headers, scope)).id


def with_bearer(headers: Mapping[str, str]) -> Mapping[str, str]:
    """Basic authentication, as Langfuse's clients send it, with the password as the key; anything else as it is."""
    kind, _, encoded = headers.get("authorization", "").partition(" ")
    if kind.lower() != "basic":
        return headers
    try:
        _, _, password = base64.b64decode(encoded, validate=True).decode().partition(":")
    except ValueError:  # Neither base64 nor text: the key ring says that it is no key.
        return headers
    return {**headers, "authorization": f"Bearer {password}"}


async def admitted(keys: Keys, headers: Mapping[str, str], scope: Scope) -> Key:
    """The caller's key, which has what `scope` asks for.

    Raises:
        Unauthorized: there is no key, or it is not a good one.
        Forbidden: it has other scopes.
    """
    credential = headers.get("authorization") or headers.get("x-api-key")
    if not credential:
        raise Unauthorized(
            "an API key is needed: `Authorization: Bearer pawl-...`",
            code="invalid_api_key",
            headers={"www-authenticate": "Bearer"},
        )
    key = keys.known(credential) or await keys.look_up(credential)
    if not key.scopes & ACCEPTED[scope]:
        raise Forbidden(f"this API key lacks the scope {scope.value!r}", code="insufficient_scope")
    return key


def key_id_of(scope: AsgiScope) -> str:
    """The public id of the caller's key, as the guard left it."""
    return str(scope.get(KEY_ID, ""))


def replayed(raw: bytes, receive: Receive) -> Receive:
    """A `receive` that gives a body which has been read already."""
    waiting: list[AsgiMessage] = [{"type": "http.request", "body": raw, "more_body": False}]

    async def again() -> AsgiMessage:
        return waiting.pop() if waiting else await receive()

    return again
