"""Lexical vectors: of length 1, the same however texts are cut into batches, near for what is written nearly alike."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from feedback.similarity import lexical
from feedback.similarity.lexical import DIMENSIONS, LexicalEmbedder

TEXTS = st.lists(st.text(max_size=30) | st.sampled_from(["", "?!", "\ud800", "Why is the sky blue?", "空はなぜ青いの"]))
EMBEDDER = LexicalEmbedder()


@given(TEXTS, st.integers(0, 10))
def test_where_batches_are_cut_makes_no_difference(texts: Sequence[str], cut: int) -> None:
    whole = EMBEDDER.embed(texts)
    assert whole.shape == (len(texts), DIMENSIONS)
    assert np.array_equal(np.concatenate([EMBEDDER.embed(texts[:cut]), EMBEDDER.embed(texts[cut:])]), whole)


def test_much_text_at_once_is_hashed_in_lots(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"question number {number} about the sky" for number in range(50)]
    whole = EMBEDDER.embed(texts)
    monkeypatch.setattr(lexical, "MAX_CODES", 100)
    assert np.array_equal(EMBEDDER.embed(texts), whole)


@given(TEXTS)
def test_vectors_have_length_one_or_none(texts: Sequence[str]) -> None:
    lengths = np.linalg.norm(EMBEDDER.embed(texts), axis=1)
    assert np.all((np.abs(lengths - 1) < 1e-5) | (lengths == 0))


def test_vectors_are_the_same_on_every_machine() -> None:
    """Stored pairs follow them: another vector is another version of the embedder."""
    (vector,) = EMBEDDER.embed(["Why is the sky blue? Weil \u212bngström."])
    assert hashlib.sha256(vector.astype("<f4").tobytes()).hexdigest()[:16] == "6348ade597fb5c7e"


@pytest.mark.parametrize(
    ("other", "is_near"),
    [
        ("why is  the sky BLUE at noon", True),
        ("“Why is the sky blue at noon?”", True),
        ("Why\u200b is the sky blue at noon?", True),
        ("Why is the sky blue at night?", False),
        ("Why is the grass green at noon?", False),
        ("At noon is why the blue sky?", False),
        ("", False),
    ],
)
def test_form_makes_no_difference_and_words_do(other: str, is_near: bool) -> None:
    one, two = EMBEDDER.embed(["Why is the sky blue at noon?", other])
    assert (float(one @ two) >= 0.9) is is_near
