"""How much one principal, one key and one prompt may say, whatever they say."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict, deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import chain
from typing import NamedTuple

from feedback.poisoning.evidence import Evidence
from feedback.poisoning.identities import Identities, key_of
from feedback.poisoning.reasons import Reason
from pawl.settings import CapSettings

Name = tuple[Reason, object]
"""What a bound is on: the kind of the bound, and the principal, prompt or key."""


class Bounds(NamedTuple):
    """The most pairs that a set may have from one principal and from one key."""

    per_principal: int
    per_key: int


def floods(evidence: Evidence, who: Identities, caps: CapSettings) -> list[bool]:
    """Of each pair, whether somebody behind it said so much within one window that none of it is taken."""
    spoken: defaultdict[str, list[tuple[float, int]]] = defaultdict(list)
    for index, pair in enumerate(evidence.pairs):
        for principal in pair.principals:
            spoken[principal].append((pair.created_at, index))
    is_flood = [False] * len(evidence.pairs)
    for principal, said in spoken.items():
        if len(said) > caps.flood and not who.is_trusted(principal):
            for index in _crowded(sorted(said), caps.flood, caps.window_s):
                is_flood[index] = True
    return is_flood


def _crowded(said: Sequence[tuple[float, int]], most: int, window_s: float) -> Iterator[int]:
    """What lies in any window that holds more than `most`."""
    for start in range(len(said) - most):
        if said[start + most][0] - said[start][0] < window_s:
            yield from (index for _, index in said[start : start + most + 1])


def over_cap(
    evidence: Evidence, candidates: Sequence[int], given: Sequence[int], who: Identities, caps: CapSettings
) -> dict[int, Reason]:
    """Which candidates find no room, and under which cap.

    What is given fills the caps as well and is never turned away: it is what reviewers and trusted principals stand by.
    """
    refused = _over_counts(evidence, candidates, given, who, caps)
    rest = [index for index in candidates if index not in refused]
    return refused | _over_shares(evidence, rest, given, who, caps)


def _over_counts(
    evidence: Evidence, candidates: Sequence[int], given: Sequence[int], who: Identities, caps: CapSettings
) -> dict[int, Reason]:
    """The caps that are numbers of pairs in any window. First come, first served, so that the past stays as it is."""
    limits = {
        Reason.SAME_PROMPT: caps.per_principal_and_prompt,
        Reason.PRINCIPAL_CAP: caps.per_principal,
        Reason.PROMPT_CAP: caps.per_prompt,
    }
    names_of = _crowded_names({index: list(_counted(evidence, index, who)) for index in (*candidates, *given)}, limits)
    taken: defaultdict[Name, deque[float]] = defaultdict(deque)
    is_given = set(given)
    refused: dict[int, Reason] = {}
    for index in sorted(names_of, key=lambda index: _turn(evidence, index)):
        at = evidence.pairs[index].created_at
        names = names_of[index]
        full = next((name[0] for name in names if _n_within(taken[name], at - caps.window_s) >= limits[name[0]]), None)
        if full is not None and index not in is_given:
            refused[index] = full
            continue
        for name in names:
            taken[name].append(at)
    return refused


def _crowded_names(names_of: Mapping[int, list[Name]], limits: Mapping[Reason, int]) -> dict[int, list[Name]]:
    """Of each pair that may find no room, the names that are on more pairs than there is room for: few are."""
    n_pairs = Counter(chain.from_iterable(names_of.values()))
    crowded = {name for name, n in n_pairs.items() if n > limits[name[0]]}
    found = ((index, [name for name in names if name in crowded]) for index, names in names_of.items())
    return {index: names for index, names in found if names}


def _draw(purpose: str, pair_id: str) -> bytes:
    """What decides between pairs where nothing else does."""
    return hashlib.blake2b(f"{purpose} {pair_id}".encode(), digest_size=16).digest()


def _turn(evidence: Evidence, index: int) -> tuple[float, bytes]:
    pair = evidence.pairs[index]
    return pair.created_at, _draw("turn", pair.id)


def _n_within(times: deque[float], since: float) -> int:
    """How many of the times, which are in order, are later than `since`; earlier ones are dropped."""
    while times and times[0] <= since:
        times.popleft()
    return len(times)


def _counted(evidence: Evidence, index: int, who: Identities) -> Iterator[Name]:
    pair, cluster = evidence.pairs[index], int(evidence.clusters[index])
    capped = [principal for principal in pair.principals if not who.is_trusted(principal)]
    yield from ((Reason.SAME_PROMPT, (principal, cluster)) for principal in capped)
    yield from ((Reason.PRINCIPAL_CAP, principal) for principal in capped)
    if capped:
        yield Reason.PROMPT_CAP, cluster


def _over_shares(
    evidence: Evidence, candidates: Sequence[int], given: Sequence[int], who: Identities, caps: CapSettings
) -> dict[int, Reason]:
    """The caps that are shares of the set: what they turn away makes the set smaller, so until nothing changes.

    Who finds room is drawn by hash, so that being early is worth nothing.
    """
    queue = sorted(candidates, key=lambda index: _draw("share", evidence.pairs[index].id))
    share = _key_share(evidence, who, caps)
    size = _attainable_size(evidence, [*queue, *given], who, share)
    names_of = {index: list(_shared(evidence.pairs[index].principals, who)) for index in (*queue, *given)}
    refused: dict[int, Reason] = {}
    while True:
        bounds = Bounds(max(caps.per_principal, int(caps.principal_share * size)), int(share * size))
        kept = [index for index in queue if index not in refused]
        refused |= _over_bounds(names_of, kept, given, bounds)
        left = len(queue) + len(given) - len(refused)
        if left >= size:
            return refused
        size = left


def _attainable_size(evidence: Evidence, indices: Sequence[int], who: Identities, share: float) -> int:
    """About how large the set is when no key has more than its share; from counts, since it can take many steps.

    A pair of several keys counts for the first alone, so that none is taken to be left out twice.
    """
    keys = (_first_key(evidence.pairs[index].principals, who) for index in indices)
    held = Counter(key for key in keys if key is not None)
    size = len(indices)
    while True:
        left = len(indices) - sum(max(0, n - int(share * size)) for n in held.values())
        if left >= size:
            return size
        size = left


def _first_key(principals: Collection[str], who: Identities) -> object:
    return next((key for reason, key in _shared(principals, who) if reason is Reason.KEY_CAP), None)


def _over_bounds(
    names_of: Mapping[int, list[Name]], queue: Sequence[int], given: Sequence[int], bounds: Bounds
) -> dict[int, Reason]:
    limits = {Reason.PRINCIPAL_CAP: bounds.per_principal, Reason.KEY_CAP: bounds.per_key}
    crowded = _crowded_names({index: names_of[index] for index in (*queue, *given)}, limits)
    taken = Counter(name for index in given for name in crowded.get(index, ()))
    refused: dict[int, Reason] = {}
    for index in queue:
        names = crowded.get(index, [])
        full = next((name[0] for name in names if taken[name] >= limits[name[0]]), None)
        if full is None:
            taken.update(names)
        else:
            refused[index] = full
    return refused


def _shared(principals: Collection[str], who: Identities) -> Iterator[Name]:
    yield from ((Reason.PRINCIPAL_CAP, each) for each in principals if not who.is_trusted(each))
    keys = {key_of(principal) for principal in principals}
    yield from ((Reason.KEY_CAP, key) for key in sorted(keys) if who.is_capped_key(key))


def _key_share(evidence: Evidence, who: Identities, caps: CapSettings) -> float:
    """The share that one key may have.

    Where every key is capped and there are few, `key_share` would leave no set at all: then a key may have twice its
    equal part. All pairs count for this, so that it changes nothing when those of others are held back.
    """
    keys = {key_of(principal) for pair in evidence.pairs for principal in pair.principals}
    is_feasible = bool(who.application_keys) or not all(who.is_capped_key(key) for key in keys)
    return caps.key_share if is_feasible else min(1.0, max(caps.key_share, 2 / max(1, len(keys))))
