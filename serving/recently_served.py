"""Completions of the last moments: feedback on them may come before the database has them."""

from __future__ import annotations

from typing import Final

MIN_KNOWN: Final = 2_048
"""At least so many completions are known, and at most twice as many."""


class RecentlyServed:
    """Alias and assigned variant of completions, by the hexadecimal digits of their ids.

    Noting them happens for every request and asking for one seldom, so they are put in order only when one is asked
    for, and forgotten many at a time. Belongs to the event loop's thread.
    """

    def __init__(self) -> None:
        self._noted: list[tuple[str, tuple[str, str]]] = []
        self._known: dict[str, tuple[str, str]] = {}
        self._known_before: dict[str, tuple[str, str]] = {}

    def note(self, suffix: str, alias: str, variant: str) -> None:
        """One was served."""
        self._noted.append((suffix, (alias, variant)))
        if len(self._noted) + len(self._known) >= MIN_KNOWN:
            self._put_in_order()
            self._known_before, self._known = self._known, {}

    def find(self, suffix: str) -> tuple[str, str] | None:
        """Alias and assigned variant, if it is still known."""
        self._put_in_order()
        return self._known.get(suffix) or self._known_before.get(suffix)

    def _put_in_order(self) -> None:
        self._known.update(self._noted)
        self._noted.clear()
