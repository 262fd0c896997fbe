import numpy as np
import pytest

from bench.ab_speed import Cost, gbstats_version, measure, outcomes, running_state, table_of


def test_every_cost_is_measured_and_shown_beside_its_target() -> None:
    costs = measure(1)
    assert [cost.target_us for cost in costs[:5]] == [100.0, 5.0, 40.0, None, 3.0]
    assert len(costs) == 5 + (gbstats_version() is not None)
    assert all(0 < cost.best_us <= cost.median_us for cost in costs)
    lines = table_of([*costs, Cost("idle", 1.0, 2.0, None)]).splitlines()
    assert len(lines) == len(costs) + 2
    assert lines[-1].split() == ["idle", "1.00", "2.00", "-"]
    assert [Cost("it", best, 9.0, limit).is_cheap for best, limit in ((3.0, 3.0), (3.1, 3.0), (5.0, None))] == [
        True, False, True,
    ]  # fmt: skip


def test_an_update_does_not_cost_more_the_longer_a_canary_runs() -> None:
    """The state is as large after 2,000 users as after one."""
    users = outcomes(2000, np.random.default_rng(1))
    sizes = [len(repr(running_state(users[:n]).to_json()).split()) for n in (10, 2000)]
    assert sizes[0] == pytest.approx(sizes[1], abs=2)
