"""Which prompts ask nearly what others ask: users' words and pairs of words, the rarer ones counting for more.

Only what users said is compared: a system prompt is the same in every conversation of an application and says nothing
of what is asked. A form that an application puts around each question stands in users' messages; so a word or pair of
words weighs log((n + 1) / d) where d of the n prompts that are compared with have it (inverse document frequency,
Spärck Jones 1972), which is next to nothing for the form. Two prompts are as similar as the weight of what they share
is of the weight of what either has (Jaccard, weighted). With one prompt to compare with, everything weighs the same.

Every prompt is compared with the given ones directly: to be near something that is near one of them is not enough.
Only those that share a rare part are compared at all (prefix filtering, Chaudhuri, Ganti and Kaushik 2006).
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

import numpy as np

from feedback.filters.message_texts import said
from feedback.interactions import Message
from feedback.poisoning.words import Stream, phrases_of, words_of

Shingles = frozenset[int]

BATCH: Final = 500
"""Prompts whose words are held at once, besides those that are compared with."""
SLACK: Final = 1e-9
"""Sums of weights are rounded, and no prompt may be missed for that."""


class NearPrompts:
    """Prompts to compare others with."""

    def __init__(self, asked: Iterable[str], min_similarity: float) -> None:
        self._min_similarity = min_similarity
        self._prompts = sorted(set(_shingles(sorted(set(asked)))) - {frozenset()}, key=sorted)
        known, n = Counter(shingle for prompt in self._prompts for shingle in prompt), len(self._prompts) + 1
        self._unknown_weight = math.log(n)
        self._weights = {shingle: math.log(n / count) for shingle, count in known.items()}
        self._sums = [self._weight(prompt) for prompt in self._prompts]
        self._with_rare: dict[int, list[int]] = defaultdict(list)
        for place, prompt in enumerate(self._prompts):
            for shingle in self._rare(prompt):
                self._with_rare[shingle].append(place)

    def are_near(self, asked: Sequence[str]) -> list[bool]:
        """Whether each of these is nearly one of the prompts; what says nothing is near nothing."""
        return [self._is_near(prompt) for prompt in _shingles(asked)]

    def _is_near(self, prompt: Shingles) -> bool:
        places = {place for shingle in prompt & self._with_rare.keys() for place in self._with_rare[shingle]}
        weight = self._weight(prompt) if places else 0.0
        return any(self._similarity(prompt, weight, place) >= self._min_similarity for place in places)

    def _similarity(self, prompt: Shingles, weight: float, place: int) -> float:
        shared = self._weight(prompt & self._prompts[place])
        return shared / (weight + self._sums[place] - shared)

    def _rare(self, prompt: Shingles) -> Iterator[int]:
        """The rarest parts, without which less than the similarity asked for would be left to share."""
        rest = whole = self._weight(prompt)
        for shingle in sorted(prompt, key=lambda each: (-self._weights[each], each)):
            if rest < whole * (self._min_similarity - SLACK):
                return
            yield shingle
            rest -= self._weights[shingle]

    def _weight(self, shingles: Iterable[int]) -> float:
        """Summed exactly: the same for the same set, in whatever order it comes."""
        return math.fsum(self._weights.get(shingle, self._unknown_weight) for shingle in shingles)


def asked(prompt: Iterable[Message]) -> str:
    """Everything that users said in a prompt.

    >>> asked([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}])
    'Why?'
    """
    return "\n".join(said(message) for message in prompt if message.get("role") == "user")


def _shingles(texts: Sequence[str]) -> Iterator[Shingles]:
    """The words and pairs of words of each text, hashed."""
    for start in range(0, len(texts), BATCH):
        batch = texts[start : start + BATCH]
        words = words_of(batch)
        singles, pairs = _by_text(words, len(batch)), _by_text(phrases_of(words, 2), len(batch))
        yield from (frozenset(one + two) for one, two in zip(singles, pairs, strict=True))


def _by_text(stream: Stream, n_texts: int) -> list[list[int]]:
    ends = np.searchsorted(stream.texts, np.arange(1, n_texts))
    return [part.tolist() for part in np.split(stream.hashes, ends)]
