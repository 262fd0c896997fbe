"""One request to one engine: which attempts are worth making, and what an engine's refusal means to the client."""

from __future__ import annotations

import asyncio

import aiohttp
import orjson

from monitoring.metrics import UPSTREAM_ERRORS
from pawl.settings import TimeoutSettings
from serving.errors import ApiError, Overloaded, UpstreamFailed, UpstreamTimeout, type_for_status
from serving.replicas import Replica, ReplicaSet

PATHS = {"chat.completions": "/v1/chat/completions", "completions": "/v1/completions"}
MAX_ERROR_BYTES = 64 * 1024
KEEP_ALIVE_S = 4.0
"""Less than the 5 s after which uvicorn, and so vLLM, closes an idle connection: never send into a closing one."""
THE_REQUESTS_FAULT = frozenset({400, 413, 422})
"""What an engine answers to a request that no engine would take."""


class EngineRefused(ApiError):
    """The engine answered with an error of its own; told to the client in our shape."""


class ModelMissing(Exception):
    """The engine does not have the adapter that was assigned."""


class Engines:
    """Keep-alive connections to every engine. The caller bounds the whole answer; waits within it are bounded here."""

    def __init__(self, timeouts: TimeoutSettings) -> None:
        self._timeouts = timeouts
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, ttl_dns_cache=30, keepalive_timeout=KEEP_ALIVE_S),
            cookie_jar=aiohttp.DummyCookieJar(),  # An engine's cookie for one caller must not reach another's request.
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=timeouts.connect_s),
            auto_decompress=False,
        )

    async def close(self) -> None:
        await self._session.close()

    async def open(
        self, replicas: ReplicaSet, replica: Replica, route: str, body: bytes, request_id: str, *, is_stream: bool
    ) -> aiohttp.ClientResponse:
        """Send the request; return once the engine's status and headers are there. The answer is still to be read.

        Raises:
            ModelMissing: the engine does not know the model.
            EngineRefused: the engine refused the request itself; another replica would too.
            UpstreamFailed, UpstreamTimeout, Overloaded: this attempt failed.
        """
        url = replica.url + PATHS[route]
        headers = {"content-type": "application/json", "accept-encoding": "identity", "x-request-id": request_id}
        # vLLM sends the headers of a whole answer when it has the answer, those of a stream at once.
        wait_s = self._timeouts.first_byte_s if is_stream else None
        try:
            async with asyncio.timeout(wait_s):
                response = await self._session.post(url, data=body, headers=headers, allow_redirects=False)
        except TimeoutError as exc:
            raise _failed(replicas, replica, UpstreamTimeout("the engine did not answer in time"), "timeout") from exc
        except aiohttp.ClientError as exc:
            down = Overloaded("the engine cannot be reached; try again", code="engine_unavailable")
            raise _failed(replicas, replica, down, "connect") from exc
        if response.status == 200:
            return response
        raise await self._refusal(replicas, replica, response)

    async def _refusal(self, replicas: ReplicaSet, replica: Replica, response: aiohttp.ClientResponse) -> Exception:
        try:
            async with asyncio.timeout(self._timeouts.between_chunks_s):
                raw = await response.content.readexactly(MAX_ERROR_BYTES)
        except asyncio.IncompleteReadError as exc:  # The usual case: shorter than the most that is read.
            raw = exc.partial
        except (TimeoutError, aiohttp.ClientError):
            raw = b""
        finally:
            response.close()
        if response.status == 404:
            UPSTREAM_ERRORS.labels(reason="model_missing").inc()
            return ModelMissing()
        if response.status in THE_REQUESTS_FAULT:
            return engine_refusal(response.status, raw)
        failure: ApiError = UpstreamFailed("the engine failed on this request", code="engine_error")
        if response.status in (429, 503):
            failure = Overloaded("the engine is overloaded; try again", code="engine_overloaded")
        return _failed(replicas, replica, failure, f"http_{response.status}")


def _failed(replicas: ReplicaSet, replica: Replica, error: ApiError, reason: str) -> ApiError:
    count_failure(replicas, replica, reason)
    return error


def count_failure(replicas: ReplicaSet, replica: Replica, reason: str) -> None:
    """One failed attempt, once: for the metrics and against the replica."""
    UPSTREAM_ERRORS.labels(reason=reason).inc()
    replicas.note_failure(replica)


def engine_refusal(status: int, raw: bytes) -> EngineRefused:
    """vLLM's error body in our shape; a context overflow gets the code that clients match on."""
    try:
        said = orjson.loads(raw)
    except orjson.JSONDecodeError:
        said = {}
    detail = said.get("error", said) if isinstance(said, dict) else {}
    detail = detail if isinstance(detail, dict) else {"message": detail}
    message = str(detail.get("message") or "the engine refused the request")
    param = detail.get("param")
    error = EngineRefused(message, param=param if isinstance(param, str) else None, code=_code(message), status=status)
    error.type = type_for_status(status)
    return error


def _code(message: str) -> str | None:
    return "context_length_exceeded" if "context length" in message or "maximum model length" in message else None
