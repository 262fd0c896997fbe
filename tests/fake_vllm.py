"""A stand-in for vLLM's OpenAI server: a real application over a real socket, whose behaviour a test can set.

It answers as vLLM 0.32 was seen to: ids from `X-Request-Id`, the same error bodies, runtime LoRA loading, usage chunks.
"""

from __future__ import annotations

import asyncio
import base64
import json
import struct
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

TOOL_CALL_ID = "chatcmpl-tool-0a1b2c3d4e5f6071"
STREAM_ERROR = b'data: {"error": {"message": "EngineCore died", "type": "InternalServerError", "code": 500}}\n\n'


@dataclass
class Behaviour:
    """What the next requests meet."""

    text: str = "Water it in the morning."
    """What every model answers, unless `text_by_model` says otherwise."""
    text_by_model: dict[str, str] = field(default_factory=dict)
    status: int = 200
    error: dict[str, Any] | None = None
    delay_s: float = 0.0
    """Before the first byte."""
    gap_s: float = 0.0
    """Between two chunks of a stream."""
    n_chunks: int = 4
    break_after: int | None = None
    """End a stream without its terminator after this many chunks."""
    fail_after: int | None = None
    """Send an error in the stream after this many chunks, and `[DONE]` after it, as vLLM does."""
    finish_reason: str = "stop"
    constant_id: str | None = None


class FakeVLLM:
    """The application and what it saw."""

    def __init__(self, *models: str) -> None:
        self.behaviour = Behaviour()
        self.base_models = list(models or ("base-model",))
        self.adapters: dict[str, str] = {}
        self.seen: list[dict[str, Any]] = []
        self.seen_headers: list[dict[str, str]] = []
        self.n_running = 0
        self.n_aborted = 0
        self.n_waiting = 0
        """What its metrics say waits inside."""
        self.app = Starlette(
            routes=[
                Route("/health", lambda _: PlainTextResponse("")),
                Route("/metrics", self.metrics),
                Route("/v1/models", self.models),
                Route("/v1/chat/completions", self.chat, methods=["POST"]),
                Route("/v1/completions", self.complete, methods=["POST"]),
                Route("/v1/responses", self.respond, methods=["POST"]),
                Route("/v1/embeddings", self.embed, methods=["POST"]),
                Route("/v1/messages", self.message, methods=["POST"]),
                Route("/v1/load_lora_adapter", self.load, methods=["POST"]),
                Route("/v1/unload_lora_adapter", self.unload, methods=["POST"]),
            ]
        )

    async def models(self, _: Request) -> Response:
        base = [{"id": name, "object": "model", "root": name, "parent": None} for name in self.base_models]
        loaded = [
            {"id": name, "object": "model", "root": path, "parent": self.base_models[0]}
            for name, path in self.adapters.items()
        ]
        return JSONResponse({"object": "list", "data": base + loaded})

    async def metrics(self, _: Request) -> Response:
        return PlainTextResponse(f'vllm:num_requests_waiting{{engine="0"}} {float(self.n_waiting)}\n')

    async def load(self, request: Request) -> Response:
        body = await request.json()
        if body["lora_name"] in self.adapters:
            return _error(400, f"The lora adapter '{body['lora_name']}' has already been loaded.")
        self.adapters[body["lora_name"]] = body["lora_path"]
        return PlainTextResponse("Success: LoRA adapter added.")

    async def unload(self, request: Request) -> Response:
        name = (await request.json())["lora_name"]
        if self.adapters.pop(name, None) is None:
            return _error(404, f"The lora adapter '{name}' cannot be found.")
        return PlainTextResponse("Success: LoRA adapter removed.")

    async def chat(self, request: Request) -> Response:
        return await self._answer(request, "chat")

    async def complete(self, request: Request) -> Response:
        return await self._answer(request, "text")

    async def respond(self, request: Request) -> Response:
        """The responses API. Unlike elsewhere, the id is what the body says, not the header (as in vLLM 0.32)."""
        body, refusal = await self._taken(request)
        if refusal is not None:
            return refusal
        answer = _response_object(body, body.get("request_id") or f"resp_{uuid.uuid4().hex}", self._text(body["model"]))
        if not body.get("stream"):
            return JSONResponse(answer)
        return self._events(list(_response_events(answer, self.behaviour.n_chunks)))

    async def embed(self, request: Request) -> Response:
        body, refusal = await self._taken(request)
        if refusal is not None:
            return refusal
        given = (
            body["input"] if isinstance(body["input"], list) and isinstance(body["input"][0], str) else [body["input"]]
        )
        answer_id = "embd-" + request.headers.get("x-request-id", "none")
        return JSONResponse(_embeddings_object(answer_id, body, len(given)))

    async def message(self, request: Request) -> Response:
        """Anthropic's messages API, which vLLM answers by a chat completion of its own: hence the id's prefix."""
        body, refusal = await self._taken(request)
        if refusal is not None:
            return refusal
        answer = _message_object("chatcmpl-" + request.headers.get("x-request-id", "none"), body)
        answer["content"] = [{"type": "text", "text": self._text(body["model"])}]
        if not body.get("stream"):
            return JSONResponse(answer)
        return self._events(list(_message_events(answer, self.behaviour.n_chunks)))

    def _events(self, events: list[dict[str, Any]]) -> Response:
        """Named events, as the two younger APIs stream; nothing like `[DONE]` ends them."""

        async def stream() -> AsyncIterator[bytes]:
            self.n_running += 1
            finished = False
            try:
                for index, event in enumerate(events):
                    if index == self.behaviour.break_after:
                        finished = True
                        return
                    yield f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode()
                    await asyncio.sleep(self.behaviour.gap_s)
                finished = True
            finally:
                self.n_running -= 1
                self.n_aborted += not finished

        return StreamingResponse(stream(), media_type="text/event-stream")

    async def _taken(self, request: Request) -> tuple[dict[str, Any], Response | None]:
        """The body of a request, and the answer to it where that is an error."""
        body = await request.json()
        self.seen.append(body)
        self.seen_headers.append(dict(request.headers))
        behaviour = self.behaviour
        if body["model"] not in (*self.base_models, *self.adapters):
            return body, _error(404, f"The model `{body['model']}` does not exist.", "model")
        await self._wait(request, behaviour.delay_s)
        if behaviour.status != 200:
            return body, JSONResponse(behaviour.error or {"error": {"message": "broken"}}, behaviour.status)
        return body, None

    async def _answer(self, request: Request, kind: str) -> Response:
        body, refusal = await self._taken(request)
        if refusal is not None:
            return refusal
        behaviour = self.behaviour
        completion_id = behaviour.constant_id or self._id(request, kind)
        if body.get("stream"):
            return StreamingResponse(self._stream(body, kind, completion_id), media_type="text/event-stream")
        return JSONResponse(self._whole(body, kind, completion_id))

    async def _wait(self, request: Request, delay_s: float) -> None:
        until = time.monotonic() + delay_s
        while time.monotonic() < until:
            if await request.is_disconnected():
                self.n_aborted += 1
                return
            await asyncio.sleep(0.01)

    def _id(self, request: Request, kind: str) -> str:
        prefix = "chatcmpl-" if kind == "chat" else "cmpl-"
        return prefix + request.headers.get("x-request-id", "none")

    def _text(self, model: str) -> str:
        return self.behaviour.text_by_model.get(model, self.behaviour.text)

    def _whole(self, body: dict[str, Any], kind: str, completion_id: str) -> dict[str, Any]:
        text = self._text(body["model"])
        content: dict[str, Any] = {"text": text}
        if kind == "chat":
            content = {"message": {"role": "assistant", "content": text}}
        choice = {**content, "logprobs": None, "finish_reason": self.behaviour.finish_reason}
        if kind == "chat" and must_call_tool(body):
            calls = [{"id": TOOL_CALL_ID, "type": "function", "function": _tool_call(body)}]
            choice |= {"message": {"role": "assistant", "content": None, "tool_calls": calls}}
            choice |= {"finish_reason": "tool_calls"}
        if kind == "chat" and body.get("logprobs"):
            choice["logprobs"] = {"content": _logprobs(text)}
        return {
            "id": completion_id,
            "object": "chat.completion" if kind == "chat" else "text_completion",
            "created": int(time.time()),
            "model": body["model"],
            "choices": [{"index": index, **choice} for index in range(body.get("n") or 1)],
            "usage": {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12},
            "unknown_field": {"kept": True},
        }

    async def _stream(self, body: dict[str, Any], kind: str, completion_id: str) -> AsyncIterator[bytes]:
        choices = self._choices(body, kind)  # Before it counts: a test may change the behaviour as soon as it does.
        self.n_running += 1
        finished = False
        try:
            for index, choice in enumerate(choices):
                if index == self.behaviour.break_after:
                    finished = True
                    return
                if index == self.behaviour.fail_after:
                    finished = True
                    yield STREAM_ERROR + b"data: [DONE]\n\n"
                    return
                yield _event(completion_id, body["model"], kind, [choice], None)
                await asyncio.sleep(self.behaviour.gap_s)
            if (body.get("stream_options") or {}).get("include_usage"):
                usage = {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12}
                yield _event(completion_id, body["model"], kind, [], usage)
            yield b"data: [DONE]\n\n"
            finished = True
        finally:
            self.n_running -= 1
            self.n_aborted += not finished

    def _choices(self, body: dict[str, Any], kind: str) -> list[dict[str, Any]]:
        text = self._text(body["model"])
        pieces = _pieces(text, self.behaviour.n_chunks)
        key = "delta" if kind == "chat" else "text"
        choices: list[dict[str, Any]] = []
        if kind == "chat":
            choices.append({"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None})
            if must_call_tool(body):
                return choices + _tool_call_choices(_tool_call(body))
        for piece in pieces:
            value: Any = {"content": piece} if kind == "chat" else piece
            choices.append({"index": 0, key: value, "finish_reason": None})
        choices[-1]["finish_reason"] = self.behaviour.finish_reason
        return choices


def must_call_tool(body: dict[str, Any]) -> bool:
    """Whether the request leaves the model no choice; otherwise it answers in words."""
    return body.get("tool_choice") == "required" or isinstance(body.get("tool_choice"), dict)


def _tool_call(body: dict[str, Any]) -> dict[str, str]:
    return {"name": body["tools"][0]["function"]["name"], "arguments": '{"plant": "fern"}'}


def _tool_call_choices(call: dict[str, str]) -> list[dict[str, Any]]:
    """The name in one piece, the arguments in two."""
    half = len(call["arguments"]) // 2
    first = {"index": 0, "id": TOOL_CALL_ID, "type": "function", "function": {"name": call["name"], "arguments": ""}}
    rest = [call["arguments"][:half], call["arguments"][half:]]
    calls = [first, *({"index": 0, "function": {"arguments": piece}} for piece in rest)]
    choices: list[dict[str, Any]] = [
        {"index": 0, "delta": {"tool_calls": [call]}, "finish_reason": None} for call in calls
    ]
    choices[-1]["finish_reason"] = "tool_calls"
    return choices


def _logprobs(text: str) -> list[dict[str, Any]]:
    return [
        {"token": word, "logprob": -0.5, "bytes": list(word.encode()), "top_logprobs": []} for word in text.split(" ")
    ]


def _embeddings_object(answer_id: str, body: dict[str, Any], n_inputs: int) -> dict[str, Any]:
    numbers = [0.25, -0.5, 0.75]
    is_base64 = body.get("encoding_format") == "base64"
    vector: Any = base64.b64encode(struct.pack("<3f", *numbers)).decode() if is_base64 else numbers
    return {
        "id": answer_id,
        "object": "list",
        "created": int(time.time()),
        "model": body["model"],
        "data": [{"index": index, "object": "embedding", "embedding": vector} for index in range(n_inputs)],
        "usage": {"prompt_tokens": 7, "total_tokens": 7, "completion_tokens": 0, "prompt_tokens_details": None},
    }


def _response_object(body: dict[str, Any], response_id: str, text: str) -> dict[str, Any]:
    part: dict[str, Any] = {"annotations": [], "text": text, "type": "output_text", "logprobs": None}
    item = {"id": f"msg_{uuid.uuid4().hex}", "content": [part], "role": "assistant", "status": "completed",
            "type": "message", "phase": None}  # fmt: skip
    return {
        "id": response_id,
        "created_at": int(time.time()),
        "incomplete_details": None,
        "instructions": body.get("instructions"),
        "metadata": body.get("metadata"),
        "model": body["model"],
        "object": "response",
        "output": [item],
        "parallel_tool_calls": True,
        "temperature": 1.0,
        "tool_choice": "auto",
        "tools": [],
        "top_p": 1.0,
        "background": False,
        "max_output_tokens": 64,
        "service_tier": "auto",
        "status": "completed",
        "truncation": "disabled",
        "usage": {
            "input_tokens": 7,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": 5,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": 12,
        },
        "user": None,
    }


def _response_events(answer: dict[str, Any], n_chunks: int) -> Iterator[dict[str, Any]]:
    """The order in which vLLM tells of one answer in words."""
    begun = {**answer, "output": [], "status": "in_progress", "usage": None}
    item = answer["output"][0]
    part = item["content"][0]
    place = {"item_id": item["id"], "output_index": 0, "content_index": 0}
    empty_item = {**item, "content": [], "status": "in_progress"}
    told: list[dict[str, Any]] = [
        {"type": "response.created", "response": begun},
        {"type": "response.in_progress", "response": begun},
        {"type": "response.output_item.added", "output_index": 0, "item": empty_item},
        {"type": "response.content_part.added", **place, "part": {**part, "text": "", "logprobs": []}},
        *(
            {"type": "response.output_text.delta", **place, "delta": piece, "logprobs": []}
            for piece in _pieces(part["text"], n_chunks)
        ),
        {"type": "response.output_text.done", **place, "text": part["text"], "logprobs": []},
        {"type": "response.content_part.done", **place, "part": part},
        {"type": "response.output_item.done", "output_index": 0, "item": item},
        {"type": "response.completed", "response": answer},
    ]
    yield from ({**event, "sequence_number": number} for number, event in enumerate(told))


def _message_object(message_id: str, body: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": message_id,
        "type": "message",
        "role": "assistant",
        "model": body["model"],
        "stop_reason": "end_turn",
        "usage": {"input_tokens": 7, "output_tokens": 5},
    }


def _message_events(answer: dict[str, Any], n_chunks: int) -> Iterator[dict[str, Any]]:
    text = answer["content"][0]["text"]
    begun = {**answer, "content": [], "stop_reason": None, "stop_sequence": None}
    yield {"type": "message_start", "message": begun | {"usage": {"input_tokens": 7, "output_tokens": 0}}}
    yield {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
    for piece in _pieces(text, n_chunks):
        yield {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": piece}}
    yield {"type": "content_block_stop", "index": 0}
    ended = {"stop_reason": "end_turn", "stop_sequence": None}
    yield {"type": "message_delta", "delta": ended, "usage": {"input_tokens": 7, "output_tokens": 5}}
    yield {"type": "message_stop"}


def _pieces(text: str, n_chunks: int) -> list[str]:
    size = max(1, -(-len(text) // n_chunks))
    return [text[start : start + size] for start in range(0, len(text), size)]


def _event(
    completion_id: str, model: str, kind: str, choices: list[dict[str, Any]], usage: dict[str, Any] | None
) -> bytes:
    name = "chat.completion.chunk" if kind == "chat" else "text_completion"
    chunk = {"id": completion_id, "object": name, "created": 1, "model": model, "choices": choices}
    if usage:
        chunk["usage"] = usage
    return b"data: " + json.dumps(chunk, separators=(",", ":")).encode() + b"\n\n"


def _error(status: int, message: str, param: str | None = None) -> Response:
    kind = "NotFoundError" if status == 404 else "BadRequestError"
    return JSONResponse({"error": {"message": message, "type": kind, "param": param, "code": status}}, status)
