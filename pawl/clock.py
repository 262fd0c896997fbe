"""The time, in one place, so that tests and replays can bring their own."""

from __future__ import annotations

import time
from collections.abc import Callable

Clock = Callable[[], float]
"""Seconds since the epoch (UTC)."""

now: Clock = time.time
