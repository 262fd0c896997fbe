"""What a refusal looks like on each family of routes: OpenAI's shape, but for those that speak another system's."""

from __future__ import annotations

import orjson

from serving.errors import ApiError

TENSORZERO_PATH = "/feedback"
LANGFUSE_PATHS = "/api/public/"


def refusal_body(path: str, error: ApiError) -> bytes:
    """The JSON that the clients of a route read.

    >>> refusal_body("/feedback", ApiError("no such metric"))
    b'{"error":"no such metric"}'
    >>> refusal_body("/api/public/scores", ApiError("no such score", code="not_found"))
    b'{"message":"no such score","error":"not_found"}'
    """
    if path == TENSORZERO_PATH:
        return orjson.dumps({"error": error.message})
    if path.startswith(LANGFUSE_PATHS):
        return orjson.dumps({"message": error.message, "error": error.code or error.type})
    return error.body()
