"""TensorZero's and Langfuse's feedback routes, so that an application can move here with the front end it has."""

from __future__ import annotations

import asyncio
import hashlib
import json
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from pydantic import BaseModel

from feedback.errors import InvalidFeedback
from feedback.signals import MAX_TAG_VALUE_CHARS, MAX_TAGS
from serving.error_shapes import TENSORZERO_PATH
from serving.errors import ApiError, BadRequest
from serving.feedback_api import FeedbackDesk, parsed
from serving.feedback_repeats import KEY_HEADER, MAX_KEY_CHARS
from serving.feedback_shapes import Meanings, from_langfuse, from_tensorzero
from serving.feedback_uuids import UUID, Uuids
from serving.routes import INGESTION, SCORE_ONE, SCORES, key_id_of
from serving.wire import headers_of

JSON = "application/json"
JsonObject = dict[str, Any]
SCORE_CREATE = "score-create"
MOST_EVENTS = 500
"""In one batch. Langfuse's SDKs send up to a hundred."""
AT_ONCE = 50
"""Events of a batch that are taken together: their records share a commit, and others get their turn between."""
SCORE_TEXTS = ("name", "dataType", "traceId", "observationId", "comment")


class Adapters:
    """Feedback in foreign shapes, given to the desk in ours."""

    def __init__(self, desk: FeedbackDesk, uuids: Uuids, meanings: Meanings) -> None:
        """
        Args:
            uuids: Who knows which completion a UUID names.
            meanings: What the installation's own metrics and scores stand for, by name.
        """
        self._desk = desk
        self._uuids = uuids
        self._meanings = meanings

    async def tensorzero(self, headers: Mapping[str, str], raw: bytes, key_id: str) -> JsonObject:
        """`POST /feedback`: what is answered to it. With `dryrun` nothing is kept.

        Raises:
            ApiError: see `FeedbackDesk.take`.
        """
        body = await parsed(raw)
        _check_texts(body, ("metric_name",))
        try:
            own = from_tensorzero(body, self._meanings)
        except InvalidFeedback as exc:
            raise BadRequest(str(exc), param=exc.param, code="invalid_feedback") from exc
        own["completion_id"] = await self._completion_id(own["completion_id"], headers, key_id)
        is_kept = body.get("dryrun") is not True
        answered = await self._desk.take_body(headers, own, raw, key_id, is_kept=is_kept)
        feedback_id = str(json.loads(answered.body)["id"])
        return {"feedback_id": as_uuid(feedback_id), "id": feedback_id}

    async def _completion_id(self, given: Any, headers: Mapping[str, str], key_id: str) -> Any:
        """TensorZero's own client sends UUIDs only: the first part of a completion's id is one."""
        if not isinstance(given, str) or not UUID.fullmatch(given):
            return given
        return await self._uuids.completion_id(given, headers, key_id)

    async def score(self, headers: Mapping[str, str], raw: bytes, key_id: str) -> JsonObject:
        """`POST /api/public/scores`.

        Raises:
            ApiError: see `FeedbackDesk.take`.
        """
        own = self._own(await parsed(raw))
        return {"id": await self._take(headers, own, raw, key_id)}

    async def ingest(self, headers: Mapping[str, str], raw: bytes, key_id: str) -> JsonObject:
        """`POST /api/public/ingestion`: what became of each event.

        Raises:
            BadRequest: it is no batch, or too long a one.
            Unauthorized: it comes with feedback tokens alone, none of them good.
        """
        events = (await parsed(raw)).get("batch")
        if not isinstance(events, list) or len(events) > MOST_EVENTS:
            problem = f"batch must be a list of at most {MOST_EVENTS} events"
            raise BadRequest(problem, param="batch", code="invalid_batch")
        self._desk.refuse_false_tokens(headers)
        outcomes: list[JsonObject] = []
        for start in range(0, len(events), AT_ONCE):
            part = events[start : start + AT_ONCE]
            outcomes += await asyncio.gather(*(self._ingest_one(headers, event, key_id) for event in part))
        taken = [one for one in outcomes if "message" not in one]
        return {"successes": taken, "errors": [one for one in outcomes if "message" in one]}

    async def _ingest_one(self, headers: Mapping[str, str], event: Any, key_id: str) -> JsonObject:
        given = event.get("id") if isinstance(event, dict) else None
        event_id = given if isinstance(given, str) else ""
        try:
            await self._take_event(headers, event, key_id)
        except ApiError as error:
            refused = {"status": error.status, "message": error.message, "error": error.code or error.type}
            return {"id": event_id, **refused}
        return {"id": event_id, "status": 201}

    async def _take_event(self, headers: Mapping[str, str], event: Any, key_id: str) -> None:
        """The event's id is what its repetition is known by."""
        score = event.get("body") if isinstance(event, dict) else None
        if not isinstance(score, dict) or event.get("type") != SCORE_CREATE:
            raise BadRequest("only events of the type score-create are taken here", param="type", code="not_supported")
        event_id = event.get("id")
        is_key = isinstance(event_id, str) and event_id.isascii() and event_id.isprintable()
        if is_key and 0 < len(event_id) <= MAX_KEY_CHARS:
            headers = {**headers, KEY_HEADER: event_id}
        own = self._own(score)
        await self._take(headers, own, json.dumps(own).encode(), key_id)

    def _own(self, score: Mapping[str, Any]) -> JsonObject:
        """A score as ours."""
        _check_score(score)
        try:
            return from_langfuse(score, self._meanings)
        except InvalidFeedback as exc:
            raise BadRequest(str(exc), param=exc.param, code="invalid_feedback") from exc

    async def _take(self, headers: Mapping[str, str], own: JsonObject, raw: bytes, key_id: str) -> str:
        answered = await self._desk.take_body(headers, own, raw, key_id)
        return str(json.loads(answered.body)["id"])


def _check_score(score: Mapping[str, Any]) -> None:
    """Before anything of it is written down, which takes long where a text or a number ought to be and a tree is.

    Raises:
        BadRequest: it is no score.
    """
    _check_texts(score, SCORE_TEXTS)
    if isinstance(score.get("value"), list | dict):
        raise BadRequest("'value' must be a number, a text or a boolean", param="value", code="invalid_feedback")
    metadata = score.get("metadata")
    if isinstance(metadata, dict) and (len(metadata) > MAX_TAGS or not all(map(is_short, metadata.values()))):
        problem = f"'metadata' must have at most {MAX_TAGS} entries of at most {MAX_TAG_VALUE_CHARS} characters"
        raise BadRequest(problem, param="metadata", code="invalid_feedback")


def _check_texts(body: Mapping[str, Any], names: Sequence[str]) -> None:
    wrong = next((name for name in names if not isinstance(body.get(name), str | None)), None)
    if wrong is not None:
        raise BadRequest(f"'{wrong}' must be a text", param=wrong, code="invalid_feedback")


def is_short(value: object) -> bool:
    """Whether JSON may fit in a tag; what is far too long is not looked at whole.

    >>> is_short({"a": [1, 2]}), is_short("x" * 513), is_short([[0] * 600])
    (True, False, False)
    """
    waiting, size = [value], 0
    while waiting and size <= MAX_TAG_VALUE_CHARS:
        one = waiting.pop()
        size += len(one) if isinstance(one, str | list | dict) else 1
        if isinstance(one, list | dict) and size <= MAX_TAG_VALUE_CHARS:
            waiting += [*one, *one.values()] if isinstance(one, dict) else one
    return size <= MAX_TAG_VALUE_CHARS


def as_uuid(feedback_id: str) -> str:
    """A name for feedback in the form that TensorZero's clients insist on; the same for the same feedback."""
    return str(uuid.UUID(bytes=hashlib.blake2b(feedback_id.encode(), digest_size=16).digest(), version=5))


class TensorZeroTaken(BaseModel):
    """Feedback as it was kept; `id` is ours, for `DELETE /v1/feedback/{id}`."""

    feedback_id: str
    id: str


class ScoreTaken(BaseModel):
    """A score as it was kept."""

    id: str


class ScoreRemoved(BaseModel):
    """A score that counts no more."""

    message: str


class EventTaken(BaseModel):
    """An event of a batch that was kept."""

    id: str
    status: int


class EventRefused(EventTaken):
    """One that was not."""

    message: str
    error: str


class BatchTaken(BaseModel):
    """What became of a batch."""

    successes: Sequence[EventTaken]
    errors: Sequence[EventRefused]


TEXT: JsonObject = {"type": "string"}
ANY_TEXT: JsonObject = {"type": ["string", "null"]}
ANY_OBJECT: JsonObject = {"type": ["object", "null"]}
TENSORZERO_BODY: JsonObject = {
    "type": "object",
    "required": ["metric_name", "value"],
    "properties": {
        "metric_name": TEXT,
        "value": {"description": "By the metric: a boolean, a number, a text, content blocks."},
        "inference_id": {**ANY_TEXT, "description": "The completion: its id, or the UUID its id begins with."},
        "episode_id": {**ANY_TEXT, "description": "The same; there are no episodes here."},
        "tags": {"type": ["object", "null"], "additionalProperties": TEXT},
        "dryrun": {"type": ["boolean", "null"]},
    },
}
SCORE_BODY: JsonObject = {
    "type": "object",
    "required": ["name", "value"],
    "properties": {
        "id": ANY_TEXT,
        "traceId": {**ANY_TEXT, "description": "The completion's id, here or as `observationId`."},
        "observationId": ANY_TEXT,
        "name": TEXT,
        "value": {"type": ["number", "string", "boolean"]},
        "dataType": {"enum": ["NUMERIC", "CATEGORICAL", "BOOLEAN", "TEXT", "CORRECTION", None]},
        "comment": ANY_TEXT,
        "metadata": ANY_OBJECT,
    },
}
EVENT: JsonObject = {
    "type": "object",
    "required": ["id", "type", "body"],
    "properties": {"id": TEXT, "type": {"const": SCORE_CREATE}, "timestamp": ANY_TEXT, "body": SCORE_BODY},
}
BATCH_BODY: JsonObject = {
    "type": "object",
    "required": ["batch"],
    "properties": {"batch": {"type": "array", "items": EVENT, "maxItems": MOST_EVENTS}, "metadata": ANY_OBJECT},
}


def _body(schema: JsonObject) -> JsonObject:
    return {"requestBody": {"required": True, "content": {JSON: {"schema": schema}}}}


def _answer(value: JsonObject, status: int = 200) -> Response:
    """In ASCII: an event's id may hold lone surrogates."""
    return Response(json.dumps(value).encode(), status, None, JSON)


def add_adapters(app: FastAPI, adapters: Adapters, desk: FeedbackDesk) -> None:
    """The routes."""

    @app.post(TENSORZERO_PATH, tags=["feedback"], response_model=TensorZeroTaken, openapi_extra=_body(TENSORZERO_BODY))
    async def tensorzero_feedback(request: Request) -> Response:
        """Feedback in TensorZero's shape; `serving.feedback_names` says what its metrics mean."""
        raw = await request.body()
        return _answer(await adapters.tensorzero(headers_of(request.scope), raw, key_id_of(request.scope)))

    @app.post(SCORES, tags=["feedback"], response_model=ScoreTaken, openapi_extra=_body(SCORE_BODY))
    async def langfuse_score(request: Request) -> Response:
        """Feedback in the shape of Langfuse's scores."""
        raw = await request.body()
        return _answer(await adapters.score(headers_of(request.scope), raw, key_id_of(request.scope)))

    @app.delete(SCORE_ONE, tags=["feedback"], response_model=ScoreRemoved)
    async def langfuse_score_removal(score_id: str, request: Request) -> Response:
        """Take it back, by the id that was answered."""
        await desk.retract(headers_of(request.scope), score_id, key_id_of(request.scope))
        return _answer({"message": "the score was removed"})

    @app.post(INGESTION, tags=["feedback"], status_code=207, response_model=BatchTaken, openapi_extra=_body(BATCH_BODY))
    async def langfuse_ingestion(request: Request) -> Response:
        """Scores in the batches that Langfuse's SDKs send; events of other types are refused, each by itself."""
        raw = await request.body()
        return _answer(await adapters.ingest(headers_of(request.scope), raw, key_id_of(request.scope)), 207)
