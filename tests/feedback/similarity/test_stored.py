"""Mining into the store finds the same pairs of similar thumbs, and they follow what users say."""

from __future__ import annotations

from random import Random

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from feedback.interactions import FeedbackEvent, Interaction
from feedback.mining import mine_alias, unpaired_examples
from feedback.pairs import mine_pairs
from feedback.store import load_pairs, mark_pairs_used
from pawl.database import Database
from tests.feedback.similarity.asking import NEAR, SKY, SKY_AGAIN, ask, asked_
from tests.feedback.test_mining import ALIAS, clear
from tests.feedback.test_pairs import down, events_, iid, tell, up
from tests.feedback.whole_history import whole_history
from tests.pawl.records import save


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(asked_, events_(), st.integers(0, 14), st.integers(1, 12), st.randoms(use_true_random=False))
def test_mining_part_by_part_gives_what_mining_all_at_once_does(
    database: Database,
    served: tuple[Interaction, ...],
    said: list[FeedbackEvent],
    n_yesterday: int,
    part_rows: int,
    random: Random,
) -> None:
    clear(database)
    save(database, random.sample(served, len(served)), said[:n_yesterday])
    mine_alias(database, ALIAS, 100.0, part_rows=part_rows, similarity=NEAR)
    before = {pair.id for pair in load_pairs(database, ALIAS)}
    save(database, [], said[n_yesterday:])
    whole = mine_pairs(*whole_history(database, ALIAS), similarity=NEAR)
    mined = mine_alias(database, ALIAS, 200.0, part_rows=part_rows, similarity=NEAR)
    after = {pair.id for pair in load_pairs(database, ALIAS)}
    assert list(load_pairs(database, ALIAS)) == list(whole.pairs)
    assert (mined.skipped, mined.n_pairs, mined.n_unpaired) == (
        {reason.value: n for reason, n in whole.skipped.items()},
        len(whole.pairs),
        len(whole.unpaired),
    )
    assert (mined.n_added, mined.n_withdrawn) == (len(after - before), len(before - after))
    assert unpaired_examples(database, ALIAS, part_rows=part_rows, similarity=NEAR) == whole.unpaired


def seed(database: Database) -> None:
    save(database, [ask(1, "a", SKY), ask(2, "b", SKY_AGAIN)], [up(8, 1), down(9, 2)])


def pair_sources(database: Database) -> list[str]:
    return [pair.source for pair in load_pairs(database, ALIAS)]


def test_each_part_for_itself_withdraws_nothing_that_two_parts_made(database: Database) -> None:
    seed(database)
    first = mine_alias(database, ALIAS, 100.0, part_rows=1, similarity=NEAR)
    again = mine_alias(database, ALIAS, 200.0, part_rows=1, similarity=NEAR)
    assert (first.by_source, first.n_added, first.skipped) == ({"similar_thumbs": 1}, 1, {})
    assert (again.n_pairs, again.n_added, again.n_withdrawn) == (1, 0, 0)


def test_a_thumb_that_is_taken_back_takes_the_pair_along(database: Database) -> None:
    seed(database)
    mine_alias(database, ALIAS, 100.0, similarity=NEAR)
    save(database, [], [tell(10, "thumbs", 2, None, is_retraction=True)])
    mined = mine_alias(database, ALIAS, 200.0, similarity=NEAR)
    assert (mined.n_withdrawn, pair_sources(database)) == (1, [])
    assert [one.interaction for one in unpaired_examples(database, ALIAS, similarity=NEAR)] == [iid(1)]


def test_without_similarity_such_pairs_go_unless_a_model_learned_from_them(database: Database) -> None:
    seed(database)
    mine_alias(database, ALIAS, 100.0, similarity=NEAR)
    assert mine_alias(database, ALIAS, 200.0).n_withdrawn == 1
    mine_alias(database, ALIAS, 300.0, similarity=NEAR)
    mark_pairs_used(database, [pair.id for pair in load_pairs(database, ALIAS)], "r0001")
    assert mine_alias(database, ALIAS, 400.0).n_withdrawn == 0
    assert pair_sources(database) == ["similar_thumbs"]
