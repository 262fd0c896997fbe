"""Which limiter the settings ask for."""

from __future__ import annotations

from pawl.api_keys import LIMIT_NAMES, KeyLimits
from pawl.clock import Clock
from pawl.database import Database
from pawl.leases import this_process
from pawl.settings import LimitSettings
from serving.database_limits import DatabaseLimiter
from serving.limits import Limiter
from serving.memory_limits import MemoryLimiter


def open_limiter(settings: LimitSettings, database: Database, clock: Clock) -> Limiter:
    """The limiter of one gateway process."""
    if settings.store == "memory":
        return MemoryLimiter(clock=clock)
    share = settings.share_without_database
    return DatabaseLimiter(database, holder=this_process(), clock=clock, share_without_database=share)


def default_limits(settings: LimitSettings) -> KeyLimits:
    """The limits of keys that were made without."""
    return KeyLimits(**{name: getattr(settings, name) for name in LIMIT_NAMES})
