"""What all routes of `/admin/v1` share: who asks, work on a thread, and errors in the HTTP form."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated, Any, ParamSpec, TypeVar

from fastapi import Path, Query, Request, Response
from pydantic import BaseModel, ConfigDict, StringConstraints

from ab_testing.errors import ABTestingError
from pawl.errors import ConfigurationError, PawlError, StaleWrite, UnknownModel, Unreachable
from serving.errors import ApiError, BadRequest, Conflict, NotFound, Overloaded
from serving.routes import key_id_of
from serving.stored_api import JSON, asking_database

P = ParamSpec("P")
T = TypeVar("T")

TAG = "administration"
WITHOUT_NUL = r"^[^\x00]+$"
"""PostgreSQL has no such text, and would not even look for it."""

Name = Annotated[str, StringConstraints(min_length=1, max_length=255, pattern=WITHOUT_NUL)]
PathName = Annotated[str, Path(pattern=WITHOUT_NUL)]
OfAlias = Annotated[str | None, Query(description="One model alias only.", pattern=WITHOUT_NUL)]
Rows = Annotated[int, Query(ge=1, le=1000)]


class Closed(BaseModel):
    """A request body: what it does not know, it refuses."""

    model_config = ConfigDict(extra="forbid")


def actor_of(request: Request) -> str:
    """The caller, as the audit trail names it."""
    key_id = key_id_of(request.scope)
    return f"key:{key_id}" if key_id else "anonymous"


async def administered(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Do blocking work on a thread; what goes wrong there is told to the client.

    Raises:
        ApiError: it was refused, or something needed does not answer.
    """
    try:
        return await asking_database(work, *args, **kwargs)
    except (PawlError, ABTestingError) as exc:
        raise told(exc) from exc


def told(exc: PawlError | ABTestingError) -> ApiError:
    """The HTTP form of an error that the command line would print."""
    if isinstance(exc, UnknownModel):
        return NotFound(str(exc), code="not_found")
    if isinstance(exc, Unreachable):
        return Overloaded(str(exc), code="unreachable")
    if isinstance(exc, ConfigurationError):
        return BadRequest(str(exc), code="refused")
    if isinstance(exc, StaleWrite):
        return Conflict(str(exc), code="changed_meanwhile")
    return Conflict(str(exc), code="refused", headers={"x-should-retry": "false"})


def as_json(value: Any, status: int = 200) -> Response:
    """JSON in ASCII, since texts in records may hold lone surrogates."""
    return Response(json.dumps(value).encode(), status, None, JSON)
