"""Cutting a history: nothing is lost, nothing that belongs together is torn apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from feedback.partitions import History, Part, cut


class Served(NamedTuple):
    conversation: str
    replaced: str


class Said(NamedTuple):
    about: str
    named: str


NAMES = st.sampled_from([f"i{number:02}" for number in range(16)])
"""Some of them are nobody's."""
CONVERSATIONS = st.sampled_from(["", "", "hello", "sky", "grass"])
served_ = st.dictionaries(NAMES, st.builds(Served, CONVERSATIONS, st.sampled_from(["", ""]) | NAMES), max_size=12)
said_ = st.lists(st.builds(Said, NAMES, st.sampled_from(["", ""]) | NAMES), max_size=12)


def column(texts: Sequence[str]) -> np.ndarray[tuple[int], np.dtype[np.bytes_]]:
    return np.array(texts, "S8")


def history_of(served: dict[str, Served], said: Sequence[Said]) -> History:
    known = sorted(served)
    return History(
        column(known),
        column([served[name].conversation for name in known]),
        column([served[name].replaced for name in known]),
        column([f"e{number}" for number in range(len(said))]),
        column([one.about for one in said]),
        column([one.named for one in said]),
    )


def related(served: dict[str, Served], said: Sequence[Said]) -> set[frozenset[str]]:
    """The definition in the module's docstring, pair by pair."""
    named = {frozenset((one.about, one.named)) for one in said}
    replaced = {frozenset((name, one.replaced)) for name, one in served.items()}
    shared = {
        frozenset((one, other))
        for one in served
        for other in served
        if served[one].conversation and served[one].conversation == served[other].conversation
    }
    return {pair for pair in named | replaced | shared if pair <= served.keys()}


def connected_to(name: str, pairs: set[frozenset[str]]) -> set[str]:
    found, before = {name}, 0
    while len(found) > before:
        before = len(found)
        found |= {each for pair in pairs if pair & found for each in pair}
    return found


def rows_of(part: Part) -> int:
    return len(part.interactions) + len(part.events)


@given(served_, said_, st.integers(1, 30))
def test_everything_is_in_one_part(served: dict[str, Served], said: list[Said], max_rows: int) -> None:
    parts = list(cut(history_of(served, said), max_rows))
    assert sorted(name for part in parts for name in part.interactions) == sorted(served)
    wanted = sorted(f"e{number}" for number, one in enumerate(said) if one.about in served)
    assert sorted(name for part in parts for name in part.events) == wanted


@given(served_, said_, st.integers(1, 30))
def test_what_is_related_stays_together(served: dict[str, Served], said: list[Said], max_rows: int) -> None:
    parts = list(cut(history_of(served, said), max_rows))
    place = {name: number for number, part in enumerate(parts) for name in part.interactions}
    assert all(len({place[name] for name in pair}) == 1 for pair in related(served, said))
    for number, part in enumerate(parts):
        assert {place[said[int(name[1:])].about] for name in part.events} <= {number}


@given(served_, said_, st.integers(1, 30))
def test_only_what_is_connected_makes_a_large_part(served: dict[str, Served], said: list[Said], max_rows: int) -> None:
    pairs = related(served, said)
    for part in cut(history_of(served, said), max_rows):
        assert part.interactions
        if rows_of(part) > max_rows:
            assert connected_to(part.interactions[0], pairs) == set(part.interactions)


def test_a_chain_of_relations_is_one_part() -> None:
    """a replaced b, b shares its conversation with c, and feedback on c names d."""
    served = {
        "a": Served("", "b"),
        "b": Served("sky", ""),
        "c": Served("sky", ""),
        "d": Served("", ""),
        "e": Served("", ""),
    }
    parts = list(cut(history_of(served, [Said("c", "d"), Said("e", "x")]), 1))
    assert parts == [Part(["a", "b", "c", "d"], ["e0"]), Part(["e"], ["e1"])]


def test_nothing_is_cut_into_nothing() -> None:
    assert list(cut(history_of({}, [Said("a", "b")]), 10)) == []
