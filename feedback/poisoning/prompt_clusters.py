"""Which prompts are nearly the same: MinHash signatures compared within the buckets of a banded LSH.

Broder 1997 for the signatures; Leskovec, Rajaraman and Ullman, *Mining of Massive Datasets*, section 3.4 for the bands.
What is compared are the sets of single words and of runs of two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from feedback.poisoning.words import Hashes, Indices, Stream, mixed, phrases_of, words_of

ROWS_PER_BAND = 4
N_BANDS = 8
"""Sets that share 0.85 of their parts meet in a bucket 99 times in a hundred, those that share a half 40 times."""
N_HASHES = ROWS_PER_BAND * N_BANDS
_SALTS = mixed(np.arange(1, N_HASHES + 1, dtype=np.uint64))
_NOTHING = np.uint64(2**64 - 1)


Sketches = NDArray[np.uint64]
"""One row for each prompt."""


class PromptClusterer(Protocol):
    """Says of prompts which belong together, by a sketch of each, so that prompts may be read anywhere.

    Which prompts share a label must not depend on their order, only on which prompts there are.
    """

    def sketch(self, prompts: Sequence[str]) -> Sketches:
        """What to remember of some prompts."""
        ...

    def labels(self, sketches: Sketches) -> Indices:
        """One for each prompt."""
        ...


class LexicalClusterer:
    """Prompts that share most of their words and of their pairs of words."""

    def __init__(self, min_similarity: float) -> None:
        self._min_similarity = min_similarity

    def sketch(self, prompts: Sequence[str]) -> Sketches:
        """Signatures by MinHash."""
        words = words_of(prompts)
        signatures = np.full((len(prompts), N_HASHES), _NOTHING)
        for shingles in (phrases_of(words, 1), phrases_of(words, 2)):
            _lower(signatures, shingles)
        return signatures

    def labels(self, sketches: Sketches) -> Indices:
        # Slow to load, and sketches are made in processes that label nothing.
        from scipy.sparse import coo_matrix
        from scipy.sparse.csgraph import connected_components

        if not len(sketches):
            return np.empty(0, np.int64)
        whole = _row_hashes(sketches)
        links = [_links(sketches, whole, band, self._min_similarity) for band in range(N_BANDS)]
        near = np.concatenate([each.near for each in links])
        heads = np.concatenate([each.heads for each in links])
        graph = coo_matrix((np.ones(len(near), bool), (near, heads)), shape=(len(sketches), len(sketches)))
        labels: Indices = connected_components(graph, directed=False)[1].astype(np.int64)
        return labels


def _lower(signatures: NDArray[np.uint64], shingles: Stream) -> None:
    """Take the minimum of each hash function over the shingles of each text into its signature."""
    if not len(shingles.hashes):
        return
    starts = np.flatnonzero(np.diff(shingles.texts, prepend=-1))
    rows = shingles.texts[starts]
    for column, salt in enumerate(_SALTS):
        lowest = np.minimum.reduceat(mixed(shingles.hashes ^ salt), starts)
        signatures[rows, column] = np.minimum(signatures[rows, column], lowest)


class _Links(NamedTuple):
    near: Indices
    heads: Indices


def _links(signatures: NDArray[np.uint64], whole: Hashes, band: int, min_similarity: float) -> _Links:
    """Each prompt with the head of its bucket, where their signatures agree enough.

    A bucket's head is the prompt with the smallest hash of its whole signature, so no order decides who it is.

    Args:
        whole: these hashes.
    """
    first = band * ROWS_PER_BAND
    buckets = _row_hashes(signatures[:, first : first + ROWS_PER_BAND])
    order = np.lexsort((whole, buckets))
    sizes = np.diff(np.flatnonzero(np.diff(buckets[order], prepend=~buckets[order[:1]])), append=len(order))
    heads = np.repeat(order[np.cumsum(sizes) - sizes], sizes)
    similarity = (signatures[order] == signatures[heads]).mean(axis=1)
    is_near = similarity >= min_similarity
    return _Links(order[is_near], heads[is_near])


def _row_hashes(rows: NDArray[np.uint64]) -> Hashes:
    hashes = np.zeros(len(rows), np.uint64)
    for column in rows.T:
        hashes = mixed(hashes ^ column) + np.uint64(1)
    return hashes
