"""What clients of these tests say, and how they read the answers."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import httpx2
import orjson

CHAT = "/v1/chat/completions"
QUESTION: Mapping[str, Any] = {
    "model": "assistant",
    "messages": [{"role": "user", "content": "When do I water roses?"}],
}
STREAM: Mapping[str, Any] = {**QUESTION, "stream": True}


def events_of(body: bytes) -> list[bytes]:
    """The data of every server-sent event."""
    assert body.endswith(b"\n\n")
    return [event.removeprefix(b"data: ") for event in body.split(b"\n\n")[:-1]]


def text_of(events: list[bytes]) -> str:
    """The text that the chunks of a chat stream join to."""
    chunks = [orjson.loads(event) for event in events if event != b"[DONE]"]
    return "".join(choice["delta"].get("content", "") for chunk in chunks for choice in chunk["choices"])


def error_of(response: httpx2.Response) -> dict[str, Any]:
    """The error of an answer, whose shape is checked."""
    body = response.json()
    assert set(body) == {"error"}
    error: dict[str, Any] = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["message"]
    assert isinstance(error["type"], str)
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    return error


def address_of(url: str) -> tuple[str, int]:
    """Host and port of a gateway's address."""
    host, _, port = url.removeprefix("http://").partition(":")
    return host, int(port)


@contextmanager
def raw_request(url: str, body: Mapping[str, Any], path: str = CHAT) -> Iterator[socket.socket]:
    """A bare connection that has just sent a request; closed at the end, whatever came back."""
    host, port = address_of(url)
    payload = orjson.dumps(body)
    head = f"POST {path} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\ncontent-length: {len(payload)}"
    with socket.create_connection((host, port), timeout=10) as connection:
        connection.sendall(head.encode() + b"\r\n\r\n" + payload)
        yield connection
