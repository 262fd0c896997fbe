"""How late the event loop wakes a task that slept: the one number that tells whether something blocks it."""

from __future__ import annotations

import asyncio
import time

import structlog

from monitoring.metrics import LOOP_LAG

log = structlog.get_logger()

PROBE_S = 0.5
ALARMING_S = 0.25


async def watch_loop_lag() -> None:
    """Measure for ever; a long stall is logged, with how long it was."""
    while True:
        before = time.perf_counter()
        await asyncio.sleep(PROBE_S)
        lag_s = max(0.0, time.perf_counter() - before - PROBE_S)
        LOOP_LAG.observe(lag_s)
        if lag_s > ALARMING_S:
            log.warning("loop_stalled", seconds=round(lag_s, 3))
