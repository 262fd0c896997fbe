"""Why a pair is not worth training on."""

from __future__ import annotations

from enum import StrEnum


class Reason(StrEnum):
    """In the order in which they are looked for; the first one counts. Those of the last two need the whole set."""

    DUPLICATE = "duplicate"
    """The same pair came in twice."""
    OPTED_OUT = "opted_out"
    """Somebody behind it does not want to be learned from, or asked for nothing to be stored."""
    INCOMPLETE = "incomplete"
    """A side says nothing, or is known to have failed, been cut, or lost its reader."""
    LENGTH = "length"
    """A side is too short, or the whole too long."""
    IDENTICAL = "identical"
    """Both sides say the same but for case and spaces."""
    SECRET = "secret"
    """There is a credential in it."""
    PERSONAL_DATA = "personal_data"
    TOXIC_CHOSEN = "toxic_chosen"
    REFUSES_BENIGN = "refuses_benign"
    """It would teach to decline what is harmless: `chosen` refuses where `rejected` answers."""
    OBEYS_HARMFUL = "obeys_harmful"
    """It would teach to do harm: `chosen` answers where `rejected` refuses."""
    CONTRADICTION = "contradiction"
    """Another pair says the opposite."""
    LENGTH_BIAS = "length_bias"
    """The set would teach that longer, or shorter, is better; without this pair it does so less."""
