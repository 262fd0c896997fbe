"""A process of its own that reserves from the shared limits: `URL REQUESTS LIMIT FIELD`.

It says `ready`, waits for a line, makes its requests all at once, says how many were admitted, and holds them until
its standard input ends.
"""

from __future__ import annotations

import asyncio
import sys
import time

from pawl.api_keys import ALL_SCOPES, KeyLimits
from pawl.database import open_database
from pawl.leases import this_process
from pawl.settings import DatabaseSettings
from serving.database_limits import DatabaseLimiter
from serving.errors import RateLimited
from serving.keys import ApiKey
from serving.limits import Reservation


async def admitted(url: str, n_requests: int, limits: KeyLimits) -> list[Reservation]:
    """The reservations that were granted."""
    database = open_database(DatabaseSettings(url=url))
    # Patient: on a loaded machine a slow answer must not be taken for an outage, in which each lends itself a share.
    limiter = DatabaseLimiter(
        database, holder=this_process(), clock=time.time, share_without_database=0.0, patience_s=60.0
    )
    key = ApiKey("shared", ALL_SCOPES, limits, "", 5, "", None)
    made = await asyncio.gather(*(limiter.reserve(key, "", 10) for _ in range(n_requests)), return_exceptions=True)
    assert all(isinstance(each, Reservation | RateLimited) for each in made), made
    return [each for each in made if isinstance(each, Reservation)]


def main() -> None:
    url, n_requests, limit, field = sys.argv[1:]
    print("ready", flush=True)
    sys.stdin.readline()
    held = asyncio.run(admitted(url, int(n_requests), KeyLimits(**{field: int(limit)})))
    print(len(held), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
