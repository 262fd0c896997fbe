"""A server that speaks as much of vLLM's API as publishing and evaluation use, and can be told to misbehave."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

Answer = Callable[[str, str], str]
"""Model and prompt to text."""


@dataclass
class FakeEngine:
    """The state of one fake engine; change it while the server runs."""

    base: str = "tiny"
    adapters: dict[str, str] = field(default_factory=dict)
    answer: Answer = lambda model, prompt: f"{model} on {prompt}"
    ignores_weights: bool = False
    """Adapters are listed but answer as the base does."""
    forgets_loads: bool = False
    """Loading is answered 200 but nothing is loaded."""
    refuses: bool = False
    delay_s: float = 0.0
    n_failures_left: int = 0
    """So many completions are answered 500 before they work."""
    loads: list[str] = field(default_factory=list)
    unloads: list[str] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    url: str = ""

    def routes(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/v1/models", self.models)
        app.router.add_post("/v1/load_lora_adapter", self.load)
        app.router.add_post("/v1/unload_lora_adapter", self.unload)
        app.router.add_post("/v1/chat/completions", self.chat)
        return app

    async def models(self, _request: web.Request) -> web.Response:
        await asyncio.sleep(self.delay_s)
        cards = [{"id": self.base, "root": "/models/base"}]
        cards += [{"id": name, "root": path, "parent": self.base} for name, path in self.adapters.items()]
        return web.json_response({"object": "list", "data": cards})

    async def load(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.loads.append(body["lora_name"])
        if self.refuses:
            return web.json_response(
                {"error": {"message": "LoRA rank 64 is greater than max_lora_rank 32."}}, status=500
            )
        if body["lora_name"] in self.adapters:
            return web.json_response({"error": {"message": "already loaded"}}, status=400)
        if not self.forgets_loads:
            self.adapters[body["lora_name"]] = body["lora_path"]
        return web.Response(text="Success: LoRA adapter added successfully.")

    async def unload(self, request: web.Request) -> web.Response:
        name = (await request.json())["lora_name"]
        self.unloads.append(name)
        del self.adapters[name]
        return web.Response(text="Success: LoRA adapter removed successfully.")

    async def chat(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.bodies.append(body)
        if self.n_failures_left:
            self.n_failures_left -= 1
            return web.json_response({"error": {"message": "busy"}}, status=500)
        if body["model"] != self.base and body["model"] not in self.adapters:
            return web.json_response({"error": {"message": "no such model"}}, status=404)
        model = self.base if self.ignores_weights else body["model"]
        text = self.answer(model, body["messages"][-1]["content"])
        logprob = -1.0 - len(model) / 100
        choice: dict[str, Any] = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        if body.get("logprobs"):
            choice["logprobs"] = {"content": [{"top_logprobs": [{"token": "a", "logprob": logprob}]}]}
        return web.json_response({"choices": [choice], "usage": {"completion_tokens": len(text.split())}})


@contextmanager
def serving(engine: FakeEngine) -> Iterator[FakeEngine]:
    """Serve on a free loopback port until the block ends."""
    loop = asyncio.new_event_loop()
    runner = web.AppRunner(engine.routes())
    loop.run_until_complete(runner.setup())
    site = web.TCPSite(runner, "127.0.0.1", 0)
    loop.run_until_complete(site.start())
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    engine.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield engine
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
