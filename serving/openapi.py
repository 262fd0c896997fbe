"""The OpenAPI document: what FastAPI knows of its routes, those of the relay beside them, and what all of them have."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from fastapi import FastAPI
from pydantic import BaseModel

from feedback.signals import Signal
from serving.error_shapes import LANGFUSE_PATHS, TENSORZERO_PATH
from serving.fields.nodes import Either, Kinds, ListOf, Node, Object
from serving.fields.table import ROUTES as REQUESTS
from serving.routes import HOT_PATHS, ROUTES, RouteSpec, Scope

JsonObject = dict[str, Any]

TAGS = {
    "completions": "Answered by the engines; any OpenAI client works by its base URL alone.",
    "stored completions": "What a caller was answered before: read, listed, annotated, deleted. Its own only.",
    "models": "The names that clients may ask for.",
    "feedback": "What users say of an answer.",
    "administration": "Keys, rollouts, model versions, pairs. Asks for the scope `admin`.",
    "operations": "Probes and metrics.",
}
ERRORS = {
    400: "The request is wrong; `error.param` names the field.",
    401: "The API key or feedback token is missing, wrong or expired.",
    403: "The key is good but lacks the scope.",
    404: "There is no such thing, or it is not the caller's; the two look the same.",
    408: "The body came too slowly.",
    409: "It contradicts what is there; another attempt alone does not help.",
    413: "The body is too large.",
    422: "The `Idempotency-Key` was used with another body, or the engine cannot do what was asked.",
    429: "A limit of the key is reached; `Retry-After` says when to try again.",
    500: "The gateway failed.",
    502: "The engine failed.",
    503: "Overloaded, or something needed does not answer; `Retry-After` says when to try again.",
    504: "The engine took too long.",
}
READING = (400, 401, 403, 404, 429, 500, 503)
WRITING = (*READING, 408, 409, 413, 422)
HEALTH = (500, 503)
RETRY_AFTER = {"retry-after": {"description": "Seconds.", "schema": {"type": "integer"}}}
REQUEST_ID = {"x-request-id": {"description": "The caller's own if it sent a sane one.", "schema": {"type": "string"}}}
LIMIT_HEADERS = {
    f"x-ratelimit-{what}-{of}": f"{words} of {of}, where the key is limited."
    for what, words in (("limit", "The limit"), ("remaining", "What is left"), ("reset", "Time until all is back"))
    for of in ("requests", "tokens")
}
COMPLETION_HEADERS = {
    "x-pawl-variant": "The variant that answered.",
    "x-pawl-model": "The model version that answered.",
    "x-pawl-feedback-token": "A short-lived pass to rate this completion.",
    **LIMIT_HEADERS,
}
SECURITY_SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer", "bearerFormat": "pawl-<public id>-<secret>"},
    "apiKey": {"type": "apiKey", "in": "header", "name": "x-api-key"},
    "basic": {"type": "http", "scheme": "basic", "description": "The key as the password; feedback routes only."},
    "feedbackToken": {"type": "apiKey", "in": "header", "name": "x-pawl-feedback-token"},
}
ERROR_SCHEMA: JsonObject = {
    "type": "object",
    "required": ["error"],
    "additionalProperties": False,
    "properties": {
        "type": {"const": "error", "description": "Beside it on `/v1/messages`, whose clients look for it."},
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        },
    },
}


def _object(required: Mapping[str, JsonObject], **optional: JsonObject) -> JsonObject:
    return {"type": "object", "required": list(required), "properties": {**required, **optional}}


def _list(items: JsonObject) -> JsonObject:
    return {"type": "array", "items": items}


TENSORZERO_ERROR = _object({"error": {"type": "string"}})
LANGFUSE_ERROR = _object({"message": {"type": "string"}, "error": {"type": "string"}})
TEXT: JsonObject = {"type": "string"}
COUNT: JsonObject = {"type": "integer", "minimum": 0}
ANY_OBJECT: JsonObject = {"type": "object"}
OPTIONAL_OBJECT: JsonObject = {"type": ["object", "null"]}
OPTIONAL_TEXT: JsonObject = {"type": ["string", "null"]}
ANSWERED = {"id": TEXT, "created": COUNT, "model": TEXT}
CHAT_CHOICE = _object({"index": COUNT, "message": ANY_OBJECT, "finish_reason": OPTIONAL_TEXT}, logprobs=OPTIONAL_OBJECT)
TEXT_CHOICE = _object({"index": COUNT, "text": TEXT, "finish_reason": OPTIONAL_TEXT}, logprobs=OPTIONAL_OBJECT)
ANSWERS: Mapping[str, JsonObject] = {
    "chat.completions": _object(
        {**ANSWERED, "object": {"const": "chat.completion"}, "choices": _list(CHAT_CHOICE)}, usage=OPTIONAL_OBJECT
    ),
    "completions": _object(
        {**ANSWERED, "object": {"const": "text_completion"}, "choices": _list(TEXT_CHOICE)}, usage=OPTIONAL_OBJECT
    ),
    "responses": _object(
        {"id": TEXT, "object": {"const": "response"}, "created_at": COUNT, "model": TEXT, "output": _list(ANY_OBJECT)},
        status=TEXT,
        usage=OPTIONAL_OBJECT,
    ),
    "embeddings": _object(
        {"object": {"const": "list"}, "data": _list(ANY_OBJECT), "model": TEXT}, id=TEXT, usage=OPTIONAL_OBJECT
    ),
    "messages": _object(
        {"id": TEXT, "type": {"const": "message"}, "role": {"const": "assistant"}, "content": _list(ANY_OBJECT)},
        model=TEXT,
        stop_reason=OPTIONAL_TEXT,
        usage=OPTIONAL_OBJECT,
    ),
}
"""What vLLM answers to each, as far as clients rely on it; whatever else it says is passed on."""
SUMMARIES = {
    "chat.completions": "Answer a conversation",
    "completions": "Continue a text",
    "responses": "Answer by the responses API",
    "embeddings": "Embed texts",
    "messages": "Answer by Anthropic's messages API",
}
QUESTION = [{"role": "user", "content": "How do I water a fern?"}]
EXAMPLES: Mapping[str, JsonObject] = {
    "chat.completions": {"model": "assistant", "messages": QUESTION, "user": "ada"},
    "completions": {"model": "assistant", "prompt": "Water a fern", "max_tokens": 16},
    "responses": {"model": "assistant", "input": "How do I water a fern?"},
    "embeddings": {"model": "assistant", "input": ["fern", "rose"]},
    "messages": {"model": "assistant", "messages": QUESTION, "max_tokens": 64},
}
NEVER_STREAMS = frozenset({"embeddings"})


class ModelCard(BaseModel):
    """A name that clients may ask for."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None


class ModelCards(BaseModel):
    """All of them."""

    object: Literal["list"]
    data: list[ModelCard]


class Liveness(BaseModel):
    """The event loop turns."""

    status: str


class FeedbackTaken(BaseModel):
    """Feedback as it was kept."""

    id: str
    object: Literal["feedback"]
    completion_id: str
    type: str
    value: str | float | bool
    created: int


class FeedbackRetracted(BaseModel):
    """Feedback that counts no more."""

    id: str
    object: Literal["feedback.deleted"]
    deleted: bool


FEEDBACK_BODY: JsonObject = {
    **_object(
        {
            "completion_id": {"type": "string"},
            "type": {"enum": [signal.value for signal in Signal]},
            "value": {"type": ["string", "number", "boolean"]},
        },
        reason=OPTIONAL_TEXT,
        comment=OPTIONAL_TEXT,
        tags={"type": ["object", "null"], "additionalProperties": {"type": "string"}},
        user=OPTIONAL_TEXT,
    ),
    "additionalProperties": False,
}
TAKEN = {"application/json": {"schema": {"$ref": "#/components/schemas/FeedbackTaken"}}}
FEEDBACK_EXTRA: JsonObject = {
    "requestBody": {"required": True, "content": {"application/json": {"schema": FEEDBACK_BODY}}},
    "parameters": [
        {
            "name": "Idempotency-Key",
            "in": "header",
            "required": False,
            "description": "The same key and body get the first answer again, for a day.",
            "schema": {"type": "string", "minLength": 1, "maxLength": 255},
        }
    ],
    "responses": {
        "200": {"description": "Kept, in place of what was said before.", "content": TAKEN},
        "202": {"description": "Kept; joined when the completion is visible.", "content": TAKEN},
    },
}
"""The feedback route reads its body itself, since it is stored as it came."""


def describe_everything(app: FastAPI) -> None:
    """Make the application's document the complete one; it is put together once."""
    described = app.openapi

    def openapi() -> JsonObject:
        if app.openapi_schema is None:
            app.openapi_schema = complete(described())
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def complete(document: JsonObject) -> JsonObject:
    """Add the relay's routes, and what all routes share: errors, keys, headers, tags."""
    for route, path in HOT_PATHS.items():
        document["paths"].setdefault(path, {})["post"] = hot_operation(route)
    components = document.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    for framework_own in ("HTTPValidationError", "ValidationError"):  # Told in our shape, as a 400.
        schemas.pop(framework_own, None)
    schemas |= {"Error": ERROR_SCHEMA, "TensorZeroError": TENSORZERO_ERROR, "LangfuseError": LANGFUSE_ERROR}
    components["securitySchemes"] = SECURITY_SCHEMES
    document["tags"] = [{"name": name, "description": text} for name, text in TAGS.items()]
    for spec, operation in operations(document):
        share(spec, operation)
    return document


def operations(document: JsonObject) -> Iterator[tuple[RouteSpec, JsonObject]]:
    """Each route of the table with its part of the document; two routes have none: they show the document itself."""
    for spec in ROUTES:
        item = document["paths"].get(spec.path.replace(":path}", "}"), {})
        if spec.method.lower() in item:
            yield spec, item[spec.method.lower()]


def share(spec: RouteSpec, operation: JsonObject) -> None:
    """What an operation has in common with its like."""
    operation["security"] = security_of(spec.scope)
    operation["x-pawl-scope"] = spec.scope.value
    responses = operation["responses"]
    responses.pop("422", None)
    for status in statuses_of(spec):
        responses[str(status)] = error_response(status, error_schema_of(spec.path))
    for response in responses.values():
        response["headers"] = {**response.get("headers", {}), **REQUEST_ID}


def security_of(scope: Scope) -> list[dict[str, list[str]]]:
    """Any one of these, while `auth.required` is on."""
    if scope is Scope.OPEN:
        return []
    keys: list[dict[str, list[str]]] = [{"bearer": []}, {"apiKey": []}]
    return [*keys, {"basic": []}, {"feedbackToken": []}] if scope is Scope.FEEDBACK else keys


def statuses_of(spec: RouteSpec) -> tuple[int, ...]:
    """The errors that a route may answer."""
    if spec.is_hot:
        return tuple(ERRORS)
    if spec.scope is Scope.OPEN:
        return HEALTH
    return READING if spec.method == "GET" else WRITING


def error_schema_of(path: str) -> str:
    """The name of the shape that refusals have on a route; see `serving.error_shapes`."""
    if path == TENSORZERO_PATH:
        return "TensorZeroError"
    return "LangfuseError" if path.startswith(LANGFUSE_PATHS) else "Error"


def error_response(status: int, schema: str) -> JsonObject:
    """An error, in the shape of its route."""
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}}
    headers = RETRY_AFTER if status in (429, 503) else {}
    return {"description": ERRORS[status], "content": content, "headers": headers}


def hot_operation(route: str) -> JsonObject:
    """A route that the relay answers."""
    content: JsonObject = {"application/json": {"schema": ANSWERS[route]}}
    if route not in NEVER_STREAMS:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    headers = {name: {"description": text, "schema": {"type": "string"}} for name, text in COMPLETION_HEADERS.items()}
    text = "The engine's answer, unchanged; with `stream: true` a stream of events."
    success = {"description": text, "headers": headers, "content": content}
    return {
        "tags": ["completions"],
        "summary": SUMMARIES[route],
        "operationId": f"create_{route.replace('.', '_')}",
        "parameters": [
            _header("x-pawl-user", "Who the user is; decides the variant."),
            _header("x-pawl-regenerate-of", "The id of the completion that this one replaces."),
            _header("x-pawl-variant", "A variant to be shown, for those who may ask (`serving.forced_variants`)."),
        ],
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": schema_of(REQUESTS[route]), "example": EXAMPLES[route]}},
        },
        "responses": {"200": success},
    }


def schema_of(node: Node) -> JsonObject:
    """A place of the table of request fields as JSON schema; what a single value must be is said in words."""
    if isinstance(node, Object):
        return _fields_schema(node)
    if isinstance(node, ListOf):
        return {"type": "array", "items": schema_of(node.item), "minItems": node.low, "maxItems": node.high}
    if isinstance(node, Kinds):
        kinds = [_kind_schema(node, tag, kind) for tag, kind in node.kinds.items()]
        return {"description": node.expected, "anyOf": kinds}
    if isinstance(node, Either):
        choices = [schema_of(choice) for choice in (node.text, node.items, node.object) if choice is not None]
        return {"description": node.expected, "anyOf": choices}
    return {"description": node.expected}


def _fields_schema(node: Object) -> JsonObject:
    properties = {name: schema_of(field) for name, field in node.fields.items()}
    closed: JsonObject = {"type": "object", "properties": properties, "additionalProperties": False}
    return closed | ({"required": list(node.required)} if node.required else {})


def _kind_schema(node: Kinds, tag: str, kind: Object) -> JsonObject:
    schema = _fields_schema(kind)
    schema["properties"] = {**schema["properties"], node.tag: {"const": tag}}
    if tag != node.default:
        schema["required"] = sorted({*kind.required, node.tag})
    return schema


def _header(name: str, text: str) -> JsonObject:
    return {"name": name, "in": "header", "required": False, "description": text, "schema": {"type": "string"}}
