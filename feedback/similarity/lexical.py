"""Texts as hashed counts of their runs of characters: no model, the same vectors on every machine.

The hashing trick with signs (Weinberger et al. 2009): each run of characters adds 1 to one place of the vector, or
takes 1 away, so that runs that meet in a place cancel each other on average and cosines keep their expectation.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from feedback.poisoning.words import Hashes, mixed
from feedback.similarity.embedding import Vectors

DIMENSIONS: Final = 384
RUN: Final = 4
"""Characters. Three are shared by texts of any kind, and of five a slip of the pen spoils more."""
MAX_CODES: Final = 1_000_000
"""Characters that are hashed at once: some 30 bytes for each."""
_PUNCTUATION: Final = re.compile("[.,;:!?'\"`´‘’“”„«»()\\[\\]{}…¿¡。、「」·]+")
"""Not signs that make another word of one, as in C# and 5 %."""
_INVISIBLE: Final = re.compile("[\u00ad\u200b-\u200f\u2060\ufe00-\ufe0f\ufeff]+")
_BASE: Final = np.uint64(0x9E3779B97F4A7C15)


class LexicalEmbedder:
    """How texts are written, whatever their case, accents' encoding, spaces and punctuation.

    >>> one, other, third = LexicalEmbedder().embed(["Why is the sky blue?", "why is  the sky blue", "Ducks?"])
    >>> round(float(one @ other), 3), bool(one @ third < 0.5)
    (1.0, True)
    """

    def embed(self, texts: Sequence[str]) -> Vectors:
        vectors = np.zeros((len(texts), DIMENSIONS), np.float32)
        start = 0
        for end in _cuts([len(text) for text in texts]):
            vectors[start:end] = _embed(texts[start:end])
            start = end
        return vectors


def plain_words(text: str) -> str:
    """A text without what is no part of its words, each word between single spaces.

    >>> plain_words("  Is 1+1 = 2?\\nYes, SIR!")
    ' is 1+1 = 2 yes sir '
    """
    folded = unicodedata.normalize("NFKC", _INVISIBLE.sub("", text)).casefold()
    return f" {' '.join(_PUNCTUATION.sub(' ', folded).split())} "


def _cuts(lengths: Sequence[int]) -> list[int]:
    """Where to cut texts of these lengths into batches."""
    batches = np.cumsum(lengths) // MAX_CODES if lengths else np.empty(0, np.intp)
    return [*(np.flatnonzero(np.diff(batches)) + 1).tolist(), len(lengths)]


def _embed(texts: Sequence[str]) -> Vectors:
    """Counts are whole numbers, exact in any order; only the last division rounds."""
    words = [plain_words(text) for text in texts]
    hashes, owners = _runs(words)
    places = owners * DIMENSIONS + (hashes % np.uint64(DIMENSIONS)).astype(np.int64)
    signs = np.where(hashes >> np.uint64(63), 1.0, -1.0)
    counts = np.bincount(places, signs, minlength=len(texts) * DIMENSIONS).reshape(len(texts), DIMENSIONS)
    lengths = np.sqrt((counts * counts).sum(axis=1, keepdims=True))
    vectors: Vectors = (counts / np.maximum(lengths, 1.0)).astype(np.float32)
    return vectors


def _runs(texts: Sequence[str]) -> tuple[Hashes, NDArray[np.int64]]:
    """Every run of characters within a text, hashed, and which text it is from."""
    codes = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
    owners = np.repeat(np.arange(len(texts)), [len(text) for text in texts])
    n_runs = max(0, len(codes) - RUN + 1)
    hashes = np.zeros(n_runs, np.uint64)
    for offset in range(RUN):
        hashes = mixed(hashes * _BASE + codes[offset : offset + n_runs] + np.uint64(1))
    is_whole = owners[:n_runs] == owners[len(owners) - n_runs :]
    return hashes[is_whole], owners[:n_runs][is_whole]
