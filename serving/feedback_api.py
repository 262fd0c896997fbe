"""Feedback over HTTP: checked, proved to come from the completion's owner, durable in the spool before the answer."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import orjson
import sqlalchemy as sa

from feedback.drain import Drain
from feedback.errors import InvalidFeedback, SpoolUnavailable
from feedback.interactions import FeedbackEvent
from feedback.recording import event_from_json, event_to_json
from feedback.signals import Feedback, Signal, parse_feedback
from feedback.spool import Connection, Spool, SpoolRecord, insert, newest
from feedback.store import Standing, feedback_standing
from monitoring.metrics import FEEDBACK, UNKNOWN_MODEL
from pawl import ids
from pawl.clock import Clock
from pawl.database import Database
from serving.errors import BadRequest, Conflict, NotFound, Overloaded, Unauthorized
from serving.identity import principal_of
from serving.routes import TOKEN_HEADER

T = TypeVar("T")

IDEMPOTENCY_TTL_S = 24 * 3600.0
LOOK_UP_S = 1.0
"""How long the shared database may take to say whether it knows a completion."""
POINTS_AT_COMPLETION = frozenset({Signal.CHOICE, Signal.REGENERATE})
NO_SUCH_COMPLETION = "no such completion"
RATING_HIGH = 0.5


class Answered(NamedTuple):
    """An HTTP answer."""

    status: int
    body: bytes


@dataclass(frozen=True)
class Caller:
    """Who sent a feedback call, and with what."""

    headers: Mapping[str, str]
    principal: ids.Principal
    token: str | None

    @property
    def name(self) -> str:
        return f"{self.principal.key_id}/{self.principal.user}"


class Served(Protocol):
    """What this process knows of its own completions before the database does."""

    def is_answering(self, suffix: str) -> bool:
        """Whether the completion is being made at this moment."""

    def recently_served(self, suffix: str) -> tuple[str, str] | None:
        """Alias and assigned variant of one made a short while ago."""


class FeedbackDesk:
    """Takes feedback in and retracts it."""

    def __init__(
        self,
        *,
        secret: bytes,
        spool: Spool,
        drain: Drain,
        database: Database,
        served: Served,
        join_window_s: float,
        clock: Clock,
    ) -> None:
        self._secret = secret
        self._spool = spool
        self._drain = drain
        self._database = database
        self._served = served
        self._join_window_s = join_window_s
        self._clock = clock
        self._look_ups = ThreadPoolExecutor(2, thread_name_prefix="feedback-look-up")
        self._answering: set[tuple[str, str]] = set()

    def close(self) -> None:
        self._look_ups.shutdown(wait=False, cancel_futures=True)

    async def take(self, headers: Mapping[str, str], raw: bytes, key_id: str = "") -> Answered:
        """`POST /v1/feedback`.

        Args:
            key_id: Of the caller's API key; empty when keys are not asked for, and for a feedback token.

        Raises:
            ApiError: why it is not taken; nothing was kept then.
        """
        body = parse_body(raw)
        feedback = _checked(body)
        principal = principal_of(headers, {"user": feedback.user}, key_id=key_id)
        caller = Caller(headers, principal, headers.get(TOKEN_HEADER))
        suffix = self._rated(caller, feedback.completion_id, "completion_id")
        if feedback.type in POINTS_AT_COMPLETION and self._rated(caller, str(feedback.value), "value") == suffix:
            raise BadRequest("value must be another completion's id", param="value", code="invalid_feedback")
        key = headers.get("idempotency-key")
        if key is None:
            return await self._take_once(caller, feedback, suffix, None)
        return await self._take_with_key(caller, feedback, suffix, _checked_key(key), raw)

    async def _take_with_key(self, caller: Caller, feedback: Feedback, suffix: str, key: str, raw: bytes) -> Answered:
        """The same key and body get the first answer again."""
        # Browsers with a token share one nameless principal: their keys are told apart by what they may rate.
        owner = caller.name if caller.token is None else f"token/{suffix}"
        slot = (owner, key)
        if slot in self._answering:
            raise Conflict("a call with this Idempotency-Key is still running", code="idempotency_key_in_use")
        self._answering.add(slot)
        try:
            stamp = Stamp(owner, key, hashlib.sha256(raw).hexdigest())
            earlier = await self._durably(lambda connection: earlier_answer(connection, stamp, self._clock()))
            return earlier or await self._take_once(caller, feedback, suffix, stamp)
        finally:
            self._answering.discard(slot)

    async def _take_once(self, caller: Caller, feedback: Feedback, suffix: str, stamp: Stamp | None) -> Answered:
        now = self._clock()
        feedback_id = ids.feedback_id(feedback.type, suffix)
        standing = await self._standing(suffix, feedback_id)
        is_visible = standing.alias is not None
        is_too_late = now - ids.created_at(suffix) > self._join_window_s
        if is_too_late and not is_visible and standing is not UNKNOWN:
            raise NotFound("the completion is no longer stored", param="completion_id", code="completion_not_found")
        event = self._event(caller, feedback, suffix, feedback_id, now)
        is_replacement = standing.last_event is not None and not standing.last_event.is_retraction
        status = 202 if not is_visible else 200 if is_replacement else 201
        answered = Answered(status, orjson.dumps(describe(event)))
        await self._durably(lambda connection: _keep(connection, event, stamp, answered))
        self._drain.wake()
        FEEDBACK.labels(
            type=feedback.type,
            value=value_label(feedback),
            model=standing.alias or UNKNOWN_MODEL,
            variant=standing.variant or UNKNOWN_MODEL,
        ).inc()
        return answered

    async def retract(self, headers: Mapping[str, str], feedback_id: str, key_id: str = "") -> Answered:
        """`DELETE /v1/feedback/{id}`.

        Args:
            key_id: As for `take`.

        Raises:
            ApiError: the id is malformed (400), or nobody's of this caller's (404).
        """
        parsed = ids.parse_feedback_id(feedback_id)
        if parsed is None or parsed[0] not in set(Signal):
            raise BadRequest("not a feedback id", param="id", code="invalid_id")
        kind, suffix = parsed
        caller = Caller(headers, principal_of(headers, {}, key_id=key_id), headers.get(TOKEN_HEADER))
        self._check_owner(caller, suffix, "id")
        standing = await self._standing(suffix, feedback_id)
        last = standing.last_event
        if last is None or last.is_retraction:
            raise NotFound("no such feedback", param="id", code="feedback_not_found")
        event = FeedbackEvent(
            id=ids.uuid7(self._clock(), os.urandom(10)),
            feedback_id=feedback_id,
            interaction_id=suffix,
            completion_id=last.completion_id,
            type=kind,
            value=None,
            is_retraction=True,
            reason=None,
            comment=None,
            tags=None,
            key_id=caller.principal.key_id,
            user_id=caller.principal.user or None,
            created_at=self._clock(),
        )
        await self._durably(lambda connection: insert(connection, _record(event)))
        self._drain.wake()
        return Answered(200, orjson.dumps({"id": feedback_id, "object": "feedback.deleted", "deleted": True}))

    def _rated(self, caller: Caller, completion_id: str, param: str) -> str:
        """The proven suffix of a completion id."""
        suffix = ids.completion_suffix(completion_id)
        if suffix is None:
            raise BadRequest(f"{param} is not a completion id of this gateway", param=param, code="invalid_id")
        self._check_owner(caller, suffix, param)
        return suffix

    def _check_owner(self, caller: Caller, suffix: str, param: str) -> None:
        if caller.token is not None:
            if ids.check_feedback_token(self._secret, caller.token, suffix, self._clock()):
                return
            raise Unauthorized(
                "the feedback token is not valid for this completion, or has expired", code="invalid_token"
            )
        if not ids.owns(self._secret, suffix, caller.principal):
            raise NotFound(NO_SUCH_COMPLETION, param=param, code="completion_not_found")

    async def _standing(self, suffix: str, feedback_id: str) -> Standing:
        """What this gateway's spool and the shared database know together."""
        event = await self._durably(lambda connection: _spooled_event(connection, feedback_id))
        alias, variant = self._served.recently_served(suffix) or (None, None)
        here = Standing(alias, variant, event)
        if (here.alias and here.last_event) or self._served.is_answering(suffix):
            return here
        there = await self._stored_standing(suffix, feedback_id)
        if there is UNKNOWN and here == UNKNOWN:
            return UNKNOWN
        return Standing(here.alias or there.alias, here.variant or there.variant, here.last_event or there.last_event)

    async def _stored_standing(self, suffix: str, feedback_id: str) -> Standing:
        """What the shared database knows; `UNKNOWN` while it does not answer, since feedback is taken all the same."""
        if not self._drain.is_database_up:
            return UNKNOWN
        look_up = asyncio.get_running_loop().run_in_executor(
            self._look_ups, feedback_standing, self._database, suffix, feedback_id
        )
        try:
            async with asyncio.timeout(LOOK_UP_S):
                return await look_up
        except (TimeoutError, sa.exc.SQLAlchemyError):
            return UNKNOWN

    def _event(self, caller: Caller, feedback: Feedback, suffix: str, feedback_id: str, now: float) -> FeedbackEvent:
        return FeedbackEvent(
            id=ids.uuid7(now, os.urandom(10)),
            feedback_id=feedback_id,
            interaction_id=suffix,
            completion_id=feedback.completion_id,
            type=feedback.type.value,
            value=feedback.value,
            is_retraction=False,
            reason=feedback.reason,
            comment=feedback.comment,
            tags=feedback.tags,
            key_id=caller.principal.key_id,
            user_id=caller.principal.user or None,
            created_at=now,
        )

    async def _durably(self, operation: Callable[[Connection], T]) -> T:
        try:
            return await asyncio.wrap_future(self._spool.submit(operation))
        except SpoolUnavailable as exc:
            raise Overloaded("feedback cannot be kept at the moment; try again", code="spool_unavailable") from exc


class Stamp(NamedTuple):
    """An idempotency key with what it was used for."""

    principal: str
    key: str
    body_sha: str


UNKNOWN = Standing(None, None, None)
"""Nobody could be asked. Compared by identity: a database that answers "no such row" gives an equal standing."""


def parse_body(raw: bytes) -> Mapping[str, Any]:
    """The JSON object of a request.

    Raises:
        BadRequest: it is not one.
    """
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError as exc:
        raise BadRequest(f"the body is not valid JSON: {exc}", code="invalid_json") from exc
    if not isinstance(body, dict):
        raise BadRequest("the body must be a JSON object", code="invalid_json")
    return body


def _checked(body: Mapping[str, Any]) -> Feedback:
    try:
        return parse_feedback(body)
    except InvalidFeedback as exc:
        raise BadRequest(str(exc), param=exc.param, code="invalid_feedback") from exc


def _checked_key(key: str) -> str:
    if not 1 <= len(key) <= 255 or not key.isascii() or not key.isprintable():
        raise BadRequest("Idempotency-Key must be 1 to 255 printable ASCII characters", param="Idempotency-Key")
    return key


def earlier_answer(connection: Connection, stamp: Stamp, now: float) -> Answered | None:
    """The answer given to this key before, inside a spool operation.

    Raises:
        Conflict: the key was used with another body.
    """
    connection.execute("DELETE FROM answers WHERE at < ?", (now - IDEMPOTENCY_TTL_S,))
    row = connection.execute(
        "SELECT body_sha, status, body FROM answers WHERE principal = ? AND key = ?", (stamp.principal, stamp.key)
    ).fetchone()
    if row is None:
        return None
    if row[0] != stamp.body_sha:
        raise Conflict("this Idempotency-Key was used with another body", status=422, code="idempotency_key_reused")
    return Answered(row[1], row[2])


def _keep(connection: Connection, event: FeedbackEvent, stamp: Stamp | None, answered: Answered) -> None:
    """The event and the answer to its key, in one commit."""
    insert(connection, _record(event))
    if stamp is not None:
        connection.execute(
            "INSERT OR REPLACE INTO answers (principal, key, body_sha, status, body, at) VALUES (?, ?, ?, ?, ?, ?)",
            (*stamp, answered.status, answered.body, event.created_at),
        )


def _record(event: FeedbackEvent) -> SpoolRecord:
    return SpoolRecord(0, "feedback", event.id, event.feedback_id, event.created_at, event_to_json(event), None, None)


def _spooled_event(connection: Connection, feedback_id: str) -> FeedbackEvent | None:
    event = newest(connection, "feedback", feedback_id)
    return event_from_json(event.meta) if event else None


def describe(event: FeedbackEvent) -> dict[str, Any]:
    """What the caller gets back."""
    return {
        "id": event.feedback_id,
        "object": "feedback",
        "completion_id": event.completion_id,
        "type": event.type,
        "value": event.value,
        "created": int(event.created_at),
    }


def value_label(feedback: Feedback) -> str:
    """A bounded label: never a text, an id or a number as it came."""
    if feedback.type in (Signal.THUMBS, Signal.REPORT):
        return str(feedback.value)
    if feedback.type == Signal.RATING:
        return "high" if float(feedback.value) >= RATING_HIGH else "low"
    return "given"
