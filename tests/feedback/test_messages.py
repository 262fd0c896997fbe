"""What stands for texts: the same digits for the same texts in the same order, however they are written down."""

from __future__ import annotations

import hashlib

from hypothesis import example, given
from hypothesis import strategies as st

from feedback.messages import canonical_json, digest

TEXTS = st.lists(st.text(st.characters(blacklist_categories=())), max_size=4)


@given(TEXTS)
@example([])
@example(['a","b', "c"])
@example(["a\\", "b"])
@example(["\x7f", "\ud800"])
def test_a_digest_is_that_of_the_canonical_list(texts: list[str]) -> None:
    assert digest(*texts) == hashlib.blake2b(canonical_json(texts).encode(), digest_size=16).hexdigest()
