"""A stand-in for vLLM's OpenAI server: a real application over a real socket, whose behaviour a test can set.

It answers as vLLM 0.32 was seen to: ids from `X-Request-Id`, the same error bodies, runtime LoRA loading, usage chunks.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

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
        self.app = Starlette(
            routes=[
                Route("/health", lambda _: PlainTextResponse("")),
                Route("/v1/models", self.models),
                Route("/v1/chat/completions", self.chat, methods=["POST"]),
                Route("/v1/completions", self.complete, methods=["POST"]),
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

    async def _answer(self, request: Request, kind: str) -> Response:
        body = await request.json()
        self.seen.append(body)
        self.seen_headers.append(dict(request.headers))
        behaviour = self.behaviour
        if body["model"] not in (*self.base_models, *self.adapters):
            return _error(404, f"The model `{body['model']}` does not exist.", "model")
        await self._wait(request, behaviour.delay_s)
        if behaviour.status != 200:
            return JSONResponse(behaviour.error or {"error": {"message": "broken"}}, behaviour.status)
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
        content = {"message": {"role": "assistant", "content": text}} if kind == "chat" else {"text": text}
        return {
            "id": completion_id,
            "object": "chat.completion" if kind == "chat" else "text_completion",
            "created": int(time.time()),
            "model": body["model"],
            "choices": [{"index": 0, **content, "logprobs": None, "finish_reason": self.behaviour.finish_reason}],
            "usage": {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12},
            "unknown_field": {"kept": True},
        }

    async def _stream(self, body: dict[str, Any], kind: str, completion_id: str) -> AsyncIterator[bytes]:
        self.n_running += 1
        finished = False
        try:
            for index, choice in enumerate(self._choices(body, kind)):
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
        size = max(1, -(-len(text) // self.behaviour.n_chunks))
        pieces = [text[start : start + size] for start in range(0, len(text), size)]
        key = "delta" if kind == "chat" else "text"
        choices: list[dict[str, Any]] = []
        if kind == "chat":
            choices.append({"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None})
        for piece in pieces:
            value: Any = {"content": piece} if kind == "chat" else piece
            choices.append({"index": 0, key: value, "finish_reason": None})
        choices[-1]["finish_reason"] = self.behaviour.finish_reason
        return choices


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
