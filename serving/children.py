"""Child processes that do not outlive the one that started them."""

from __future__ import annotations

import ctypes
import signal
import sys
from collections.abc import Callable

PR_SET_PDEATHSIG = 1


def ending_with_parent() -> Callable[[], None] | None:
    """For `Popen(preexec_fn=...)`: the kernel stops the child when this process dies, however it dies. Linux only.

    An orphan would go on writing to files that the next start believes to be its own.
    """
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)  # Loaded before the fork: nothing may be allocated after it.

    def ask_kernel() -> None:
        library.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)

    return ask_kernel
