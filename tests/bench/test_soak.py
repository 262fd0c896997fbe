"""When a soak has found something that grows; the soak itself takes twenty minutes."""

from __future__ import annotations

import pytest

from bench.soak import Floor, Look, Outcome, fit, floor_of

LOOK_EVERY_S = 5.0
AN_HOUR = 3600 / LOOK_EVERY_S


def outcome_of(descriptors: list[int], mb_per_h: float = 0.0) -> Outcome:
    """Of a run in which everything but memory and descriptors stayed as it was."""
    looks = [
        Look(number * LOOK_EVERY_S, 100 + mb_per_h * number / AN_HOUR, 150.0, 14, each)
        for number, each in enumerate(descriptors)
    ]
    return Outcome(
        minutes=len(looks) * LOOK_EVERY_S / 60,
        whole_per_s=100.0,
        streams_per_s=10.0,
        answered=1_000,
        abandoned=100,
        statuses={"200": 1_000},
        engine_failures=50,
        unexpected=0,
        core_share=0.3,
        worker_mb_first=looks[0].worker_mb,
        worker_mb_last=looks[-1].worker_mb,
        slope_mb_per_h=fit([(look.at_s, look.worker_mb) for look in looks]).mb_per_h,
        slope_standard_error=0.0,
        all_slope_mb_per_h=0.0,
        threads=(14, 14),
        descriptors=(min(descriptors), max(descriptors)),
        descriptors_floor=floor_of([(look.at_s, look.descriptors) for look in looks]),
        looks=tuple(looks),
    )


def test_requests_that_piled_up_and_went_away_are_no_leak() -> None:
    assert outcome_of([60] * 80 + [950] * 60 + [70, 60] * 50).is_faultless
    assert outcome_of([950] * 150 + [70, 60] * 45).is_faultless


@pytest.mark.parametrize("per_look", [0.15, 1.0])
def test_descriptors_that_are_never_closed_are(per_look: float) -> None:
    assert not outcome_of([60 + number % 7 + int(number * per_look) for number in range(180)]).is_faultless


def test_growing_memory_is_told_by_its_slope() -> None:
    assert outcome_of([60] * 180, mb_per_h=0.9).is_faultless
    assert not outcome_of([60] * 180, mb_per_h=1.1).is_faultless


def test_the_fewest_before_and_at_the_end() -> None:
    assert floor_of([(0.0, 60), (10.0, 70), (20.0, 80), (30.0, 90)]) == Floor(before=60, at_the_end=80)
