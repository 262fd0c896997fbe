"""What is known of a completion, and of what was said about it before, at the moment when feedback on it comes in."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import sqlalchemy as sa

from feedback.drain import Drain
from feedback.standing import UNKNOWN, Asked, Last, Standing, standings
from pawl.database import Database
from serving.grouping import Grouped

LOOK_UP_S = 1.0
"""How long the shared database may take to say whether it knows a completion."""
LOOK_UP_ON_OWN_DISK_S = 5.0
"""The same for SQLite, whose readers wait while a commit is flushed: a vote waits for the same disk, so it would gain
nothing by giving up earlier, and be answered as if its completion were unknown."""
MOST_AT_ONCE = 256
REMEMBERED = 65_536
"""Feedback ids whose last event is known without the database: it reaches there a moment later."""


class Served(Protocol):
    """What this process knows of its own completions before the database does."""

    def is_answering(self, suffix: str) -> bool:
        """Whether the completion is being made at this moment."""

    def recently_served(self, suffix: str) -> tuple[str, str] | None:
        """Alias and assigned variant of one made a short while ago."""


class Standings:
    """Puts together what this process and the shared database know."""

    def __init__(self, database: Database, drain: Drain, served: Served) -> None:
        self._database = database
        self._drain = drain
        self._served = served
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="feedback-look-up")
        self._there = Grouped(self._ask, most=MOST_AT_ONCE)
        self._here: dict[str, Last] = {}

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def of(self, suffix: str, feedback_id: str, beginnings: tuple[str, ...] = ()) -> Standing:
        """What both know; `is_complete` is False if the database could not be asked.

        Args:
            beginnings: How the id of the event begins that the same call may have made before.
        """
        there = await self._stored(Asked(suffix, feedback_id, beginnings))
        if there.alias is None and (recent := self._served.recently_served(suffix)) is not None:
            there = there._replace(alias=recent[0], variant=recent[1])
        here = self._here.get(feedback_id)
        is_newer = here is not None and (there.last is None or here.at > there.last.at)
        return there._replace(last=here) if is_newer else there

    def note(self, feedback_id: str, last: Last) -> None:
        """This process takes an event now."""
        self._here.pop(feedback_id, None)
        self._here[feedback_id] = last
        if len(self._here) > REMEMBERED:
            del self._here[next(iter(self._here))]

    def forget(self, feedback_id: str, last: Last) -> None:
        """It could not be kept after all."""
        if self._here.get(feedback_id) == last:
            del self._here[feedback_id]

    async def _stored(self, asked: Asked) -> Standing:
        """What the database says; `UNKNOWN` while it does not answer, since feedback is taken all the same."""
        if not self._drain.is_database_up or self._served.is_answering(asked.interaction_id):
            return UNKNOWN
        return await self._there(asked)

    async def _ask(self, asked: Sequence[Asked]) -> Sequence[Standing]:
        look_up = asyncio.get_running_loop().run_in_executor(self._thread, standings, self._database, asked)
        try:
            async with asyncio.timeout(patience_with(self._database)):
                return await look_up
        except (TimeoutError, sa.exc.SQLAlchemyError):
            return [UNKNOWN] * len(asked)


def patience_with(database: Database) -> float:
    """Seconds that a look-up may take."""
    return LOOK_UP_ON_OWN_DISK_S if database.is_sqlite else LOOK_UP_S
