"""Texts as vectors: the small interface behind which a model may stand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.float32]


class Embedder(Protocol):
    """Says what texts mean, or how they are written, in numbers."""

    def embed(self, texts: Sequence[str]) -> Vectors:
        """One vector of length 1 for each text, shape (len(texts), dimensions); all zeros for a text of nothing.

        A text's vector does not depend on what else is asked, so that batches may be cut anywhere.
        """
        ...


@dataclass(frozen=True)
class Similarity:
    """What counts as nearly the same question."""

    embedder: Embedder
    min_similarity: float
    """The cosine of two vectors, 0 to 1."""
    max_changed_chars: float | None = None
    """How many characters may differ, by `(1 - similarity) * length`. In a long text few of them make another question,
    and hardly turn a vector that counts characters; None for a model, whose vectors do not count any."""
    neighbours: int = 16
    """Questions that each question is compared with more closely."""
