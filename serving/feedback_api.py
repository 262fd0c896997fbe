"""Feedback over HTTP: checked, proved to come from the completion's owner, durable in the spool before the answer."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

import orjson

from feedback.drain import Drain
from feedback.errors import InvalidFeedback, SpoolUnavailable
from feedback.interactions import FeedbackEvent
from feedback.recording import event_to_json
from feedback.signals import Feedback, Signal, parse_feedback, without_text
from feedback.spool import Connection, Spool, SpoolRecord, insert
from feedback.standing import Last, Standing
from monitoring.metrics import FEEDBACK, UNKNOWN_MODEL
from pawl import ids
from pawl.clock import Clock
from pawl.database import Database
from serving.errors import BadRequest, Conflict, NotFound, Overloaded, Unauthorized
from serving.feedback_neighbours import Neighbours, Turns
from serving.feedback_repeats import (
    First,
    Found,
    Stamp,
    beginnings,
    event_id_for,
    forget_old,
    found_in,
    remember,
    same_answer,
    stamp_of,
)
from serving.feedback_standing import Served, Standings
from serving.feedback_tokens import named_by, suffix_in, tokens_of
from serving.fields.json_input import parse_object
from serving.grouping import Grouped
from serving.identity import principal_of
from serving.routes import SHORT_BODY_BYTES

T = TypeVar("T")

MAX_DEPTH = 16
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F][0-9a-fA-F]{2}")
POINTS_AT_COMPLETION = frozenset({Signal.CHOICE, Signal.REGENERATE})
NO_SUCH_COMPLETION = "no such completion"
RATING_HIGH = 0.5
MOST_AT_ONCE = 512
"""Calls whose records go to the disk in one commit."""
RANDOMNESS = ids.Randomness()
"""For many at once: each call to the system lets go of the interpreter, and threads that write then take their turn."""
TICK_S = 1e-6
"""Between two events of one feedback id, whatever the clocks say: the last one counts."""


class Answered(NamedTuple):
    """An HTTP answer."""

    status: int
    body: bytes


@dataclass(frozen=True)
class Caller:
    """Who sent a feedback call, and with what."""

    headers: Mapping[str, str]
    principal: ids.Principal
    tokens: tuple[str, ...]
    """Feedback tokens; with any, the caller is whoever they were made for, whatever name it gives itself."""

    def owner(self, suffix: str) -> str:
        """Who may repeat a call. Browsers with a token have no name: they are told apart by what they may rate."""
        return f"token/{suffix}" if self.tokens else f"{self.principal.key_id}/{self.principal.user}"


class Kept(NamedTuple):
    """What one call puts on the disk."""

    event: FeedbackEvent
    stamp: Stamp | None
    first: First


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
        self._standings = Standings(database, drain, served)
        self._join_window_s = join_window_s
        self._clock = clock
        self._turns = Turns(spool.path.parent)
        self._neighbours = Neighbours(spool.path)
        self._keep = Grouped(self._keep_all, most=MOST_AT_ONCE)
        self._recall = Grouped(self._recall_all, most=MOST_AT_ONCE)

    def close(self) -> None:
        self._standings.close()
        self._turns.close()
        self._spool.submit(lambda _: self._neighbours.close())

    async def take(self, headers: Mapping[str, str], raw: bytes, key_id: str = "") -> Answered:
        """`POST /v1/feedback`.

        Args:
            key_id: Of the caller's API key; empty when keys are not asked for, and for a feedback token.

        Raises:
            ApiError: why it is not taken; nothing was kept then.
        """
        return await self.take_body(headers, await parsed(raw), raw, key_id)

    async def take_body(
        self, headers: Mapping[str, str], body: Mapping[str, Any], raw: bytes, key_id: str, *, is_kept: bool = True
    ) -> Answered:
        """The same for a body that has been read, or made from one in another shape.

        Args:
            raw: What the same call has in common with its repetition.
            is_kept: False only says what would be said.
        """
        tokens = tokens_of(headers)
        feedback = _checked(body if "completion_id" in body else {**named_by(tokens), **body})
        caller = Caller(headers, _caller_of(headers, tokens, feedback.user, key_id), tokens)
        suffix = self._rated(caller, feedback.completion_id, "completion_id")
        if feedback.type in POINTS_AT_COMPLETION and self._rated(caller, str(feedback.value), "value") == suffix:
            raise BadRequest("value must be another completion's id", param="value", code="invalid_feedback")
        feedback_id = ids.feedback_id(feedback.type, suffix)
        stamp = stamp_of(headers, caller.owner(suffix), raw) if is_kept else None
        first = await self._once(stamp, lambda: self._take(caller, feedback, suffix, stamp, is_kept=is_kept))
        describing = partial(describe, feedback, feedback_id, first.at)
        return Answered(first.status, describing() if is_short_body(raw) else await asyncio.to_thread(describing))

    async def _once(self, stamp: Stamp | None, act: Callable[[], Awaitable[First]]) -> First:
        """What was answered to the same call before, else what `act` answers.

        Raises:
            Conflict: the same `Idempotency-Key` is still at work, or came with another body.
        """
        if stamp is None:
            return await act()
        if not stamp.is_exclusive:
            return (await self._earlier(stamp)) or await act()
        if not self._turns.take(stamp):
            raise Conflict("a call with this Idempotency-Key is still running", code="idempotency_key_in_use")
        try:
            return (await self._earlier(stamp)) or await act()
        finally:
            self._turns.give_back(stamp)

    async def _earlier(self, stamp: Stamp) -> First | None:
        if not stamp.is_repeat:
            return None
        return same_answer(stamp, await _spooling(self._recall(stamp)))

    async def _take(
        self, caller: Caller, feedback: Feedback, suffix: str, stamp: Stamp | None, *, is_kept: bool
    ) -> First:
        feedback_id, now = ids.feedback_id(feedback.type, suffix), self._clock()
        standing = await self._standings.of(suffix, feedback_id, beginnings(self._secret, stamp, now))
        if earlier := self._answered_elsewhere(stamp, standing, now):
            return earlier
        is_visible = standing.alias is not None
        is_too_late = now - ids.created_at(suffix) > self._join_window_s
        if is_too_late and not is_visible and standing.is_complete:
            raise NotFound("the completion is no longer stored", param="completion_id", code="completion_not_found")
        is_replacement = standing.last is not None and not standing.last.is_retraction
        status = 202 if not is_visible else 200 if is_replacement else 201
        first = First(status, _after(standing.last, now))
        if is_kept:
            event_id = self._event_id(stamp, first.at, now)
            event = _event(event_id, caller, standing, suffix, feedback_id, first.at, feedback)
            await self._write(Kept(event if standing.is_stored else without_text(event), stamp, first))
            _count(feedback, standing)
        return first

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
        _, suffix = parsed
        tokens = tokens_of(headers)
        caller = Caller(headers, _caller_of(headers, tokens, None, key_id), tokens)
        self._check_owner(caller, suffix, "id")
        stamp = stamp_of(headers, caller.owner(suffix), f"DELETE {feedback_id}".encode())
        first = await self._once(stamp, lambda: self._retract(caller, feedback_id, suffix, stamp))
        return Answered(first.status, orjson.dumps({"id": feedback_id, "object": "feedback.deleted", "deleted": True}))

    async def _retract(self, caller: Caller, feedback_id: str, suffix: str, stamp: Stamp | None) -> First:
        """202 for what is not visible here yet: another gateway may have taken it a moment ago."""
        now = self._clock()
        standing = await self._standings.of(suffix, feedback_id, beginnings(self._secret, stamp, now))
        if earlier := self._answered_elsewhere(stamp, standing, now):
            return earlier
        if standing.last is not None and standing.last.is_retraction:
            raise NotFound("no such feedback", param="id", code="feedback_not_found")
        first = First(202 if standing.last is None else 200, _after(standing.last, now))
        event_id = self._event_id(stamp, first.at, now)
        await self._write(Kept(_event(event_id, caller, standing, suffix, feedback_id, first.at, None), stamp, first))
        return first

    @staticmethod
    def _answered_elsewhere(stamp: Stamp | None, standing: Standing, now: float) -> First | None:
        return None if stamp is None else same_answer(stamp, found_in(stamp, standing.earlier, now))

    def _event_id(self, stamp: Stamp | None, at: float, now: float) -> str:
        """By the key that it came with, else a new one."""
        if stamp is not None and stamp.is_exclusive:
            return event_id_for(self._secret, stamp, now)
        return ids.uuid7(at, RANDOMNESS.take())

    def _rated(self, caller: Caller, completion_id: str, param: str) -> str:
        """The proven suffix of a completion id."""
        suffix = ids.completion_suffix(completion_id)
        if suffix is None:
            raise BadRequest(f"{param} is not a completion id of this gateway", param=param, code="invalid_id")
        self._check_owner(caller, suffix, param)
        return suffix

    def refuse_false_tokens(self, headers: Mapping[str, str]) -> None:
        """For calls of several parts, each of which may need another token.

        Raises:
            Unauthorized: there are tokens, and not one of them is good for anything.
        """
        tokens, now = tokens_of(headers), self._clock()
        if tokens and not any(ids.check_feedback_token(self._secret, each, suffix_in(each), now) for each in tokens):
            raise Unauthorized("the feedback token is not valid, or has expired", code="invalid_token")

    def _check_owner(self, caller: Caller, suffix: str, param: str) -> None:
        """Without a look-up, so that forged and foreign ids take the same time too."""
        if not caller.tokens:
            if not ids.owns(self._secret, suffix, caller.principal):
                raise NotFound(NO_SUCH_COMPLETION, param=param, code="completion_not_found")
            return
        now = self._clock()
        if not any(ids.check_feedback_token(self._secret, token, suffix, now) for token in caller.tokens):
            raise Unauthorized(
                "the feedback token is not valid for this completion, or has expired", code="invalid_token"
            )

    async def _write(self, kept: Kept) -> None:
        """On the disk when it returns. What this process knows changes before: the next call must not overtake it."""
        event = kept.event
        last = Last(event.created_at, event.is_retraction)
        self._standings.note(event.feedback_id, last)
        try:
            await _spooling(self._keep(kept))
        except BaseException:
            self._standings.forget(event.feedback_id, last)
            raise

    async def _keep_all(self, group: Sequence[Kept]) -> Sequence[None]:
        """One commit for all that came meanwhile."""
        await asyncio.wrap_future(self._spool.submit(lambda connection: _keep(connection, group)))
        return [None] * len(group)

    async def _recall_all(self, group: Sequence[Stamp]) -> Sequence[Found | None]:
        now, look = self._clock(), self._neighbours.first_answers
        return await asyncio.wrap_future(self._spool.submit(lambda connection: look(connection, group, now)))


async def _spooling(work: Awaitable[T]) -> T:
    try:
        return await work
    except SpoolUnavailable as exc:
        raise Overloaded("feedback cannot be kept at the moment; try again", code="spool_unavailable") from exc


def parse_body(raw: bytes) -> Mapping[str, Any]:
    """The JSON object of a request. Lone surrogates, which browsers send as they have them, are let through.

    Raises:
        BadRequest: it is not one, or a hostile one.
    """
    try:
        return parse_object(raw, MAX_DEPTH)
    except BadRequest:
        if not SURROGATE.search(raw):
            raise
    # The rest is checked without them: only what is sound and of a bearable size goes to the slower parser.
    parse_object(SURROGATE.sub(rb"\\ufffd", raw), MAX_DEPTH)
    body: Mapping[str, Any] = json.loads(raw)
    return body


async def parsed(raw: bytes) -> Mapping[str, Any]:
    """A body's JSON object; a long one is read on a thread.

    Raises:
        BadRequest: see `parse_body`.
    """
    return parse_body(raw) if is_short_body(raw) else await asyncio.to_thread(parse_body, raw)


def is_short_body(raw: bytes) -> bool:
    """Whether reading or writing it takes no time to speak of."""
    return len(raw) <= SHORT_BODY_BYTES


def _caller_of(headers: Mapping[str, str], tokens: Sequence[str], user: str | None, key_id: str) -> ids.Principal:
    return ids.Principal() if tokens else principal_of(headers, {"user": user}, key_id=key_id)


def _checked(body: Mapping[str, Any]) -> Feedback:
    try:
        return parse_feedback(body)
    except InvalidFeedback as exc:
        raise BadRequest(str(exc), param=exc.param, code="invalid_feedback") from exc


def _after(last: Last | None, now: float) -> float:
    return now if last is None else max(now, last.at + TICK_S)


def _event(
    event_id: str,
    caller: Caller,
    standing: Standing,
    suffix: str,
    feedback_id: str,
    at: float,
    feedback: Feedback | None,
) -> FeedbackEvent:
    """What is kept; without feedback, a retraction. Who shows a token is the completion's owner, known or not yet."""
    owner = ids.Principal(standing.key_id, standing.user_id or "") if caller.tokens else caller.principal
    return FeedbackEvent(
        id=event_id,
        feedback_id=feedback_id,
        interaction_id=suffix,
        completion_id=feedback.completion_id if feedback else standing.completion_id or f"chatcmpl-{suffix}",
        type=feedback_id.split("_")[1],
        value=feedback.value if feedback else None,
        is_retraction=feedback is None,
        reason=feedback.reason if feedback else None,
        comment=feedback.comment if feedback else None,
        tags=feedback.tags if feedback else None,
        key_id=owner.key_id,
        user_id=owner.user or None,
        created_at=at,
    )


def _keep(connection: Connection, group: Sequence[Kept]) -> None:
    """Events and what was answered to them, in one commit."""
    for kept in group:
        insert(connection, _record(kept.event))
    stamped = [(kept.stamp, kept.first) for kept in group if kept.stamp is not None]
    if stamped:
        remember(connection, stamped)
        forget_old(connection, group[-1].first.at)


def _record(event: FeedbackEvent) -> SpoolRecord:
    return SpoolRecord(0, "feedback", event.id, event.feedback_id, event.created_at, event_to_json(event), None, None)


def describe(feedback: Feedback, feedback_id: str, at: float) -> bytes:
    """What the caller gets back, in ASCII: it may hold lone surrogates."""
    shown = {
        "id": feedback_id,
        "object": "feedback",
        "completion_id": feedback.completion_id,
        "type": feedback.type.value,
        "value": feedback.value,
        "created": int(at),
    }
    return json.dumps(shown, separators=(",", ":")).encode()


def _count(feedback: Feedback, standing: Standing) -> None:
    FEEDBACK.labels(
        type=feedback.type,
        value=value_label(feedback),
        model=standing.alias or UNKNOWN_MODEL,
        variant=standing.variant or UNKNOWN_MODEL,
    ).inc()


def value_label(feedback: Feedback) -> str:
    """A bounded label: never a text, an id or a number as it came."""
    if feedback.type in (Signal.THUMBS, Signal.REPORT):
        return str(feedback.value)
    if feedback.type == Signal.RATING:
        return "high" if float(feedback.value) >= RATING_HIGH else "low"
    return "given"
