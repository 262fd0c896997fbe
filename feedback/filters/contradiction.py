"""Pairs of which another says the opposite."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from feedback.filters.wholeness import essence
from feedback.messages import substance
from feedback.pairs import PreferencePair

Conversation = tuple[str, tuple[tuple[str, bytes], ...]]


def contradicted(pairs: Sequence[PreferencePair]) -> frozenset[str]:
    """Ids of pairs whose two answers are also preferred the other way round, on the same prompt.

    All of them go, on both sides: how many voted each way was mining's to weigh, and what is left is a tie.
    """
    directions: defaultdict[tuple[Conversation, frozenset[bytes]], dict[bytes, list[str]]] = defaultdict(dict)
    for pair in pairs:
        chosen, rejected = substance(pair.chosen), substance(pair.rejected)
        both = (conversation_of(pair), frozenset((chosen, rejected)))
        directions[both].setdefault(chosen, []).append(pair.id)
    opposed = [each for each in directions.values() if len(each) > 1]
    return frozenset(pair_id for each in opposed for ids in each.values() for pair_id in ids)


def conversation_of(pair: PreferencePair) -> Conversation:
    """The same for two pairs on the same prompt, but for case and spaces."""
    return pair.alias, tuple((str(message.get("role")), essence(message)) for message in pair.prompt)
