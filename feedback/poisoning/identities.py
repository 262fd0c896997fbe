"""Whose word counts as whose: principals, the keys they come with, and who is independent of whom.

A key is given out by an operator; a user's name is whatever the holder of the key sends. So the users of one key are
one party, unless the key belongs to an application that authenticates its users: then each of them is a party.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from typing import NamedTuple

from pawl.settings import DefenceSettings


def key_of(principal: str) -> str:
    """The key in `key_id/user`.

    >>> key_of("a1b2/team/ann")
    'a1b2'
    """
    return principal.partition("/")[0]


class Identities(NamedTuple):
    """What is known of those who voted."""

    trusted: frozenset[str]
    """Keys and principals."""
    application_keys: frozenset[str]

    def is_trusted(self, principal: str) -> bool:
        return principal in self.trusted or key_of(principal) in self.trusted

    def is_capped_key(self, key: str) -> bool:
        return key not in self.application_keys and key not in self.trusted

    def party(self, principal: str) -> str:
        """Two principals of different parties are independent of each other."""
        key = key_of(principal)
        return principal if key in self.application_keys else key


def identities(principals: Iterable[str], settings: DefenceSettings) -> Identities:
    """Read the settings; where no application's key is named, a key with most of all principals is taken for one.

    Args:
        principals: everyone behind any pair.
    """
    trusted = frozenset(settings.trusted)
    named = frozenset(settings.application_keys)
    return Identities(trusted, named or _majority_key(set(principals)))


def _majority_key(principals: Collection[str]) -> frozenset[str]:
    users = Counter(map(key_of, principals))
    return frozenset(key for key, n in users.items() if 2 * n > len(principals))
