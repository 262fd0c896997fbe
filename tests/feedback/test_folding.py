"""Changing the case of Latin-1 byte by byte agrees with `str` and `unicodedata`."""

from __future__ import annotations

import unicodedata

from hypothesis import example, given
from hypothesis import strategies as st

from feedback.folding import casefolded, is_latin, lowered, normalized, normalized_bytes, one_spaced

LATIN_1 = [chr(code) for code in range(256)]
TEXTS = st.text(
    st.sampled_from([*LATIN_1, "\u0301", "İ", "\u212a", "Σ", "ǆ", "ﬁ", "Ａ", "\u2003", "\ud800"]), max_size=12
)


@given(TEXTS | st.text(st.sampled_from(LATIN_1)))
@example("".join(LATIN_1))
@example("A\u0301")
def test_the_short_way_says_what_the_long_way_says(text: str) -> None:
    assert lowered(text) == text.lower()
    assert casefolded(text) == text.casefold()
    assert normalized(text) == unicodedata.normalize("NFKC", text).casefold()
    assert one_spaced(text) == " ".join(text.split())
    assert normalized_bytes(text) in (None, normalized(text).encode("latin-1", "replace"))
    assert is_latin(text) == all(ord(character) < 256 for character in text)


def test_each_character_by_itself() -> None:
    for character in LATIN_1:
        for around in ("", "é"):
            test = around + character
            assert lowered(test) == test.lower()
            assert casefolded(test) == test.casefold()
            assert normalized(test) == unicodedata.normalize("NFKC", test).casefold()


@given(
    st.lists(st.sampled_from(["a", "É", " ", "  ", "\n", "\t", "\x1c", "\x85", "\xa0", "\u2028", "\u200b"])).map(
        "".join
    )
)
def test_every_kind_of_space_becomes_one(text: str) -> None:
    assert one_spaced(text) == " ".join(text.split())
