"""Completions that callers name by a UUID alone, which proves nothing: TensorZero's clients send no other ids."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import sqlalchemy as sa

from feedback.standing import completion_of_uuid
from pawl import ids
from pawl.database import Database
from serving.call_record import ID_PREFIXES
from serving.errors import NotFound, Overloaded, Unauthorized
from serving.feedback_api import NO_SUCH_COMPLETION
from serving.feedback_standing import patience_with
from serving.feedback_tokens import named_by, tokens_of
from serving.identity import principal_of
from serving.relay import Relay

UUID = re.compile(r"(?i:[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})")
CHAT = ID_PREFIXES["chat.completions"]


class Uuids:
    """Finds the whole id that a UUID begins. Whether the caller may rate that completion is not asked here."""

    def __init__(self, secret: bytes, relay: Relay, database: Database) -> None:
        """
        Args:
            relay: Knows this gateway's own completions before the database does.
        """
        self._secret = secret
        self._relay = relay
        self._database = database
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="feedback-uuids")

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def completion_id(self, given: str, headers: Mapping[str, str], key_id: str) -> str:
        """The completion's id; the database is asked only for callers that have shown a key, where one is needed.

        Raises:
            Unauthorized: the caller shows feedback tokens, and none of them is for this completion.
            NotFound: there is no such completion.
            Overloaded: the database does not answer.
        """
        unique = given.replace("-", "").lower()
        tokens = tokens_of(headers)
        if tokens:
            return named_in(tokens, unique)
        return self._made_here(unique, principal_of(headers, {}, key_id=key_id)) or await self._look_up(unique)

    def _made_here(self, unique: str, caller: ids.Principal) -> str | None:
        """One that is being answered now, or the caller's own of a short while ago."""
        call = self._relay.calls.get(unique)
        if call is not None and call.suffix:
            return ID_PREFIXES[call.route] + call.suffix
        suffix = ids.make_completion_suffix(self._secret, unique, caller)
        return CHAT + suffix if self._relay.recently_served(suffix) else None

    async def _look_up(self, unique: str) -> str:
        """On a thread of its own: completions must not wait for this."""
        asked = asyncio.get_running_loop().run_in_executor(self._thread, completion_of_uuid, self._database, unique)
        try:
            async with asyncio.timeout(patience_with(self._database)):
                found = await asked
        except (TimeoutError, sa.exc.SQLAlchemyError) as exc:
            raise Overloaded("the database does not answer; try again", code="database_unavailable") from exc
        if found is None:
            raise NotFound(NO_SUCH_COMPLETION, param="inference_id", code="completion_not_found")
        return found


def named_in(tokens: Sequence[str], unique: str) -> str:
    """The completion among those that tokens are for whose id begins with 32 hexadecimal digits.

    Raises:
        Unauthorized: none does.

    >>> named_in(("ffff.00ab.cd", "ffff.01ab.cd"), "01ab")
    'chatcmpl-01ab'
    """
    named = (named_by((token,)).get("completion_id", "") for token in tokens)
    found = next((one for one in named if one.startswith(CHAT + unique)), None)
    if found is None:
        raise Unauthorized("the feedback token is not valid for this completion, or has expired", code="invalid_token")
    return found
