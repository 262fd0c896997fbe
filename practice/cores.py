"""How many cores training here may use."""

import os

MOST_CORES = 2
"""The practice models are too small to gain from more."""


def free_cores() -> int:
    """Return how many threads to train with: one or two.

    Threads that wait for each other on a busy core make a run many times slower than one thread alone, so a second one
    is used only when a core is idle for it.
    """
    idle = (os.cpu_count() or 1) - os.getloadavg()[0]
    return max(1, min(MOST_CORES, round(idle)))
