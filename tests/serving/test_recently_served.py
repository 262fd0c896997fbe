"""What was just served, known for a while."""

from __future__ import annotations

from serving.recently_served import MIN_KNOWN, RecentlyServed


def test_each_is_known_at_once_and_as_it_was() -> None:
    served = RecentlyServed()
    served.note("one", "assistant", "control")
    assert served.find("one") == ("assistant", "control")
    served.note("two", "helper", "treatment")
    assert served.find("two") == ("helper", "treatment")
    assert served.find("one") == ("assistant", "control")
    assert served.find("three") is None


def test_of_many_the_last_are_known_whether_any_was_asked_for_or_not() -> None:
    for every in (1, 7, 10 * MIN_KNOWN):
        served = RecentlyServed()
        for n in range(5 * MIN_KNOWN):
            served.note(str(n), "assistant", str(n))
            if n % every == 0:
                assert served.find(str(n)) == ("assistant", str(n))
            if n >= MIN_KNOWN and n % 500 == 0:
                assert all(served.find(str(m)) for m in range(n - MIN_KNOWN + 1, n + 1))
        n_known = sum(served.find(str(n)) is not None for n in range(5 * MIN_KNOWN))
        assert MIN_KNOWN <= n_known <= 2 * MIN_KNOWN
