"""Verdicts among the other candidates of mining: the promises as properties, all at once and part by part."""

from __future__ import annotations

from random import Random
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from feedback.candidates import Source, Verdict
from feedback.interactions import FeedbackEvent, Interaction
from feedback.judged.reply import SideScores
from feedback.judged.rulings import Outcome, Ruling
from feedback.judged.verdict_store import Heard, Judging, save_verdict
from feedback.mining import mine_alias
from feedback.pairs import mine_pairs
from feedback.store import load_pairs
from pawl.database import Database
from pawl.schema import feedback_events, interactions, judge_verdicts, pairs
from tests.feedback.test_pairs import N_KNOWN, events_, iid, interactions_
from tests.feedback.whole_history import whole_history
from tests.pawl.records import save

ALIAS = "assistant"
NUMBERS = st.integers(0, N_KNOWN - 1)
SCORES = {"kind": SideScores(0.5, 0.5)}


@st.composite
def verdicts_(draw: st.DrawFn) -> list[Verdict]:
    """Of any two interactions one at most."""
    sides = draw(st.sets(st.frozensets(NUMBERS, min_size=2, max_size=2), max_size=6))
    found = []
    for first, second in (sorted(each) for each in sorted(sides, key=sorted)):
        winner = draw(st.sampled_from([None, iid(first), iid(second)]))
        margin = draw(st.sampled_from([0.1, 0.5, 1.0])) if winner else 0.0
        found.append(Verdict(iid(first), iid(second), winner, margin))
    return found


@settings(max_examples=60)
@given(interactions_, events_(), verdicts_(), st.sampled_from([0.0, 0.3]))
def test_every_verdict_is_a_pair_or_counted_once(
    served: tuple[Interaction, ...], said: list[FeedbackEvent], verdicts: list[Verdict], least: float
) -> None:
    without = mine_pairs(served, said)
    mined = mine_pairs(served, said, verdicts, min_judged_margin=least)
    n_candidates = len(without.pairs) + without.skipped.total() + len(verdicts)
    assert len(mined.pairs) + mined.skipped.total() == n_candidates
    people = [pair for pair in mined.pairs if pair.source != Source.JUDGE]
    assert (people, mined.unpaired) == (list(without.pairs), without.unpaired), "a verdict takes nothing from people"


@settings(max_examples=60)
@given(interactions_, events_(), verdicts_(), st.sampled_from([0.0, 0.3]))
def test_every_judged_pair_keeps_its_promises(
    served: tuple[Interaction, ...], said: list[FeedbackEvent], verdicts: list[Verdict], least: float
) -> None:
    mined = mine_pairs(served, said, verdicts, min_judged_margin=least)
    known = {one.id: one for one in served}
    won = {(one.winner, one.first, one.second): one.margin for one in verdicts}
    for pair in mined.pairs:
        if pair.source != Source.JUDGE:
            continue
        assert pair.chosen_interaction is not None
        sides = sorted((pair.chosen_interaction, pair.rejected_interaction))
        assert pair.margin == won[pair.chosen_interaction, sides[0], sides[1]] >= least
        both = [known[side] for side in sides]
        assert pair.principals == tuple(sorted({f"{one.key_id}/{one.user_id or ''}" for one in both}))
        assert pair.created_at == max(one.created_at for one in both)
        assert all(one.is_stored and one.is_complete and one.prompt == pair.prompt for one in both)


@settings(max_examples=40)
@given(interactions_, events_(), verdicts_(), st.randoms(use_true_random=False))
def test_order_and_repetition_change_nothing(
    served: tuple[Interaction, ...], said: list[FeedbackEvent], verdicts: list[Verdict], random: Any
) -> None:
    shuffled = [[*served, *served[:2]], [*said, *said[:2]], [*verdicts, *verdicts[:2]]]
    for each in shuffled:
        random.shuffle(each)
    again = mine_pairs(*shuffled, min_judged_margin=0.3)  # type: ignore[arg-type]
    assert repr(again) == repr(mine_pairs(served, said, verdicts, min_judged_margin=0.3))


def keep(database: Database, verdict: Verdict) -> bool:
    lead = verdict.margin if verdict.winner == verdict.first else -verdict.margin
    ruling = Ruling(Outcome.PREFERRED if verdict.winner else Outcome.DISAGREED, lead)
    heard = Heard(ruling, SCORES, SCORES, 1, 50.0)
    return save_verdict(database, ALIAS, "0" * 64, (verdict.first, verdict.second), heard, Judging("judge", "0" * 64))


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(interactions_, events_(), verdicts_(), st.integers(1, 12), st.randoms(use_true_random=False))
def test_mining_part_by_part_gives_what_mining_all_at_once_does(
    database: Database,
    served: tuple[Interaction, ...],
    said: list[FeedbackEvent],
    verdicts: list[Verdict],
    part_rows: int,
    random: Random,
) -> None:
    with database.write() as connection:
        for table in (interactions, feedback_events, pairs, judge_verdicts):
            connection.execute(table.delete())
    save(database, random.sample(served, len(served)), said)
    kept = [verdict for verdict in verdicts if keep(database, verdict)]
    aliases = {one.id: one.alias for one in served}
    ours = [verdict for verdict in kept if aliases[verdict.first] == ALIAS]
    whole = mine_pairs(*whole_history(database, ALIAS), ours, min_judged_margin=0.3)
    mined = mine_alias(database, ALIAS, 100.0, min_judged_margin=0.3, part_rows=part_rows)
    assert load_pairs(database, ALIAS) == list(whole.pairs)
    assert mined.skipped == whole.skipped
    assert mined.n_pairs == len(whole.pairs)
