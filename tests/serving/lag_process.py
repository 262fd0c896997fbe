"""A gateway in a process of its own that says how long its event loop was held: `SETTINGS`, as JSON.

A beat runs on the loop every few milliseconds, so what happens between two beats is about what holds the loop at once.
Of that, processor time is told, not time that passed: whatever else the machine is busy with says nothing about the
gateway. It is the whole process's, since other threads keep the loop waiting too while they hold the interpreter.

It says the port, and after every empty line that it reads, what was longest since the last one. After a line with a
number, the loop is held for so many seconds, which shows that this can measure it. It stops when the lines end.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import threading
import time

import orjson

from monitoring.metrics import LOOP_LAG
from pawl.settings import Settings
from serving.gateway import create_app
from serving.server import run_gateway

BEAT_S = 0.002


class Held:
    """The longest that the loop was held."""

    def __init__(self) -> None:
        self.by_process_s = 0.0
        self.by_loop_s = 0.0
        self.wall_s = 0.0

    async def watch(self) -> None:
        """Measure for ever, on the loop."""
        while True:
            process, loop, wall = time.process_time(), time.thread_time(), time.perf_counter()
            await asyncio.sleep(BEAT_S)
            self.by_process_s = max(self.by_process_s, time.process_time() - process)
            self.by_loop_s = max(self.by_loop_s, time.thread_time() - loop)
            self.wall_s = max(self.wall_s, time.perf_counter() - wall - BEAT_S)

    def told(self) -> bytes:
        """What was longest since this was asked last, in milliseconds, and what the gateway's own series holds."""
        found = {"process_ms": self.by_process_s * 1e3, "loop_ms": self.by_loop_s * 1e3, "wall_ms": self.wall_s * 1e3}
        self.by_process_s = self.by_loop_s = self.wall_s = 0.0
        return orjson.dumps(found | {"series": own_series()})


def own_series() -> dict[str, float]:
    """The buckets of `pawl_event_loop_lag_seconds`."""
    (family,) = LOOP_LAG.collect()
    return {sample.labels["le"]: sample.value for sample in family.samples if sample.name.endswith("_bucket")}


def hold(seconds: float) -> None:
    """Keep a processor busy."""
    begun = time.thread_time()
    while time.thread_time() < begun + seconds:
        pass


def main() -> None:
    settings = Settings.model_validate(orjson.loads(sys.argv[1]))
    said, sys.stdout = sys.stdout, sys.stderr  # The gateway's log is not for the test.
    held = Held()
    watches: list[asyncio.Task[None]] = []

    def on_ready() -> None:
        watches.append(asyncio.get_running_loop().create_task(held.watch()))
        print(listener.getsockname()[1], file=said, flush=True)

    def answer() -> None:
        for line in sys.stdin:
            if line.strip():
                watches[0].get_loop().call_soon_threadsafe(hold, float(line))
                continue
            print(held.told().decode(), file=said, flush=True)
        os.kill(os.getpid(), signal.SIGTERM)

    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener:
        threading.Thread(target=answer, daemon=True).start()
        run_gateway(create_app(settings, drains_here=False), [listener], on_ready=on_ready)


if __name__ == "__main__":
    main()
