"""Pairs for the tests of the defence."""

from __future__ import annotations

import hashlib
from typing import Any

from feedback.candidates import Source
from feedback.pairs import PreferencePair
from feedback.poisoning.defence import Defended, SideTables
from feedback.poisoning.reasons import Reason

DAY = 86400.0
NOW = 1000 * DAY
LONG_AGO = NOW - 100 * DAY
WORDS = [first + vowel + last for first in "bdfgklmnprst" for vowel in "aeiou" for last in "bdgklmnprst"]


def talk(seed: object, n_words: int) -> str:
    """Words that depend on the seed alone and that no other seed's text has much of."""
    digest = hashlib.shake_256(repr(seed).encode()).digest(2 * n_words)
    places = [int.from_bytes(digest[at : at + 2]) % len(WORDS) ** 2 for at in range(0, 2 * n_words, 2)]
    return " ".join(WORDS[place % len(WORDS)] + WORDS[place // len(WORDS) % len(WORDS)] for place in places)


def pair(number: int, principal: str = "app/ann", **changes: Any) -> PreferencePair:
    """Pair `number`: on a prompt of its own, made `number` seconds after everybody was first seen."""
    name = f"{number:032x}"
    asked = changes.pop("asked", talk(("asked", number), 12))
    chosen = changes.pop("chosen", talk(("chosen", number), 20))
    rejected = changes.pop("rejected", talk(("rejected", number), 20))
    fields: dict[str, Any] = {
        "id": name,
        "alias": "assistant",
        "source": Source.THUMBS.value,
        "prompt": ({"role": "user", "content": asked},),
        "chosen": {"role": "assistant", "content": chosen},
        "rejected": {"role": "assistant", "content": rejected},
        "margin": 1.0,
        "n_voters": 1,
        "principals": (principal,),
        "chosen_interaction": f"{name}0",
        "rejected_interaction": f"{name}1",
        "models": ("base",),
        "probability": 1.0,
        "created_at": LONG_AGO + number,
    }
    return PreferencePair(**(fields | changes))


def edit(number: int, principal: str, text: str, **changes: Any) -> PreferencePair:
    return pair(number, principal, chosen=text, source=Source.EDIT.value, chosen_interaction=None, **changes)


def tables(**changes: Any) -> SideTables:
    return SideTables(**({"now": NOW} | changes))


def held(defended: Defended) -> dict[int, Reason]:
    """Why pairs wait, by their number."""
    return {int(each.pair.id, 16): each.reason for each in defended.quarantined}


def accepted(defended: Defended) -> set[int]:
    return {int(each.id, 16) for each in defended.accepted}
