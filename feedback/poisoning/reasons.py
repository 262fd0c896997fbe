"""Why a pair is kept out of the training set."""

from __future__ import annotations

from enum import StrEnum


class Reason(StrEnum):
    """In the order in which they are looked for; the first one counts."""

    REVIEWER = "reviewer"
    """A reviewer rejected it."""
    ECHO = "echo"
    """The prompt contains the answer: whoever wrote it chose the words that a vote then teaches."""
    NEWCOMER = "newcomer"
    """A principal behind it was first seen only lately; the pair comes in by itself when the wait is over."""
    UNCORROBORATED_EDIT = "uncorroborated_edit"
    """Nobody independent of the user who wrote the text prefers it."""
    OVERREPRESENTED = "overrepresented"
    """It teaches a phrase, host or import that a few parties push."""
    REPEATED_PHRASE = "repeated_phrase"
    """One principal has too many pairs with the same rare phrase."""
    BURST = "burst"
    """Votes on its prompt came all at once."""
    FLOOD = "flood"
    """A principal behind it said far more than anybody may."""
    SAME_PROMPT = "same_prompt"
    """A principal behind it has spoken on nearly this prompt before."""
    PRINCIPAL_CAP = "principal_cap"
    PROMPT_CAP = "prompt_cap"
    KEY_CAP = "key_cap"


QUARANTINED = frozenset(
    {
        Reason.NEWCOMER,
        Reason.UNCORROBORATED_EDIT,
        Reason.OVERREPRESENTED,
        Reason.REPEATED_PHRASE,
        Reason.BURST,
        Reason.FLOOD,
    }
)
"""A reviewer may let these pairs in; those with any other reason are refused."""
