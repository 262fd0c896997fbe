"""The few pieces of ASGI that the raw endpoints need: headers in, body in, answer out."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping
from typing import Any

from serving.errors import ApiError, RequestTimeout, TooLarge

Scope = MutableMapping[str, Any]
AsgiMessage = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[AsgiMessage]]
Send = Callable[[AsgiMessage], Awaitable[None]]
RawHeaders = list[tuple[bytes, bytes]]

SANE_REQUEST_ID = re.compile(r"[\x20-\x7e]{1,128}")


class ClientGone(Exception):
    """The client left before its request was complete."""


def headers_of(scope: Scope) -> dict[str, str]:
    """Names in lower case; of repeated headers the last counts."""
    return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}


def sane_request_id(headers: Mapping[str, str], otherwise: str) -> str:
    """The caller's own request id if it is short and printable, else ours."""
    inbound = headers.get("x-request-id", "")
    return inbound if SANE_REQUEST_ID.fullmatch(inbound) else otherwise


async def read_body(receive: Receive, headers: Mapping[str, str], limit: int, within_s: float) -> bytes:
    """The whole request body.

    Raises:
        TooLarge: more than `limit` bytes are announced or come; no more than that is read.
        RequestTimeout: it was not there within `within_s`; the connection is closed with the answer.
        ClientGone: the client left.
    """
    announced = headers.get("content-length", "")
    if announced.isdigit() and int(announced) > limit:
        raise body_too_large(limit)
    try:
        async with asyncio.timeout(within_s):
            return await _read_parts(receive, limit)
    except TimeoutError as exc:
        raise body_too_slow(within_s) from exc


def body_too_slow(within_s: float) -> RequestTimeout:
    """The connection is closed with the answer."""
    return RequestTimeout(
        f"the body did not come within {within_s:g} s (serving.timeouts.request_body_s)",
        code="request_timeout",
        headers={"connection": "close"},
    )


async def _read_parts(receive: Receive, limit: int) -> bytes:
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        part = message.get("body", b"")
        size += len(part)
        if size > limit:
            raise body_too_large(limit)
        parts.append(part)
        if not message.get("more_body"):
            return b"".join(parts)


def body_too_large(limit: int) -> TooLarge:
    """More came, or was announced, than the settings or the route allow."""
    message = f"the body is larger than the {limit} bytes that this route takes (serving.max_body_bytes at most)"
    return TooLarge(message, code="request_too_large")


def raw_headers(headers: Iterable[tuple[str, str]]) -> RawHeaders:
    """For ASGI; a character that HTTP cannot carry becomes `?`."""
    return [(name.encode("latin-1"), value.encode("latin-1", "replace")) for name, value in headers]


async def start_response(send: Send, status: int, headers: Iterable[tuple[str, str]]) -> None:
    """Status line and headers."""
    await send({"type": "http.response.start", "status": status, "headers": raw_headers(headers)})


async def send_whole(send: Send, status: int, headers: Iterable[tuple[str, str]], body: bytes) -> None:
    """A complete answer."""
    await start_response(send, status, [*headers, ("content-length", str(len(body)))])
    await send({"type": "http.response.body", "body": body})


async def send_error(send: Send, error: ApiError, headers: Iterable[tuple[str, str]]) -> None:
    """An error before anything else was sent."""
    extra = [("content-type", "application/json"), *error.headers.items()]
    await send_whole(send, error.status, [*headers, *extra], error.body())
