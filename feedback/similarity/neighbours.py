"""Which vectors are near which: Faiss finds who comes into question, and what they share is then summed exactly.

Vectors are kept in half precision. Products of two such numbers are multiples of 2**-48, and a sum of them that is
about 1 at most fits the 53 bits of a double: so a similarity is the same in whatever order it is summed, on any
machine. Only which neighbours an inverted file overlooks (Johnson, Douze and Jégou 2017) may depend on the machine.
"""

from __future__ import annotations

import math
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from feedback.similarity.embedding import Vectors

Halves = NDArray[np.float16]
Places = NDArray[np.int64]

MAX_COMPARISONS: Final = 100_000_000
"""Up to here everything is compared with everything, which takes a second; beyond it an inverted file is asked."""
PROBED_LISTS: Final = 8
"""Of an inverted file with a list for each square root of what is in it: two vectors that share nine tenths lie in the
same list or in one close by."""
TRAINED_ON: Final = 64
"""Vectors for each list, when the lists' centres are sought."""
ASKED_AT_ONCE: Final = 4096


class Edges(NamedTuple):
    """Pairs of a row of one matrix and a row of another, with what they share."""

    ones: Places
    others: Places
    similarities: NDArray[np.float64]

    def where(self, is_wanted: NDArray[np.bool_]) -> Edges:
        return Edges(self.ones[is_wanted], self.others[is_wanted], self.similarities[is_wanted])


NO_EDGES: Final = Edges(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float64))


def near(ones: Halves, others: Halves, min_similarity: float, neighbours: int) -> Edges:
    """For each of `others` those of `ones` that are most similar to it.

    Args:
        ones: unit vectors, shape (n, d).
        others: unit vectors, shape (m, d).
        neighbours: how many at most for each of `others`.
    """
    index = _index(ones, len(others))
    found = [NO_EDGES]
    for start in range(0, len(others), ASKED_AT_ONCE):
        asked = others[start : start + ASKED_AT_ONCE]
        _, places = index.search(asked.astype(np.float32), min(neighbours, len(ones)))
        edges = _exact(ones, asked, np.asarray(places, np.int64), min_similarity)
        found.append(edges._replace(others=edges.others + start))
    return Edges(*(np.concatenate(column) for column in zip(*found, strict=True)))


def _index(ones: Halves, n_asked: int) -> Any:
    """Faiss takes a fifth of a second to load, and is not needed where nobody asks twice."""
    import faiss

    vectors: Vectors = ones.astype(np.float32)
    is_small = len(ones) * n_asked <= MAX_COMPARISONS
    index = faiss.IndexFlatIP(vectors.shape[1]) if is_small else _inverted_file(vectors)
    index.add(vectors)
    return index


def _inverted_file(vectors: Vectors) -> Any:
    """Trained on a sample that is drawn from a fixed seed."""
    import faiss

    dimensions, halves = vectors.shape[1], faiss.ScalarQuantizer.QT_fp16
    index = faiss.IndexIVFScalarQuantizer(
        faiss.IndexFlatIP(dimensions), dimensions, math.isqrt(len(vectors)), halves, faiss.METRIC_INNER_PRODUCT, False
    )
    index.nprobe = PROBED_LISTS
    index.cp.max_points_per_centroid = TRAINED_ON
    index.train(vectors)
    return index


def _exact(ones: Halves, asked: Halves, places: Places, min_similarity: float) -> Edges:
    """What was found, without what is not near after all; -1 stands for nothing found."""
    rows, columns = np.nonzero(places >= 0)
    found = places[rows, columns]
    similarities = np.empty(len(rows), np.float64)
    for start in range(0, len(rows), ASKED_AT_ONCE):
        lot = slice(start, start + ASKED_AT_ONCE)
        similarities[lot] = np.einsum("ij,ij->i", ones[found[lot]], asked[rows[lot]], dtype=np.float64)
    is_near = similarities >= min_similarity
    return Edges(found[is_near], rows[is_near], similarities[is_near])
