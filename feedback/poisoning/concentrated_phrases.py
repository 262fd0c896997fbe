"""Phrases that few parties teach: found by exact paired tests, and by a cap for what is too rare to be tested.

Occurrences are looked at in slices, each of all phrases whose hashes begin alike: what is held at once besides the
evidence is a few arrays of one slice. Whether a phrase is in the hands of a few is found by bounds first and by
counting where these leave it open.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from feedback.poisoning.evidence import PAIR_BITS, PHRASE_BITS, Evidence, Occurrences, first_places
from feedback.poisoning.words import Hashes, Indices, sorted_hashes
from pawl.settings import PhraseSettings

MOST = 0.8
"""A phrase is in the hands of a few when they are behind this share of the pairs that have it. Not all of them: one
honest user who quotes it, or whom somebody gets to say it, must not hide it."""
SLICE = 1 << 19
"""About as many occurrences are looked at at once."""
MOST_COUNTERS = 8
"""For each occurrence; with more of them sorting takes less than counting."""
THREADS = 2
"""Slices that are looked at at once: with more of them more is held."""
Marks = NDArray[np.bool_]
Found = TypeVar("Found")


class Membership(NamedTuple):
    """Who is behind each pair, as numbers."""

    starts: Indices
    """Where the members of each pair begin; one more than there are pairs."""
    members: Indices

    def sizes(self) -> Indices:
        """How many members each pair has."""
        return np.diff(self.starts)

    def are_by_busy(self, limit: int) -> Marks:
        """Of each pair, whether somebody behind it is behind more than `limit` pairs."""
        is_busy = np.bincount(self.members, minlength=1) > limit
        pairs = np.repeat(np.arange(len(self.starts) - 1), self.sizes())
        return np.bincount(pairs[is_busy[self.members]], minlength=len(self.starts) - 1) > 0

    def most_by(self, n_members: int) -> int:
        """How many pairs those few who are behind most have between them, at most."""
        return int(np.sort(np.bincount(self.members, minlength=1))[::-1][:n_members].sum())


def membership(groups: Sequence[Sequence[str]]) -> Membership:
    """Number the names in `groups`, one group for each pair."""
    names = {name: number for number, name in enumerate(sorted({name for group in groups for name in group}))}
    sizes = np.array([len(group) for group in groups], dtype=np.int64)
    members = np.array([names[name] for group in groups for name in group], dtype=np.int64)
    return Membership(np.concatenate([[0], np.cumsum(sizes)]), members)


def overrepresented(
    evidence: Evidence, parties: Membership, settings: PhraseSettings, *, chance: float = 1 / 2
) -> Marks:
    """Of each pair, whether it teaches a phrase that a few parties push.

    Under the null hypothesis a phrase that is in one side of a pair only is as likely to be in the other: the sign
    test. Only phrases that a few parties have in their hands are tested, and Tarone's correction (1990,
    Biometrics 46:515) leaves out those too rare to be significant at all, so that the chance of a single false finding
    among all of them is at most `error_rate`.

    Args:
        chance: how probable the chosen side is where it is not as likely as the other.
    """
    at_least = _fewest_trials(settings.error_rate, chance)
    few = _Few.of(parties, evidence.clusters, settings)
    # Decided by the pairs of either side together, so that it tells nothing of which side the phrase is on.

    def test(every: _Runs) -> _Tests:
        runs = every.chosen(every.counts >= at_least)
        return _tests(runs.chosen(few.hold(runs)), settings, chance)

    tests = _of_slices(test, evidence, evidence.taught, evidence.untaught)
    level = _tarone_level(np.concatenate([[0], *(each.n_trials for each in tests)])[1:], settings.error_rate, chance)
    return _marks((each.pairs[each.p_values <= level] for each in tests), len(evidence.pairs))


class _Tests(NamedTuple):
    """What a slice has to say in the end, when it is known how many tests there are."""

    n_trials: Indices
    """Of each phrase that is tested."""
    pairs: Indices
    """Those that teach a phrase that is strong enough,"""
    p_values: NDArray[np.float64]
    """and the phrase's."""


def _tests(runs: _Runs, settings: PhraseSettings, chance: float) -> _Tests:
    from scipy.special import betainc  # Slow to load, and texts are read in processes that judge nothing.

    n_taught = runs.n_taught()
    n_untaught = runs.counts - n_taught
    p_values = betainc(n_taught, n_untaught + 1, chance)  # P(Binomial(n, chance) >= n_taught)
    is_strong = (n_taught + 0.5) / (n_untaught + 0.5) >= settings.min_ratio
    is_found = is_strong & (p_values <= settings.error_rate)  # The level is lower.
    found = runs.chosen(is_found)
    return _Tests(
        runs.counts, found.pairs[found.is_taught], np.repeat(p_values[is_found], found.counts)[found.is_taught]
    )


class _Few(NamedTuple):
    """Which phrases a few parties have in their hands.

    A phrase that goes with one prompt may well be the right answer to it, and liked by all who asked. One that turns up
    after all kinds of prompts, and in no rejected answer, is a habit: more than a few have to like that.
    """

    parties: Membership
    clusters: Membership
    n_near: int
    """The most that are a few, for phrases that go with one prompt,"""
    n_spread: int
    """and for those that do not."""

    @classmethod
    def of(cls, parties: Membership, clusters: Indices, settings: PhraseSettings) -> _Few:
        of_all = math.ceil(settings.few_share * len(np.unique(parties.members)))
        alone = Membership(np.arange(len(clusters) + 1), clusters)
        return cls(parties, alone, settings.few_parties - 1, max(settings.few_parties, of_all) - 1)

    def hold(self, runs: _Runs) -> Marks:
        """Of each phrase, whether they do."""
        is_held: Marks = self.parties.most_by(self.n_spread) / runs.counts >= MOST
        if self.n_spread == self.n_near or not is_held.any():
            return _narrowed(is_held, runs, lambda rest: _have_share(rest, self.parties, self.n_near, MOST))
        is_near = np.zeros(len(is_held), bool)
        is_near[is_held] = _have_share(runs.chosen(is_held), self.clusters, 1, 1 / 2)
        near = _narrowed(is_held & is_near, runs, lambda rest: _have_share(rest, self.parties, self.n_near, MOST))
        spread = _narrowed(is_held & ~is_near, runs, lambda rest: _have_share(rest, self.parties, self.n_spread, MOST))
        return near | spread


def repeated(evidence: Evidence, principals: Membership, settings: PhraseSettings) -> Marks:
    """Of each pair, whether it is one of more than `max_per_principal` by the same principal with the same rare phrase.

    No test: so few pairs prove nothing, and so many from one principal would be enough to teach the phrase.
    """
    limit, n_few = settings.max_per_principal, settings.few_parties - 1
    is_by_busy, at_most = principals.are_by_busy(limit), principals.most_by(n_few)

    def find(runs: _Runs) -> Indices:
        # All that a principal has of a phrase, it has of pairs: nobody else is behind enough of them.
        n_by_busy = _sums(is_by_busy[runs.pairs], runs.starts())
        rest = runs.chosen((n_by_busy > limit) & (at_most / runs.counts >= MOST))
        return _held_by_one(rest.chosen(_have_share(rest, principals, n_few, MOST)), principals, limit)

    found = _of_slices(find, evidence, evidence.taught) + _of_slices(find, evidence, evidence.asked)
    return _marks(found, len(evidence.pairs))


def _held_by_one(runs: _Runs, principals: Membership, limit: int) -> Indices:
    """The pairs of principals who have more than `limit` with the same phrase."""
    held = _holdings(runs, principals)
    return held.pairs[np.repeat(held.counts > limit, held.counts)]


class _Runs(NamedTuple):
    """Occurrences sorted by phrase, of at least one phrase."""

    counts: Indices
    """In how many pairs each phrase is."""
    pairs: Indices
    """The pairs of the first phrase, then those of the second, and so on."""
    is_taught: Marks
    """Of each of these, whether it teaches the phrase."""

    @classmethod
    def of(cls, ordered: Hashes, pair_bits: int) -> _Runs:
        """Read from phrases above the numbers of pairs above one bit, which is set where the phrase is not taught."""
        counts = np.diff(first_places(ordered >> np.uint64(pair_bits + 1)), append=len(ordered))
        pairs = (ordered >> np.uint64(1)) & np.uint64((1 << pair_bits) - 1)
        return cls(counts, pairs.astype(np.int64), (ordered & np.uint64(1)) == 0)

    def starts(self) -> Indices:
        """Where the pairs of each phrase begin."""
        return np.cumsum(self.counts) - self.counts

    def chosen(self, is_chosen: Marks) -> _Runs:
        is_kept = np.repeat(is_chosen, self.counts)
        return _Runs(self.counts[is_chosen], self.pairs[is_kept], self.is_taught[is_kept])

    def n_taught(self) -> Indices:
        """How many pairs teach each phrase."""
        return _sums(self.is_taught, self.starts())


def _of_slices(look: Callable[[_Runs], Found], evidence: Evidence, *sides: Occurrences) -> list[Found]:
    """What is found in all occurrences, some of the phrases at a time; those of the first side are taken for taught.

    In threads, for most of the time goes into sorting, which lets others run.
    """
    parts = [(part, side) for side, occurrences in enumerate(sides) for part in occurrences]
    pair_bits = len(evidence.pairs).bit_length()
    n_occurrences = sum(len(part.packed) for part, _ in parts)
    # What all phrases of a slice begin with is left out, and that makes room for the number of the pair.
    n_bits = max((n_occurrences // SLICE).bit_length(), pair_bits + 1 + PHRASE_BITS - 64)
    edges = np.arange(1, 1 << n_bits, dtype=np.uint64) << np.uint64(PHRASE_BITS + PAIR_BITS - n_bits)
    bounds = [(0, *np.searchsorted(part.packed, edges).tolist(), len(part.packed)) for part, _ in parts]
    lows = np.array([part.first << 1 | side for part, side in parts], np.uint64)

    def look_at(number: int) -> list[Found]:
        spans = [slice(*bound[number : number + 2]) for bound in bounds]
        keys = _keys([part.packed[at] for (part, _), at in zip(parts, spans, strict=True)], lows, pair_bits)
        keys = sorted_hashes(keys, PHRASE_BITS + pair_bits + 1 - n_bits)
        return [look(_Runs.of(keys, pair_bits))] if len(keys) else []

    with ThreadPoolExecutor(THREADS) as pool:
        return list(chain.from_iterable(pool.map(look_at, range(1 << n_bits))))


def _keys(packed: Sequence[Hashes], lows: Hashes, pair_bits: int) -> Hashes:
    """The occurrences of a slice as `_Runs.of` reads them when they are sorted.

    Args:
        lows: of each part of `packed`, the number of its first pair above the bit of its side.
    """
    joined = np.concatenate([np.empty(0, np.uint64), *packed])
    keys: Hashes = joined >> np.uint64(PAIR_BITS) << np.uint64(pair_bits + 1)
    keys |= ((joined & np.uint64((1 << PAIR_BITS) - 1)) << np.uint64(1)) + np.repeat(lows, [len(p) for p in packed])
    return keys


class _Holdings(NamedTuple):
    """Who has how many of the pairs of each phrase."""

    phrases: Indices
    """The number of the phrase, in ascending order, once for each of its holders."""
    counts: Indices
    """How many of its pairs the holder is behind."""
    pairs: Indices
    """Each pair of the first holder of the first phrase, and so on."""


def _holdings(runs: _Runs, holders: Membership) -> _Holdings:
    """With pairs; for few phrases."""
    phrases, members, pairs = _held(runs, holders)
    order = np.lexsort((members, phrases))
    starts = np.flatnonzero(np.diff(phrases[order], prepend=-1) | np.diff(members[order], prepend=-1))
    return _Holdings(phrases[order][starts], np.diff(starts, append=len(order)), pairs[order])


def _held(runs: _Runs, holders: Membership) -> tuple[Indices, Indices, Indices]:
    """The phrase, the holder and the pair of each occurrence, once for each who is behind the pair."""
    phrases = np.repeat(np.arange(len(runs.counts)), runs.counts)
    sizes = holders.sizes()[runs.pairs]
    if (sizes == 1).all():
        return phrases, holders.members[holders.starts[runs.pairs]], runs.pairs
    firsts = np.repeat(holders.starts[runs.pairs] - np.cumsum(sizes) + sizes, sizes)
    members = holders.members[firsts + np.arange(len(firsts))]
    return np.repeat(phrases, sizes), members, np.repeat(runs.pairs, sizes)


def _have_share(runs: _Runs, holders: Membership, n_top: int, share: float) -> Marks:
    """Of each phrase, whether its `n_top` largest holders have at least this share of its pairs between them."""
    n_held = _sums(holders.sizes()[runs.pairs], runs.starts())
    # Where there are no more holdings than that, all holders are among the largest.
    is_had: Marks = n_held / runs.counts >= share
    return _narrowed(is_had & (n_held > n_top), runs, lambda rest: _top_have(rest, holders, n_top, share)) | (
        is_had & (n_held <= n_top)
    )


def _top_have(runs: _Runs, holders: Membership, n_top: int, share: float) -> Marks:
    """As `_have_share`, by counting."""
    phrases, members, _ = _held(runs, holders)
    n_members = int(holders.members.max()) + 1
    held, counts = _counted(phrases * n_members + members, len(runs.counts) * n_members)
    owners = held // n_members
    most = np.maximum.reduceat(counts, np.searchsorted(owners, np.arange(len(runs.counts))))
    is_had: Marks = most * n_top / runs.counts >= share
    is_open = is_had[owners]
    tops = _sums_of_largest(owners[is_open], counts[is_open], n_top, len(is_had))
    return is_had & (tops / runs.counts >= share)


def _counted(values: Indices, bound: int) -> tuple[Indices, Indices]:
    """Each value in ascending order, and how often it comes; all are below `bound`.

    >>> [each.tolist() for each in _counted(np.array([7, 2, 7]), 1 << 40)]
    [[2, 7], [1, 2]]
    """
    if bound <= MOST_COUNTERS * len(values):
        counts = np.bincount(values)
        found = np.flatnonzero(counts)
        return found, counts[found]
    ordered = np.sort(values)
    places = np.flatnonzero(np.diff(ordered, prepend=-1))
    return ordered[places], np.diff(places, append=len(ordered))


def _sums_of_largest(groups: Indices, values: Indices, n_top: int, n_groups: int) -> Indices:
    """The sum of the `n_top` largest values of each group.

    >>> _sums_of_largest(np.array([0, 0, 0, 2]), np.array([5, 1, 7, 3]), 2, 3).tolist()
    [12, 0, 3]
    """
    highest = 1 << 32
    ordered = np.sort(groups * highest + (highest - 1 - values))
    owners = ordered // highest
    is_top = np.arange(len(owners)) - np.searchsorted(owners, owners) < n_top
    largest = highest - 1 - ordered[is_top] % highest
    return np.bincount(owners[is_top], weights=largest, minlength=n_groups).astype(np.int64)


def _narrowed(is_open: Marks, runs: _Runs, decide: Callable[[_Runs], Marks]) -> Marks:
    """What is decided of the phrases that are open; no for the others."""
    decided = np.zeros(len(is_open), bool)
    if is_open.any():
        decided[is_open] = decide(runs.chosen(is_open))
    return decided


def _sums(values: Marks | Indices, starts: Indices) -> Indices:
    """Of the values from each start to the next."""
    return np.add.reduceat(values, starts, dtype=np.int64) if len(starts) else np.empty(0, np.int64)


def _fewest_trials(error_rate: float, chance: float) -> int:
    """With fewer trials than this no test reaches the error rate."""
    return math.ceil(math.log2(error_rate) / math.log2(chance))


def _tarone_level(n_trials: Indices, error_rate: float, chance: float) -> float:
    """The significance level for each test: `error_rate` over the number of tests that could reach that level.

    With n trials no test can fall below chance^n.
    """
    smallest = np.sort(np.exp2(n_trials * math.log2(chance)))
    n_tests = np.arange(1, len(smallest) + 2)
    is_enough = np.searchsorted(smallest, error_rate / n_tests, side="right") <= n_tests
    return error_rate / int(n_tests[np.argmax(is_enough)])


def _marks(pairs: Iterable[Indices], n_pairs: int) -> Marks:
    marks = np.zeros(n_pairs, bool)
    for some in pairs:
        marks[some] = True
    return marks
