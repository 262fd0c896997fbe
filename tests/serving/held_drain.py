"""A drain that stands still for as long as a test likes."""

from __future__ import annotations

import threading

from feedback.drain import DrainThread


def hold(drain: DrainThread | None, release: threading.Event) -> None:
    """From now on this drain moves nothing until `release`."""
    assert drain is not None
    drain_once, is_held = drain.drain_once, threading.Event()

    def held() -> int:
        is_held.set()
        return drain_once() if release.is_set() else 0

    drain.drain_once = held  # type: ignore[method-assign]
    drain.wake()
    assert is_held.wait(30), "a batch under way has ended then"
