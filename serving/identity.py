"""Who is calling: the user a request names, in the order of precedence the contract fixes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pawl.ids import Principal
from serving.errors import BadRequest, Unauthorized
from serving.request_fields import MAX_USER_CHARS, UNPRINTABLE

USER_HEADER = "x-pawl-user"


def principal_of(headers: Mapping[str, str], body: Mapping[str, Any], *, key_id: str = "") -> Principal:
    """As `principal_from`, for headers that have been decoded."""
    return principal_from(headers.get(USER_HEADER, "").encode("latin-1"), body, key_id=key_id)


def principal_from(header: bytes, body: Mapping[str, Any], *, key_id: str = "") -> Principal:
    """Header `x-pawl-user`, else `safety_identifier`, else `user`, else `metadata.user_id`, else nobody but the key.

    Raises:
        BadRequest: the name is too long or holds control characters.
    """
    named = header_text(header) if header else (body.get("safety_identifier") or body.get("user"))
    if not named:
        metadata = body.get("metadata")
        named = (metadata.get("user_id") if isinstance(metadata, dict) else None) or ""
    if not isinstance(named, str) or len(named) > MAX_USER_CHARS or UNPRINTABLE.search(named):
        raise BadRequest(
            f"a user is text of at most {MAX_USER_CHARS} characters without control characters", param="user"
        )
    return Principal(key_id, named)


def header_text(value: bytes) -> str:
    """A header as its sender meant it: UTF-8 where the bytes are that, so that header and body name the same thing."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value.decode("latin-1")


def unit_of(principal: Principal) -> str | None:
    """What is hashed for the assignment: the user within the key, else the key, else None."""
    if principal.user:
        return f"{principal.key_id}/{principal.user}" if principal.key_id else principal.user
    return principal.key_id or None


def credential_of(headers: Mapping[bytes, bytes]) -> str:
    """What the caller shows as its key: `Authorization`, or `x-api-key` as Anthropic's clients do.

    Raises:
        Unauthorized: nothing.
    """
    shown = headers.get(b"authorization") or headers.get(b"x-api-key")
    if not shown:
        raise Unauthorized(
            "no API key: send `Authorization: Bearer <key>`",
            code="invalid_api_key",
            headers={"www-authenticate": "Bearer"},
        )
    return shown.decode("latin-1")


def is_sane(request_id: bytes) -> bool:
    """Whether a caller's own request id may be echoed: at most 128 printable ASCII characters."""
    return len(request_id) <= 128 and request_id.isascii() and request_id.decode("ascii").isprintable()
