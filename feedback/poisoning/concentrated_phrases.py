"""Phrases that few parties teach: found by exact paired tests, and by a cap for what is too rare to be tested."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import betainc

from feedback.poisoning.evidence import PHRASE_BITS, Evidence, Occurrences
from feedback.poisoning.words import Hashes, Indices
from pawl.settings import PhraseSettings

MOST = 0.8
"""A phrase is in the hands of a few when they are behind this share of the pairs that have it. Not all of them: one
honest user who quotes it, or whom somebody gets to say it, must not hide it."""


_MOST_BUCKET_BITS = 23
_COUNTED = 1 << 21
"""Phrases counted at once: as many as leave the memory that this takes in proportion."""


class Membership(NamedTuple):
    """Who is behind each pair, as numbers."""

    starts: Indices
    """Where the members of each pair begin; one more than there are pairs."""
    members: Indices


def membership(groups: Sequence[Sequence[str]]) -> Membership:
    """Number the names in `groups`, one group for each pair."""
    names = {name: number for number, name in enumerate(sorted({name for group in groups for name in group}))}
    sizes = np.array([len(group) for group in groups], dtype=np.int64)
    members = np.array([names[name] for group in groups for name in group], dtype=np.int64)
    return Membership(np.concatenate([[0], np.cumsum(sizes)]), members)


def overrepresented(evidence: Evidence, parties: Membership, settings: PhraseSettings) -> NDArray[np.bool_]:
    """Of each pair, whether it teaches a phrase that a few parties push.

    Under the null hypothesis a phrase that is in one side of a pair only is as likely to be in the other: the sign
    test. Only phrases that a few parties have in their hands are tested, and Tarone's correction (1990,
    Biometrics 46:515) leaves out those too rare to be significant at all, so that the chance of a single false finding
    among all of them is at most `error_rate`.
    """
    runs = _Runs.of(_frequent([evidence.taught, evidence.untaught], at_least=_fewest_trials(settings.error_rate)))
    # Decided by the pairs of either side together, so that it tells nothing of which side the phrase is on.
    n_few = _few(runs, parties, evidence.clusters, settings)
    runs = runs.chosen(_top_share(runs, parties, n_few - 1) >= MOST)
    n_taught = _count(evidence.taught, runs.phrases)
    n_untaught = runs.counts - n_taught
    p_values = betainc(n_taught, n_untaught + 1, 0.5)  # P(Binomial(n, 1/2) >= n_taught)
    level = _tarone_level(runs.counts, settings.error_rate)
    is_strong = (n_taught + 0.5) / (n_untaught + 0.5) >= settings.min_ratio
    found = runs.phrases[is_strong & (p_values <= level)]
    return _marks(_those_with(evidence.taught, found), len(evidence.pairs))


def _few(runs: _Runs, parties: Membership, clusters: Indices, settings: PhraseSettings) -> Indices:
    """How many parties are more than a few, for each phrase.

    A phrase that goes with one prompt may well be the right answer to it, and liked by all who asked. One that turns up
    after all kinds of prompts, and in no rejected answer, is a habit: more than a few have to like that.
    """
    of_all = math.ceil(settings.few_share * len(set(parties.members.tolist())))
    alone = Membership(np.arange(len(clusters) + 1), clusters)
    is_spread = _top_share(runs, alone, np.ones(len(runs.phrases), np.int64)) < 1 / 2
    return np.where(is_spread, max(settings.few_parties, of_all), settings.few_parties)


def repeated(evidence: Evidence, principals: Membership, settings: PhraseSettings) -> NDArray[np.bool_]:
    """Of each pair, whether it is one of more than `max_per_principal` by the same principal with the same rare phrase.

    No test: so few pairs prove nothing, and so many from one principal would be enough to teach the phrase.
    """
    limit = settings.max_per_principal
    taught = _held_by_one(evidence.taught, principals, limit, settings.few_parties)
    asked = _held_by_one(evidence.asked, principals, limit, settings.few_parties)
    return _marks(np.concatenate([taught, asked]), len(evidence.pairs))


def _held_by_one(occurrences: Occurrences, principals: Membership, limit: int, few: int) -> Indices:
    """The pairs with a phrase that is in the hands of a few, of principals who have more than `limit` of them."""
    runs = _Runs.of(_frequent([occurrences], at_least=limit + 1))
    # What is in more pairs than the most talkative have between them need not be looked at closely.
    most = np.sort(np.bincount(principals.members, minlength=few))[1 - few :].sum()
    runs = runs.chosen((runs.counts > limit) & (runs.counts * MOST <= most))
    runs = runs.chosen(_top_share(runs, principals, np.full(len(runs.phrases), few - 1)) >= MOST)
    held = _holdings(runs, principals)
    return held.pairs[held.counts[held.rows] > limit]


class _Runs(NamedTuple):
    """Occurrences sorted by phrase."""

    phrases: Hashes
    """Each once."""
    counts: Indices
    """In how many pairs each is."""
    pairs: Indices
    """The pairs of the first phrase, then those of the second, and so on."""

    @classmethod
    def of(cls, occurrences: Occurrences) -> _Runs:
        order = np.argsort(occurrences.phrases)
        phrases, counts = np.unique(occurrences.phrases[order], return_counts=True)
        return cls(phrases, counts, occurrences.pairs[order])

    def chosen(self, is_chosen: NDArray[np.bool_]) -> _Runs:
        is_kept = np.repeat(is_chosen, self.counts)
        return _Runs(self.phrases[is_chosen], self.counts[is_chosen], self.pairs[is_kept])


def _frequent(parts: Sequence[Occurrences], *, at_least: int) -> Occurrences:
    """All parts as one, without most of the phrases that are in fewer pairs: counted by the beginning of their hash."""
    n_bits = min(_MOST_BUCKET_BITS, sum(len(part.phrases) for part in parts).bit_length())
    counts = np.zeros(1 << n_bits, np.int64)
    for part in parts:
        for start in range(0, len(part.phrases), _COUNTED):
            counts += np.bincount(_buckets(part.phrases[start : start + _COUNTED], n_bits), minlength=len(counts))
    kept = [counts[_buckets(part.phrases, n_bits)] >= at_least for part in parts]
    return Occurrences(
        np.concatenate([part.phrases[is_kept] for part, is_kept in zip(parts, kept, strict=True)]),
        np.concatenate([part.pairs[is_kept] for part, is_kept in zip(parts, kept, strict=True)]),
    )


def _buckets(phrases: Hashes, n_bits: int) -> NDArray[np.int32]:
    return (phrases >> (PHRASE_BITS - np.uint64(n_bits))).astype(np.int32)


class _Holdings(NamedTuple):
    """Who has how many of the pairs of each phrase."""

    phrases: Indices
    """The number of the phrase, in ascending order, once for each of its holders."""
    counts: Indices
    """How many of its pairs the holder is behind."""
    pairs: Indices
    """Each pair of each holder of each phrase,"""
    rows: Indices
    """and which of the above it is one of."""


def _holdings(runs: _Runs, holders: Membership) -> _Holdings:
    phrases = np.repeat(np.arange(len(runs.phrases)), runs.counts)
    sizes = np.diff(holders.starts)[runs.pairs]
    firsts = np.repeat(holders.starts[runs.pairs] - np.cumsum(sizes) + sizes, sizes)
    members = holders.members[firsts + np.arange(sizes.sum())]
    n_members = len(holders.members) + 1
    held, rows, counts = np.unique(
        np.repeat(phrases, sizes) * n_members + members, return_inverse=True, return_counts=True
    )
    return _Holdings(held // n_members, counts, np.repeat(runs.pairs, sizes), rows)


def _top_share(runs: _Runs, holders: Membership, n_top: Indices) -> NDArray[np.float64]:
    """The share of each phrase's pairs that its `n_top` largest holders have between them."""
    held = _holdings(runs, holders)
    order = np.lexsort((-held.counts, held.phrases))
    phrases, counts = held.phrases[order], held.counts[order]
    ranks = np.arange(len(phrases)) - np.searchsorted(phrases, phrases)
    is_top = ranks < n_top[phrases]
    tops = np.bincount(phrases[is_top], weights=counts[is_top], minlength=len(runs.phrases))
    shares: NDArray[np.float64] = tops / np.maximum(runs.counts, 1)
    return shares


def _count(occurrences: Occurrences, phrases: Hashes) -> Indices:
    """In how many pairs each of these phrases (in ascending order) occurs."""
    places, is_one = _find(occurrences, phrases)
    counts: Indices = np.bincount(places[is_one], minlength=len(phrases))
    return counts


def _those_with(occurrences: Occurrences, phrases: Hashes) -> Indices:
    """The pairs that have one of these phrases (in ascending order)."""
    return occurrences.pairs[_find(occurrences, phrases)[1]]


def _find(occurrences: Occurrences, phrases: Hashes) -> tuple[Indices, NDArray[np.bool_]]:
    """Where in `phrases` each occurrence would be, and whether it is there."""
    if not len(phrases):
        return np.zeros(len(occurrences.phrases), np.int64), np.zeros(len(occurrences.phrases), bool)
    places = np.minimum(np.searchsorted(phrases, occurrences.phrases), len(phrases) - 1)
    return places, phrases[places] == occurrences.phrases


def _fewest_trials(error_rate: float) -> int:
    """With fewer trials than this no sign test reaches the error rate."""
    return math.ceil(-math.log2(error_rate))


def _tarone_level(n_trials: Indices, error_rate: float) -> float:
    """The significance level for each test: `error_rate` over the number of tests that could reach that level.

    With n trials no sign test can fall below 2^-n.
    """
    smallest = np.sort(np.exp2(-n_trials.astype(float)))
    n_tests = np.arange(1, len(smallest) + 2)
    is_enough = np.searchsorted(smallest, error_rate / n_tests, side="right") <= n_tests
    return error_rate / int(n_tests[np.argmax(is_enough)])


def _marks(pairs: Indices, n_pairs: int) -> NDArray[np.bool_]:
    marks = np.zeros(n_pairs, bool)
    marks[pairs] = True
    return marks
