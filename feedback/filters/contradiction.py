"""Pairs of which another says the opposite."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

from feedback.filters.wholeness import essence
from feedback.messages import fingerprint, substance
from feedback.pairs import PreferencePair


class Dispute(NamedTuple):
    """Which two answers a pair weighs against each other, and which way."""

    answers: bytes
    """The same for two pairs of the same two answers, whichever is preferred, and whatever the prompt."""
    is_forward: bool


def contradicted(pairs: Iterable[PreferencePair]) -> frozenset[str]:
    """Ids of pairs whose two answers are also preferred the other way round, on the same prompt.

    All of them go, on both sides: how many voted each way was mining's to weigh, and what is left is a tie.
    """
    directions: defaultdict[tuple[bytes, bytes], dict[bool, list[str]]] = defaultdict(dict)
    for pair in pairs:
        answers, is_forward = dispute_of(pair)
        directions[conversation_of(pair), answers].setdefault(is_forward, []).append(pair.id)
    opposed = [each for each in directions.values() if len(each) > 1]
    return frozenset(pair_id for each in opposed for ids in each.values() for pair_id in ids)


def dispute_of(pair: PreferencePair) -> Dispute:
    """What two pairs that contradict each other have in common, and what they do not."""
    chosen, rejected = fingerprint(substance(pair.chosen)), fingerprint(substance(pair.rejected))
    return Dispute(min(chosen, rejected) + max(chosen, rejected), chosen <= rejected)


def disputed(disputes: Iterable[tuple[str, Dispute]]) -> list[str]:
    """Ids of pairs that contradict each other if their prompts are the same."""
    given = list(disputes)
    directions: defaultdict[bytes, set[bool]] = defaultdict(set)
    for _, (answers, is_forward) in given:
        directions[answers].add(is_forward)
    return [pair_id for pair_id, (answers, _) in given if len(directions[answers]) > 1]


def conversation_of(pair: PreferencePair) -> bytes:
    """The same for two pairs on the same prompt, but for case and spaces."""
    parts = [pair.alias.encode("utf-8", "surrogatepass")]
    for message in pair.prompt:
        parts += [str(message.get("role")).encode("utf-8", "surrogatepass"), essence(message)]
    hashed = hashlib.blake2b(digest_size=16)
    for part in parts:
        hashed.update(len(part).to_bytes(8, "big") + part)
    return hashed.digest()
