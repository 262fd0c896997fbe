"""Feedback from browsers on pages of other origins (CORS): who may send it, in the headers that browsers ask for."""

from __future__ import annotations

from collections.abc import Collection

from serving.error_shapes import LANGFUSE_PATHS, TENSORZERO_PATH
from serving.routes import FEEDBACK_PATH
from serving.wire import AsgiMessage, RawHeaders, Scope, Send

ANY = "*"
PREFLIGHT: RawHeaders = [
    (b"access-control-allow-methods", b"POST, DELETE"),
    (
        b"access-control-allow-headers",
        b"authorization, content-type, idempotency-key, x-pawl-feedback-token, x-pawl-user",
    ),
    (b"access-control-max-age", b"600"),
    (b"content-length", b"0"),
]


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
            await send({"type": "http.response.start", "status": 204, "headers": [*granted, *PREFLIGHT]})
            await send({"type": "http.response.body", "body": b""})
            return None

        async def send_granted(message: AsgiMessage) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *granted]
            await send(message)

        return send_granted

    def _granted(self, scope: Scope) -> RawHeaders:
        origin = next((value for name, value in scope["headers"] if name.lower() == b"origin"), b"")
        is_granted = origin and (ANY in self._allowed or origin.decode("latin-1") in self._allowed)
        return [(b"access-control-allow-origin", origin), (b"vary", b"origin")] if is_granted else []
