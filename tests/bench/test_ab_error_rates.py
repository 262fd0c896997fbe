from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest

from ab_testing.analysis import Columns, analyse, ratio
from ab_testing.eprocess import HarmBet
from bench.ab_bets import HarmBets, UnequalBets, Witness, proof
from bench.ab_error_rates import MOST_NEW_EVENTS, median_events, rate, run_study, verdicts_on
from bench.ab_rivals import gbstats_sequential, sequence
from bench.ab_studies import AT_THE_MARGIN, NEVER, NEW_HARM, NULLS, Batch, Study, allowed
from bench.ab_sums import Cells, clustered_by_user
from bench.ab_worlds import (
    Clustered,
    Crossing,
    Latency,
    OneShot,
    Returning,
    Users,
)

_SIMS = 150


def _null(start: str) -> Study:
    return next(study for study in NULLS if study.name.startswith(start))


def _short(study: Study, per_look: int) -> Study:
    world = study.world
    assert isinstance(world, OneShot | Clustered | Returning | Crossing | Latency)
    return replace(study, world=replace(world, per_look=per_look))


@pytest.fixture(scope="module")
def clustered() -> Batch:
    return run_study(_short(_null("S2a"), 40), _SIMS, seed=1, proven=1)


def test_looking_all_the_time_does_not_roll_equal_canaries_back(clustered: Batch) -> None:
    for name in _null("S2a").judged:
        assert rate(clustered.firsts[name]) <= allowed(_SIMS), name


def test_the_tutorial_test_does_in_the_same_simulations(clustered: Batch) -> None:
    # The harness can see a wrong test: otherwise the limits above would mean nothing.
    assert rate(clustered.firsts["tutorial, per interaction"]) > 0.5
    assert rate(clustered.firsts["tutorial"]) > 2 * allowed(_SIMS)
    tutorial = replace(_null("S2a"), judged=("tutorial",))
    assert not any(verdict.holds for verdict in verdicts_on(tutorial, clustered.firsts))


@pytest.mark.parametrize(("start", "per_look"), [("S5 ramp 1-10-50 %, rate falls", 60), ("S9", 20), ("S3", 60)])
def test_ramps_crossing_users_and_long_tails_change_nothing(start: str, per_look: int) -> None:
    study = _short(_null(start), per_look)
    batch = run_study(study, _SIMS, seed=2, proven=1)
    assert all(verdict.holds for verdict in verdicts_on(study, batch.firsts))


def test_a_canary_at_the_margin_is_not_called_safe() -> None:
    study = _short(AT_THE_MARGIN[-1], 80)
    batch = run_study(study, _SIMS, seed=3, proven=1)
    assert rate(batch.firsts["margin bet"]) <= allowed(_SIMS)
    assert rate(batch.firsts["tutorial"]) > allowed(_SIMS)


def test_a_harm_that_the_control_never_has_is_noticed_within_five_events_and_never_by_gbstats() -> None:
    firsts = run_study(_short(NEW_HARM, 200), _SIMS, seed=4, proven=1).firsts
    assert median_events(firsts["canary"]) <= MOST_NEW_EVENTS
    assert rate(firsts["canary"]) > 0.95
    assert (firsts["gbstats"].look == NEVER).all()
    late = replace(NEW_HARM, judged=("gbstats",))
    assert not any(verdict.holds for verdict in verdicts_on(late, firsts))


def test_the_same_seed_gives_the_same_numbers() -> None:
    study = _short(_null("S2c"), 10)
    first, second = (run_study(study, 5, seed=6, proven=1).firsts for _ in range(2))
    assert _looks(first) == _looks(second)
    assert _looks(first) != _looks(run_study(study, 5, seed=7, proven=1).firsts)


def test_bets_that_differ_from_the_real_ones_are_refused() -> None:
    bets = HarmBets(1)
    users = Users(np.array([[True, False, True]]), np.array([[1.0, 0.0, 0.3]]), 0.4)
    bets.update(users)
    wealth = bets.log_wealth[0].tolist()
    assert proof([Witness(users, {"harm bet": wealth})], {"harm bet": HarmBet()}) < 1e-12
    wealth[3] += 1e-6
    with pytest.raises(UnequalBets, match="differs by"):
        proof([Witness(users, {"harm bet": wealth})], {"harm bet": HarmBet()})


def test_clustered_users_have_the_design_effect_that_was_asked_for() -> None:
    world = Clustered("clusters", 0.5, 200)
    *_, last = world.looks(np.random.default_rng(1), 20)
    control = last.right_unit.control
    assert control.d is not None
    of_independent_interactions = control.mean * (1 - control.mean) / control.d
    assert 2.0 < (control.variance / control.n / of_independent_interactions).mean() < 2.6


def test_crossing_users_are_reported_as_an_analysis_of_their_rows_reports_them() -> None:
    rng, users = np.random.default_rng(2), 400
    tries = [rng.poisson(1.5, (1, users)) for _ in range(2)]
    harms = [rng.binomial(n, 0.3) for n in tries]
    canary = [rng.random((1, users)) < 0.3]
    canary.append(canary[0] | (rng.random((1, users)) < 0.3))
    cells = [Cells(x.astype(float), n.astype(float), seen) for x, n, seen in zip(harms, tries, canary, strict=True)]
    ours = clustered_by_user(cells)

    table = {
        "user_id": np.tile(np.arange(users), 2),
        "variant": np.where(np.concatenate(canary, axis=1)[0], "treatment", "control"),
        "phase": np.repeat(["first", "second"], users),
        "harm": np.concatenate(harms, axis=1)[0],
        "tries": np.concatenate(tries, axis=1)[0],
    }
    report = analyse(table, [ratio("harm", "harm", "tries")], columns=Columns(stratum="phase"))
    effect = report.effect("harm")
    assert effect.estimate == pytest.approx(float(ours.difference[0]), abs=1e-12)
    assert effect.std_error == pytest.approx(float(np.sqrt(ours.variance[0])), rel=5e-3)


def test_rivals_are_silent_where_they_know_nothing() -> None:
    *_, last = NEW_HARM.world.looks(np.random.default_rng(3), 3)
    assert gbstats_sequential(last.right_unit).p_value.tolist() == [1.0] * 3
    assert sequence(last.report, 0.005, last.right_unit).p_value.tolist() == [1.0] * 3


def _looks(firsts: Mapping[str, object]) -> str:
    return repr(sorted(firsts.items()))
