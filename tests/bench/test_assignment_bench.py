"""The short form of `python -m bench.assignment`: its promises, over fewer users, and that it times every kind."""

from __future__ import annotations

from functools import partial

import pytest

from ab_testing.assignment import assign
from bench.assignment import check_donor, checks, cost_us, deviations, donors, routes


def test_every_promise_holds() -> None:
    found = checks(20_000)
    assert [check.name for check in found if not check.holds] == []
    assert [check.seen.startswith("10.") or check.seen.startswith("9.") for check in found[2:]] == [False, True]


def test_a_hash_would_break_the_promise_of_a_slot_table() -> None:
    assert not check_donor(5_000, "hash", donors(None), may_stray=False).holds


def test_every_kind_is_timed() -> None:
    for route in routes().values():
        assert cost_us(partial(assign, route), n_repeats=1) > 0


def test_deviations_are_those_of_a_coin() -> None:
    assert deviations(60, 100, 0.5) == pytest.approx(2.0)
