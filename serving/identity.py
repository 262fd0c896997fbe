"""Who is calling: the user a request names, in the order of precedence the contract fixes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pawl.ids import Principal
from serving.errors import BadRequest
from serving.request_fields import MAX_USER_CHARS, UNPRINTABLE

USER_HEADER = "x-pawl-user"


def principal_of(headers: Mapping[str, str], body: Mapping[str, Any], *, key_id: str = "") -> Principal:
    """Header `x-pawl-user`, else `safety_identifier`, else `user`, else `metadata.user_id`, else nobody but the key.

    Raises:
        BadRequest: the name is too long or holds control characters.
    """
    metadata = body.get("metadata")
    named = (
        _header_text(headers.get(USER_HEADER, ""))
        or body.get("safety_identifier")
        or body.get("user")
        or (metadata.get("user_id") if isinstance(metadata, dict) else None)
        or ""
    )
    if not isinstance(named, str) or len(named) > MAX_USER_CHARS or UNPRINTABLE.search(named):
        raise BadRequest(
            f"a user is text of at most {MAX_USER_CHARS} characters without control characters", param="user"
        )
    return Principal(key_id=key_id, user=named)


def _header_text(value: str) -> str:
    """A header as its sender meant it: UTF-8 where the bytes are that, so that header and body name the same user."""
    try:
        return value.encode("latin-1").decode()
    except UnicodeDecodeError:
        return value


def unit_of(principal: Principal) -> str | None:
    """What is hashed for the assignment: the user within the key, else the key, else None."""
    if principal.user:
        return f"{principal.key_id}/{principal.user}" if principal.key_id else principal.user
    return principal.key_id or None
