"""Waiting for what happens on another thread, with a bound."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def eventually(look: Callable[[], T | None], *, within_s: float = 30.0) -> T:
    """What `look` finds, asked again until it finds something."""
    deadline = time.monotonic() + within_s
    while not (found := look()):
        assert time.monotonic() < deadline, f"nothing within {within_s:g} s"
        time.sleep(0.01)
    return found
