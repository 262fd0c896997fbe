"""Stored completions over HTTP, as OpenAI's API has them: a caller reads, lists, annotates and deletes its own.

Whose a completion is stands in its id, so a foreign or forged one is told without a look-up, and looks like one that
does not exist.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Mapping, Set
from typing import Annotated, Any, Literal, ParamSpec, TypeVar

import sqlalchemy as sa
from fastapi import FastAPI, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from feedback.interactions import Interaction, Message, Status
from feedback.store import StoredQuery, delete_texts, get_interaction, list_stored, metadata_of, replace_metadata
from pawl import ids
from pawl.clock import Clock
from pawl.database import Database
from serving.errors import BadRequest, NotFound, Overloaded
from serving.identity import principal_of
from serving.routes import CHAT_LIST, CHAT_MESSAGES, CHAT_ONE, RESPONSE_ONE, key_id_of
from serving.wire import Scope, headers_of

P = ParamSpec("P")
T = TypeVar("T")

JSON = "application/json"
CHAT = "chat.completions"
CHATS = frozenset({CHAT, "messages"})
"""Engines answer Anthropic's route by a chat completion, with the id of one."""
RESPONSES = frozenset({"responses"})
FRESH_S = 60.0
"""For this long after its making, a completion that is not here may still be on its way from the journal."""
WAIT_S = 1.0
"""How long a look-up waits for such a one."""
FIRST_PAUSE_S = 0.03
NO_SUCH = "no such completion, or it is not stored"
METADATA_PREFIX, METADATA_SUFFIX = "metadata[", "]"

MetadataKey = Annotated[str, StringConstraints(max_length=64)]
MetadataValue = Annotated[str, StringConstraints(max_length=512)]
Metadata = Annotated[dict[MetadataKey, MetadataValue], Field(max_length=16)]
PageSize = Annotated[int, Query(ge=1, le=100)]
Order = Annotated[Literal["asc", "desc"], Query(description="By time.")]
After = Annotated[str | None, Query(description="The last id of the page before.", max_length=80)]


class Usage(BaseModel):
    """Tokens as the engine counted them."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class StoredMessage(BaseModel):
    """What the assistant said."""

    model_config = ConfigDict(extra="allow")

    role: str
    content: Any


class StoredChoice(BaseModel):
    """The first choice; others are not stored."""

    index: int
    message: StoredMessage
    finish_reason: str | None
    logprobs: None


class StoredChat(BaseModel):
    """A stored chat completion."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[StoredChoice]
    usage: Usage | None
    metadata: dict[str, str]


class StoredChatPage(BaseModel):
    """A page of them."""

    object: Literal["list"]
    data: list[StoredChat]
    first_id: str | None
    last_id: str | None
    has_more: bool


class PromptMessage(StoredMessage):
    """One message of the conversation that was answered."""

    id: str


class PromptMessagePage(BaseModel):
    """A page of a conversation."""

    object: Literal["list"]
    data: list[PromptMessage]
    first_id: str | None
    last_id: str | None
    has_more: bool


class MetadataChange(BaseModel):
    """What can be changed of a stored completion; null removes all of it."""

    model_config = ConfigDict(extra="forbid")

    metadata: Metadata | None


class DeletedChat(BaseModel):
    """The texts are gone."""

    object: Literal["chat.completion.deleted"]
    id: str
    deleted: bool


class ResponseUsage(BaseModel):
    """The same in the words of the responses API."""

    input_tokens: int
    output_tokens: int
    total_tokens: int


class StoredResponse(BaseModel):
    """A stored response."""

    id: str
    object: Literal["response"]
    created_at: int
    status: str
    model: str
    output: list[dict[str, Any]]
    usage: ResponseUsage | None
    metadata: dict[str, str]
    error: None
    incomplete_details: dict[str, str] | None
    instructions: None
    parallel_tool_calls: bool
    tool_choice: str
    tools: list[dict[str, Any]]


class DeletedResponse(BaseModel):
    """The texts are gone."""

    object: Literal["response"]
    id: str
    deleted: bool


class StoredDesk:
    """Finds a caller's own completions in the shared database."""

    def __init__(self, *, secret: bytes, database: Database, clock: Clock) -> None:
        self._secret = secret
        self._database = database
        self._clock = clock

    async def get(self, scope: Scope, given_id: str, routes: Set[str]) -> Interaction:
        """A stored completion of the caller's.

        Raises:
            NotFound: there is none of this id, it is somebody else's, or its texts are not kept.
        """
        suffix = self._own(scope, given_id)
        found = await self._awaited(suffix)
        if found is None:
            raise self._missing(suffix)
        if (
            found.completion_id != given_id
            or found.route not in routes
            or not found.is_stored
            or found.completion is None
        ):
            raise _no_such()
        return found

    async def page(self, scope: Scope, query: StoredQuery) -> tuple[list[Interaction], bool]:
        """The caller's own among those asked for."""
        caller = self._caller(scope)
        return await asking_database(
            list_stored, self._database, query._replace(key_id=caller.key_id, user=caller.user)
        )

    async def annotate(self, scope: Scope, given_id: str, metadata: Mapping[str, str]) -> Interaction:
        """Replace a completion's metadata.

        Raises:
            NotFound: see `get`.
        """
        found = await self.get(scope, given_id, CHATS)
        changed = await asking_database(replace_metadata, self._database, found.id, metadata)
        if changed is None:
            raise _no_such()
        return changed

    async def delete(self, scope: Scope, given_id: str, routes: Set[str]) -> None:
        """Remove a completion's texts; one that is still in the journal is dropped when it arrives.

        Raises:
            NotFound: see `get`; also for one that was deleted before.
        """
        suffix = self._own(scope, given_id)
        found = await self._awaited(suffix)
        if found is None and not self._is_fresh(suffix):
            raise _no_such()
        if found is not None and (found.completion_id != given_id or found.route not in routes):
            raise _no_such()
        grave = _tombstone(suffix, given_id, min(routes), self._caller(scope))
        if not await asking_database(delete_texts, self._database, suffix, grave):
            raise _no_such()

    def _caller(self, scope: Scope) -> ids.Principal:
        return principal_of(headers_of(scope), {}, key_id=key_id_of(scope))

    def _own(self, scope: Scope, given_id: str) -> str:
        suffix = ids.completion_suffix(given_id)
        if suffix is None or not ids.owns(self._secret, suffix, self._caller(scope)):
            raise _no_such()
        return suffix

    async def _awaited(self, suffix: str) -> Interaction | None:
        """The row, waited for a moment while the completion is so young that it may be on its way."""
        deadline, pause_s = time.monotonic() + WAIT_S, FIRST_PAUSE_S
        while True:
            found = await asking_database(get_interaction, self._database, suffix)
            if found is not None or not self._is_fresh(suffix) or time.monotonic() > deadline:
                return found
            await asyncio.sleep(pause_s)
            pause_s *= 2

    def _is_fresh(self, suffix: str) -> bool:
        return self._clock() - ids.created_at(suffix) < FRESH_S

    def _missing(self, suffix: str) -> NotFound:
        if not self._is_fresh(suffix):
            return _no_such()
        # SDKs obey: they ask again by themselves, where they would give up on a 404 otherwise.
        headers = {"x-should-retry": "true", "retry-after": "1"}
        return NotFound("the completion is not stored yet; try again", code="completion_not_found", headers=headers)


async def asking_database(ask: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run a query on a thread.

    Raises:
        Overloaded: the database does not answer.
    """
    try:
        return await asyncio.to_thread(ask, *args, **kwargs)
    except sa.exc.DBAPIError as exc:
        raise Overloaded("the database does not answer; try again", code="database_unavailable") from exc
    except sa.exc.TimeoutError as exc:  # All of the pool's connections are in use.
        raise Overloaded("the database is busy; try again", code="database_unavailable") from exc


def _no_such() -> NotFound:
    return NotFound(NO_SUCH, code="completion_not_found")


def _tombstone(suffix: str, completion_id: str, route: str, caller: ids.Principal) -> dict[str, Any]:
    """The row of a completion that was deleted before it arrived: its id and its owner, and that nothing is kept."""
    return {
        "id": suffix,
        "completion_id": completion_id,
        "route": route,
        "created_at": ids.created_at(suffix),
        "alias": "",
        "key_id": caller.key_id,
        "user_id": caller.user or None,
        "unit_id": "",
        "assigned_variant": "",
        "served_variant": "",
        "probability": 1.0,
        "is_analysed": False,
        "phase": 0,
        "route_version": 0,
        "model": "",
        "status": Status.OK.value,
        "http_status": 200,
        "latency_ms": 0.0,
    }


def describe_chat(found: Interaction) -> dict[str, Any]:
    """As OpenAI shows it."""
    choice = {"index": 0, "message": found.completion, "finish_reason": found.finish_reason, "logprobs": None}
    return {
        "id": found.completion_id,
        "object": "chat.completion",
        "created": int(found.created_at),
        "model": found.model,
        "choices": [choice],
        "usage": _usage(found, "prompt_tokens", "completion_tokens"),
        "metadata": dict(metadata_of(found)),
    }


def describe_response(found: Interaction) -> dict[str, Any]:
    """The same in the words of the responses API."""
    is_whole = found.is_complete
    return {
        "id": found.completion_id,
        "object": "response",
        "created_at": int(found.created_at),
        "status": "completed" if is_whole else "incomplete",
        "model": found.model,
        "output": _output_items(found),
        "usage": _usage(found, "input_tokens", "output_tokens"),
        "metadata": dict(metadata_of(found)),
        "error": None,
        "incomplete_details": None if is_whole else {"reason": "max_output_tokens"},
        "instructions": None,
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": [],
    }


def _usage(found: Interaction, read: str, written: str) -> dict[str, int] | None:
    n_read, n_written = found.prompt_tokens, found.completion_tokens
    if n_read is None or n_written is None:
        return None
    return {read: n_read, written: n_written, "total_tokens": n_read + n_written}


def _output_items(found: Interaction) -> list[dict[str, Any]]:
    message = found.completion or {}
    part: dict[str, Any] = {"type": "output_text", "text": message.get("content") or "", "annotations": []}
    said = {"type": "message", "id": f"msg_{found.id}", "role": "assistant", "status": "completed", "content": [part]}
    calls = [
        {
            "type": "function_call",
            "id": f"fc_{found.id}_{index}",
            "call_id": call.get("id"),
            "name": (call.get("function") or {}).get("name"),
            "arguments": (call.get("function") or {}).get("arguments"),
            "status": "completed",
        }
        for index, call in enumerate(message.get("tool_calls") or [])
    ]
    return [said, *calls] if part["text"] or not calls else calls


def describe_message(found: Interaction, index: int, message: Message) -> dict[str, Any]:
    """One message of the prompt, with an id of its own."""
    content = message.get("content")
    is_parts = isinstance(content, list)
    shown = {"content": None if is_parts else content, "content_parts": content if is_parts else None}
    return {**message, **shown, "id": f"{found.completion_id}-{index}"}


def as_page(data: list[dict[str, Any]], *, has_more: bool) -> dict[str, Any]:
    """A list as OpenAI's SDKs page through it."""
    first, last = (data[0]["id"], data[-1]["id"]) if data else (None, None)
    return {"object": "list", "data": data, "first_id": first, "last_id": last, "has_more": has_more}


def answer(value: Mapping[str, Any], headers: Mapping[str, str] | None = None) -> Response:
    """As JSON in ASCII: models write lone surrogates, which UTF-8 cannot carry."""
    return Response(json.dumps(value).encode(), 200, dict(headers or {}), JSON)


def shown_by(found: Interaction) -> dict[str, str]:
    """The headers that say who answered, as the completion itself carried them."""
    named = {"x-pawl-variant": found.served_variant, "x-pawl-model": found.model}
    return {name: value.encode("latin-1", "replace").decode("latin-1") for name, value in named.items()}


def wanted_metadata(request: Request) -> dict[str, str]:
    """The `metadata[key]=value` parts of a query."""
    return {
        name[len(METADATA_PREFIX) : -len(METADATA_SUFFIX)]: value
        for name, value in request.query_params.items()
        if name.startswith(METADATA_PREFIX) and name.endswith(METADATA_SUFFIX)
    }


def cursor_of(after: str | None) -> str | None:
    """The suffix of the id that a page ended with.

    Raises:
        BadRequest: it is no such id.
    """
    suffix = ids.completion_suffix(after) if after is not None else None
    if after is not None and suffix is None:
        raise BadRequest("after must be the id of a completion", param="after", code="invalid_id")
    return suffix


METADATA_QUERY = {
    "parameters": [
        {
            "name": "metadata",
            "in": "query",
            "required": False,
            "style": "deepObject",
            "explode": True,
            "description": "Only those with these pairs: `metadata[key]=value`.",
            "schema": {"type": "object", "additionalProperties": {"type": "string"}},
        }
    ]
}


def add_stored(app: FastAPI, desk: StoredDesk) -> None:
    """The routes of stored completions."""
    _add_reading(app, desk)
    _add_changing(app, desk)
    _add_responses(app, desk)


def _add_reading(app: FastAPI, desk: StoredDesk) -> None:
    @app.get(CHAT_LIST, tags=["stored completions"], response_model=StoredChatPage, openapi_extra=METADATA_QUERY)
    async def list_chats(
        request: Request,
        model: Annotated[str | None, Query(description="The name asked for, or the version that answered.")] = None,
        after: After = None,
        limit: PageSize = 20,
        order: Order = "asc",
    ) -> Response:
        """The caller's stored chat completions: those of its key, and of the user that `x-pawl-user` names."""
        query = StoredQuery(CHAT, "", "", model, wanted_metadata(request), cursor_of(after), limit, order == "desc")
        found, has_more = await desk.page(request.scope, query)
        return answer(as_page([describe_chat(one) for one in found], has_more=has_more))

    @app.get(CHAT_ONE, tags=["stored completions"], response_model=StoredChat)
    async def get_chat(completion_id: str, request: Request) -> Response:
        """One of them."""
        found = await desk.get(request.scope, completion_id, CHATS)
        return answer(describe_chat(found), shown_by(found))

    @app.get(CHAT_MESSAGES, tags=["stored completions"], response_model=PromptMessagePage)
    async def list_messages(
        completion_id: str, request: Request, after: After = None, limit: PageSize = 20, order: Order = "asc"
    ) -> Response:
        """The conversation that it answered."""
        found = await desk.get(request.scope, completion_id, CHATS)
        every = [describe_message(found, index, message) for index, message in enumerate(found.prompt or ())]
        ordered = every if order == "asc" else every[::-1]
        start = next((place + 1 for place, message in enumerate(ordered) if message["id"] == after), 0)
        shown = ordered[start : start + limit]
        return answer(as_page(shown, has_more=len(ordered) > start + limit))


def _add_changing(app: FastAPI, desk: StoredDesk) -> None:
    @app.post(CHAT_ONE, tags=["stored completions"], response_model=StoredChat)
    async def update_chat(completion_id: str, change: MetadataChange, request: Request) -> Response:
        """Replace its metadata."""
        found = await desk.annotate(request.scope, completion_id, change.metadata or {})
        return answer(describe_chat(found), shown_by(found))

    @app.delete(CHAT_ONE, tags=["stored completions"], response_model=DeletedChat)
    async def delete_chat(completion_id: str, request: Request) -> Response:
        """Remove its texts, those of feedback on it and the pairs from it, for good; only numbers stay."""
        await desk.delete(request.scope, completion_id, CHATS)
        return answer({"object": "chat.completion.deleted", "id": completion_id, "deleted": True})


def _add_responses(app: FastAPI, desk: StoredDesk) -> None:
    @app.get(RESPONSE_ONE, tags=["stored completions"], response_model=StoredResponse)
    async def get_response(response_id: str, request: Request) -> Response:
        """A stored response."""
        found = await desk.get(request.scope, response_id, RESPONSES)
        return answer(describe_response(found), shown_by(found))

    @app.delete(RESPONSE_ONE, tags=["stored completions"], response_model=DeletedResponse)
    async def delete_response(response_id: str, request: Request) -> Response:
        """The same as for chat completions."""
        await desk.delete(request.scope, response_id, RESPONSES)
        return answer({"object": "response", "id": response_id, "deleted": True})
