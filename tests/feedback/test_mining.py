"""Mining into the store: it follows what users say now, and what a model has learned from stays."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from feedback import mining, stored_pairs
from feedback.interactions import FeedbackEvent, Interaction
from feedback.mining import mine_alias, unpaired_examples
from feedback.pairs import mine_pairs
from feedback.store import count_pairs, delete_texts, list_pairs, load_pairs, mark_pairs_used
from pawl.database import Database
from pawl.schema import feedback_events, interactions, pairs
from tests.feedback.test_pairs import events_, interactions_
from tests.feedback.whole_history import whole_history
from tests.pawl.records import feedback, interaction_id, save, served, thumb

ALIAS = "assistant"


def seed(database: Database) -> None:
    """Two questions with a liked and a disliked answer each, and one liked answer that stands alone."""
    interactions = [
        *(served(number, question="Why is the sky blue?") for number in (1, 2)),
        *(served(number, question="Why is grass green?") for number in (3, 4)),
        served(5, question="Why is snow white?"),
        served(6, question="Why is the sky blue?", alias="helper"),
    ]
    thumbs = [thumb(1, "up"), thumb(2, "down"), thumb(3, "up"), thumb(4, "down"), thumb(5, "up"), thumb(6, "down")]
    save(database, interactions, thumbs)


def sides(database: Database, *, used: bool | None = None) -> list[tuple[str | None, str]]:
    return sorted(
        (pair.chosen_interaction or "", pair.rejected_interaction) for pair in load_pairs(database, ALIAS, used=used)
    )


SKY = (interaction_id(1), interaction_id(2))
GRASS = (interaction_id(3), interaction_id(4))


def test_what_was_found_is_told_and_kept(database: Database) -> None:
    seed(database)
    mined = mine_alias(database, ALIAS, 100.0)
    assert (mined.n_pairs, mined.n_added, mined.n_withdrawn, mined.n_unpaired) == (2, 2, 0, 1)
    assert mined.by_source == {"thumbs": 2}
    assert mined.skipped == {"unpaired": 1}
    assert sides(database) == [SKY, GRASS]
    assert count_pairs(database) == {"thumbs": 2}


def test_a_text_that_is_erased_before_its_pair_is_written_makes_none(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    seed(database)
    save(database, [], [feedback(interaction_id(2), "edit", "wanted", created_at=9.0)])
    drafting = stored_pairs.draft

    def draft_and_erase(*given: Any, **named: Any) -> Any:
        drafts = drafting(*given, **named)
        delete_texts(database, interaction_id(2), {})
        return drafts

    monkeypatch.setattr(mining, "draft", draft_and_erase)
    mined = mine_alias(database, ALIAS, 200.0)
    assert (mined.n_added, mined.skipped) == (1, {"not_stored": 2, "unpaired": 1})
    assert sides(database) == [GRASS]


@pytest.mark.parametrize("room", [0, 500, 1 << 20])
def test_pairs_are_the_same_however_many_texts_are_kept(
    database: Database, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    monkeypatch.setattr(mining, "KEPT_CHARS", room)
    seed(database)
    save(database, [], [feedback(interaction_id(2), "edit", "wanted", created_at=9.0)])
    assert mine_alias(database, ALIAS, 100.0).n_added == 3
    assert load_pairs(database, ALIAS) == list(mine_pairs(*whole_history(database, ALIAS)).pairs)


def test_mining_twice_changes_nothing(database: Database) -> None:
    seed(database)
    mine_alias(database, ALIAS, 100.0)
    before = load_pairs(database, ALIAS)
    again = mine_alias(database, ALIAS, 200.0)
    assert (again.n_pairs, again.n_added, again.n_withdrawn) == (2, 0, 0)
    assert load_pairs(database, ALIAS) == before


def test_feedback_that_is_taken_back_takes_its_pair_along(database: Database) -> None:
    seed(database)
    mine_alias(database, ALIAS, 100.0)
    save(database, [], [thumb(2, "down", at=50.0, is_retraction=True)])
    mined = mine_alias(database, ALIAS, 200.0)
    assert (mined.n_pairs, mined.n_added, mined.n_withdrawn) == (1, 0, 1)
    assert sides(database) == [GRASS]


def test_a_pair_that_a_model_learned_from_stays(database: Database) -> None:
    seed(database)
    mine_alias(database, ALIAS, 100.0)
    mark_pairs_used(database, [pair.id for pair in load_pairs(database, ALIAS)], "r0001")
    save(database, [], [thumb(2, "down", at=50.0, is_retraction=True)])
    mined = mine_alias(database, ALIAS, 200.0)
    assert mined.n_withdrawn == 0
    assert sides(database, used=True) == [SKY, GRASS]
    assert sides(database, used=False) == []


def test_a_changed_mind_turns_the_pair_round(database: Database) -> None:
    seed(database)
    mine_alias(database, ALIAS, 100.0)
    save(database, [], [thumb(1, "down", at=50.0), thumb(2, "up", at=51.0)])
    mined = mine_alias(database, ALIAS, 200.0)
    assert (mined.n_added, mined.n_withdrawn) == (1, 1)
    assert sides(database) == [(SKY[1], SKY[0]), GRASS]


def edit(user: str, at: float) -> FeedbackEvent:
    return feedback(
        interaction_id(5), "edit", "White, for it scatters all colours.", user_id=user, created_at=at,
        feedback_id=f"fb_edit_{user}",
    )  # fmt: skip


def test_whoever_says_the_same_later_stands_for_the_pair_too(database: Database) -> None:
    save(database, [served(5, question="Why is snow white?")], [edit("ann", 10.0)])
    mine_alias(database, ALIAS, 100.0)
    (alone,) = load_pairs(database, ALIAS)
    save(database, [], [edit("bob", 150.0)])
    mined = mine_alias(database, ALIAS, 200.0)
    (confirmed,) = load_pairs(database, ALIAS)
    assert (mined.n_added, mined.n_withdrawn) == (0, 0)
    assert (confirmed.id, confirmed.n_voters, confirmed.created_at) == (alone.id, 2, 150.0)
    assert confirmed.principals == (*alone.principals, "/bob")


def test_what_a_model_learned_from_keeps_those_who_stood_for_it(database: Database) -> None:
    save(database, [served(5, question="Why is snow white?")], [edit("ann", 10.0)])
    mine_alias(database, ALIAS, 100.0)
    before = load_pairs(database, ALIAS)
    mark_pairs_used(database, [pair.id for pair in before], "r0001")
    save(database, [], [edit("bob", 150.0)])
    mine_alias(database, ALIAS, 200.0)
    assert load_pairs(database, ALIAS) == before


def test_a_mark_stays_with_the_first_run(database: Database) -> None:
    seed(database)
    mine_alias(database, ALIAS, 100.0)
    ids = [pair.id for pair in load_pairs(database, ALIAS)]
    mark_pairs_used(database, ids[:1], "r0001")
    mark_pairs_used(database, ids, "r0002")
    assert {listing.id: listing.first_run for listing in list_pairs(database, ALIAS, 10)} == {
        ids[0]: "r0001",
        ids[1]: "r0002",
    }


def test_an_alias_keeps_to_its_own(database: Database) -> None:
    seed(database)
    mine_alias(database, ALIAS, 100.0)
    assert mine_alias(database, "helper", 100.0).n_pairs == 0
    assert sides(database) == [SKY, GRASS]


def test_a_thumb_without_a_partner_is_an_example_of_its_own(database: Database) -> None:
    seed(database)
    (example,) = unpaired_examples(database, ALIAS)
    assert (example.interaction, example.label) == (interaction_id(5), True)


def preferred(about: int, value: str, kind: str = "choice") -> FeedbackEvent:
    """Interaction `about` was worse than the completion named."""
    return replace(thumb(about, value), type=kind, feedback_id=f"fb_{kind}_{interaction_id(about)}")


@pytest.mark.parametrize(("kind", "source"), [("choice", "choice"), ("regenerate", "regeneration")])
def test_the_answer_that_was_preferred_needs_no_feedback_of_its_own(database: Database, kind: str, source: str) -> None:
    save(database, [served(1), served(2)], [preferred(1, f"chatcmpl-{interaction_id(2)}", kind)])
    mined = mine_alias(database, ALIAS, 100.0)
    assert (mined.by_source, mined.skipped) == ({source: 1}, {})
    assert sides(database) == [(interaction_id(2), interaction_id(1))]


@pytest.mark.parametrize("value", ["chatcmpl-" + "f" * 48, "nonsense", "\x00", "'"])
def test_a_choice_of_what_is_not_there_gives_no_pair(database: Database, value: str) -> None:
    save(database, [served(1)], [preferred(1, value)])
    assert mine_alias(database, ALIAS, 100.0).skipped == {"missing_interaction": 1}


def test_a_choice_of_another_alias_s_answer_gives_no_pair(database: Database) -> None:
    save(database, [served(1), served(2, alias="helper")], [preferred(1, f"chatcmpl-{interaction_id(2)}")])
    assert mine_alias(database, ALIAS, 100.0).n_pairs == 0


def clear(database: Database) -> None:
    with database.write() as connection:
        for table in (interactions, feedback_events, pairs):
            connection.execute(table.delete())


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(interactions_, events_(), st.integers(1, 12), st.randoms(use_true_random=False))
def test_mining_part_by_part_gives_what_mining_all_at_once_does(
    database: Database, served_: tuple[Interaction, ...], said: list[FeedbackEvent], part_rows: int, random: Random
) -> None:
    clear(database)
    save(database, random.sample(served_, len(served_)), random.sample(said, len(said)))
    whole = mine_pairs(*whole_history(database, ALIAS))
    mined = mine_alias(database, ALIAS, 100.0, part_rows=part_rows)
    assert load_pairs(database, ALIAS) == list(whole.pairs)
    assert mined.by_source == Counter(pair.source for pair in whole.pairs)
    assert mined.skipped == whole.skipped
    assert (mined.n_pairs, mined.n_added, mined.n_unpaired) == (len(whole.pairs), len(whole.pairs), len(whole.unpaired))
    assert unpaired_examples(database, ALIAS, part_rows=part_rows) == whole.unpaired


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(interactions_, events_(), st.integers(0, 14), st.integers(1, 12))
def test_the_pairs_of_yesterday_become_those_of_today(
    database: Database, served_: tuple[Interaction, ...], said: list[FeedbackEvent], n_yesterday: int, part_rows: int
) -> None:
    clear(database)
    save(database, served_, said[:n_yesterday])
    yesterday = mine_alias(database, ALIAS, 100.0, part_rows=part_rows)
    before = {pair.id for pair in load_pairs(database, ALIAS)}
    save(database, [], said[n_yesterday:])
    today = mine_alias(database, ALIAS, 200.0)
    after = {pair.id for pair in load_pairs(database, ALIAS)}
    assert load_pairs(database, ALIAS) == list(mine_pairs(*whole_history(database, ALIAS)).pairs)
    assert len(before) == yesterday.n_added
    assert (today.n_added, today.n_withdrawn) == (len(after - before), len(before - after))
