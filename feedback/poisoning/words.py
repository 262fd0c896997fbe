"""Texts as streams of hashed words and phrases, in NumPy: a hundred thousand answers in a few seconds.

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

from feedback.folding import normalized, normalized_bytes

Hashes = NDArray[np.uint64]
Indices = NDArray[np.int64]
Codes = NDArray[np.uint8] | NDArray[np.uint32]

_SEPARATOR, _LETTER, _ALONE, _INVISIBLE = range(4)
_UNSPACED = ((0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x2E80, 0x30FF), (0x3400, 0x9FFF), (0xF900, 0xFAFF))
"""Thai and Lao, Burmese, Khmer, kana and Chinese characters."""
_VARIATION_SELECTORS = range(0xFE00, 0xFE10)
_BASE = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)
_INVERSE = np.uint64(pow(int(_BASE), -1, 2**64))
_PLANE = 0x10000
"""Characters of the Basic Multilingual Plane have smaller codes."""
KEPT_POWERS = 1 << 19
"""Of the base and of its inverse: 8 MB."""


class Stream(NamedTuple):
    """Words or phrases of several texts, one after another."""

    hashes: Hashes
    texts: Indices
    """Which text each comes from, in ascending order."""
    is_plain: bool = False
    """Whether each word is written as it is here, but for the case of its letters."""


def mixed(values: Hashes) -> Hashes:
    """Each value scattered over 64 bits (the finaliser of SplitMix64, Steele et al. 2014)."""
    scattered: Hashes = values >> np.uint64(30)
    scattered ^= values
    scattered *= _FIRST
    shifted = scattered >> np.uint64(27)
    scattered ^= shifted
    scattered *= _SECOND
    np.right_shift(scattered, np.uint64(31), out=shifted)
    scattered ^= shifted
    return scattered


def words_of(texts: Sequence[str]) -> Stream:
    """The words of the texts.

    >>> words = words_of(["Hello, world", "HELLO\u200b again"])
    >>> words.texts.tolist(), bool(words.hashes[0] == words.hashes[2])
    ([0, 0, 1, 1], True)
    """
    # The separator between two texts keeps the last word of one from running into the first of the next.
    folded = _folded(texts)
    codes, kinds = folded.codes, folded.kinds
    ends = np.cumsum(folded.lengths + 1)
    if not len(kinds) or kinds.max() <= _LETTER:
        edges = _edges(kinds)
        starts, lengths = edges[::2], edges[1::2] - edges[::2]
        letters = codes[kinds.view(bool)]
        return Stream(_run_hashes(letters, lengths), _owners(starts, ends), folded.is_plain)
    seen = np.flatnonzero(kinds != _INVISIBLE)
    is_part, is_start = _parts(kinds[seen])
    starts, letters = seen[is_start], codes[seen[is_part]]
    lengths = np.diff(np.flatnonzero(is_start[is_part]), append=len(letters))
    return Stream(_run_hashes(letters, lengths), _owners(starts, ends))


def _edges(kinds: NDArray[np.uint8]) -> Indices:
    """Where runs of letters begin and end, in turn."""
    bounded = np.full(len(kinds) + 2, _SEPARATOR, np.uint8)
    bounded[1:-1] = kinds
    return np.flatnonzero(bounded[1:] != bounded[:-1])


class _Folded(NamedTuple):
    """Texts in one case and form, a separator between each two."""

    codes: Codes
    kinds: NDArray[np.uint8]
    """What each character is to a word."""
    lengths: Indices
    """Of each text."""
    is_plain: bool
    """Whether it took no more than to look at each character by itself."""


def _folded(texts: Sequence[str]) -> _Folded:
    raw = normalized_bytes("\n".join(texts))
    if raw is not None:
        return _Folded(np.frombuffer(raw, np.uint8), _kinds_of(raw), _lengths(texts), is_plain=True)
    folded = [normalized(text) for text in texts]
    return _Folded(*_characters("\n".join(folded)), _lengths(folded), is_plain=False)


def _lengths(texts: Sequence[str]) -> Indices:
    return np.array([len(text) for text in texts], np.int64)


def _characters(text: str) -> tuple[Codes, NDArray[np.uint8]]:
    """The code of each character, and what it is to a word."""
    try:
        raw = text.encode("latin-1")
    except UnicodeEncodeError:
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
        return codes, _kinds().take(codes, mode="clip")
    return np.frombuffer(raw, np.uint8), _kinds_of(raw)


def _kinds_of(raw: bytes) -> NDArray[np.uint8]:
    return np.frombuffer(raw.translate(_kinds_of_bytes()), np.uint8)


def _parts(kinds: NDArray[np.uint8]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Of each visible character, whether it is part of a word, and whether a word begins with it."""
    is_part = (kinds == _LETTER) | (kinds == _ALONE)
    is_start = is_part.copy()
    is_start[1:] &= (kinds[1:] == _ALONE) | (kinds[:-1] != _LETTER)
    return is_part, is_start


def _owners(starts: Indices, ends: Indices) -> Indices:
    """Which text each place lies in; both in ascending order."""
    return np.repeat(np.arange(len(ends)), np.diff(np.searchsorted(starts, ends), prepend=0))


def phrases_of(words: Stream, n_words: int) -> Stream:
    """Every run of `n_words` words within a text."""
    last = len(words.hashes) - n_words + 1
    if last <= 0:
        return Stream(np.empty(0, np.uint64), np.empty(0, np.int64))
    hashes = mixed(words.hashes[:last] + np.uint64(n_words * int(_BASE) % 2**64))
    for offset in range(1, n_words):
        hashes *= _BASE
        hashes += words.hashes[offset : offset + last]
        hashes = mixed(hashes)
    if n_words == 1:
        return Stream(hashes, words.texts)
    is_whole = words.texts[:last] == words.texts[n_words - 1 :]
    return Stream(hashes[is_whole], words.texts[:last][is_whole])


def _run_hashes(codes: Codes, lengths: Indices) -> Hashes:
    """One polynomial hash for each run of characters, modulo 2^64.

    The powers go on from run to run, which spares counting the places within each, and what is too much is divided out:
    the base is odd, so it has an inverse.
    """
    if not len(lengths):
        return np.empty(0, np.uint64)
    starts = np.cumsum(lengths) - lengths
    powers, inverses = _powers(len(codes))
    terms = _scattered(codes)
    terms *= powers[: len(codes)]
    sums = np.cumsum(terms)[starts + lengths - 1]
    hashes = sums.copy()
    hashes[1:] -= sums[:-1]
    hashes *= inverses.take(starts)
    return mixed(hashes)


def _powers(n: int) -> tuple[Hashes, Hashes]:
    """At least `n` powers of the base, from the first, and of its inverse, from 0."""
    return _kept_powers() if n <= KEPT_POWERS else _powers_of(n)


@cache
def _kept_powers() -> tuple[Hashes, Hashes]:
    return _powers_of(KEPT_POWERS)


def _powers_of(n: int) -> tuple[Hashes, Hashes]:
    powers, inverses = np.full(n, _BASE, np.uint64), np.full(n, _INVERSE, np.uint64)
    inverses[:1] = 1
    return np.multiply.accumulate(powers), np.multiply.accumulate(inverses)


def _scattered(codes: Codes) -> Hashes:
    """A hash for each character."""
    if codes.dtype == np.uint8 or codes.max() < _PLANE:
        return _known_hashes().take(codes)
    return mixed(codes.astype(np.uint64) + np.uint64(1))


TOP_BITS = 16
"""NumPy sorts numbers of so many bits by counting."""


def sorted_hashes(values: Hashes, n_bits: int = 64) -> Hashes:
    """In ascending order.

    Sorted by their highest bits first, which takes a third less: what a comparison says of random numbers no processor
    foresees, of numbers that are nearly in order it does.

    Args:
        n_bits: in what is above these all are alike.
    """
    tops = (values >> np.uint64(max(0, n_bits - TOP_BITS))).astype(np.uint16)
    ordered = values[np.argsort(tops, kind="stable")]
    ordered.sort(kind="stable")
    return ordered


@cache
def _known_hashes() -> Hashes:
    """Of the characters of the Basic Multilingual Plane."""
    return mixed(np.arange(1, _PLANE + 1, dtype=np.uint64))


@cache
def _kinds_of_bytes() -> bytes:
    """What each character of Latin-1 is to a word."""
    return _kinds()[:256].tobytes()


@cache
def _kinds() -> NDArray[np.uint8]:
    """What each character of the Basic Multilingual Plane is to a word; those beyond it, the last one, stand alone."""
    kinds = np.array([*map(_kind, range(_PLANE)), _ALONE], dtype=np.uint8)
    for first, last in _UNSPACED:
        block = kinds[first : last + 1]
        block[block == _LETTER] = _ALONE
    return kinds


def _kind(code: int) -> int:
    category = unicodedata.category(chr(code))
    if category == "Cf" or code in _VARIATION_SELECTORS:
        return _INVISIBLE
    return _LETTER if category[0] in "LMN" or code == ord("_") else _SEPARATOR
