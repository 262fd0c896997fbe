"""Feedback from browsers on pages of other origins (CORS): who may send it, in the headers that browsers ask for."""

from __future__ import annotations

import re
from collections.abc import Collection

from serving.error_shapes import LANGFUSE_PATHS, TENSORZERO_PATH
from serving.routes import FEEDBACK_PATH
from serving.wire import AsgiMessage, RawHeaders, Scope, Send

ANY = "*"
ASKED = b"access-control-request-headers"
HEADER_NAMES = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,64}(?:[ \t]*,[ \t]*[!#$%&'*+.^_`|~0-9A-Za-z-]{1,64}){0,63}")
"""Tokens as RFC 9110 has them (section 5.6.2), not many and not long."""
MOST_ASKED_BYTES = 2048
OWN_HEADERS = b"authorization, content-type, idempotency-key, x-pawl-feedback-token, x-pawl-user"


def takes_feedback(path: str) -> bool:
    """Whether a path is one of feedback's.

    >>> [takes_feedback(path) for path in ("/v1/feedback/fb_1", "/feedback", "/api/public/scores", "/v1/models")]
    [True, True, True, False]
    """
    return path.startswith((FEEDBACK_PATH, LANGFUSE_PATHS)) or path == TENSORZERO_PATH


class Origins:
    """The origins whose pages may send feedback."""

    def __init__(self, allowed: Collection[str]) -> None:
        """
        Args:
            allowed: Such as `https://app.example.com`; `*` for every origin.
        """
        self._allowed = frozenset(allowed)

    async def open(self, scope: Scope, send: Send) -> Send | None:
        """Where the answer is to be sent; None if the request only asked whether it may come, and has been answered."""
        granted = self._granted(scope) if self._allowed and takes_feedback(scope["path"]) else []
        if not granted:
            return send
        if scope["method"] == "OPTIONS":
            headers = [*granted, *preflight(_header(scope, ASKED))]
            await send({"type": "http.response.start", "status": 204, "headers": headers})
            await send({"type": "http.response.body", "body": b""})
            return None

        async def send_granted(message: AsgiMessage) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *granted]
            await send(message)

        return send_granted

    def _granted(self, scope: Scope) -> RawHeaders:
        origin = _header(scope, b"origin")
        is_granted = origin and (ANY in self._allowed or origin.decode("latin-1") in self._allowed)
        return [(b"access-control-allow-origin", origin), (b"vary", b"origin")] if is_granted else []


def preflight(asked: bytes) -> RawHeaders:
    """What a browser hears that asks before it sends: other systems' SDKs add headers of their own, under many names.

    Args:
        asked: The names it asks for; what is no list of them is answered by those that we read.

    >>> dict(preflight(b"x-langfuse-sdk-name"))[b"access-control-allow-headers"]
    b'x-langfuse-sdk-name'
    """
    is_sound = len(asked) <= MOST_ASKED_BYTES and HEADER_NAMES.fullmatch(asked)
    return [
        (b"access-control-allow-methods", b"POST, DELETE"),
        (b"access-control-allow-headers", asked if is_sound else OWN_HEADERS),
        (b"access-control-max-age", b"600"),
        (b"content-length", b"0"),
    ]


def _header(scope: Scope, wanted: bytes) -> bytes:
    return next((value for name, value in scope["headers"] if name.lower() == wanted), b"")
