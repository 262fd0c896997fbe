"""`POST /v1/feedback` as plain ASGI: votes come by the thousand, and the framework would cost more than they do.

FastAPI has the same route, for its document and for whoever asks it directly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from serving.errors import ApiError, error_body
from serving.feedback_api import Answered, FeedbackDesk
from serving.routes import FEEDBACK_PATH, BodyLimits, Keys, Scope, key_id_for, longest_body
from serving.wire import ClientGone, Receive, Send, headers_of, read_body, send_whole
from serving.wire import Scope as AsgiScope

JSON = ("content-type", "application/json")
FAILED = error_body("the gateway failed on this request", "server_error", None, None)


class FeedbackLane:
    """Answers the route by itself."""

    def __init__(self, desk: FeedbackDesk, *, keys: Callable[[], Keys | None], limits: BodyLimits) -> None:
        """
        Args:
            keys: None where keys are not asked for.
        """
        self._desk = desk
        self._keys = keys
        self._limits = limits

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        headers = headers_of(scope)
        try:
            answered = await self._answer(headers, receive)
        except ApiError as error:
            await send_whole(send, error.status, [JSON, *error.headers.items()], error.body())
        except ClientGone:
            pass
        except Exception:
            await send_whole(send, 500, [JSON], FAILED)
            raise  # The server writes it to its log.
        else:
            await send_whole(send, answered.status, [JSON], answered.body)

    async def _answer(self, headers: Mapping[str, str], receive: Receive) -> Answered:
        keys = self._keys()
        key_id = await key_id_for(keys, headers, Scope.FEEDBACK) if keys is not None else ""
        most = longest_body(FEEDBACK_PATH, self._limits.max_bytes)
        raw = await read_body(receive, headers, most, self._limits.within_s)
        return await self._desk.take(headers, raw, key_id)
