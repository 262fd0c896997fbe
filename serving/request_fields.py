"""A request's body, checked: only fields of the table pass (`serving.fields.table`), at every depth.

Everything else is refused with the field's name. Some fields are known and refused on purpose, since they reach code in
the engine that one request can use to stop it for everybody (chat templates, regular expressions and grammars,
embeddings, media, cache and scheduling controls).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import orjson

from serving.errors import BadRequest
from serving.fields.checks import compile_routes, raise_problem
from serving.fields.json_input import parse_object
from serving.fields.nodes import Check
from serving.fields.table import FIELDS_BY_ROUTE, NEVER_FORWARDED
from serving.fields.values import MAX_USER_CHARS, UNPRINTABLE

__all__ = [
    "FIELDS_BY_ROUTE",
    "MAX_USER_CHARS",
    "NEVER_FORWARDED",
    "UNPRINTABLE",
    "CompletionRequest",
    "FieldLimits",
    "parse_request",
    "upstream_body",
]

OUTPUT_BOUNDS: Final[Mapping[str, tuple[str, ...]]] = {
    "chat.completions": ("max_completion_tokens", "max_tokens"),
    "completions": ("max_tokens",),
    "responses": ("max_output_tokens",),
    "messages": ("max_tokens",),
    "embeddings": (),
}
"""The names of the bound on an answer's tokens; the first one given counts, as it does for the engine."""
COMPLETION_TOKENS = 16
"""What an engine makes of a plain completion that names no bound."""
RESPONSE_ID_PREFIX = "resp_"
ASKS_FOR_USAGE: Final = frozenset({"chat.completions", "completions"})
"""Streams of the other routes always tell their usage."""


@dataclass(frozen=True)
class FieldLimits:
    """What an operator may change about the table. Making one compiles the table: do it once."""

    max_json_depth: int = 64
    max_choices: int = 8
    max_output_tokens: int | None = None
    allow_fields: tuple[str, ...] = ()
    checks: Mapping[str, Check] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "checks", compile_routes(self.allow_fields))


class CompletionRequest:
    """A checked request. A plain class: compiled, making and reading a named tuple takes several times as long."""

    def __init__(
        self,
        alias: str,
        body: dict[str, Any],
        route: str,
        is_stream: bool,
        wants_usage: bool,
        is_stored: bool,
        regenerate_of: str | None,
        n_choices: int,
        max_output_tokens: int | None,
    ) -> None:
        self.alias = alias
        self.body = body
        self.route = route
        self.is_stream = is_stream
        self.wants_usage = wants_usage
        """The client reads the usage chunk itself."""
        self.is_stored = is_stored
        self.regenerate_of = regenerate_of
        self.n_choices = n_choices
        """Answers that one request makes the engine write."""
        self.max_output_tokens = max_output_tokens
        """The bound of one answer, the operator's where the client names none; 0 for embeddings."""


def parse_request(raw: bytes, route: str, limits: FieldLimits) -> CompletionRequest:
    """Check a request's body against the table of its route. Safe to call from any thread.

    Raises:
        BadRequest: what is wrong, with the field's path.
    """
    body = parse_object(raw, limits.max_json_depth)
    problem = limits.checks[route](body)
    if problem is not None:
        raise_problem(problem)
    get = body.get
    metadata = get("metadata")
    is_stream = get("stream") is True
    return CompletionRequest(
        get("model"),  # type: ignore[arg-type]  # The table asks for it.
        body,
        route,
        is_stream,
        route not in ASKS_FOR_USAGE or (is_stream and _asks_for_usage(get("stream_options"))),
        get("store") is not False,
        metadata.get("regenerate_of") if metadata else None,
        _count_choices(body, route, limits.max_choices),
        _output_bound(body, route, limits.max_output_tokens),
    )


def _asks_for_usage(stream_options: Mapping[str, Any] | None) -> bool:
    return bool(stream_options and stream_options.get("include_usage"))


def _count_choices(body: Mapping[str, Any], route: str, limit: int) -> int:
    """How many answers the engine writes: `n` for each prompt."""
    n: int = body.get("n") or 1
    if route == "completions":
        n = _count_prompts(body["prompt"], limit) * max(n, _bounded("best_of", body.get("best_of") or 1, limit))
    return _bounded("n", n, limit)


def _count_prompts(prompt: object, limit: int) -> int:
    if isinstance(prompt, list) and not isinstance(prompt[0], int):
        return _bounded("prompt", len(prompt), limit, "may hold at most {} texts")
    return 1


def _bounded(name: str, n: int, limit: int, wrong: str = "may be at most {}, for all prompts together") -> int:
    if n > limit:
        raise BadRequest(f"{name} {wrong.format(limit)} (serving.max_choices)", param=name, code="invalid_value")
    return n


def _output_bound(body: dict[str, Any], route: str, limit: int | None) -> int | None:
    """The bound the client named; without one the operator's, which is then written into the request."""
    for name in OUTPUT_BOUNDS[route]:
        if limit is not None and (body.get(name) or 0) > limit:
            raise BadRequest(
                f"{name} may be at most {limit} (serving.max_output_tokens)", param=name, code="invalid_value"
            )
    for name in OUTPUT_BOUNDS[route]:
        given: int | None = body.get(name)
        if given is not None:
            return given
    if route == "embeddings":
        return 0
    if route == "completions" and "max_tokens" not in body:
        return min(COMPLETION_TOKENS, limit or COMPLETION_TOKENS)
    if limit is not None:
        body[OUTPUT_BOUNDS[route][0]] = limit
    return limit


def upstream_body(
    request: CompletionRequest, model: str, cache_salt: str | None = None, suffix: str | None = None
) -> bytes:
    """What the engine gets: the same request for the version chosen, usage always asked for.

    Args:
        request: as checked.
        model: the version that serves.
        cache_salt: keeps the cached prompts of tenants apart; every route of the engine knows it.
        suffix: of the completion's id, for the one route whose ids do not come from the `X-Request-Id` header.
    """
    body = {name: value for name, value in request.body.items() if name not in NEVER_FORWARDED}
    body["model"] = model
    if cache_salt:
        body["cache_salt"] = cache_salt
    if request.route == "responses":
        body["store"] = False  # An engine that stores answers keeps them for ever, in memory.
        if suffix:
            body["request_id"] = RESPONSE_ID_PREFIX + suffix
    elif request.is_stream and request.route in ASKS_FOR_USAGE:
        body["stream_options"] = {**(body.get("stream_options") or {}), "include_usage": True}
    return orjson.dumps(body)
