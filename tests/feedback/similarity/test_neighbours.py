"""Neighbours: exact in small sets, nearly all of them in large ones, and the same every time."""

from __future__ import annotations

import numpy as np
import pytest

from feedback.similarity import neighbours
from feedback.similarity.neighbours import Edges, Halves, near


def unit(n: int, seed: int, dimensions: int = 32) -> Halves:
    vectors = np.random.default_rng(seed).normal(size=(n, dimensions))
    halves: Halves = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
    return halves


def shaken(vectors: Halves, seed: int) -> Halves:
    """Others that are near each of these."""
    moved = vectors.astype(np.float64) + 0.02 * np.random.default_rng(seed).normal(size=vectors.shape)
    halves: Halves = (moved / np.linalg.norm(moved, axis=1, keepdims=True)).astype(np.float16)
    return halves


def as_set(edges: Edges) -> set[tuple[int, int, float]]:
    return set(zip(edges.ones.tolist(), edges.others.tolist(), edges.similarities.tolist(), strict=True))


def by_hand(ones: Halves, others: Halves, least: float) -> set[tuple[int, int, float]]:
    shared = ones.astype(np.float64) @ others.astype(np.float64).T
    return {(int(i), int(j), float(shared[i, j])) for i, j in np.argwhere(shared >= least)}


def test_a_small_set_is_compared_exactly() -> None:
    ones = unit(200, 1)
    others = np.concatenate([shaken(ones[:50], 2), unit(30, 3)])
    found = as_set(near(ones, others, 0.9, 8))
    assert found == by_hand(ones, others, 0.9)
    assert len(found) >= 50


def test_a_large_set_is_asked_approximately(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "MAX_COMPARISONS", 0)
    ones = unit(3000, 1)
    others = shaken(ones[:500], 2)
    found, wanted = as_set(near(ones, others, 0.9, 8)), by_hand(ones, others, 0.9)
    assert found <= wanted, "what is found is as near as it is said to be"
    assert len(found) >= 0.95 * len(wanted)
    assert as_set(near(ones, others, 0.9, 8)) == found, "another search finds the same"


def test_no_more_than_so_many_neighbours_each() -> None:
    same = np.repeat(unit(1, 1), 20, axis=0)
    assert len(near(same, same[:3], 0.9, 5).ones) == 15


def test_what_says_nothing_is_near_nothing() -> None:
    nothing = np.zeros((2, 32), np.float16)
    assert len(near(nothing, nothing, 0.5, 4).ones) == 0
