"""What a completion costs in processor time beyond the system's calls: `python -m bench.hot_path`.

Both HTTP protocols, the relay and everything it asks run as in a worker, records off; stand-ins take the place of the
two sockets. Run it before and after `make compiled`: it says what ran. The least of several rounds counts, since
whatever else the machine does can only add to it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from uvicorn.server import ServerState

import serving.relay
from bench.native_tools import Bodies, write_bodies
from pawl.database import open_database, upgrade
from pawl.settings import Settings
from serving.gateway import Gateway, create_app
from serving.server import server_config

ENGINE = "http://127.0.0.1:9"
ROUNDS = 12
REQUESTS = 2_000
"""In a round; a tenth of it for streams."""
N_EVENTS = 64
ANSWER = json.dumps(
    {"id": "x", "choices": [{"message": {"content": "a" * 800}}], "usage": {"prompt_tokens": 9}}
).encode()
EVENT = b'data: {"choices":[{"index":0,"delta":{"content":"a word of an answer"}}]}\n\n'


class NoSocket(asyncio.Transport):
    """A transport whose bytes go to a function."""

    def __init__(self, on_write: Callable[[bytes], None]) -> None:
        super().__init__()
        self._on_write = on_write

    def write(self, data: Any) -> None:
        self._on_write(data)

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self if name == "socket" else default

    def setsockopt(self, *_: int) -> None:
        """As a socket."""

    def getsockname(self) -> tuple[str, int]:
        """As a socket."""
        return ("127.0.0.1", 9)

    getpeername = getsockname

    def is_closing(self) -> bool:
        return False

    def abort(self) -> None:
        return

    def close(self) -> None:
        return

    def pause_reading(self) -> None:
        return

    def resume_reading(self) -> None:
        return

    def get_write_buffer_size(self) -> int:
        return 0

    def set_write_buffer_limits(self, *_: int | None, **__: int | None) -> None:
        return


class EnginelessLoop(asyncio.SelectorEventLoop):
    """Opens connections to nobody: what is sent waits in `asked` for the bench to answer."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: asyncio.Queue[asyncio.Protocol] = asyncio.Queue()
        self.is_driven = False
        """The bench itself ends each turn, so that nothing is to be remembered until then."""

    def call_soon(self, callback: Any, *args: Any, context: Any = None) -> asyncio.Handle:  # type: ignore[override]
        """See `asyncio.loop.call_soon`."""
        if self.is_driven:
            return cast(asyncio.Handle, None)
        return super().call_soon(callback, *args, context=context)

    async def create_connection(self, protocol_factory: Any, *_: Any, **__: Any) -> Any:
        """See `asyncio.loop.create_connection`."""
        protocol = protocol_factory()
        transport = NoSocket(lambda _: self.asked.put_nowait(protocol))
        protocol.connection_made(transport)
        return transport, protocol


class Bench:
    """A client's connection to the gateway, and an engine that answers each request with the same reads."""

    def __init__(self, gateway: Gateway, loop: EnginelessLoop) -> None:
        config = server_config(gateway)
        config.load()
        make_protocol = cast(Callable[..., asyncio.Protocol], config.http_protocol_class)
        self._client = make_protocol(config, ServerState(), {}, loop)
        self._client.connection_made(NoSocket(self._note))
        self._loop = loop
        self._end_turn = gateway.outbox.flush
        self._n_bytes = 0

    def _note(self, data: bytes) -> None:
        self._n_bytes += len(data)

    async def prepare(self, request: bytes, reads: list[bytes]) -> None:
        """One request that opens the engine's connection, and more until nothing is done for the first time."""
        self._client.data_received(request)  # Sent at the end of this turn, when `asked` has been waited for.
        self._answer(await self._loop.asked.get(), reads)
        self._run(REQUESTS // 10, request, reads)

    def cost_us(self, n_requests: int, request: bytes, reads: list[bytes]) -> float:
        """Processor time of a request, in microseconds."""
        before, n_bytes = time.thread_time(), self._n_bytes
        self._run(n_requests, request, reads)
        took = time.thread_time() - before
        least = n_requests * sum(len(read) for read in reads) // 2
        assert self._n_bytes - n_bytes > least, "the client did not get its answers"
        return took / n_requests * 1e6

    def _run(self, n_requests: int, request: bytes, reads: list[bytes]) -> None:
        self._loop.is_driven = True
        try:
            for _ in range(n_requests):
                self._client.data_received(request)
                self._end_turn()
                self._answer(self._loop.asked.get_nowait(), reads)
        finally:
            self._loop.is_driven = False

    def _answer(self, engine: asyncio.Protocol, reads: list[bytes]) -> None:
        for read in reads:
            engine.data_received(read)
            self._end_turn()


def request_of(body: bytes) -> bytes:
    """As a client sends it."""
    head = "POST /v1/chat/completions HTTP/1.1\r\nhost: gateway\r\ncontent-type: application/json\r\n"
    return head.encode() + b"content-length: %d\r\n\r\n" % len(body) + body


def whole_answer() -> list[bytes]:
    """In one read."""
    return [
        b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(ANSWER), ANSWER)
    ]


def streamed_answer() -> list[bytes]:
    """In a read for each event."""
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    chunk = b"%x\r\n%b\r\n" % (len(EVENT), EVENT)
    done = b"data: [DONE]\n\n"
    return [head, *[chunk] * N_EVENTS, b"%x\r\n%b\r\n0\r\n\r\n" % (len(done), done)]


async def measure(directory: Path, bodies: Bodies, rounds: int) -> dict[str, float]:
    """Microseconds of each kind of request."""
    gateway = make_gateway(directory)
    loop = cast(EnginelessLoop, asyncio.get_running_loop())
    bench = Bench(gateway, loop)
    kinds = {
        "a whole answer": (request_of(bodies.whole.read_bytes()), whole_answer(), REQUESTS),
        f"a stream of {N_EVENTS} events": (request_of(bodies.stream.read_bytes()), streamed_answer(), REQUESTS // 10),
    }
    costs = {}
    try:
        for name, (request, reads, n_requests) in kinds.items():
            await bench.prepare(request, reads)
            costs[name] = min(bench.cost_us(n_requests, request, reads) for _ in range(rounds))
    finally:
        gateway.records.close()
        gateway.database.close()
    return costs


def make_gateway(directory: Path) -> Gateway:
    """One model, an experiment over two variants, no keys, no records."""
    variants = [{"name": "control", "model": "a", "weight": 0.5}, {"name": "treatment", "model": "b", "weight": 0.5}]
    model = {"engines": [ENGINE], "champion": "a", "experiment": {"key": "tone", "variants": variants}}
    settings = Settings.model_validate(
        {
            "database": {"url": f"sqlite:///{directory}/pawl.db"},
            "state_dir": str(directory),
            "auth": {"required": False},
            "serving": {"records": "off", "models": {"assistant": model}},
        }
    )
    database = open_database(settings.database)
    upgrade(database)
    database.close()
    return create_app(settings)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pawl-hot-path-") as directory:
        bodies = write_bodies(Path(directory))
        with asyncio.Runner(loop_factory=EnginelessLoop) as runner:
            costs = runner.run(measure(Path(directory), bodies, options.rounds))
    is_compiled = not str(serving.relay.__file__).endswith(".py")
    print(f"the hot path is {'compiled' if is_compiled else 'interpreted'}")
    for name, cost_us in costs.items():
        print(f"{name}: {cost_us:.1f} us")


if __name__ == "__main__":
    main()
