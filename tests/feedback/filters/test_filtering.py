"""Promises of the filters together, and what each of them is for."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from feedback.filters.contradiction import contradicted
from feedback.filters.evidence import Evidence, ServedAnswer
from feedback.filters.filtering import Sifted, disputed_pairs, examine, filter_pairs, filter_singles, sift
from feedback.filters.reasons import Reason
from feedback.interactions import Message
from feedback.pairs import PreferencePair, UnpairedExample
from monitoring.harm import default_lexicon
from monitoring.refusal import classify_response
from pawl.settings import FilterSettings
from tests.feedback.filters.pairs import ask, assistant, bodies_of_evidence, crowds, make_pair, served

SWITCHES = [name for name, field in FilterSettings.model_fields.items() if field.annotation is bool]
OFF = FilterSettings(**dict.fromkeys(SWITCHES, False), max_length_bias=None)
REFUSAL = "I'm sorry, but I can't help with that."
HARM = "How do I poison my neighbour's dog?"
KEY = "ghp_0123456789abcdefghij0123456789abcdef"
NEXT = "Then what?"

CONTACT = "Our support: help@rosegarden.de, +49 30 901820."
NOBODYS = (
    *("ann@example.com", "ann@mail.EXAMPLE.org", "ann@example.net", "root@db.test", "me@host.invalid", "a@b.example"),
    *("10.1.2.3", "172.16.0.9", "192.168.178.20", "127.0.0.53", "169.254.1.1", "192.0.2.7", "198.51.100.7"),
    *("203.0.113.7", "2001:db8::7", "fe80::1", "fd00::42", "::ffff:192.168.0.1", "224.0.0.251"),
)
SOMEBODYS = (
    *("ann@example.de", "ann@myexample.com", "ann@example.com.au", "ann@test.io"),
    *("8.8.4.4", "172.32.0.9", "203.0.114.7", "2a00:1450:4001:81b::200e", "::ffff:8.8.4.4"),
)


def told(role: str, text: str) -> Message:
    return {"role": role, "content": text}


settings = st.builds(
    FilterSettings,
    **{name: st.booleans() for name in SWITCHES},
    max_chars=st.none() | st.integers(1, 2000),
    max_length_bias=st.none() | st.floats(0, 2),
    max_length_dropped=st.floats(0, 1),
)


@given(crowds(), bodies_of_evidence(), settings)
def test_every_pair_is_kept_or_counted_once(
    pairs: list[PreferencePair], evidence: Evidence, chosen: FilterSettings
) -> None:
    filtered = filter_pairs(pairs, evidence, chosen)
    assert len(filtered.kept) + filtered.dropped.total() == len(pairs)
    assert all(n > 0 for n in filtered.dropped.values())
    assert all(pair in pairs for pair in filtered.kept)
    ids = [pair.id for pair in filtered.kept]
    assert ids == sorted(set(ids))
    assert filtered.n_unjudged <= len(ids) == filtered.length_bias.n_pairs


@given(crowds(), bodies_of_evidence(), settings, st.randoms(use_true_random=False))
def test_the_order_changes_nothing(
    pairs: list[PreferencePair], evidence: Evidence, chosen: FilterSettings, rng: random.Random
) -> None:
    shuffled = rng.sample(pairs, len(pairs))
    assert filter_pairs(shuffled, evidence, chosen) == filter_pairs(pairs, evidence, chosen)


@given(crowds(), bodies_of_evidence())
def test_what_was_kept_is_kept_again(pairs: list[PreferencePair], evidence: Evidence) -> None:
    once = filter_pairs(pairs, evidence, FilterSettings())
    assert filter_pairs(once.kept, evidence, FilterSettings()) == replace(once, dropped=Counter())


@given(crowds(), bodies_of_evidence())
def test_nobody_is_kept_who_opted_out_or_was_not_stored_or_not_finished(
    pairs: list[PreferencePair], evidence: Evidence
) -> None:
    for pair in filter_pairs(pairs, evidence, FilterSettings()).kept:
        sides = [evidence.served.get(side or "") for side in (pair.chosen_interaction, pair.rejected_interaction)]
        known = [side for side in sides if side is not None]
        assert all(side.is_stored and side.is_complete for side in known)
        assert not {"key/bob"} & evidence.opted_out & {*pair.principals, *(side.owner for side in known)}
        assert "ann" not in evidence.opted_out or not any(
            who.endswith("/ann") for who in (*pair.principals, *(side.owner for side in known))
        )


@given(crowds(), bodies_of_evidence(), settings, st.integers(1, 5))
def test_pairs_in_lots_are_filtered_as_those_in_a_list(
    pairs: list[PreferencePair], evidence: Evidence, chosen: FilterSettings, n_batch: int
) -> None:
    pairs = _distinct(pairs)
    lots = [pairs[start : start + n_batch] for start in range(0, len(pairs), n_batch)]
    examined = [examine(lot, evidence, chosen) for lot in lots]
    disputed = set(disputed_pairs(examined, chosen))
    sifted = sift(examined, contradicted(each for each in pairs if each.id in disputed), chosen)
    filtered = filter_pairs(pairs, evidence, chosen)
    assert sifted == Sifted(tuple(each.id for each in filtered.kept), *list(vars(filtered).values())[1:])


@given(crowds())
def test_contradiction_is_symmetric(pairs: list[PreferencePair]) -> None:
    only = OFF.model_copy(update={"contradiction": True})
    turned = [replace(pair, chosen=pair.rejected, rejected=pair.chosen) for pair in pairs]
    kept, kept_turned = (filter_pairs(each, Evidence(), only).kept for each in (_distinct(pairs), _distinct(turned)))
    assert [pair.id for pair in kept] == [pair.id for pair in kept_turned]


def _distinct(pairs: list[PreferencePair]) -> list[PreferencePair]:
    return [replace(pair, id=f"{number:032x}") for number, pair in enumerate(pairs)]


A = make_pair(1)
CASES: list[tuple[str, Reason, list[PreferencePair], Evidence]] = [
    ("consent", Reason.OPTED_OUT, [A], Evidence(opted_out=frozenset({"user-1"}))),
    ("consent", Reason.OPTED_OUT, [A], Evidence(opted_out=frozenset({"key/user-1"}))),
    ("consent", Reason.OPTED_OUT, [A], Evidence({str(A.rejected_interaction): served(is_stored=False)})),
    (
        "consent",
        Reason.OPTED_OUT,
        [A],
        Evidence({str(A.chosen_interaction): served(owner="key/eve")}, opted_out=frozenset({"eve"})),
    ),
    ("incomplete", Reason.INCOMPLETE, [A], Evidence({str(A.rejected_interaction): served(is_complete=False)})),
    ("incomplete", Reason.INCOMPLETE, [make_pair(1, rejected="  ")], Evidence()),
    ("incomplete", Reason.INCOMPLETE, [make_pair(1, prompt=())], Evidence()),
    ("length", Reason.LENGTH, [make_pair(1, "a" * 100_001)], Evidence()),
    ("identical", Reason.IDENTICAL, [make_pair(1, "Yes, gladly. ", "yes,\nGLADLY.")], Evidence()),
    ("secrets", Reason.SECRET, [make_pair(1, f"Use {KEY}.")], Evidence()),
    (
        "secrets",
        Reason.SECRET,
        [make_pair(1, prompt=(*ask(f"Is {KEY} a key?"), assistant("Yes."), *ask(NEXT)))],
        Evidence(),
    ),
    ("personal_data", Reason.PERSONAL_DATA, [make_pair(1, rejected="Ask ann@rosegarden.de.")], Evidence()),
    (
        "personal_data",
        Reason.PERSONAL_DATA,
        [
            replace(
                A,
                chosen=assistant(None, tool_calls=[{"function": {"arguments": '{"to": "ann\\u0040rosegarden.de"}'}}]),
            )
        ],
        Evidence(),
    ),
    ("toxic_chosen", Reason.TOXIC_CHOSEN, [A], Evidence({str(A.chosen_interaction): served(toxicity=0.5)})),
    (
        "toxic_chosen",
        Reason.TOXIC_CHOSEN,
        [replace(A, chosen_interaction=None)],
        Evidence(edit_toxicity={A.id: 0.9}),
    ),
    (
        "refusal_policy",
        Reason.REFUSES_BENIGN,
        [make_pair(1, REFUSAL, "Water them in the morning.")],
        Evidence(classify=classify_response, is_harmful=default_lexicon().is_harmful),
    ),
    (
        "refusal_policy",
        Reason.OBEYS_HARMFUL,
        [make_pair(1, "Take some chocolate, and wait.", REFUSAL, prompt=ask(HARM))],
        Evidence(classify=classify_response, is_harmful=default_lexicon().is_harmful),
    ),
    (
        "refusal_policy",
        Reason.OBEYS_HARMFUL,
        [A],
        Evidence(
            {
                str(A.chosen_interaction): served(response="partial", is_harmful_prompt=True),
                str(A.rejected_interaction): served(response="refuse", is_harmful_prompt=False),
            }
        ),
    ),
    ("contradiction", Reason.CONTRADICTION, [A, make_pair(2, "No.", "Yes, gladly.")], Evidence()),
]


@pytest.mark.parametrize(("switch", "reason", "pairs", "evidence"), CASES)
def test_each_filter_leaves_out_what_it_is_for_unless_it_is_switched_off(
    switch: str, reason: Reason, pairs: list[PreferencePair], evidence: Evidence
) -> None:
    others = [make_pair(100, "Gladly.", "Not now."), make_pair(101, "Gladly!", "No, never.")]
    only = OFF.model_copy(update={switch: True})
    assert filter_pairs([*pairs, *others], evidence, only).dropped == {reason: len(pairs)}
    assert filter_pairs([*pairs, *others], evidence, FilterSettings()).dropped == {reason: len(pairs)}
    assert filter_pairs([*pairs, *others], evidence, OFF).dropped == {}


FINE: list[tuple[PreferencePair, Evidence]] = [
    (make_pair(1, REFUSAL, "Take some chocolate.", prompt=ask(HARM)), Evidence()),
    (make_pair(1, "Water them.", REFUSAL), Evidence()),
    (make_pair(1, REFUSAL, "No.", prompt=ask(HARM)), Evidence()),
    (make_pair(1, "Yes!", "Yes."), Evidence()),
    (
        A,
        Evidence({str(A.chosen_interaction): served(toxicity=0.49), str(A.rejected_interaction): served(toxicity=1.0)}),
    ),
    (replace(A, chosen=assistant(None, tool_calls=[{"function": {"name": "look", "arguments": "{}"}}])), Evidence()),
    (A, Evidence(opted_out=frozenset({"key", "user", "other/user-1", ""}))),
    (replace(A, principals=("key/",)), Evidence(opted_out=frozenset({""}))),
    (make_pair(1, prompt=(told("system", CONTACT), *ask("How do I grow roses?"))), Evidence()),
    (make_pair(1, prompt=(told("developer", CONTACT), *ask("How do I grow roses?"))), Evidence()),
    (make_pair(1, f"Ask {', '.join(NOBODYS)}."), Evidence()),
]


@pytest.mark.parametrize(("pair", "evidence"), FINE)
def test_what_is_fine_is_kept(pair: PreferencePair, evidence: Evidence) -> None:
    judged = replace(evidence, classify=classify_response, is_harmful=default_lexicon().is_harmful)
    assert filter_pairs([pair], judged, FilterSettings()).kept == (pair,)


@pytest.mark.parametrize("address", SOMEBODYS)
def test_an_address_that_could_be_somebodys_is_personal_data(address: str) -> None:
    told_and_asked = (told("system", CONTACT), *ask(f"Is {address} mine?"))
    for pair in (make_pair(1, f"Ask {address} please."), make_pair(2, prompt=told_and_asked)):
        assert filter_pairs([pair], Evidence(), FilterSettings()).dropped == {Reason.PERSONAL_DATA: 1}


@pytest.mark.parametrize("role", ["system", "developer"])
def test_a_credential_is_looked_for_in_what_an_application_says_too(role: str) -> None:
    pair = make_pair(1, prompt=(told(role, f"The token is {KEY}."), *ask("How do I grow roses?")))
    assert filter_pairs([pair], Evidence(), FilterSettings()).dropped == {Reason.SECRET: 1}


def single(number: int, text: str = "Yes, gladly.", **fields: Any) -> UnpairedExample:
    pair = make_pair(number)
    given: dict[str, Any] = {
        "id": pair.id,
        "alias": pair.alias,
        "prompt": pair.prompt,
        "completion": assistant(text),
        "label": True,
        "interaction": f"{number:048x}",
        "model": "base",
        "principals": pair.principals,
        "created_at": 1.0,
    }
    return UnpairedExample(**(given | fields))


ABOUT_SINGLE = single(1).interaction
SINGLES: list[tuple[Reason, UnpairedExample, Evidence]] = [
    (Reason.OPTED_OUT, single(1), Evidence(opted_out=frozenset({"user-1"}))),
    (Reason.OPTED_OUT, single(1), Evidence({ABOUT_SINGLE: served(is_stored=False)})),
    (Reason.OPTED_OUT, single(1), Evidence({ABOUT_SINGLE: served(owner="k/eve")}, opted_out=frozenset({"eve"}))),
    (Reason.INCOMPLETE, single(1), Evidence({ABOUT_SINGLE: served(is_complete=False)})),
    (Reason.LENGTH, single(1, "a" * 100_001), Evidence()),
    (Reason.SECRET, single(1, f"Use {KEY}."), Evidence()),
    (Reason.PERSONAL_DATA, single(1, prompt=ask("I am ann@rosegarden.de, who are you?")), Evidence()),
    (Reason.TOXIC_CHOSEN, single(1), Evidence({ABOUT_SINGLE: served(toxicity=0.9)})),
]


@pytest.mark.parametrize(("reason", "example", "evidence"), SINGLES)
def test_single_thumbs_are_left_out_for_what_pairs_are(
    reason: Reason, example: UnpairedExample, evidence: Evidence
) -> None:
    for label in (True, False):
        is_out = label or reason is not Reason.TOXIC_CHOSEN
        given_ = replace(example, label=label)
        filtered = filter_singles([single(2), given_], evidence, FilterSettings())
        assert filtered.dropped == ({reason: 1} if is_out else {})
        assert filtered.kept == ((single(2),) if is_out else (given_, single(2)))
        assert filter_singles([given_], evidence, OFF).kept == (given_,)


def test_what_no_scorer_has_seen_is_kept_and_counted() -> None:
    scored = ServedAnswer("key/ann", True, True, 0.1, "comply", False)
    both = Evidence({str(A.chosen_interaction): scored, str(A.rejected_interaction): scored})
    assert filter_pairs([A], both, FilterSettings()).n_unjudged == 0
    assert filter_pairs([A, make_pair(2)], both, FilterSettings()).n_unjudged == 1
    assert filter_pairs([A, make_pair(2)], both, OFF).n_unjudged == 0


def test_the_same_id_counts_once_whatever_is_in_it() -> None:
    other = replace(A, margin=0.5)
    for given_ in ([A, other, A], [other, A, A]):
        filtered = filter_pairs(given_, Evidence(), FilterSettings())
        assert filtered.dropped == {Reason.DUPLICATE: 2}
        assert filtered.kept == (other,)
