"""Pairs that hold a secret or personal data, anywhere in prompt or answers."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Final

from feedback.filters.message_texts import OPENING, all_texts
from feedback.interactions import Message
from feedback.pairs import PreferencePair

OPERATORS: Final = frozenset({"system", "developer"})
"""Roles whose messages an application writes: a contact address in them is told to everybody, and is in every pair."""
REMEMBERED_CHARS: Final = 4_000_000
"""Of texts that were read; when there are more, all are forgotten."""


class SensitiveTexts:
    """Remembers what it has read lately: answers to one prompt share that prompt, and pairs share answers."""

    def __init__(self, find: Callable[[str], str | None], *, skipped_roles: Collection[str] = ()) -> None:
        self._find = find
        self._skipped_roles = skipped_roles
        self._known: dict[str, bool] = {}
        self._n_chars = 0

    def are_in(self, pair: PreferencePair) -> bool:
        """Whether any text of the pair that is looked at holds what is looked for."""
        prompt = [message for message in pair.prompt if message.get("role") not in self._skipped_roles]
        # Tools are what an application writes, as the messages of those roles are.
        tools = () if self._skipped_roles else pair.tools or ()
        return any(map(self._is_in, (*prompt, pair.chosen, pair.rejected, *tools)))

    def _is_in(self, message: Message) -> bool:
        return any(map(self._is_in_value, message.values()))

    def _is_in_value(self, value: object) -> bool:
        if not isinstance(value, str) or value[:1] in OPENING:
            return any(map(self._holds, all_texts(value, depth=1)))
        return self._holds(value)

    def _holds(self, text: str) -> bool:
        known = self._known.get(text)
        return self._read(text) if known is None else known

    def _read(self, text: str) -> bool:
        self._n_chars += len(text)
        if self._n_chars > REMEMBERED_CHARS:
            self._known.clear()
            self._n_chars = len(text)
        holds = self._known[text] = self._find(text) is not None
        return holds
