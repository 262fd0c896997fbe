"""A judge behind an OpenAI-compatible API: one question, one reply, whatever the network does in between."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx2

from feedback.errors import JudgeRefuses
from pawl.errors import ConfigurationError, Unreachable
from pawl.settings import JudgeSettings

MAX_REPLY_BYTES = 2 * 1024**2
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 30.0
"""Between two attempts; doubled after each."""
BUSY = frozenset({408, 409, 425, 429})
"""Answers that may be others a moment later, as those from 500 on."""
NOT_THIS = frozenset({400, 413, 422})
"""Answers that are about what was asked: too long, filtered, a parameter that the API does not have."""


@dataclass(frozen=True)
class _Answer:
    """What came back. Status 0: nothing did."""

    status: int
    body: bytes
    retry_after: str = ""
    problem: str = ""


@dataclass
class Judge:
    """Asks one model. Several threads may ask at once."""

    url: str
    model: str
    key: str | None = field(repr=False)
    timeout_s: float
    attempts: int
    parameters: Mapping[str, Any]
    first_wait_s: float = FIRST_WAIT_S
    _is_over: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        headers = {"authorization": f"Bearer {self.key}"} if self.key else {}
        self._client = httpx2.Client(
            headers=headers | {"content-type": "application/json"}, timeout=self.timeout_s, trust_env=False
        )

    def stop(self) -> None:
        """No question is sent any more, and whoever waits for the next attempt gives up."""
        self._is_over.set()

    def close(self) -> None:
        self.stop()
        self._client.close()

    def ask(self, messages: Sequence[Mapping[str, str]], extras: Mapping[str, Any]) -> str:
        """The text that the judge replies; empty when what comes is no chat completion.

        Args:
            extras: more fields of the request.

        Raises:
            Unreachable: it does not answer, or is busy, however often it is asked.
            JudgeRefuses: it does not take this request; another it may.
            ConfigurationError: it takes none: the key, the model or the address is wrong.
        """
        # ASCII, since what users wrote need not be text that UTF-8 can hold.
        body = json.dumps({"model": self.model, "messages": list(messages), **self.parameters, **extras}).encode()
        answer = _Answer(0, b"", problem="it was stopped")
        for attempt in range(self.attempts):
            if self._is_over.wait(self._pause_s(attempt, answer)):
                break
            answer = self._post(body)
            if answer.status and answer.status not in BUSY and answer.status < 500:
                return self._text(answer)
        raise Unreachable(f"the judge at {self.url}: {answer.problem or f'answered {answer.status}'}")

    def _pause_s(self, attempt: int, last: _Answer) -> float:
        if not attempt:
            return 0.0
        asked_for = float(last.retry_after) if last.retry_after.isdecimal() else 0.0
        return min(LONGEST_WAIT_S, max(asked_for, self.first_wait_s * 2.0 ** (attempt - 1)))

    def _post(self, body: bytes) -> _Answer:
        try:
            with self._client.stream("POST", f"{self.url}/chat/completions", content=body) as response:
                return _Answer(response.status_code, self._read(response), response.headers.get("retry-after", ""))
        except (httpx2.HTTPError, TimeoutError) as exc:
            return _Answer(0, b"", problem=f"{type(exc).__name__} {exc}".strip())
        except (httpx2.InvalidURL, UnicodeError) as exc:  # The second: a host name that none can be.
            raise ConfigurationError(f"feedback.judge.url {self.url} is no address: {exc}") from exc

    def _read(self, response: httpx2.Response) -> bytes:
        """The body, within bounds: a server may send for ever, or a byte a minute."""
        body, deadline = b"", time.monotonic() + self.timeout_s
        for chunk in response.iter_bytes():
            body += chunk
            if len(body) > MAX_REPLY_BYTES:
                return b""
            if time.monotonic() > deadline:
                raise TimeoutError(f"no whole reply within {self.timeout_s:g} s")
        return body

    def _text(self, answer: _Answer) -> str:
        if answer.status == 200:
            return _reply(answer.body)
        if answer.status in NOT_THIS:
            raise JudgeRefuses(f"the judge at {self.url} refuses a request with {answer.status}{_code(answer.body)}")
        advice = "check feedback.judge.url, model and api_key"
        raise ConfigurationError(f"the judge at {self.url} answered {answer.status}{_code(answer.body)}: {advice}")


def judge_of(settings: JudgeSettings) -> Judge:
    """The judge that is configured.

    Raises:
        ConfigurationError: there is none, or its key cannot be read.
    """
    if settings.url is None or settings.model is None:
        raise ConfigurationError("no judge is configured: set feedback.judge.url and feedback.judge.model")
    return Judge(
        settings.url, settings.model, _key(settings), settings.timeout_s, settings.attempts, settings.parameters
    )


def _key(settings: JudgeSettings) -> str | None:
    if settings.api_key_file is None:
        key = settings.api_key.get_secret_value().strip() if settings.api_key else ""
    else:
        try:
            key = settings.api_key_file.read_text().strip()
        except (OSError, UnicodeDecodeError) as exc:
            raise ConfigurationError(f"cannot read feedback.judge.api_key_file {settings.api_key_file}: {exc}") from exc
    if not (key.isascii() and key.isprintable()):
        raise ConfigurationError("the judge's api_key holds what a header cannot")
    return key or None


def _reply(body: bytes) -> str:
    """The text of a chat completion; empty for everything else."""
    try:
        content = json.loads(body)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError, RecursionError):
        return ""
    if isinstance(content, list):
        content = "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""


def _code(body: bytes) -> str:
    """What an error calls itself. Not its message: that may quote what was asked."""
    try:
        error = json.loads(body)["error"]
        code = error.get("code") or error.get("type")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return ""
    return f" ({code})" if isinstance(code, str) and code.isprintable() and len(code) < 80 else ""
