"""A server that speaks as much of vLLM's API as publishing and evaluation use, and can be told to misbehave."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web

from pawl.fingerprints import Fingerprint, fingerprint_of

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
    answers_as: dict[str, str] = field(default_factory=dict)
    """By a model's name, whose numbers it really gives: `base`, `parent`, or the name of another adapter."""
    noise: float = 0.0
    """By so much, up and down in turn, its log-probabilities of fixed texts are off."""
    in_use: set[str] = field(default_factory=set)
    """Adapters that its metrics say requests run with."""
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
        app.router.add_post("/v1/completions", self.complete)
        app.router.add_get("/metrics", self.metrics)
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
        answer: dict[str, Any] = {"choices": [choice], "usage": {"completion_tokens": len(text.split())}}
        if body.get("return_token_ids"):
            choice["token_ids"] = tokens_of(text)
            answer["prompt_token_ids"] = tokens_of(body["messages"][-1]["content"])
        return web.json_response(answer)

    async def complete(self, request: web.Request) -> web.Response:
        """Log-probabilities of the next token; at a fingerprint's places those that the trainer wrote down."""
        body = await request.json()
        if body["model"] != self.base and body["model"] not in self.adapters:
            return web.json_response({"error": {"message": "no such model"}}, status=404)
        if "prompt_logprobs" in body:
            return web.json_response({"choices": [{"text": "", "prompt_logprobs": self.places(body)}]})
        logps = self._logps(body["model"], tuple(map(tuple, body["prompt"])))
        tops = [dict.fromkeys((f"token_id:{token}" for token in body["logprob_token_ids"]), logp) for logp in logps]
        choices = [{"index": index, "text": "", "logprobs": {"top_logprobs": [top]}} for index, top in enumerate(tops)]
        return web.json_response({"choices": choices[::-1]})

    def _logps(self, model: str, prefixes: tuple[tuple[int, ...], ...]) -> list[float]:
        whose = self.answers_as.get(model, "base" if model == self.base or self.ignores_weights else model)
        found = self._fingerprints(prefixes)
        if whose in found:
            exact: Sequence[float] = found[whose].logps["adapter"]
        elif found:
            exact = next(iter(found.values())).logps["base" if whose not in ("base", "parent") else whose]
        else:
            exact = [-1.0 - len(model) / 100] * len(prefixes)
        return [value + self.noise * (-1) ** place for place, value in enumerate(exact)]

    def _fingerprints(self, prefixes: tuple[tuple[int, ...], ...]) -> dict[str, Fingerprint]:
        """Of the loaded adapters, those that are about these places."""
        paths = {name: Path(path) / "manifest.json" for name, path in self.adapters.items()}
        manifests = {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}
        found = {name: fingerprint_of(manifest) for name, manifest in manifests.items()}
        prints = {name: one for name, one in found.items() if one is not None}
        return {name: one for name, one in prints.items() if tuple(p.prefix for p in one.places) == prefixes}

    def places(self, body: dict[str, Any]) -> list[Any]:
        """A log-probability for each token of a prompt but the first; the longer a model's name, the less likely."""
        logp = -1.0 - len(body["model"]) / 100
        return [None, *({str(token): {"logprob": logp, "rank": 1}} for token in body["prompt"][1:])]

    async def metrics(self, _request: web.Request) -> web.Response:
        labels = f'max_lora="4",running_lora_adapters="{",".join(sorted(self.in_use))}",waiting_lora_adapters=""'
        return web.Response(text=f"vllm:lora_requests_info{{{labels}}} 1000.0\n")


def tokens_of(text: str) -> list[int]:
    """A token for each word."""
    return [len(word) for word in text.split()]


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
