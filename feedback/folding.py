"""Texts in one letter case, as `str` and `unicodedata` have them; texts of Latin-1 in a fraction of the time. Pure."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from typing import Final, NamedTuple

_LATIN_1: Final = "latin-1"


class _Change(NamedTuple):
    """A change of texts that changes each character of Latin-1 by itself."""

    of_text: Callable[[str], str]
    table: bytes
    """What becomes of each character; NUL where that is no single character of Latin-1."""


def _change(of_text: Callable[[str], str]) -> _Change:
    changed = [of_text(chr(code)) for code in range(256)]
    is_one = [len(text) == 1 and ord(text) < 256 for text in changed]
    return _Change(of_text, bytes(ord(text) if fits else 0 for text, fits in zip(changed, is_one, strict=True)))


_LOWERED: Final = _change(str.lower)
_CASEFOLDED: Final = _change(str.casefold)
_NORMALIZED: Final = _change(lambda text: unicodedata.normalize("NFKC", text).casefold())


def lowered(text: str) -> str:
    """As `str.lower`."""
    return _changed(text, _LOWERED)


def is_latin(text: str) -> bool:
    """Whether all of it is Latin-1: then `lowered` changes each character by itself."""
    try:
        text.encode(_LATIN_1)
    except UnicodeEncodeError:
        return False
    return True


def casefolded(text: str) -> str:
    """As `str.casefold`."""
    return _changed(text, _CASEFOLDED)


def normalized(text: str) -> str:
    """One case and one form of each character: NFKC, then `str.casefold`.

    >>> normalized("Ｃａｆé"), normalized("STRASSE") == normalized("Straße")
    ('café', True)
    """
    return _changed(text, _NORMALIZED)


def normalized_bytes(text: str) -> bytes | None:
    """`normalized` in Latin-1, as many characters as before; None where it takes more than to look at each by itself.

    >>> normalized_bytes("CAFÉ"), normalized_bytes("Ｃafé"), normalized_bytes("Straße")
    (b'caf\\xe9', None, None)
    """
    return _changed_bytes(text, _NORMALIZED)


def one_spaced(text: str) -> str:
    """The words of a text with one space between them.

    >>> one_spaced(" to  be\\nor not ")
    'to be or not'
    """
    # Of spaces only the common one is printable.
    return text.strip(" ") if text.isprintable() and "  " not in text else " ".join(text.split())


def _changed(text: str, change: _Change) -> str:
    if text.isascii():
        return text.lower()
    raw = _changed_bytes(text, change)
    return change.of_text(text) if raw is None else raw.decode(_LATIN_1)


def _changed_bytes(text: str, change: _Change) -> bytes | None:
    try:
        changed = text.encode(_LATIN_1).translate(change.table)
    except UnicodeEncodeError:
        return None
    return None if b"\0" in changed else changed
