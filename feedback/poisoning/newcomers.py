"""Principals that were first seen only lately: what they say waits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from feedback.poisoning.evidence import Known


def newcomers(pairs: Iterable[Known], first_seen: Mapping[str, float], *, now: float, wait_s: float) -> frozenset[str]:
    """Who was first seen less than `wait_s` before `now`.

    Args:
        first_seen: when each principal came first; who is not in it came with its earliest pair.
    """
    came: dict[str, float] = {}
    for pair in pairs:
        for principal in pair.principals:
            came[principal] = min(came.get(principal, pair.created_at), pair.created_at)
    return frozenset(who for who, at in came.items() if now - min(at, first_seen.get(who, at)) < wait_s)
