"""Cutting a history into parts that mining can look at one at a time, with the same result as from all at once.

Mining relates two interactions only when they share a conversation, when one replaced the other, or when feedback on
one names the other. Interactions connected by such relations, directly or through others, stay together; what is not
connected may be mined apart. Only ids and hashes are needed for that, so a history is cut in about 300 bytes per
interaction that feedback touches, all in columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.bytes_]
Numbers = npt.NDArray[np.intp]
NOBODY = b""
"""In a column of ids: none."""


class History(NamedTuple):
    """Who is related to whom. Ids that are not among `interactions` are of no consequence."""

    interactions: Ids
    """Sorted, each once."""
    conversations: Ids
    """Of each interaction, what all that could be compared with it have too; `NOBODY` if nothing could be."""
    replaced: Ids
    """Of each interaction, the one that it was a second attempt at."""
    events: Ids
    """Live feedback."""
    rated: Ids
    """Of each event, the interaction it is about."""
    named: Ids
    """Of each event, the other interaction that its value names."""


class Part(NamedTuple):
    """Ids of interactions, and of the events about them, that nothing relates to what is in other parts."""

    interactions: list[str]
    events: list[str]


def cut(history: History, max_rows: int) -> Iterator[Part]:
    """The history in parts of at most `max_rows` interactions and events, except where a larger lot is connected.

    >>> ids = np.array([b"a", b"b", b"c"])
    >>> history = History(ids, np.array([b"x", b"y", b"x"]), np.array([b"", b"", b""]), *[np.array([], "S1")] * 3)
    >>> [part.interactions for part in cut(history, 1)]
    [['a', 'c'], ['b']]
    """
    groups = _components(history)
    about = _places(history.rated, history.interactions)
    events, about = history.events[about >= 0], about[about >= 0]
    event_groups = groups[about]
    parts = _pack(np.bincount(groups) + np.bincount(event_groups, minlength=_count(groups)), max_rows)
    yield from map(
        Part,
        _lots(history.interactions, parts[groups], _count(parts)),
        _lots(events, parts[event_groups], _count(parts)),
    )


def _components(history: History) -> Numbers:
    """The number of each interaction's connected component, counted in the order of the interactions."""
    # Slow to load, and parts are worked on in processes that cut nothing.
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    ids = history.interactions
    everyone = np.arange(len(ids))
    names, conversations = np.unique(history.conversations, return_inverse=True)
    edges = [
        _edges(np.where(history.conversations == NOBODY, -1, everyone), conversations + len(ids)),
        _edges(everyone, _places(history.replaced, ids)),
        _edges(_places(history.rated, ids), _places(history.named, ids)),
    ]
    here, there = np.concatenate(edges, axis=1)
    n_nodes = len(ids) + len(names)
    links = coo_matrix((np.ones(len(here), np.bool_), (here, there)), shape=(n_nodes, n_nodes))
    _, labels = connected_components(links, directed=False)
    return np.unique(labels[: len(ids)], return_inverse=True)[1]


def _edges(here: Numbers, there: Numbers) -> npt.NDArray[np.intp]:
    """Two rows: from, to. Edges with an end that is -1 are left out."""
    return np.stack([here, there])[:, (here >= 0) & (there >= 0)]


def _places(ids: Ids, among: Ids) -> Numbers:
    """Where each of `ids` stands in the sorted `among`; -1 if it does not."""
    if not len(among):
        return np.full(len(ids), -1)
    places = np.minimum(np.searchsorted(among, ids), len(among) - 1)
    return np.where(among[places] == ids, places, -1)


def _pack(sizes: Numbers, max_rows: int) -> Numbers:
    """The part of each component: in order, a new part when the next would not fit.

    >>> _pack(np.array([2, 2, 9, 1, 1]), 4).tolist()
    [0, 0, 1, 2, 2]
    """
    parts = np.empty(len(sizes), np.intp)
    part, n_rows = 0, 0
    for component, size in enumerate(sizes.tolist()):
        if n_rows and n_rows + size > max_rows:
            part, n_rows = part + 1, 0
        parts[component] = part
        n_rows += size
    return parts


def _count(numbers: Numbers) -> int:
    """How many numbers there are when they are counted from 0."""
    return int(numbers.max()) + 1 if len(numbers) else 0


def _lots(ids: Ids, parts: Numbers, n_parts: int) -> Iterator[list[str]]:
    """The ids of each part in turn."""
    order = np.argsort(parts, kind="stable")
    bounds = np.searchsorted(parts[order], np.arange(n_parts + 1)).tolist()
    for start, end in pairwise(bounds):
        yield [name.decode() for name in ids[order[start:end]].tolist()]
