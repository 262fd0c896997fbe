"""Feedback tokens as callers show them: in a header of their own, or where other systems' browser SDKs put a key."""

from __future__ import annotations

import re
from collections.abc import Mapping

TOKEN_HEADER = "x-pawl-feedback-token"
MOST_TOKENS = 8
"""In one header: for a choice, that of either completion."""
BEARER_TOKEN = re.compile(r"(?i:bearer) +([0-9a-f]+\.[0-9a-f]{48}\.[0-9a-f]{32})")


def tokens_of(headers: Mapping[str, str]) -> tuple[str, ...]:
    """The feedback tokens of a call, separated by commas; a header that holds none is one bad one.

    >>> tokens_of({"x-pawl-feedback-token": "a.b.c, d.e.f"})
    ('a.b.c', 'd.e.f')
    >>> tokens_of({"authorization": "Bearer pawl-0-0"})
    ()
    """
    shown = headers.get(TOKEN_HEADER)
    if shown is not None:
        return tuple(token.strip() for token in shown.split(",", MOST_TOKENS)[:MOST_TOKENS])
    found = BEARER_TOKEN.fullmatch(headers.get("authorization", ""))
    return (found[1],) if found else ()


def suffix_in(token: str) -> str:
    """What a token says that it is for; nothing is proved by that.

    >>> suffix_in("ffff.00ab.cd"), suffix_in("NaN")
    ('00ab', '')
    """
    return "".join(token.split(".", 2)[1:2])


def named_by(tokens: tuple[str, ...]) -> Mapping[str, str]:
    """The completion that a single token is for, where the body names none; nothing is proved by that.

    >>> named_by(("ffff.00ab.cd",))
    {'completion_id': 'chatcmpl-00ab'}
    """
    parts = tokens[0].split(".") if len(tokens) == 1 else []
    return {"completion_id": f"chatcmpl-{parts[1]}"} if len(parts) > 1 else {}
