"""The worker's HTTP side: its metrics, and toxicity scores for gateways that ask before they pass an answer on.

`POST /score` with `{"texts": [...]}` gives `{"toxicity": [...]}`, one number from 0 to 1 for each text. There is no
key: whoever reaches the port may ask, so it listens on the loopback interface unless told otherwise. What it is sent
is neither kept nor logged.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import socket
from typing import Any

import orjson
import structlog

from monitoring.errors import ScoringFailed
from monitoring.metrics import render

log = structlog.get_logger()

PATH = "/score"
METRICS_PATHS = ("/metrics", "/")
MAX_BODY_BYTES = 1024 * 1024
MAX_TEXTS = 64
MAX_CHARS = 110_000
"""Of one request; a gateway asks for a little less."""
MAX_CONNECTIONS = 64
MAX_WAITING = 8
"""Requests for scores at once: one is scored at a time, and more would be answered too late to be of use."""
IDLE_S = 15.0
"""Longer than gateways keep an idle connection."""
PIECE = 4
"""Texts that background work scores before it lets others go first."""

Score = Callable[[Sequence[str]], list[float]]


class SharedScorer:
    """One scorer for two kinds of work: people wait for a gateway's question, nobody for the scoring duty's batches.

    Only one thread scores at a time, since fast tokenizers do not bear two. The duty works in small pieces, and lets
    whatever came meanwhile go first.
    """

    def __init__(self, score: Score) -> None:
        self._score = score
        self._turn = threading.Condition()
        self._is_busy = False
        self._n_urgent = 0

    def score(self, texts: Sequence[str]) -> list[float]:
        """In the background."""
        return [score for start in range(0, len(texts), PIECE) for score in self._score_piece(texts, start)]

    def _score_piece(self, texts: Sequence[str], start: int) -> list[float]:
        with self._turn:
            self._turn.wait_for(lambda: not self._is_busy and not self._n_urgent)
            self._is_busy = True
        return self._run(texts[start : start + PIECE])

    def score_now(self, texts: Sequence[str]) -> list[float]:
        """Before any background work that has not begun."""
        with self._turn:
            self._n_urgent += 1
            self._turn.wait_for(lambda: not self._is_busy)
            self._n_urgent -= 1
            self._is_busy = True
        return self._run(texts)

    def _run(self, texts: Sequence[str]) -> list[float]:
        try:
            return self._score(texts)
        finally:
            with self._turn:
                self._is_busy = False
                self._turn.notify_all()


class ScoreServer(ThreadingHTTPServer):
    """A bounded number of connections, each on a thread of its own."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(
        self,
        host: str,
        port: int,
        find_scorer: Callable[[], Score | None],
        *,
        max_connections: int = MAX_CONNECTIONS,
    ) -> None:
        """
        Args:
            find_scorer: None while there is no scorer, or none that can be trusted.

        Raises:
            OSError: the port is taken, or may not be used.
        """
        super().__init__((host, port), _Handler)
        self.find_scorer = find_scorer
        self.asking = threading.BoundedSemaphore(MAX_WAITING)
        self._connections = threading.BoundedSemaphore(max_connections)

    @property
    def port(self) -> int:
        return int(self.server_address[1])

    def start(self) -> None:
        """Serve on a thread until `shutdown`."""
        threading.Thread(target=self.serve_forever, name="score-server", daemon=True).start()

    def process_request(self, request: Any, client_address: Any) -> None:
        """A thread for a connection; one too many is closed."""
        if self._connections.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._connections.release()

    def handle_error(self, request: socket | tuple[bytes, socket], client_address: Any) -> None:  # noqa: ARG002
        """A client that went away is nothing to write about."""
        log.debug("score_connection_ended")


class _Handler(BaseHTTPRequestHandler):
    server: ScoreServer
    protocol_version = "HTTP/1.1"
    timeout = IDLE_S
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        if self.path.partition("?")[0] in METRICS_PATHS:
            body, content_type = render()
            self._answer(200, body, content_type)
        else:
            self._refuse(404, "no such page")

    def do_POST(self) -> None:
        body = self._read()
        if body is None:
            self.close_connection = True
            self._refuse(413, f"the body must have a length, of at most {MAX_BODY_BYTES} bytes")
        elif self.path != PATH:
            self._refuse(404, "no such page")
        elif (texts := parse_texts(body)) is None:
            self._refuse(400, f"expected texts: at most {MAX_TEXTS}, of {MAX_CHARS} characters together")
        else:
            self._score(texts)

    def _read(self) -> bytes | None:
        length = self.headers.get("content-length", "")
        if not (length.isascii() and length.isdigit()) or int(length) > MAX_BODY_BYTES:
            return None
        return self.rfile.read(int(length))

    def _score(self, texts: Sequence[str]) -> None:
        score = self.server.find_scorer()
        if score is None or not self.server.asking.acquire(blocking=False):
            self._refuse(503, "there is no scorer now" if score is None else "too many ask at once")
            return
        try:
            self._answer(200, orjson.dumps({"toxicity": score(texts) if texts else []}))
        except (ScoringFailed, RuntimeError) as exc:
            log.warning("scoring_failed", reason=type(exc).__name__)
            self._refuse(500, "scoring failed")
        finally:
            self.server.asking.release()

    def _refuse(self, status: int, why: str) -> None:
        self._answer(status, orjson.dumps({"error": why}))

    def _answer(self, status: int, body: bytes, content_type: str = "application/json") -> None:
        self.send_response(status)
        self.send_header("content-type", content_type)
        self.send_header("content-length", str(len(body)))
        if self.close_connection:  # Else a client would send its next request into a closed connection.
            self.send_header("connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing: metrics tell what there is to tell."""


def parse_texts(body: bytes) -> list[str] | None:
    """The texts of a request; None where it is not one, or too large.

    >>> parse_texts(b'{"texts": ["hello"]}')
    ['hello']
    >>> parse_texts(b'{"texts": [1]}')
    """
    try:
        texts = orjson.loads(body)["texts"]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return None
    if not isinstance(texts, list) or len(texts) > MAX_TEXTS or not all(isinstance(text, str) for text in texts):
        return None
    return texts if sum(map(len, texts)) <= MAX_CHARS else None
