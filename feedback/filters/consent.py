"""Nobody is learned from who does not want to be."""

from __future__ import annotations

from feedback.filters.evidence import Evidence
from feedback.pairs import PreferencePair


def is_opted_out(pair: PreferencePair, evidence: Evidence) -> bool:
    """Whether anyone who was served or who voted has opted out, or a side was not to be stored."""
    sides = evidence.sides(pair)
    if not all(side.is_stored for side in sides):
        return True
    principals = {*pair.principals, *(side.owner for side in sides)}
    users = {principal.partition("/")[2] for principal in principals}
    return not evidence.opted_out.isdisjoint(principals | (users - {""}))
