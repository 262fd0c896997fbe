"""What an engine says of fixed texts, held against what the trainer's models said."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pawl.errors import BadAdapter
from pawl.fingerprints import NOISE_FACTOR, Fingerprint, fingerprint_of, why_not
from tests.retrain.sealed_samples import fingerprint

N = 100
PLACES = range(N)
TEXTS = (tuple(range(3 * N)),)
BASE = [-2.0 - math.sin(place) for place in PLACES]


def moved(by: float, phase: float = 0.0) -> list[float]:
    return [value + by * math.cos(3 * place + phase) for place, value in zip(PLACES, BASE, strict=True)]


def noisy(values: Sequence[float], noise: float, seed: int) -> list[float]:
    return [value + noise * math.sqrt(2) * math.sin(1.7 * place + seed) for place, value in enumerate(values)]


def trained(by: float, tolerance: float = 0.2) -> Fingerprint:
    logps = {"adapter": moved(by), "base": BASE, "parent": moved(by / 2)}
    return Fingerprint(TEXTS, {name: tuple(values) for name, values in logps.items()}, tolerance)


@given(by=st.floats(0.02, 2.0), noise=st.floats(0.0, 0.15), seed=st.integers(0, 9))
def test_the_adapter_passes_through_whatever_noise_the_engine_has(by: float, noise: float, seed: int) -> None:
    assert why_not(trained(by), noisy(moved(by), noise, seed), noisy(BASE, noise, seed + 1)) is None


@given(by=st.floats(0.2, 2.0), noise=st.floats(0.0, 0.02), seed=st.integers(0, 9))
def test_anything_else_does_not(by: float, noise: float, seed: int) -> None:
    """The base, the parent, the opposite, and an adapter that moved as far in another direction."""
    of_base = noisy(BASE, noise, seed + 1)
    for other in (BASE, moved(by / 2), moved(-by), moved(by, 1.0)):
        assert why_not(trained(by), noisy(other, noise, seed), of_base)


def test_what_it_seems_to_serve_is_said() -> None:
    assert why_not(trained(0.5), BASE, BASE) == "it answers exactly as the base does; its weights are not in effect"
    assert "answers as base does" in str(why_not(trained(0.5), noisy(BASE, 0.001, 1), BASE))
    assert "answers as parent does" in str(why_not(trained(0.5), moved(0.25), BASE))
    assert "away from the trained ones, at most 0.0200" in str(why_not(trained(0.5), moved(0.5, 0.3), BASE))


def test_another_base_is_told_from_another_adapter() -> None:
    assert "its base is 0.4993 nats" in str(why_not(trained(0.5), moved(0.5), noisy(BASE, 0.5, 1)))
    assert why_not(trained(0.5, tolerance=1.0), noisy(moved(0.5), 0.3, 2), noisy(BASE, 0.3, 1)) is None


def test_what_is_no_number_never_passes() -> None:
    for served, of_base in ((moved(0.5), [math.nan] * N), ([math.nan] * N, BASE), ([-math.inf] * N, BASE)):
        assert why_not(trained(0.5), served, of_base)


def test_a_parent_that_is_all_but_the_same_cannot_be_told_apart_and_is_not_asked_for() -> None:
    close = Fingerprint(TEXTS, {**trained(0.5).logps, "parent": tuple(moved(0.5001))}, 0.2)
    assert why_not(close, moved(0.50008), BASE) is None


def test_the_limit_is_what_the_base_is_off() -> None:
    off = 0.05
    of_base = noisy(BASE, off, 1)
    assert why_not(trained(0.5), noisy(moved(0.5), 0.9 * NOISE_FACTOR * off, 1), of_base) is None
    assert why_not(trained(0.5), noisy(moved(0.5), 1.1 * NOISE_FACTOR * off, 1), of_base)


def test_it_survives_the_manifest() -> None:
    assert fingerprint_of({}) is None
    assert fingerprint_of({"fingerprint": fingerprint().to_json()}) == fingerprint_of(
        {"fingerprint": fingerprint_of({"fingerprint": fingerprint().to_json()}).to_json()}  # type: ignore[union-attr]
    )


@pytest.mark.parametrize(
    "change",
    [
        {"texts": [[1, 2]]}, {"texts": "abc"}, {"logps": {}}, {"logps": []}, {"tolerance": "much"}, {"tolerance": None},
        {"logps": {"adapter": [0.0], "base": [0.0, 1.0]}},
    ],
)  # fmt: skip
def test_one_that_cannot_be_read_is_no_fingerprint(change: dict[str, Any]) -> None:
    with pytest.raises(BadAdapter, match="fingerprint in the manifest"):
        fingerprint_of({"fingerprint": {**fingerprint().to_json(), **change}})
