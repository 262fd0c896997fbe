"""What a model says of fixed texts, and whether an engine's answers are the trained adapter's or something else's.

The trainer writes down the log-probability of some tokens of a few fixed texts under the new adapter, under the base
and under the adapter it continued. An engine is asked for the same. Two programs never agree to the last digit; how far
they are apart on the base, which both have, says how far they may be apart on the adapter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

from pawl.errors import BadAdapter

CANDIDATE = "adapter"
BASE = "base"
FLOOR = 0.02
"""Nats per token that an adapter may be off where the base is not at all: its product is rounded once more."""
NOISE_FACTOR = 3.0
"""Times what the base is off, the adapter may be off."""
TELLING = 10.0
"""Two models can be told apart if what lies between them, over all tokens, is so many times the noise of one.

The adapter is then taken for the other one time in 5000, if the noise of its numbers has nothing to do with the base's.
"""

STRIDE = 3
"""Every third token of a text is asked for: a request each, with all before it as the prompt."""
MAX_TARGETS = 128
"""Tokens whose log-probability vLLM tells in one request."""


class Place(NamedTuple):
    """Where in a text a model is asked how likely the next token is."""

    prefix: tuple[int, ...]
    token: int


@dataclass(frozen=True)
class Fingerprint:
    """What a trainer's models made of some texts."""

    texts: tuple[tuple[int, ...], ...]
    """As tokens."""
    logps: Mapping[str, tuple[float, ...]]
    """At every place of the texts, by model: `adapter`, `base` and others."""
    tolerance: float
    """Nats per token that an engine's base may be off, as a root mean square."""

    @property
    def places(self) -> list[Place]:
        return places_of(self.texts)

    def to_json(self) -> dict[str, Any]:
        logps = {name: [round(value, 6) for value in values] for name, values in self.logps.items()}
        return {"texts": [list(text) for text in self.texts], "logps": logps, "tolerance": self.tolerance}


def places_of(texts: Sequence[Sequence[int]]) -> list[Place]:
    """Where models are asked, text by text; as many as there may be different tokens.

    >>> places_of([[5, 6, 7, 8, 9]])
    [Place(prefix=(5,), token=6), Place(prefix=(5, 6, 7, 8), token=9)]
    """
    found = [Place(tuple(text[:at]), text[at]) for text in texts for at in range(1, len(text), STRIDE)]
    return found[:MAX_TARGETS]


def fingerprint_of(manifest: Mapping[str, Any]) -> Fingerprint | None:
    """The one in an adapter's manifest, if it has one.

    Raises:
        BadAdapter: it cannot be read.
    """
    found = manifest.get("fingerprint")
    if found is None:
        return None
    try:
        texts = tuple(tuple(map(int, text)) for text in found["texts"])
        logps = {str(name): tuple(map(float, values)) for name, values in found["logps"].items()}
        fingerprint = Fingerprint(texts, logps, float(found["tolerance"]))
        lengths = {len(logps[CANDIDATE]), len(logps[BASE]), *map(len, logps.values())}
    except (KeyError, TypeError, ValueError, AttributeError) as exc:
        raise BadAdapter("the fingerprint in the manifest cannot be read") from exc
    if lengths != {len(fingerprint.places)} or not all(map(math.isfinite, chain(*logps.values()))):
        raise BadAdapter("the fingerprint in the manifest does not fit its texts")
    return fingerprint


def why_not(fingerprint: Fingerprint, served: Sequence[float], base: Sequence[float]) -> str | None:
    """Why an engine does not serve the adapter that was trained; None if it does.

    Args:
        served: what the engine says of the texts under the adapter's name.
        base: what it says of them under the base model's.

    >>> prints = Fingerprint(((1, 2), (1, 3)), {"adapter": (-1.0, -3.0), "base": (-2.0, -2.0)}, 0.1)
    >>> why_not(prints, [-1.001, -3.001], [-2.0, -2.0])
    >>> why_not(prints, [-1.5, -2.5], [-2.0, -2.0])
    'its answers are 0.5000 nats per token away from the trained ones, at most 0.0200 is noise'
    >>> why_not(prints, [-2.0, -2.0], [-2.0, -2.0])
    'it answers exactly as the base does; its weights are not in effect'
    """
    if served == base:
        return "it answers exactly as the base does; its weights are not in effect"
    noise = distance(base, fingerprint.logps[BASE])
    if not noise <= fingerprint.tolerance:
        return f"its base is {noise:.4f} nats per token away from the trainer's, at most {fingerprint.tolerance:g} is"
    off = distance(served, fingerprint.logps[CANDIDATE])
    for name, values in fingerprint.logps.items():
        if name != CANDIDATE and _is_nearer(fingerprint, name, served, base, noise):
            return f"it answers as {name} does ({distance(served, values):.4f} nats per token away), not as trained"
    limit = max(FLOOR, NOISE_FACTOR * noise)
    if not off <= limit:
        return f"its answers are {off:.4f} nats per token away from the trained ones, at most {limit:.4f} is noise"
    return None


def distance(one: Sequence[float], other: Sequence[float]) -> float:
    """Root mean square of the differences.

    >>> distance([0.0, 0.0], [3.0, 4.0])
    3.5355339059327378
    """
    return math.sqrt(sum((a - b) ** 2 for a, b in zip(one, other, strict=True)) / max(len(one), 1))


def _is_nearer(
    fingerprint: Fingerprint, name: str, served: Sequence[float], base: Sequence[float], noise: float
) -> bool:
    """Whether the engine moved its base to where another model of the trainer's is, rather than the new adapter.

    Moves are compared, so that what engine and trainer disagree on for every model alike falls out.
    """
    trained, other, origin = fingerprint.logps[CANDIDATE], fingerprint.logps[name], fingerprint.logps[BASE]
    if distance(trained, other) * math.sqrt(len(trained)) < TELLING * max(noise, FLOOR / NOISE_FACTOR):
        return False
    moved = [a - b for a, b in zip(served, base, strict=True)]
    to_trained = distance(moved, [a - b for a, b in zip(trained, origin, strict=True)])
    return distance(moved, [a - b for a, b in zip(other, origin, strict=True)]) < to_trained
