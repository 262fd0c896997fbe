"""Does an answer say anything, or does it hand the user's words back?"""

from __future__ import annotations

import re
from collections.abc import Sequence

RUN = 3
"""So many words in the same order are taken from the other text; fewer are what any answer on the matter shares."""
ECHOED = 0.6
"""From this share of borrowed words on, an answer is an echo."""
_WORD = re.compile(r"\w+(?:['’]\w+)*")


def is_echo(prompt: str, answer: str) -> bool:
    """Whether an answer is mostly made of what the user wrote.

    Only a comparison with another model's answers to the same prompts makes sense of it: whoever asks for a correction
    wants most of it back.

    >>> is_echo("How do I boil an egg?", "How do I boil an egg? Good question.")
    True
    >>> is_echo("How do I boil an egg?", "To boil an egg, put it in hot water.")
    False
    """
    return echoed_share(prompt, answer) >= ECHOED


def echoed_share(prompt: str, answer: str) -> float:
    """The share of an answer's words that stand in runs of `RUN` words which the prompt has too."""
    asked, said = _words(prompt), _words(answer)
    known = set(_runs(asked))
    borrowed = {
        place + offset for place, run in enumerate(_runs(said)) if run in known for offset in range(RUN)
    }  # fmt: skip
    return len(borrowed) / len(said) if said else 0.0


def _runs(words: Sequence[str]) -> list[tuple[str, ...]]:
    return [tuple(words[start : start + RUN]) for start in range(len(words) - RUN + 1)]


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())
