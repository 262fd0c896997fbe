"""A judge behind a real socket that thinks what a test tells it to, and can be told to misbehave."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from feedback.judged.constitution import load_constitution

PRINCIPLES = [one.id for one in load_constitution(None).principles]
Taste = Callable[[str, str], tuple[float, float]]
"""The texts of both answers, in the order in which it reads them, to their scores, 0 to 10."""


def by_number(first: str, second: str) -> tuple[float, float]:
    """Of "answer 3" and "answer 1" the larger number is better by so many tenths."""
    lead = int(first.split()[-1]) - int(second.split()[-1])
    return 5 + lead / 2, 5 - lead / 2


def first_is_best(_first: str, _second: str) -> tuple[float, float]:
    return 9, 1


@dataclass
class FakeJudge:
    """Change it while it runs."""

    taste: Taste = by_number
    reply: Callable[[str], str] = lambda text: text
    """What becomes of a reply before it is sent."""
    statuses: list[int] = field(default_factory=list)
    """Of the next requests; 200 when there are no more."""
    is_away: bool = False
    on_question: Callable[[str], object] = lambda _: None
    """Is told everything that it reads."""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: set[str | None] = field(default_factory=set)

    @property
    def app(self) -> Starlette:
        return Starlette(routes=[Route("/v1/chat/completions", self.judge, methods=["POST"])])

    @property
    def read(self) -> list[str]:
        """What was sent to it."""
        return [body["messages"][1]["content"] for body in self.bodies]

    async def judge(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append(body)
        self.keys.add(request.headers.get("authorization"))
        status = 503 if self.is_away else self.statuses.pop(0) if self.statuses else 200
        if status != 200:
            return JSONResponse({"error": {"message": "private words", "code": f"code_{status}"}}, status)
        told = body["messages"][1]["content"]
        await asyncio.to_thread(self.on_question, told)
        scores = self.taste(answer_in(told, "first"), answer_in(told, "second"))
        text = json.dumps(
            {"scores": {name: dict(zip(("first", "second"), scores, strict=True)) for name in PRINCIPLES}}
        )
        return JSONResponse({"choices": [{"message": {"role": "assistant", "content": self.reply(text)}}]})


def answer_in(told: str, side: str) -> str:
    """The text of the answer that stands between its marks."""
    found = re.search(rf"^--- ([0-9a-f]+) {side} answer begins\n(.*)\n--- \1 {side} answer ends$", told, re.MULTILINE)
    assert found, told
    return str(json.loads(found[2])["content"])
