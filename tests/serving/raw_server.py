"""A gateway with the protocol that `pawl serve` uses, in a thread, and clients that speak raw HTTP to it."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from pawl.settings import Settings
from serving.gateway import create_app
from serving.server import GatewayServer, server_config
from tests.gateway_configuration import make_schema
from tests.serving.waiting import eventually

PATIENCE_S = 20.0


@contextmanager
def served_raw(settings: Settings) -> Iterator[tuple[str, int]]:
    """The address of a running gateway."""
    make_schema(settings.database)
    gateway = create_app(settings)
    server = GatewayServer(server_config(gateway), gateway)
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        eventually(lambda: server.started or not thread.is_alive())
        assert server.started
        try:
            yield listener.getsockname()
        finally:
            server.handle_exit(0, None)
            thread.join(20)


def connected(address: tuple[str, int]) -> socket.socket:
    """A connection on which nothing has been said."""
    return socket.create_connection(address, timeout=PATIENCE_S)


def said(address: tuple[str, int], data: bytes) -> bytes:
    """Everything that comes back until the server closes."""
    with connected(address) as connection:
        connection.sendall(data)
        return rest_of(connection)


def rest_of(connection: socket.socket) -> bytes:
    """What still comes until the server closes."""
    parts = []
    try:
        while part := connection.recv(65536):
            parts.append(part)
    except ConnectionResetError:
        pass  # Closed, with something of ours unread.
    return b"".join(parts)


def request(path: str, body: bytes, *lines: str, method: str = "POST") -> bytes:
    """A whole request; more header lines may be given."""
    head = [f"{method} {path} HTTP/1.1", "host: gateway", "content-type: application/json", *lines]
    if not any(line.lower().startswith(("content-length", "transfer-encoding")) for line in lines):
        head.append(f"content-length: {len(body)}")
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body
