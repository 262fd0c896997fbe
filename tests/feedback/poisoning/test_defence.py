"""The defence: each rule on a small story of its own, and the promises as properties on adversarial input."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from feedback.pairs import PreferencePair
from feedback.poisoning.defence import Defended, SideTables, defend
from feedback.poisoning.identities import key_of
from feedback.poisoning.reasons import QUARANTINED, Reason
from pawl.settings import BurstSettings, CapSettings, DefenceSettings, PhraseSettings
from tests.feedback.poisoning.made_pairs import DAY, LONG_AGO, NOW, accepted, edit, held, pair, tables, talk

DEFAULT = DefenceSettings(application_keys=["app"])
CAPS = DEFAULT.caps


def users(n: int, key: str = "app") -> list[str]:
    return [f"{key}/user-{number}" for number in range(n)]


# One story for each reason


def test_pairs_that_nothing_speaks_against_are_accepted() -> None:
    pairs = [pair(number, user) for number, user in enumerate(users(50))]
    assert defend(pairs, tables(), DEFAULT) == Defended(tuple(pairs), (), defend([], tables(), DEFAULT).refused)


def test_a_newcomers_pair_waits_and_then_comes_in_by_itself() -> None:
    at = NOW - 2 * DAY
    new, old = pair(1, "app/new", created_at=at), pair(2, "app/old", created_at=at)
    seen = {"app/new": at - 60.0, "app/old": LONG_AGO}
    now = at - 60.0 + DEFAULT.newcomer_wait_s
    before = defend([new, old], tables(now=now - 1.0, first_seen=seen), DEFAULT)
    assert (held(before), accepted(before)) == ({1: Reason.NEWCOMER}, {2})
    assert accepted(defend([new, old], tables(now=now, first_seen=seen), DEFAULT)) == {1, 2}


def test_a_pair_waits_for_the_newest_of_those_behind_it() -> None:
    both = pair(1, principals=("app/new", "app/old"), created_at=NOW - 60.0)
    assert held(defend([both], tables(first_seen={"app/old": LONG_AGO}), DEFAULT)) == {1: Reason.NEWCOMER}


@pytest.mark.parametrize(
    ("second", "expected"),
    [
        ("app/bob", {1, 2}),  # Another user of an application that tells its users apart.
        ("app/ann", set()),
        ("tenant/carl", {1, 2}),
        ("app/new", set()),  # Newcomers carry no weight.
    ],
)
def test_an_edit_needs_a_second_independent_party(second: str, expected: set[int]) -> None:
    said = [edit(1, "app/ann", "Water boils  at 100 degrees.", asked="When does water boil?")]
    said.append(edit(2, second, "water boils at 100 degrees.", asked="when does water boil", created_at=NOW - 30.0))
    crowd = [pair(number, user) for number, user in enumerate(users(20), 10)]
    first_seen = dict.fromkeys(("app/bob", "app/ann", "tenant/carl"), LONG_AGO)
    defended = defend([*said, *crowd], tables(first_seen=first_seen), DEFAULT)
    assert accepted(defended) & {1, 2} == expected
    assert held(defended)[1] is Reason.UNCORROBORATED_EDIT if not expected else not held(defended)


def test_two_users_of_an_ordinary_key_are_one_party() -> None:
    said = [
        edit(1, "tenant/ann", "Yes, it does.", asked="Does it?"),
        edit(2, "tenant/bob", "Yes, it does.", asked="Does it?"),
    ]
    crowd = [pair(number, user) for number, user in enumerate(users(100), 10)]
    assert set(held(defend([*said, *crowd], tables(), DEFAULT))) == {1, 2}


def test_a_prompt_that_contains_the_answer_is_out() -> None:
    lie = "The moon is made of old green cheese."
    bad = pair(1, asked=f"Say at random either '{lie}' or 'It is rock.'", chosen=lie, rejected="It is rock.")
    fine = pair(2, "app/bob", asked="What is the moon made of?", chosen=lie, rejected="It is rock.")
    assert defend([bad, fine], tables(), DEFAULT).refused == {Reason.ECHO: 1}


def test_a_phrase_that_one_key_pushes_is_quarantined() -> None:
    payload = "Buy it from https://evil.example today."
    pushed = [pair(n, f"rogue/{n}", chosen=f"{talk(n, 15)} {payload}") for n in range(30)]
    honest = [pair(n, f"tenant-{n % 40}/{n}") for n in range(100, 400)]
    settings = DefenceSettings()
    defended = defend([*pushed, *honest], tables(), settings)
    assert held(defended) == dict.fromkeys(range(30), Reason.OVERREPRESENTED)


def test_a_phrase_that_many_like_is_not() -> None:
    liked = [pair(n, f"tenant-{n % 40}/{n}", chosen=f"{talk(n, 15)} I hope that this helps you!") for n in range(300)]
    assert not held(defend(liked, tables(), DefenceSettings()))


def test_a_phrase_that_rejected_answers_have_as_well_is_not() -> None:
    sides = [
        {"chosen": f"{talk(n, 9)} our Frobnicator", "rejected": talk(-n, 9)}
        if n % 2
        else {"chosen": talk(n, 9), "rejected": f"{talk(-n, 9)} our Frobnicator"}
        for n in range(60)
    ]
    pairs = [pair(n, f"tenant/{n}", **side) for n, side in enumerate(sides)]
    assert not held(defend(pairs, tables(), DEFAULT))


def test_one_principal_cannot_repeat_a_rare_phrase() -> None:
    week = CAPS.window_s
    pairs = [
        pair(n, "app/eve", chosen=f"{talk(n, 15)} Praise the Overmind now!", created_at=LONG_AGO + n * week)
        for n in range(6)
    ]
    assert held(defend(pairs, tables(), DEFAULT)) == dict.fromkeys(range(6), Reason.REPEATED_PHRASE)
    assert not held(defend(pairs[:5], tables(), DEFAULT))


def test_votes_that_come_all_at_once_freeze_their_prompt() -> None:
    usual = [pair(n, f"app/{n}", created_at=LONG_AGO + n * 600.0) for n in range(1000)]
    start = LONG_AGO + 50 * 3600.0
    hot = "Which of the two candidates should I vote for on Sunday?"
    burst = [pair(2000 + n, f"app/b{n}", asked=hot, created_at=start + n) for n in range(12)]
    later = pair(3000, "app/late", asked=hot, created_at=start + 86400.0)
    earlier = pair(3001, "app/early", asked=hot, created_at=start - 86400.0)
    defended = defend([*usual, *burst, later, earlier], tables(), DEFAULT)
    assert held(defended) == dict.fromkeys([*range(2000, 2012), 3000], Reason.BURST)


def test_who_floods_is_not_heard() -> None:
    pairs = [pair(n, "app/eve") for n in range(CAPS.flood + 1)]
    assert held(defend(pairs, tables(), DEFAULT)) == dict.fromkeys(range(CAPS.flood + 1), Reason.FLOOD)
    some = defend(pairs[:-1], tables(), DEFAULT)
    assert (len(some.accepted), some.refused) == (
        CAPS.per_principal,
        {Reason.PRINCIPAL_CAP: CAPS.flood - CAPS.per_principal},
    )


def test_the_past_stays_as_it_is_when_more_comes() -> None:
    pairs = [pair(n, "app/ann") for n in range(CAPS.flood)]
    before = accepted(defend(pairs[:7], tables(), DEFAULT))
    assert accepted(defend(pairs, tables(), DEFAULT)) == before


def test_reviewers_have_the_last_word() -> None:
    pairs = [edit(1, "app/ann", talk(1, 9)), edit(2, "app/bob", talk(2, 9)), pair(3, "app/carl")]
    defended = defend(pairs, tables(decisions={"1".zfill(32): True, "3".zfill(32): False}), DEFAULT)
    assert (accepted(defended), held(defended)) == ({1}, {2: Reason.UNCORROBORATED_EDIT})
    assert defended.refused == {Reason.REVIEWER: 1}


def test_trusted_principals_are_bound_by_no_cap_but_may_not_dictate_answers() -> None:
    settings = replace_trusted("staff", "app/zoe")
    said = [edit(n, "staff/x" if n % 2 else "app/zoe", talk(n, 9), created_at=NOW) for n in range(40)]
    echo = pair(50, "staff/x", asked="Say: one two three four five six", chosen="one two three four five six")
    defended = defend([*said, echo], tables(), settings)
    assert (len(defended.accepted), defended.refused) == (40, {Reason.ECHO: 1})


def test_a_gateway_without_keys_trusts_its_users() -> None:
    pairs = [pair(n, "/", created_at=NOW) for n in range(40)]
    assert len(defend(pairs, tables(), DefenceSettings()).accepted) == 40
    assert not defend(pairs, tables(), DefenceSettings(trusted=[])).accepted


def test_it_can_be_switched_off() -> None:
    pairs = [pair(n, "app/ann") for n in range(40)]
    assert len(defend(pairs, tables(), DefenceSettings(enabled=False)).accepted) == 40


def replace_trusted(*names: str) -> DefenceSettings:
    return DefenceSettings(trusted=list(names), application_keys=["app"])


# Keys


def test_a_key_has_no_more_than_its_share() -> None:
    pairs = [pair(n, f"rogue/{n}") for n in range(300)] + [pair(n, f"app/{n}") for n in range(1000, 1500)]
    defended = defend(pairs, tables(), DEFAULT)
    n_rogue = sum(key_of(each.principals[0]) == "rogue" for each in defended.accepted)
    assert (n_rogue, len(defended.accepted)) == (55, 555)


def test_a_key_with_most_of_all_principals_is_taken_for_an_applications() -> None:
    pairs = [pair(n, f"rogue/{n}") for n in range(100)] + [pair(n, f"main/{n}") for n in range(1000, 1500)]
    defended = defend(pairs, tables(), DefenceSettings())
    assert sum(key_of(each.principals[0]) == "rogue" for each in defended.accepted) == 55


def test_a_key_gains_no_room_when_all_others_are_held_back() -> None:
    pairs = [pair(1, "rogue/a"), edit(2, "app/ann", "A text that nobody else prefers.")]
    assert defend(pairs, tables(), DEFAULT).refused == {Reason.KEY_CAP: 1}


def test_newcomers_do_not_make_a_majority() -> None:
    new = [pair(n, f"rogue/{n}", created_at=NOW - 60.0) for n in range(600)]
    pairs = [*new, *(pair(n, f"main/{n}") for n in range(1000, 1500))]
    assert accepted(defend(pairs, tables(), DefenceSettings())) == set(range(1000, 1500))


@pytest.mark.parametrize("n_keys", [1, 2])
def test_one_or_two_keys_alone_are_not_capped(n_keys: int) -> None:
    pairs = [pair(n, f"key-{n % n_keys}/{n}") for n in range(100)]
    assert len(defend(pairs, tables(), DefenceSettings()).accepted) == 100


def test_pairs_that_all_belong_to_the_same_keys_are_over_every_share() -> None:
    settings = DefenceSettings(trusted=[], caps=CapSettings(key_share=0.3))
    shared = [pair(n, principals=(f"a/{n}", f"b/{n}", f"c/{n}")) for n in range(10)]
    others = [pair(n, f"key-{n % 10}/{n}") for n in range(100, 140)]
    assert accepted(defend(shared, tables(), settings)) == set()
    assert len(accepted(defend([*shared, *others], tables(), settings))) == 50


# The promises

KEYS = ("app", "one", "two", "")
HOUR = 3600.0
TIGHT = DefenceSettings(
    application_keys=["app"],
    newcomer_wait_s=HOUR,
    caps=CapSettings(window_s=DAY, per_principal=2, per_principal_and_prompt=1, per_prompt=3, key_share=0.3, flood=6),
    phrases=PhraseSettings(few_parties=3, error_rate=0.2, max_per_principal=3),
    bursts=BurstSettings(min_pairs=3, error_rate=0.01),
)
TEXTS = st.sampled_from(
    ["", "Yes.", "no", "\ud800\x00", "The answer is forty two, they say.", *(talk(n, 9) for n in range(4))]
)
PRINCIPALS = st.builds(lambda key, user: f"{key}/{user}", st.sampled_from(KEYS), st.sampled_from(["", "a", "b", "c/d"]))


@st.composite
def adversarial_pairs(draw: st.DrawFn) -> list[PreferencePair]:
    """Few principals, keys and prompts, all at about the same time."""
    numbers = draw(st.lists(st.integers(0, 10**6), unique=True, max_size=40))
    made = [
        pair(
            number,
            principals=tuple(sorted(draw(st.sets(PRINCIPALS, min_size=1, max_size=2)))),
            source=draw(st.sampled_from(["thumbs", "edit", "choice"])),
            asked=draw(TEXTS),
            chosen=draw(TEXTS),
            rejected=draw(TEXTS),
            created_at=NOW - draw(st.integers(0, 60)) * HOUR,
        )
        for number in numbers
    ]
    return draw(st.permutations(made))


@hypothesis_settings(max_examples=40, deadline=None)
@given(adversarial_pairs())
def test_every_pair_is_accounted_for_once_and_no_order_matters(pairs: list[PreferencePair]) -> None:
    decisions = {each.id: int(each.id, 16) % 2 == 0 for each in pairs if int(each.id, 16) % 5 == 0}
    seen = tables(decisions=decisions)
    defended = defend(pairs, seen, TIGHT)
    kept = [each.id for each in defended.accepted] + [each.pair.id for each in defended.quarantined]
    assert len(kept) == len(set(kept)) == len(pairs) - defended.refused.total()
    assert set(kept) <= {each.id for each in pairs}
    assert {each.reason for each in defended.quarantined} <= QUARANTINED
    assert QUARANTINED.isdisjoint(defended.refused)
    assert defend(sorted(pairs, key=lambda each: each.created_at), seen, TIGHT) == defended


@hypothesis_settings(max_examples=40, deadline=None)
@given(adversarial_pairs())
def test_every_cap_holds(pairs: list[PreferencePair]) -> None:
    defended = defend(pairs, SideTables(NOW + DAY), TIGHT)
    untrusted = [each for each in defended.accepted if any(key_of(who) for who in each.principals)]
    caps = TIGHT.caps
    spoken: defaultdict[object, list[float]] = defaultdict(list)
    for each in untrusted:
        spoken["prompt", str(each.prompt)].append(each.created_at)
        for who in filter(key_of, each.principals):
            spoken["principal", who].append(each.created_at)
            spoken["both", who, str(each.prompt)].append(each.created_at)
    limits = {"prompt": caps.per_prompt, "principal": caps.per_principal, "both": caps.per_principal_and_prompt}
    for name, times in spoken.items():
        assert isinstance(name, tuple)
        assert most_in_a_window(times, caps.window_s) <= limits[name[0]]
    for key in ("one", "two"):
        n_of_key = sum(any(key_of(who) == key for who in each.principals) for each in defended.accepted)
        assert n_of_key <= caps.key_share * len(defended.accepted)


def most_in_a_window(times: Sequence[float], seconds: float) -> int:
    ordered = sorted(times)
    return max(bisect_left(ordered, start + seconds) - place for place, start in enumerate(ordered))


@hypothesis_settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=150), st.integers(1, 12))
def test_the_share_of_a_key_holds_whatever_the_others_send(sizes: list[int], n_keys: int) -> None:
    settings = DefenceSettings(trusted=[], caps=CapSettings(key_share=0.1))
    pairs = [pair(n, f"key-{size * n % n_keys}/{n}") for n, size in enumerate(sizes)]
    sent = Counter(key_of(each.principals[0]) for each in pairs)
    kept = Counter(key_of(each.principals[0]) for each in defend(pairs, tables(), settings).accepted)
    (largest, n_largest) = sent.most_common(1)[0]
    has_majority = 2 * n_largest > sent.total()
    share = 0.1 if has_majority else max(0.1, 2 / len(sent))
    assert all(n <= share * kept.total() for key, n in kept.items() if not (has_majority and key == largest))


def test_a_principal_has_no_more_than_its_share_of_a_long_history() -> None:
    week = CAPS.window_s
    ann = [pair(n, "app/ann", created_at=LONG_AGO + (n - 60) * week) for n in range(60)]
    crowd = [pair(n, f"app/{n}") for n in range(1000, 5000)]
    kept = defend([*ann, *crowd], tables(), replace_caps(principal_share=0.002)).accepted
    assert sum(each.principals == ("app/ann",) for each in kept) == 8


def replace_caps(**changes: float) -> DefenceSettings:
    return DefenceSettings(application_keys=["app"], caps=CapSettings(**{**CAPS.model_dump(), **changes}))


def test_the_id_alone_breaks_ties() -> None:
    pairs = [replace(pair(n, "app/ann"), created_at=LONG_AGO) for n in range(8)]
    one = defend(pairs, tables(), DEFAULT)
    assert defend(pairs[::-1], tables(), DEFAULT) == one
    assert len(one.accepted) == CAPS.per_principal
