"""What a client can be told, in the shape OpenAI's SDKs parse.

ApiError                 any non-2xx answer
├── BadRequest           400, the request itself is wrong; names the parameter
├── Unauthorized         401, a key or feedback token that is not good
├── Forbidden            403, a good key without the scope this needs
├── NotFound             404, unknown model, id or route; the same for forged and foreign ids
├── RequestTimeout       408, the request itself came too slowly
├── TooLarge             413
├── Conflict             409 or 422, an idempotency key used again
├── RateLimited          429, a limit of the key is reached; says when to come back, and whether to
├── Overloaded           503 with Retry-After: try again soon
├── UpstreamFailed       502, the engine answered nonsense or broke off
└── UpstreamTimeout      504
"""

from __future__ import annotations

from collections.abc import Mapping

import orjson

RETRY_AFTER_S = 2
"""SDKs honour 1-60 s; longer than 120 s stops their retries."""


class ApiError(Exception):
    """An answer other than success."""

    status = 500
    type = "server_error"

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        status: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code
        self.status = status or self.status
        self.headers = dict(headers or {})

    def body(self) -> bytes:
        """The JSON every SDK knows how to read."""
        return error_body(self.message, self.type, self.param, self.code)


class BadRequest(ApiError):
    status = 400
    type = "invalid_request_error"


class Unauthorized(ApiError):
    status = 401
    type = "invalid_request_error"


class Forbidden(ApiError):
    status = 403
    type = "permission_error"


class NotFound(ApiError):
    status = 404
    type = "invalid_request_error"


class RequestTimeout(ApiError):
    status = 408
    type = "invalid_request_error"


class TooLarge(ApiError):
    status = 413
    type = "invalid_request_error"


class Conflict(ApiError):
    status = 409
    type = "invalid_request_error"


class RateLimited(ApiError):
    status = 429
    type = "rate_limit_error"


class Overloaded(ApiError):
    status = 503
    type = "overloaded_error"

    def __init__(self, message: str, *, code: str = "overloaded", retry_after_s: int = RETRY_AFTER_S) -> None:
        super().__init__(message, code=code, headers={"retry-after": str(retry_after_s)})


class UpstreamFailed(ApiError):
    status = 502
    type = "server_error"


class UpstreamTimeout(ApiError):
    status = 504
    type = "server_error"


def error_body(message: str, kind: str, param: str | None, code: str | None) -> bytes:
    """`{"error": {...}}` as bytes."""
    return orjson.dumps({"error": {"message": message, "type": kind, "param": param, "code": code}})


TYPES_BY_STATUS = {
    401: "invalid_request_error",
    403: "permission_error",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def type_for_status(status: int) -> str:
    """OpenAI's error type for a status the framework or the engine produced."""
    return TYPES_BY_STATUS.get(status, "invalid_request_error" if status < 500 else "server_error")
