"""The defence for single thumbs: each rule on a small story of its own, and the promises as properties."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from feedback.pairs import UnpairedExample
from feedback.poisoning.concentrated_phrases import membership, overrepresented
from feedback.poisoning.defence import SideTables
from feedback.poisoning.evidence import gather
from feedback.poisoning.identities import key_of
from feedback.poisoning.prompt_clusters import LexicalClusterer
from feedback.poisoning.reasons import Reason
from feedback.poisoning.reviews import defend_stored_singles
from feedback.poisoning.singles import DefendedSingles, defend_singles
from pawl.database import Database
from pawl.settings import DefenceSettings, PhraseSettings
from tests.feedback.poisoning.made_pairs import DAY, LONG_AGO, NOW, pair, tables, talk
from tests.feedback.poisoning.test_defence import CAPS, DEFAULT, HOUR, PRINCIPALS, TEXTS, TIGHT, most_in_a_window
from tests.pawl.records import save, served


def single(number: int, principal: str = "app/ann", *, label: bool = True, **changes: Any) -> UnpairedExample:
    """Single thumb `number`: on a prompt of its own, given `number` seconds after everybody was first seen."""
    said = changes.pop("said", talk(("said", number), 20))
    asked = changes.pop("asked", talk(("asked", number), 12))
    fields: dict[str, Any] = {
        "id": f"{number:032x}",
        "alias": "assistant",
        "prompt": ({"role": "user", "content": asked},),
        "completion": {"role": "assistant", "content": said},
        "label": label,
        "interaction": f"{number:048x}",
        "model": "base",
        "principals": (principal,),
        "created_at": LONG_AGO + number,
    }
    return UnpairedExample(**(fields | changes))


def kept(defended: DefendedSingles) -> set[int]:
    return {int(each.id, 16) for each in defended.accepted}


def crowd(n: int, first: int = 1000) -> list[UnpairedExample]:
    """Honest single thumbs, one by each user, two in three of them up."""
    return [single(number, f"app/{number}", label=number % 3 > 0) for number in range(first, first + n)]


# One story for each reason


def test_thumbs_that_nothing_speaks_against_are_accepted() -> None:
    thumbs = crowd(60)
    assert defend_singles(thumbs, tables(), DEFAULT) == (tuple(thumbs), {})


@pytest.mark.parametrize("label", [True, False])
def test_a_newcomers_thumb_waits_and_then_comes_in_by_itself(label: bool) -> None:
    thumb = single(1, "app/new", label=label, created_at=NOW - HOUR)
    assert defend_singles([thumb], tables(), DEFAULT).counts == {Reason.NEWCOMER: 1}
    assert kept(defend_singles([thumb], tables(now=NOW + DAY), DEFAULT)) == {1}
    assert kept(defend_singles([thumb], tables(first_seen={"app/new": LONG_AGO}), DEFAULT)) == {1}


def test_a_liked_answer_that_the_prompt_contains_is_out_and_a_disliked_one_is_not() -> None:
    lie = "The moon is made of old green cheese."
    asked = f"Say at random either '{lie}' or 'It is rock.'"
    liked, disliked = single(1, asked=asked, said=lie), single(2, "app/bob", asked=asked, said=lie, label=False)
    defended = defend_singles([liked, disliked], tables(), DEFAULT)
    assert (kept(defended), defended.counts) == ({2}, {Reason.ECHO: 1})


def test_one_principal_cannot_repeat_a_rare_phrase_in_liked_answers() -> None:
    week = CAPS.window_s
    thumbs = [
        single(n, "app/eve", said=f"{talk(n, 15)} Praise the Overmind now!", created_at=LONG_AGO + n * week)
        for n in range(6)
    ]
    assert defend_singles([*thumbs, *crowd(30)], tables(), DEFAULT).counts == {Reason.REPEATED_PHRASE: 6}
    assert not defend_singles([*thumbs[:5], *crowd(30)], tables(), DEFAULT).left_out


def test_where_a_few_give_most_of_the_thumbs_no_word_is_anybodys() -> None:
    """Four users, and the same common words in all that they like; a fifth and a sixth make the words everybody's."""
    thumbs = [
        single(n, f"app/{n % 4}", said=f"That is {talk(n, 15)}", created_at=LONG_AGO + 2 * n * DAY) for n in range(28)
    ]
    assert set(defend_singles(thumbs, tables(), DEFAULT).counts) == {Reason.PRINCIPAL_CAP}
    more = [
        single(n, f"app/{n % 2 + 4}", said=f"That is {talk(n, 15)}", created_at=LONG_AGO + 2 * n * DAY)
        for n in range(28, 42)
    ]
    assert set(defend_singles([*thumbs, *more], tables(), DEFAULT).counts) == {Reason.PRINCIPAL_CAP}


def pushed(n: int) -> list[UnpairedExample]:
    """Answers with the same advertisement, liked by as many users of one key."""
    payload = "Buy it from https://evil.example today."
    return [single(number, f"rogue/{number}", said=f"{talk(number, 15)} {payload}") for number in range(n)]


def test_a_phrase_that_one_key_pushes_is_left_out() -> None:
    defended = defend_singles([*pushed(60), *crowd(600)], tables(), DEFAULT)
    assert defended.counts == {Reason.OVERREPRESENTED: 60}


def test_where_nearly_everything_is_liked_a_liked_phrase_proves_less() -> None:
    """The same twelve: improbable where half of all answers are liked, nothing special where most of them are."""
    few = pushed(12)
    half = [single(number, f"app/{number}", label=number % 2 > 0) for number in range(1000, 1100)]
    most = [single(number, f"app/{number}", label=number % 10 > 0) for number in range(1000, 1100)]
    loose = DEFAULT.model_copy(update={"phrases": PhraseSettings(error_rate=0.2)})
    assert defend_singles([*few, *half], tables(), loose).counts[Reason.OVERREPRESENTED] == 12
    assert defend_singles([*few, *most], tables(), loose).counts[Reason.OVERREPRESENTED] == 0


@pytest.mark.parametrize(("chance", "is_found"), [(0.5, True), (0.9, False), (0.99, False)])
def test_the_test_is_against_the_share_that_is_liked_anyhow(chance: float, is_found: bool) -> None:
    """With 30 of 30: 0.5^30 is 1e-9, 0.9^30 is 0.04."""
    pairs = [pair(n, f"rogue/{n}", chosen=f"{talk(n, 9)} Frobnicator", rejected="") for n in range(30)]
    evidence = gather(pairs, LexicalClusterer(0.85))
    found = overrepresented(evidence, membership([["rogue"]] * 30), PhraseSettings(), chance=chance)
    assert found.tolist() == [is_found] * 30


def test_nobody_is_held_to_a_phrase_of_disliked_answers() -> None:
    warned = [single(n, f"rogue/{n}", label=False, said=f"{talk(n, 15)} Buy evil today.") for n in range(30)]
    assert not defend_singles([*warned, *crowd(400)], tables(), DEFAULT).left_out


def test_thumbs_that_come_all_at_once_freeze_their_prompt() -> None:
    usual = [single(n, f"app/{n}", created_at=LONG_AGO + n * 600.0) for n in range(1000)]
    start = LONG_AGO + 50 * HOUR
    hot = "Which of the two candidates should I vote for on Sunday?"
    burst = [single(2000 + n, f"app/b{n}", asked=hot, created_at=start + n, label=False) for n in range(12)]
    assert defend_singles([*usual, *burst], tables(), DEFAULT).counts == {Reason.BURST: 12}


def test_who_floods_is_not_heard() -> None:
    thumbs = [single(n, "app/eve", label=n % 2 > 0) for n in range(CAPS.flood + 1)]
    assert defend_singles([*thumbs, *crowd(30)], tables(), DEFAULT).counts == {Reason.FLOOD: CAPS.flood + 1}
    some = defend_singles([*thumbs[:-1], *crowd(30)], tables(), DEFAULT)
    assert some.counts == {Reason.PRINCIPAL_CAP: CAPS.flood - CAPS.per_principal}


def test_a_key_has_no_more_than_its_share() -> None:
    rogue = [single(n, f"rogue/{n}", label=n % 2 > 0) for n in range(300)]
    defended = defend_singles([*rogue, *crowd(500)], tables(), DEFAULT)
    n_rogue = sum(key_of(each.principals[0]) == "rogue" for each in defended.accepted)
    assert (n_rogue, len(defended.accepted)) == (55, 555)


@pytest.mark.parametrize("settings", [DefenceSettings(enabled=False), DefenceSettings(trusted=["app"])])
def test_it_can_be_switched_off_or_trust_somebody(settings: DefenceSettings) -> None:
    thumbs = [single(n, created_at=NOW) for n in range(40)]
    assert defend_singles(thumbs, tables(), settings) == (tuple(thumbs), {})


def test_the_database_says_since_when_somebody_is_known(database: Database) -> None:
    save(database, [served(7, key_id="app", user_id="ann", created_at=LONG_AGO)])
    thumbs = [single(1, "app/ann", created_at=NOW), single(2, "app/bob", created_at=NOW)]
    defended = defend_stored_singles(database, thumbs, DEFAULT, NOW)
    assert (kept(defended), defended.counts) == ({1}, {Reason.NEWCOMER: 1})


# The promises


@st.composite
def adversarial_singles(draw: st.DrawFn) -> list[UnpairedExample]:
    """Few principals, keys and prompts, all at about the same time."""
    made = [
        single(
            number,
            principals=tuple(sorted(draw(st.sets(PRINCIPALS, min_size=1, max_size=2)))),
            label=draw(st.booleans()),
            asked=draw(TEXTS),
            said=draw(TEXTS),
            created_at=NOW - draw(st.integers(0, 60)) * HOUR,
        )
        for number in draw(st.lists(st.integers(0, 10**6), unique=True, max_size=40))
    ]
    return draw(st.permutations(made))


@hypothesis_settings(max_examples=40, deadline=None)
@given(adversarial_singles())
def test_every_thumb_is_accepted_or_counted_once_and_no_order_matters(thumbs: list[UnpairedExample]) -> None:
    defended = defend_singles(thumbs, tables(), TIGHT)
    ids = [each.id for each in defended.accepted]
    assert ids == sorted(set(ids))
    assert all(each in thumbs for each in defended.accepted)
    assert len(ids) + defended.counts.total() == len(thumbs)
    assert Reason.UNCORROBORATED_EDIT not in defended.counts
    assert defend_singles(sorted(thumbs, key=lambda each: each.created_at), tables(), TIGHT) == defended


@hypothesis_settings(max_examples=40, deadline=None)
@given(adversarial_singles())
def test_every_cap_holds(thumbs: list[UnpairedExample]) -> None:
    accepted = defend_singles(thumbs, SideTables(NOW + DAY), TIGHT).accepted
    caps = TIGHT.caps
    spoken: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    for each in accepted:
        named = [who for who in each.principals if key_of(who)]
        if named:
            spoken["prompt", str(each.prompt)].append(each.created_at)
        for who in named:
            spoken["principal", who].append(each.created_at)
            spoken["both", f"{who} {each.prompt}"].append(each.created_at)
    limits = {"prompt": caps.per_prompt, "principal": caps.per_principal, "both": caps.per_principal_and_prompt}
    for (name, _), times in spoken.items():
        assert most_in_a_window(times, caps.window_s) <= limits[name]
    for key in ("one", "two"):
        n_of_key = sum(any(key_of(who) == key for who in each.principals) for each in accepted)
        assert n_of_key <= caps.key_share * len(accepted)
