"""Metrics of several processes as one: nothing counted twice, nothing that falls."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from monitoring import metrics
from monitoring.board import FIRST_PAGE, HEADER, NOBODY, PAGE_BYTES, Board, Families, Page
from monitoring.exposition import GAUGES, families_of, merged


@pytest.fixture
def board() -> Board:
    return Board.create()


def counting(*values: float) -> CollectorRegistry:
    """A process that has counted these, and has as many requests in flight."""
    registry = CollectorRegistry()
    counter = Counter("pawl_requests", "Requests.", ("model",), registry=registry)
    times = Histogram("pawl_request_duration_seconds", "Times.", buckets=(1.0, 2.0), registry=registry)
    Gauge("pawl_requests_in_flight", "Now.", registry=registry).set(len(values))
    Gauge("pawl_build_info", "One.", registry=registry).set(1)
    for value in values:
        counter.labels("assistant").inc()
        times.observe(value)
    return registry


def shown(own: CollectorRegistry, *others: Families) -> dict[str, float]:
    """Samples by name and labels, creation times left out."""
    return {
        sample.name + "".join(sample.labels.values()): sample.value
        for family in merged(own.collect(), others)
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def page(process: int, *values: float) -> Page:
    return Page(process, 0, families_of(counting(*values).collect()), [])


@given(st.lists(st.lists(st.floats(0, 3), max_size=5), min_size=1, max_size=4))
def test_counts_of_all_processes_are_added_up(processes: list[list[float]]) -> None:
    registries = [counting(*values) for values in processes]
    together = counting(*(value for values in processes for value in values))
    found = shown(registries[0], *(families_of(registry.collect()) for registry in registries[1:]))
    assert found == pytest.approx(shown(together))


def test_every_gauge_says_what_several_of_it_are() -> None:
    declared = {family.name for family in metrics.REGISTRY.collect() if family.type == "gauge"}
    assert declared == set(GAUGES), "give each gauge a line in monitoring.exposition.GAUGES"


def test_a_reader_sees_the_others_and_not_itself(board: Board) -> None:
    board.write(FIRST_PAGE, page(1, 0.5))
    board.write(FIRST_PAGE + 1, page(2, 0.5, 1.5))
    assert shown(counting(), *board.others(FIRST_PAGE))["pawl_requests_totalassistant"] == 2


def test_the_dead_keep_their_counts_and_lose_their_gauges(board: Board) -> None:
    board.write(FIRST_PAGE, page(1, 0.5))
    board.write(FIRST_PAGE + 1, page(2, 0.5, 1.5))
    for number in (FIRST_PAGE, FIRST_PAGE + 1):
        board.bury(number)
    found = shown(counting(), *board.others(FIRST_PAGE))
    assert found["pawl_requests_totalassistant"] == 3
    assert found["pawl_request_duration_seconds_bucket1.0"] == 2
    assert found["pawl_requests_in_flight"] == 0


def test_nothing_is_counted_twice_while_the_parent_buries(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    board.write(FIRST_PAGE, page(1, 0.5))
    with monkeypatch.context() as patched:
        patched.setattr(board, "clear", lambda _: None)  # As if it had not come to that yet.
        board.bury(FIRST_PAGE)
    assert shown(counting(), *board.others(FIRST_PAGE + 1))["pawl_requests_totalassistant"] == 1


def test_a_torn_page_is_left_out(board: Board) -> None:
    board.write(FIRST_PAGE, page(1, 0.5))
    assert board.read(FIRST_PAGE).process == 1
    os.pwrite(board.descriptor, b"half a page of another process", FIRST_PAGE * PAGE_BYTES + HEADER.size)
    assert board.read(FIRST_PAGE) == NOBODY


def test_who_has_not_answered_is_waited_for(board: Board) -> None:
    board.ask(7)
    assert board.asked() == 7
    board.write(FIRST_PAGE, Page(1, 6, {}, []))
    assert not board.has_answered(7, but=FIRST_PAGE + 1)
    board.write(FIRST_PAGE, Page(1, 7, {}, []))
    assert board.has_answered(7, but=FIRST_PAGE + 1)
