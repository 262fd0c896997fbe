"""Which records are a person's, and what an erasure removed: the decisions of erasure, without a database.

A record is known by the names in it, and where those were taken out (redaction, a backend that rates for its users) by
the completion's id, which proves whose the completion was.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from feedback.tombstones import Person, owner_in
from pawl import ids
from pawl.ids import Principal

COUNTED = ("interactions", "feedback", "scores", "verdicts", "shadow_answers", "pairs", "dead_letters", "limits")


@dataclass(frozen=True)
class Removed:
    """What one batch removed."""

    counts: Counter[str] = field(default_factory=Counter)
    trained: Counter[str] = field(default_factory=Counter)
    """How many of the pairs each run trained on."""

    def plus(self, other: Removed) -> Removed:
        return Removed(self.counts + other.counts, self.trained + other.trained)


@dataclass(frozen=True)
class Report:
    """How far one erasure is; kept with its tombstone, so that one that was killed goes on counting."""

    counts: Mapping[str, int] = field(default_factory=dict)
    runs: Mapping[str, int] = field(default_factory=dict)
    """How many of the person's pairs each run trained on."""
    models: Sequence[str] = ()
    """Those that learned from them, and their descendants."""
    is_rewriting: bool = True
    """Whether the tables are written anew at the end, so that not even the files keep a byte."""

    def after(self, removed: Removed, models: Sequence[str]) -> Report:
        """With one more batch."""
        return Report(
            dict(Counter(self.counts) + removed.counts),
            dict(Counter(self.runs) + removed.trained),
            sorted({*self.models, *models}),
            self.is_rewriting,
        )

    def as_json(self) -> dict[str, object]:
        return {
            "counts": {name: self.counts.get(name, 0) for name in COUNTED},
            "runs": dict(sorted(self.runs.items())),
            "models": list(self.models),
            "is_rewriting": self.is_rewriting,
        }


def report_from(found: Mapping[str, Any]) -> Report:
    """As it was kept; a tombstone that came back from a file has none yet."""
    return Report(
        found.get("counts", {}), found.get("runs", {}), found.get("models", ()), found.get("is_rewriting", True)
    )


def is_pair_of(person: Person, secret: bytes, row: Mapping[str, Any]) -> bool:
    """Whether a pair holds this person's words, or a preference of theirs, from before they asked.

    Args:
        row: With `principals`, as JSON text or as a list, and the ids of the two sides.
    """
    principals = _list(row["principals"])
    sides = [side for side in (row.get("chosen_interaction"), row.get("rejected_interaction")) if side]
    if not any(made_at(side) <= person.until for side in sides):
        return False
    names = [principal.partition("/") for principal in principals]
    if any(person.is_called(key_id, user) for key_id, _, user in names):
        return True
    keys = {key_id for key_id, _, _ in names if person.key_id in (None, key_id)}
    return any(is_owner(secret, side, key_id, person.user) for side in sides for key_id in keys)


def is_owner(secret: bytes, suffix: str, key_id: str, user: str) -> bool:
    """Whether a completion was made for this user."""
    is_genuine = ids.completion_suffix(f"cmpl-{suffix}") is not None
    return is_genuine and ids.owns(secret, suffix, Principal(key_id, user))


def made_at(suffix: str) -> float:
    """When a completion was asked for; at the beginning of time where its id does not say."""
    try:
        return ids.created_at(suffix)
    except ValueError:
        return 0.0


def is_letter_of(person: Person, secret: bytes, payload: str) -> bool:
    """Whether a record that was put aside is this person's: an unreadable one is, if a string in it is their name."""
    owner = owner_in(payload.partition("\n")[0])
    if owner is None:
        return any(f'"{name}"' in payload for name in spellings(person.user))
    if owner.at > person.until or person.key_id not in (None, owner.key_id):
        return False
    return owner.user == person.user or is_owner(secret, owner.suffix or "", owner.key_id, person.user)


def spellings(name: str) -> set[str]:
    """How a name may stand in a text: as it is, and as JSON writes it."""
    return {name, json.dumps(name)[1:-1], json.dumps(name, ensure_ascii=False)[1:-1]}


def people_of_pair(principals: str) -> Iterator[tuple[str, str]]:
    """Key and user of everybody who made a pair."""
    for principal in _list(principals):
        key_id, _, user = principal.partition("/")
        if user:
            yield key_id, user


def people_in_letter(payload: str) -> Iterator[tuple[str, str]]:
    """Key and user of a record that was put aside."""
    owner = owner_in(payload.partition("\n")[0])
    if owner is not None and owner.user:
        yield owner.key_id, owner.user


def _list(principals: str | Sequence[str]) -> Sequence[str]:
    return json.loads(principals) if isinstance(principals, str) else principals
