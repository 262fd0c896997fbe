"""Texts as streams of hashed words and phrases, in NumPy: a hundred thousand answers in a second or two.

A word is a run of letters, marks, digits and underscores after NFKC and case folding. In scripts that put no spaces
between words each character is a word of its own. Invisible characters are left out, so that they hide nothing.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]
Indices = NDArray[np.int64]

_SEPARATOR, _LETTER, _ALONE, _INVISIBLE = range(4)
_UNSPACED = ((0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x2E80, 0x30FF), (0x3400, 0x9FFF), (0xF900, 0xFAFF))
"""Thai and Lao, Burmese, Khmer, kana and Chinese characters."""
_VARIATION_SELECTORS = range(0xFE00, 0xFE10)
_BASE = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)


class Stream(NamedTuple):
    """Words or phrases of several texts, one after another."""

    hashes: Hashes
    texts: Indices
    """Which text each comes from, in ascending order."""


def mixed(values: Hashes) -> Hashes:
    """Each value scattered over 64 bits (the finaliser of SplitMix64, Steele et al. 2014)."""
    values = (values ^ (values >> np.uint64(30))) * _FIRST
    values = (values ^ (values >> np.uint64(27))) * _SECOND
    scattered: Hashes = values ^ (values >> np.uint64(31))
    return scattered


def words_of(texts: Sequence[str]) -> Stream:
    """The words of the texts.

    >>> words = words_of(["Hello, world", "HELLO\u200b again"])
    >>> words.texts.tolist(), bool(words.hashes[0] == words.hashes[2])
    ([0, 0, 1, 1], True)
    """
    folded = [_folded(text) for text in texts]
    # The separator between two texts keeps the last word of one from running into the first of the next.
    codes = np.frombuffer("\n".join(folded).encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    ends = np.cumsum([len(text) + 1 for text in folded])
    kinds = _kinds()[np.minimum(codes, 0xFFFF)]
    kinds[codes > 0xFFFF] = _ALONE
    seen = np.flatnonzero(kinds != _INVISIBLE)
    codes, kinds = codes[seen], kinds[seen]
    is_part = (kinds == _LETTER) | (kinds == _ALONE)
    is_start = is_part.copy()
    is_start[1:] &= (kinds[1:] == _ALONE) | (kinds[:-1] != _LETTER)
    owners = np.searchsorted(ends, seen[is_start], side="right")
    return Stream(_run_hashes(codes[is_part], np.flatnonzero(is_start[is_part])), owners)


def phrases_of(words: Stream, n_words: int) -> Stream:
    """Every run of `n_words` words within a text."""
    last = len(words.hashes) - n_words + 1
    if last <= 0:
        return Stream(np.empty(0, np.uint64), np.empty(0, np.int64))
    hashes = np.full(last, np.uint64(n_words))
    for offset in range(n_words):
        hashes = mixed(hashes * _BASE + words.hashes[offset : offset + last])
    is_whole = words.texts[:last] == words.texts[n_words - 1 :]
    return Stream(hashes[is_whole], words.texts[:last][is_whole])


def _folded(text: str) -> str:
    return text.lower() if text.isascii() else unicodedata.normalize("NFKC", text).casefold()


def _run_hashes(codes: NDArray[np.uint32], starts: Indices) -> Hashes:
    """One polynomial hash for each run of characters, modulo 2^64."""
    if not len(starts):
        return np.empty(0, np.uint64)
    lengths = np.diff(starts, append=len(codes))
    powers = np.cumprod(np.full(int(lengths.max()), _BASE))
    places = np.arange(len(codes)) - np.repeat(starts, lengths)
    terms = mixed(codes.astype(np.uint64) + np.uint64(1)) * powers[places]
    return mixed(np.add.reduceat(terms, starts))


@cache
def _kinds() -> NDArray[np.uint8]:
    """What each character of the Basic Multilingual Plane is to a word; those beyond it stand alone."""
    kinds = np.array([_kind(code) for code in range(0x10000)], dtype=np.uint8)
    for first, last in _UNSPACED:
        block = kinds[first : last + 1]
        block[block == _LETTER] = _ALONE
    return kinds


def _kind(code: int) -> int:
    category = unicodedata.category(chr(code))
    if category == "Cf" or code in _VARIATION_SELECTORS:
        return _INVISIBLE
    return _LETTER if category[0] in "LMN" or code == ord("_") else _SEPARATOR
