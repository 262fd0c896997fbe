"""Pairs that hold a secret or personal data, anywhere in prompt or answers."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Final

from feedback.filters.message_texts import all_texts
from feedback.interactions import Message
from feedback.pairs import PreferencePair

OPERATORS: Final = frozenset({"system", "developer"})
"""Roles whose messages an application writes: a contact address in them is told to everybody, and is in every pair."""


class SensitiveTexts:
    """Remembers what it has read: answers to one prompt share that prompt, and pairs share answers."""

    def __init__(self, find: Callable[[str], str | None], *, skipped_roles: Collection[str] = ()) -> None:
        self._find = find
        self._skipped_roles = skipped_roles
        self._known: dict[str, bool] = {}

    def are_in(self, pair: PreferencePair) -> bool:
        """Whether any text of the pair that is looked at holds what is looked for."""
        prompt = (message for message in pair.prompt if message.get("role") not in self._skipped_roles)
        return any(self._is_in(message) for message in (*prompt, pair.chosen, pair.rejected))

    def _is_in(self, message: Message) -> bool:
        return any(self._holds(text) for text in all_texts(message))

    def _holds(self, text: str) -> bool:
        known = self._known.get(text)
        if known is None:
            known = self._known[text] = self._find(text) is not None
        return known
