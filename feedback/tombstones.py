"""Who was erased, and until when: what comes back from a spool, a journal or a backup is told by it.

A tombstone must outlive the person's data and yet not be a record about the person. A name, or a plain hash of one,
would be: e-mail addresses and account numbers are few enough to hash them all. So it holds a hash under the secret that
signs completion ids: whoever has the secret can ask "was this one erased?", and nobody can read the list.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

from feedback.interactions import FeedbackEvent, Interaction

DIGEST_BYTES = 16
CHECK_BYTES = 4
PERSON = b"pawl-erasure"
ERASED_UNIT = "erased-"
"""Before the interaction's own id, it is the unit of one that was erased: nobody can be called that beforehand."""


class Subject(NamedTuple):
    """Whose records are meant: a user's, under one key or under all of them, or one completion."""

    user: str | None = None
    key_id: str | None = None
    """None: whatever the key."""
    completion: str | None = None
    """The completion id without its prefix."""


class Owner(NamedTuple):
    """Whose a record is."""

    key_id: str
    user: str | None
    suffix: str | None
    """Of the completion that it is, or is about."""
    at: float
    """When it was made, in seconds since the epoch."""


class Person(NamedTuple):
    """Somebody by name, and up to when what they sent is to go."""

    user: str
    key_id: str | None
    """None: whatever the key."""
    until: float

    def is_called(self, key_id: str, user: str) -> bool:
        return self.user == user and self.key_id in (None, key_id)


class Tombstone(NamedTuple):
    """What was sent up to a moment is gone, and stays away; what is sent later is new."""

    who: str
    until: float
    reason: str
    key_check: str
    """Of the secret that `who` was made with."""


def digest_of(secret: bytes, subject: Subject) -> str:
    """The subject's name in tombstones.

    >>> digest_of(b"secret", Subject("ann")) == digest_of(b"secret", Subject("ann", "k1"))
    False
    """
    if subject.completion is not None:
        return _digest(secret, "completion", subject.completion)
    if subject.key_id is None:
        return _digest(secret, "user", subject.user or "")
    return _digest(secret, "user of key", subject.key_id, subject.user or "")


def key_check(secret: bytes) -> str:
    """Tells one secret from another without saying anything about it."""
    return _digest(secret, "check")[: 2 * CHECK_BYTES]


def _digest(secret: bytes, *parts: str) -> str:
    text = json.dumps(parts).encode()  # Lone surrogates are escaped, and no two lists of parts look the same.
    return hashlib.blake2b(text, key=secret[:64], digest_size=DIGEST_BYTES, person=PERSON).hexdigest()


class Erased:
    """A set of tombstones that records are held against. Immutable."""

    def __init__(self, secret: bytes, tombstones: Iterable[Tombstone] = ()) -> None:
        self.tombstones = frozenset(tombstones)
        self.secret = secret
        self._until: dict[str, float] = {}
        for each in self.tombstones:
            self._until[each.who] = max(each.until, self._until.get(each.who, 0.0))

    def __bool__(self) -> bool:
        return bool(self.tombstones)

    @property
    def n_of_another_secret(self) -> int:
        """Tombstones that cannot be matched with anything here."""
        known = key_check(self.secret)
        return sum(each.key_check != known for each in self.tombstones)

    def joined(self, more: Iterable[Tombstone]) -> Erased:
        """Tombstones are only ever added."""
        return Erased(self.secret, self.tombstones.union(more))

    def covers(self, owner: Owner) -> bool:
        """Whether a record was erased."""
        if not self._until:
            return False
        if owner.suffix is not None and digest_of(self.secret, Subject(completion=owner.suffix)) in self._until:
            return True
        return bool(owner.user) and owner.at <= self.until(owner.key_id, owner.user or "")

    def until(self, key_id: str, user: str) -> float:
        """The last moment up to which a user's records are erased; negative for one who never asked."""
        names = (Subject(user), Subject(user, key_id))
        return max(self._until.get(digest_of(self.secret, name), -1.0) for name in names)


def owner_of_interaction(interaction: Interaction) -> Owner:
    return Owner(interaction.key_id, interaction.user_id, interaction.id, interaction.created_at)


def owner_of_event(event: FeedbackEvent) -> Owner:
    return Owner(event.key_id, event.user_id, event.interaction_id, event.created_at)


def owner_in(meta: str | bytes) -> Owner | None:
    """Whose a record is, from its facts alone; None when not even those can be read."""
    try:
        found = json.loads(meta)
        about = str(found.get("interaction_id") or found["id"])
        return Owner(str(found["key_id"]), found["user_id"], about, float(found["created_at"]))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def erased_unit(interaction_id: str) -> str:
    """The unit of an interaction that was erased: of that one alone, so that nothing ties a person's together."""
    return ERASED_UNIT + interaction_id


def forgotten(interaction: Interaction) -> Interaction:
    """What stays of an erased interaction: which model answered when, how fast and how much, as if to nobody.

    Like one that named no user it belongs to no experiment's comparison, so that it does not count there as a user who
    never said anything.
    """
    return replace(
        interaction,
        user_id=None,
        unit_id=erased_unit(interaction.id),
        is_analysed=False,
        regenerate_of=None,
        prompt=None,
        prompt_sha=None,
        completion=None,
        parameters={},
        tools=None,
        is_complete=False,
        is_stored=False,
    )
