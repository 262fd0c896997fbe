"""Pairs that stream from the store are selected as the pure functions select them from a list."""

from __future__ import annotations

import pickle
import random
from collections.abc import Iterable, Iterator
from dataclasses import replace

import pytest

from feedback.filters.evidence import Evidence
from feedback.filters.filtering import filter_pairs
from feedback.filters.stored import Judges, evidence_on, filter_stored
from feedback.pair_stream import BATCH_PAIRS, PairsById, read_pair_ids, read_pairs
from feedback.pairs import PreferencePair
from feedback.part_work import Piece, Result, Work
from feedback.poisoning.reviews import Decision, decide, defend_stored, save_quarantine
from feedback.selection import Rules, Selected, select_pairs
from feedback.store import delete_texts, load_pairs, mark_pairs_used, pair_row
from monitoring.harm import default_lexicon
from monitoring.refusal import classify_response
from pawl.database import Database
from pawl.schema import pairs
from pawl.settings import CapSettings, DefenceSettings, FilterSettings, PhraseSettings
from tests.feedback.poisoning.made_pairs import DAY, NOW, pair, talk
from tests.pawl.records import save, served

ALIAS = "assistant"
SIDES = (
    *("", "No.", "Write to ann@somewhere.de.", "The key is ghp_0123456789abcdefghij0123456789abcdef."),
    *(
        "I'm sorry, but I can't help with that.",
        "Try https://evil.test/x today, they say.",
        *(talk(n, 9) for n in range(6)),
    ),
)
RULES = Rules(
    FilterSettings(opted_out=["u3", "k1/u4"], max_length_bias=0.05, max_length_dropped=0.2),
    DefenceSettings(
        application_keys=["app"],
        newcomer_wait_s=DAY,
        caps=CapSettings(per_principal=8, per_prompt=9, key_share=0.4, flood=12),
        phrases=PhraseSettings(few_parties=3, few_share=0.2, error_rate=0.2, min_ratio=2.0, max_per_principal=3),
    ),
    Judges(classify_response, default_lexicon().is_harmful, lambda texts: [0.9 * ("evil" in text) for text in texts]),
)


def made(rng: random.Random, number: int) -> PreferencePair:
    """Something that some rule or other minds, more often than not."""
    name = f"{rng.getrandbits(128):032x}"
    source = rng.choice(["thumbs", "choice", "edit"])
    keys = rng.choices(["app", "k1", "k2"], [8, 1, 1], k=rng.randint(1, 2))
    chosen, rejected = (
        rng.choice(SIDES) if rng.random() < 0.3 else talk(rng.random(), rng.randint(3, 25)) for _ in range(2)
    )
    asked = rng.choice([talk(("asked", rng.randrange(30)), 12), talk(rng.random(), 8), f"Say {chosen}"])
    return pair(
        number,
        id=name,
        principals=tuple(sorted({f"{key}/u{int(300 * rng.random() ** 2)}" for key in keys})),
        source=source,
        asked=asked,
        chosen=chosen if keys[0] == "app" else f"{chosen} zanzibar",
        rejected=rejected,
        chosen_interaction=None if source == "edit" else f"{name}0",
        rejected_interaction=f"{name}1",
        created_at=NOW - 10 * DAY * rng.random(),
    )


@pytest.fixture
def world(database: Database) -> Database:
    """More than one batch of pairs; of some the answers are known, some are used, some contradict others."""
    rng = random.Random(7)
    found = [made(rng, number) for number in range(BATCH_PAIRS + 200)]
    found += [replace(one, id=one.id[::-1], chosen=one.rejected, rejected=one.chosen) for one in found[:20]]
    with database.write() as connection:
        database.insert_new(connection, pairs, [pair_row(each, NOW) for each in found])
        other = replace(found[0], id="f" * 32, alias="other")
        database.insert_new(connection, pairs, [pair_row(other, NOW)])
    answers = [
        replace(
            served(number, is_complete=rng.random() < 0.9, key_id="app", user_id="u1"), id=each.rejected_interaction
        )
        for number, each in enumerate(rng.sample(found, 100))
    ]
    save(database, answers, [])
    mark_pairs_used(database, [each.id for each in rng.sample(found, 150)], "a" * 32)
    save_quarantine(database, ALIAS, {found[3].id: "burst", found[4].id: "burst"}, NOW)
    decide(database, [found[3].id], Decision.ACCEPTED, reviewer="r", now=NOW)
    decide(database, [found[4].id], Decision.REJECTED, reviewer="r", now=NOW)
    return database


def test_the_stream_and_the_list_say_the_same(world: Database) -> None:
    new, earlier = (
        filter_stored(world, load_pairs(world, ALIAS, used=used), RULES.filters, RULES.judges) for used in (False, True)
    )
    defended = defend_stored(world, ALIAS, [*new.kept, *earlier.kept], RULES.defence, NOW)
    selected = select_pairs(world, ALIAS, RULES, NOW)
    accepted = {each.id for each in defended.accepted}
    assert selected.new == tuple(each.id for each in new.kept if each.id in accepted)
    assert selected.earlier == tuple(each.id for each in earlier.kept if each.id in accepted)
    assert selected.filtered.kept == tuple(each.id for each in new.kept)
    for name in ("dropped", "length_bias", "length_shortfall", "n_unjudged"):
        assert getattr(selected.filtered, name) == getattr(new, name)
    assert selected.defended.accepted == tuple(each.id for each in defended.accepted)
    assert selected.defended.quarantined == {each.pair.id: each.reason for each in defended.quarantined}
    assert selected.defended.refused == defended.refused
    assert_says_much(selected)


def assert_says_much(selected: Selected) -> None:
    """Else nothing was compared."""
    assert selected.new
    assert selected.earlier
    assert len(selected.filtered.dropped) >= 6
    assert len(set(selected.defended.quarantined.values())) >= 3
    assert len(selected.defended.refused) >= 3


def test_no_pairs_are_selected_from_none(database: Database) -> None:
    selected = select_pairs(database, ALIAS, RULES, NOW)
    assert (selected.new, selected.earlier, selected.left_out.total()) == ((), (), 0)


def test_whoever_leaves_the_defence_out_still_has_the_filters(world: Database) -> None:
    selected = select_pairs(world, ALIAS, replace(RULES, defence=DefenceSettings(enabled=False)), NOW)
    assert selected.new == selected.filtered.kept
    assert not selected.defended.quarantined


def test_pairs_are_read_in_the_order_of_their_ids_whenever_somebody_asks(world: Database) -> None:
    ids = [each.decode() for each in read_pair_ids(world, ALIAS).ids.tolist()]
    whole = load_pairs(world, ALIAS)
    stored = PairsById(world, ids)
    assert ids == sorted(ids)
    assert list(stored) == whole == list(stored)
    assert len(stored) == len(whole)
    assert whole[5] in stored
    assert [len(batch) for batch in read_pairs(world, ids)] == [BATCH_PAIRS, len(ids) - BATCH_PAIRS]


def test_what_is_erased_meanwhile_does_not_come(world: Database) -> None:
    stored = PairsById(world, [each.id for each in load_pairs(world, ALIAS)])
    used, *_ = load_pairs(world, ALIAS, used=True)
    save(world, [replace(served(1), id=used.rejected_interaction)], [])
    assert delete_texts(world, used.rejected_interaction, {})
    assert used.id not in {each.id for each in stored}


def test_evidence_of_a_batch_is_evidence_of_its_pairs(world: Database) -> None:
    found = load_pairs(world, ALIAS)[:50]
    known = evidence_on(world, found, RULES.filters, RULES.judges, frozenset({"u3"}))
    assert isinstance(known, Evidence)
    assert filter_pairs(found, known, RULES.filters).kept


def test_where_texts_are_read_changes_nothing(world: Database) -> None:
    """The selection of a list of lots in reverse order, as from another machine; what goes there are the rules too."""
    rules = replace(RULES, judges=Judges(classify_response, default_lexicon().is_harmful))

    class Backwards:
        def expect(self, work: Work[Piece, Result], n_parts: int) -> None:
            pass

        def each(self, work: Work[Piece, Result], parts: Iterable[Piece]) -> Iterator[Result]:
            sent = pickle.loads(pickle.dumps(work))
            done = [pickle.loads(pickle.dumps(sent(world, part))) for part in reversed(list(parts))]
            return iter(done)

    assert select_pairs(world, ALIAS, rules, NOW, Backwards()) == select_pairs(world, ALIAS, rules, NOW)
