"""Pairs that hold a secret or personal data, anywhere in prompt or answers."""

from __future__ import annotations

from collections.abc import Callable

from feedback.filters.message_texts import all_texts
from feedback.interactions import Message
from feedback.pairs import PreferencePair


class SensitiveTexts:
    """Remembers what it has read: answers to one prompt share that prompt, and pairs share answers."""

    def __init__(self, find: Callable[[str], str | None]) -> None:
        self._find = find
        self._known: dict[str, bool] = {}

    def are_in(self, pair: PreferencePair) -> bool:
        """Whether any text of the pair holds what is looked for."""
        return any(self._is_in(message) for message in (*pair.prompt, pair.chosen, pair.rejected))

    def _is_in(self, message: Message) -> bool:
        return any(self._holds(text) for text in all_texts(message))

    def _holds(self, text: str) -> bool:
        known = self._known.get(text)
        if known is None:
            known = self._known[text] = self._find(text) is not None
        return known
