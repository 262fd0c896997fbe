"""Mining: a golden story, one small story per reason, and the promises as properties."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feedback.candidates import Skipped, Source
from feedback.interactions import FeedbackEvent, Interaction, Message, Status
from feedback.pairs import MinedPairs, mine_pairs
from tests.pawl.records import feedback, interaction

HELLO: tuple[Message, ...] = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello?"})
SKY: tuple[Message, ...] = ({"role": "user", "content": "Why is the sky blue?"},)


def sha(prompt: Sequence[Message]) -> str:
    return hashlib.sha256(json.dumps(prompt).encode()).hexdigest()


def iid(number: int) -> str:
    return f"{number:048x}"


def say(number: int, text: str | None, prompt: tuple[Message, ...] = HELLO, **changes: Any) -> Interaction:
    """Interaction `number`, at second `number`, answered with `text`."""
    fields: dict[str, Any] = {
        "created_at": float(number),
        "key_id": "key",
        "probability": 0.9,
        "is_analysed": True,
        "route_version": 1,
        "model": "base",
        "prompt": prompt,
        "prompt_sha": sha(prompt),
        "completion": {"role": "assistant", "content": text},
    }
    return interaction(iid(number), **(fields | changes))


def tell(at: float, kind: str, about: int, value: str | float | None = None, **changes: Any) -> FeedbackEvent:
    """Feedback on interaction `about` at second `at`; one event per time, so `at` names it."""
    fields = {"id": hashlib.md5(f"{at}".encode()).hexdigest(), "key_id": "key", "created_at": at}
    return feedback(iid(about), kind, value, **(fields | changes))


def up(at: float, about: int, **changes: Any) -> FeedbackEvent:
    return tell(at, "thumbs", about, "up", **changes)


def down(at: float, about: int, **changes: Any) -> FeedbackEvent:
    return tell(at, "thumbs", about, "down", **changes)


def rate(at: float, about: int, value: float, **changes: Any) -> FeedbackEvent:
    return tell(at, "rating", about, value, **changes)


def better(at: float, preferred: int, other: int, **changes: Any) -> FeedbackEvent:
    return tell(at, "choice", other, f"chatcmpl-{iid(preferred)}", **changes)


def again(at: float, new: int, old: int, **changes: Any) -> FeedbackEvent:
    return tell(at, "regenerate", old, f"chatcmpl-{iid(new)}", **changes)


def sides(mined: MinedPairs) -> set[tuple[str, str | int | None, int]]:
    """(source, chosen, rejected) by interaction number; an edit's text in place of its number."""
    return {
        (
            pair.source,
            int(pair.chosen_interaction, 16) if pair.chosen_interaction else pair.chosen["content"],
            int(pair.rejected_interaction, 16),
        )
        for pair in mined.pairs
    }


# The golden story


def story() -> tuple[list[Interaction], list[FeedbackEvent]]:
    """Ann asks again and is then content; Bob edits; two strangers disagree about the sky; Cy changes his mind."""
    interactions = [
        say(1, "Yes.", model="base"),
        say(2, "Hello! How can I help?", model="tuned", regenerate_of=iid(1), probability=0.1),
        say(3, "Hi ther.", user_id="bob"),
        say(4, "Because of Rayleigh scattering.", SKY, user_id="dee", key_id="other"),
        say(5, "Because it is painted.", SKY, user_id="cy"),
        say(6, "It just is.", SKY, user_id="cy"),
        say(7, "Bec", SKY, is_complete=False, finish_reason="length"),
        replace(say(8, None), is_stored=False, completion=None, prompt=None, prompt_sha=None),
    ]
    events = [
        up(10, 2),
        tell(11, "edit", 3, "Hi there.", user_id="bob"),
        up(12, 4, user_id="dee", key_id="other"),
        down(13, 5, user_id="cy"),
        up(14, 6, user_id="cy"),
        tell(15, "thumbs", 6, None, is_retraction=True, user_id="cy"),
        better(16, 5, 6, user_id="cy"),
        down(17, 7),
        up(18, 8),
        up(19, 99),
        tell(20, "comment", 1, "fine"),
    ]
    return interactions, events


def test_the_story_gives_exactly_these_pairs() -> None:
    mined = mine_pairs(*story())
    by_source = {pair.source: pair for pair in mined.pairs}
    assert sides(mined) == {("regeneration", 2, 1), ("edit", "Hi there.", 3), ("thumbs", 4, 5)}
    assert mined.skipped == {
        Skipped.CONTRADICTION: 1,  # Cy chose 5 over 6, yet gave 5 a thumb down.
        Skipped.INCOMPLETE: 1,  # 7
        Skipped.NOT_STORED: 1,  # 8
        Skipped.MISSING_INTERACTION: 1,  # 99
        Skipped.DUPLICATE: 1,  # The thumb on 2 has no partner, and 2 is in a pair already.
    }
    assert mined.unpaired == ()

    regeneration = by_source[Source.REGENERATION]
    assert asdict(regeneration) == {
        "id": regeneration.id,
        "alias": "assistant",
        "source": "regeneration",
        "prompt": HELLO,
        "chosen": {"role": "assistant", "content": "Hello! How can I help?"},
        "rejected": {"role": "assistant", "content": "Yes."},
        "margin": 0.8,
        "n_voters": 1,
        "principals": ("key/ann",),
        "chosen_interaction": iid(2),
        "rejected_interaction": iid(1),
        "tools": None,
        "models": ("base", "tuned"),
        "probability": 0.1,
        "created_at": 10.0,
    }
    assert [(pair.margin, pair.principals, pair.created_at) for pair in (by_source["edit"], by_source["thumbs"])] == [
        (1.0, ("key/bob",), 11.0),
        (1.0, ("key/cy", "other/dee"), 13.0),
    ]
    assert by_source["edit"].models == ("base",)
    assert by_source["edit"].probability == 0.9


def test_pair_ids_never_change() -> None:
    """A stored pair is found again by its id, so the recipe is part of the promise."""
    ids = {pair.source: pair.id for pair in mine_pairs(*story()).pairs}
    for source, chosen, rejected in [("thumbs", iid(4), iid(5)), ("edit", "Hi there.", iid(3))]:
        message = json.dumps([source, chosen, rejected], separators=(",", ":")).encode()
        assert ids[source] == hashlib.blake2b(message, digest_size=16).hexdigest()


# Reasons

A, B = say(1, "first"), say(2, "second")
B_OF_A = replace(B, regenerate_of=A.id)
TOOL_CALL = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("reason", "interactions", "events"),
    [
        (Skipped.MISSING_INTERACTION, [B_OF_A], []),
        (Skipped.MISSING_INTERACTION, [A], [again(9, 2, 1)]),
        (Skipped.MISSING_INTERACTION, [], [tell(9, "edit", 1, "x")]),
        (Skipped.MISSING_INTERACTION, [], [down(9, 1)]),
        (Skipped.NOT_STORED, [replace(A, is_stored=False), B_OF_A], []),
        (Skipped.NOT_STORED, [A, replace(B_OF_A, is_stored=False, prompt=None, completion=None)], []),
        (Skipped.NOT_STORED, [replace(A, is_stored=False)], [tell(9, "edit", 1, "x")]),
        (Skipped.INCOMPLETE, [replace(A, is_complete=False), B_OF_A], []),
        (Skipped.INCOMPLETE, [A, replace(B_OF_A, status=Status.UPSTREAM_ERROR)], []),
        (Skipped.INCOMPLETE, [A, replace(B_OF_A, status=Status.CLIENT_DISCONNECTED)], []),
        (Skipped.INCOMPLETE, [replace(A, completion=None)], [up(9, 1)]),
        (Skipped.EMPTY, [say(1, " \n"), B_OF_A], []),
        (Skipped.EMPTY, [say(1, None), B_OF_A], []),
        (Skipped.EMPTY, [A], [tell(9, "edit", 1, " ")]),
        (Skipped.EMPTY, [replace(A, prompt=())], [up(9, 1)]),
        (Skipped.FOREIGN, [replace(A, key_id="other"), B_OF_A], []),
        (Skipped.FOREIGN, [replace(A, key_id="other"), B], [better(9, 2, 1, key_id="other")]),
        (Skipped.DIFFERENT_ALIAS, [replace(A, alias="other"), B_OF_A], []),
        (Skipped.DIFFERENT_PROMPT, [A, say(2, "second", SKY, regenerate_of=A.id)], []),
        (Skipped.DIFFERENT_PROMPT, [A, replace(B_OF_A, prompt=SKY)], []),
        (Skipped.DIFFERENT_PROMPT, [A, replace(B_OF_A, prompt_sha="other tools")], []),
        (Skipped.IDENTICAL, [A, say(2, " first\n", regenerate_of=A.id)], []),
        (Skipped.IDENTICAL, [A], [tell(9, "edit", 1, "first ")]),
        (Skipped.IDENTICAL, [replace(A, regenerate_of=A.id)], []),
        (Skipped.IDENTICAL, [A, say(2, "first")], [up(8, 1), down(9, 2)]),
        (Skipped.CONTRADICTION, [replace(A, created_at=99.0), B_OF_A], []),
        (Skipped.CONTRADICTION, [A], [up(8, 1, feedback_id="one"), down(9, 1, feedback_id="two")]),
        (Skipped.CONTRADICTION, [A], [up(8, 1), tell(9, "report", 1, "harmful")]),
        (Skipped.CONTRADICTION, [A], [up(8, 1), rate(9, 1, 0.0)]),
        (Skipped.CONTRADICTION, [A], [rate(8, 1, 1.0), down(9, 1, user_id="bob", feedback_id="other")]),
        (Skipped.INCOMPLETE, [replace(A, is_complete=False)], [rate(9, 1, 1.0)]),
        (Skipped.NOT_STORED, [replace(A, is_stored=False)], [rate(9, 1, 0.0)]),
        (Skipped.MISSING_INTERACTION, [], [rate(9, 1, 1.0)]),
        (Skipped.IDENTICAL, [A, say(2, "first")], [rate(8, 1, 1.0), rate(9, 2, 0.0)]),
        (Skipped.CONTRADICTION, [A, B_OF_A], [tell(9, "report", 2, "harmful")]),
    ],
)
def test_each_reason_is_counted_once(
    reason: Skipped, interactions: list[Interaction], events: list[FeedbackEvent]
) -> None:
    assert mine_pairs(interactions, events) == MinedPairs((), Counter({reason: 1}), ())


def test_a_margin_that_is_too_small() -> None:
    assert mine_pairs([A, B_OF_A], [], min_margin=0.6).skipped == {Skipped.MARGIN_TOO_SMALL: 1}
    assert sides(mine_pairs([A, B_OF_A], [down(9, 1)], min_margin=0.6)) == {("regeneration", 2, 1)}


def test_a_lone_thumb_is_an_unpaired_example() -> None:
    mined = mine_pairs([A, B], [down(9, 1), up(10, 2, is_retraction=True)])
    (example,) = mined.unpaired
    assert (example.prompt, example.completion, example.label) == (A.prompt, A.completion, False)
    assert (example.interaction, example.principals, example.created_at) == (A.id, ("key/ann",), 9.0)
    assert mined.skipped == {Skipped.UNPAIRED: 1}
    assert mined.pairs == ()


# Contradictions


@pytest.mark.parametrize(
    "event", [up(9, 1), down(9, 2), tell(9, "report", 2, "wrong"), rate(9, 1, 0.75), rate(9, 2, 0.25)]
)
def test_a_regeneration_that_a_signal_speaks_against_makes_no_pair(event: FeedbackEvent) -> None:
    mined = mine_pairs([A, B_OF_A], [event])
    assert mined.pairs == ()
    assert mined.skipped[Skipped.CONTRADICTION] == 1


def test_of_a_chain_of_regenerations_only_the_last_is_a_preference() -> None:
    mined = mine_pairs([A, B_OF_A, say(3, "third", regenerate_of=B.id)], [])
    assert sides(mined) == {("regeneration", 3, 2)}
    assert mined.skipped == {Skipped.CONTRADICTION: 1}


def test_of_several_regenerations_of_one_answer_only_the_last_is_a_preference() -> None:
    mined = mine_pairs([A, B_OF_A, say(3, "third", regenerate_of=A.id)], [])
    assert sides(mined) == {("regeneration", 3, 1)}
    assert mined.skipped == {Skipped.CONTRADICTION: 1}


def test_another_key_cannot_undo_a_regeneration() -> None:
    stranger = say(3, "third", regenerate_of=B.id, key_id="stranger")
    mined = mine_pairs([A, B_OF_A, stranger], [])
    assert sides(mined) == {("regeneration", 2, 1)}
    assert mined.skipped == {Skipped.FOREIGN: 1}


def test_a_retracted_regeneration_never_happened() -> None:
    said = again(8, 2, 1)
    unsaid = replace(said, id="f" * 32, value=None, is_retraction=True, created_at=9.0)
    assert sides(mine_pairs([A, B], [said])) == {("regeneration", 2, 1)}
    assert mine_pairs([A, B], [said, unsaid]) == MinedPairs((), Counter(), ())


def test_an_edit_of_a_liked_answer_is_a_contradiction() -> None:
    mined = mine_pairs([A], [up(8, 1), tell(9, "edit", 1, "better")])
    assert mined.pairs == ()
    assert mined.skipped == {Skipped.CONTRADICTION: 1, Skipped.UNPAIRED: 1}


def test_opposite_choices_cancel_each_other_and_what_is_weaker() -> None:
    mined = mine_pairs([A, B_OF_A], [better(8, 1, 2), better(9, 2, 1)])
    assert mined.pairs == ()
    assert mined.skipped == {Skipped.CONTRADICTION: 3}


def test_a_choice_beats_a_regeneration_the_other_way() -> None:
    mined = mine_pairs([A, B_OF_A], [better(9, 1, 2)])
    assert sides(mined) == {("choice", 1, 2)}
    assert mined.skipped == {Skipped.CONTRADICTION: 1}


def test_between_two_liked_or_two_disliked_answers_a_choice_stands() -> None:
    assert sides(mine_pairs([A, B], [up(7, 1), up(8, 2), better(9, 2, 1)])) == {("choice", 2, 1)}
    assert sides(mine_pairs([A, B], [down(7, 1), down(8, 2), better(9, 2, 1)])) == {("choice", 2, 1)}


# Sources and voters


def test_the_strongest_source_makes_the_pair_and_all_agreeing_voters_are_named() -> None:
    events = [better(7, 2, 1, user_id="cy"), up(8, 2, user_id="bob"), down(9, 1, user_id="dee")]
    mined = mine_pairs([A, B_OF_A], events)
    (pair,) = mined.pairs
    assert (pair.source, pair.margin) == ("choice", 1.0)
    assert (pair.n_voters, pair.principals) == (4, ("key/ann", "key/bob", "key/cy", "key/dee"))
    assert pair.created_at == 9.0
    assert mined.skipped == {Skipped.DUPLICATE: 2}


def test_a_regeneration_told_twice_is_one_candidate() -> None:
    mined = mine_pairs([A, B_OF_A], [again(9, 2, 1)])
    assert sides(mined) == {("regeneration", 2, 1)}
    assert mined.pairs[0].margin == 0.5
    assert mined.skipped == {}


def test_two_people_who_want_the_same_text_are_two_voters() -> None:
    events = [
        tell(8, "edit", 1, "better", feedback_id="one"),
        tell(9, "edit", 1, "better", feedback_id="two", user_id=None),
    ]
    (pair,) = mine_pairs([A], events).pairs
    assert (pair.n_voters, pair.principals) == (2, ("key/", "key/ann"))
    assert (pair.chosen, pair.chosen_interaction) == ({"role": "assistant", "content": "better"}, None)


def test_tool_calls_survive_and_their_random_ids_make_no_difference() -> None:
    message = {"role": "assistant", "content": None, "tool_calls": [TOOL_CALL]}
    calling = replace(A, completion=message)
    (pair,) = mine_pairs([calling, B_OF_A], []).pairs
    assert pair.rejected == message
    same = replace(B_OF_A, completion=message | {"tool_calls": [TOOL_CALL | {"id": "call_2"}]})
    assert mine_pairs([calling, same], []).skipped == {Skipped.IDENTICAL: 1}
    (edit,) = mine_pairs([calling], [tell(9, "edit", 1, "Looking.")]).pairs
    assert edit.chosen == {"role": "assistant", "content": "Looking.", "tool_calls": [TOOL_CALL]}


def test_a_popular_prompt_does_not_square_up() -> None:
    interactions = [say(n, f"answer {n}") for n in range(100)]
    events = [up(100 + n, n) if n < 70 else down(100 + n, n) for n in range(100)]
    mined = mine_pairs(interactions, events)
    assert len(mined.pairs) == 30
    assert len({pair.chosen_interaction for pair in mined.pairs}) == 30
    assert len({pair.rejected_interaction for pair in mined.pairs}) == 30
    assert {pair.chosen_interaction for pair in mined.pairs} != {iid(n) for n in range(30)}, "not by age"
    assert mined.skipped == {Skipped.UNPAIRED: 40}
    assert [example.label for example in mined.unpaired] == [True] * 40


# Promises

N_KNOWN, N_NAMED = 6, 7
"""Feedback may name one interaction more than there are."""
NUMBERS = st.integers(0, N_NAMED - 1)
mostly = st.sampled_from([True] * 9 + [False])

interactions_ = st.tuples(
    *(
        st.builds(
            say,
            st.just(number),
            st.sampled_from(["red", "green", "blue", "red ", "", "\ud800\x00"]),
            st.sampled_from([HELLO, HELLO, HELLO, SKY]),
            alias=st.sampled_from(["assistant"] * 8 + ["other"]),
            key_id=st.sampled_from(["key"] * 8 + ["other"]),
            is_stored=mostly,
            is_complete=mostly,
            status=st.sampled_from([Status.OK] * 9 + [Status.SHUTDOWN]),
            regenerate_of=st.none() | NUMBERS.map(iid),
            probability=st.sampled_from([0.1, 0.9]),
        )
        for number in range(N_KNOWN)
    )
)
VALUES: Mapping[str, st.SearchStrategy[str | float]] = {
    "thumbs": st.sampled_from(["up", "down"]),
    "rating": st.sampled_from([0.0, 0.25, 0.26, 0.5, 0.74, 0.75, 1.0]),
    "edit": st.sampled_from(["red", "better", " "]),
    "choice": NUMBERS.map(lambda number: f"chatcmpl-{iid(number)}"),
    "regenerate": NUMBERS.map(lambda number: f"chatcmpl-{iid(number)}"),
    "report": st.just("wrong"),
    "comment": st.just("hm"),
}


@st.composite
def events_(draw: st.DrawFn) -> list[FeedbackEvent]:
    events = []
    for index in range(draw(st.integers(0, 14))):
        kind = draw(st.sampled_from(["thumbs", "thumbs", "rating", *VALUES]))
        user = draw(st.sampled_from(["ann", "bob"]))
        about = draw(NUMBERS)
        event = tell(
            100.0 + index,
            kind,
            about,
            draw(VALUES[kind]),
            user_id=user,
            feedback_id=f"fb_{kind}_{about}_{user}",
            is_retraction=not draw(mostly),
        )
        events.append(event)
    return events


def count_candidates(interactions: Sequence[Interaction], events: Sequence[FeedbackEvent]) -> int:
    """The definition in the module's docstring, counted the slow way."""
    live = [event for event in {event.feedback_id: event for event in events}.values() if not event.is_retraction]
    stated = {(e.type, e.value, e.completion_id) for e in live if e.type in ("choice", "edit", "regenerate")}
    stated |= {
        ("regenerate", each.completion_id, f"chatcmpl-{each.regenerate_of}")
        for each in interactions
        if each.regenerate_of
    }
    known = {each.id: each for each in interactions}
    votes: dict[str, set[str]] = {}
    for event in live:
        if vote := vote_of(event):
            votes.setdefault(event.interaction_id, set()).add(vote)
    thumbed = {e.interaction_id for e in live if e.type != "report" and vote_of(e)}
    refused = 0
    tally: dict[tuple[str, str], Counter[str]] = {}
    for each in (known.get(interaction_id) for interaction_id in thumbed):
        if each is None or not is_usable(each) or len(votes[each.id]) > 1:
            refused += 1
        else:
            conversation = tally.setdefault((each.alias, json.dumps(each.prompt)), Counter())
            conversation.update(votes[each.id])
    return len(stated) + refused + sum(max(conversation.values()) for conversation in tally.values())


def vote_of(event: FeedbackEvent) -> str | None:
    """Up or down; middling ratings and other kinds are no vote."""
    if event.type == "rating":
        return "up" if float(event.value or 0) >= 0.75 else "down" if float(event.value or 0) <= 0.25 else None
    return str(event.value) if event.type == "thumbs" else "down" if event.type == "report" else None


def is_usable(each: Interaction) -> bool:
    text = (each.completion or {}).get("content") or ""
    return each.is_stored and each.is_complete and each.status == Status.OK and bool(text.strip())


@settings(max_examples=300)
@given(interactions_, events_())
def test_every_candidate_is_a_pair_or_counted_under_one_reason(
    interactions: tuple[Interaction, ...], events: list[FeedbackEvent]
) -> None:
    mined = mine_pairs(interactions, events)
    assert len(mined.pairs) + mined.skipped.total() == count_candidates(interactions, events)
    assert mined.skipped[Skipped.UNPAIRED] == len(mined.unpaired)


@settings(max_examples=200)
@given(interactions_, events_(), st.randoms(use_true_random=False), st.sampled_from([0.0, 0.6, 0.9]))
def test_order_and_repetition_change_nothing(
    interactions: tuple[Interaction, ...], events: list[FeedbackEvent], random: Any, min_margin: float
) -> None:
    shuffled = [*interactions, *interactions[:2]], [*events, *events[:3]]
    random.shuffle(shuffled[0])
    random.shuffle(shuffled[1])
    mined = mine_pairs(interactions, events, min_margin=min_margin)
    assert repr(mine_pairs(*shuffled, min_margin=min_margin)) == repr(mined)


@settings(max_examples=300)
@given(interactions_, events_(), st.sampled_from([0.0, 0.6, 0.9]))
def test_every_pair_keeps_its_promises(
    interactions: tuple[Interaction, ...], events: list[FeedbackEvent], min_margin: float
) -> None:
    mined = mine_pairs(interactions, events, min_margin=min_margin)
    known = {each.id: each for each in interactions}
    for pair in mined.pairs:
        served = [known[each] for each in (pair.chosen_interaction, pair.rejected_interaction) if each is not None]
        assert all(map(is_usable, served))
        assert all((each.alias, each.prompt) == (pair.alias, pair.prompt) for each in served)
        assert pair.chosen["content"].strip() != pair.rejected["content"].strip()
        assert min_margin <= pair.margin <= 1.0
        assert pair.probability == served[0].probability
        assert pair.models == tuple(sorted({each.model for each in served}))
        assert pair.n_voters == len(pair.principals) > 0
        assert pair.created_at >= max(each.created_at for each in served)
    ids = [pair.id for pair in mined.pairs]
    assert ids == sorted(set(ids))
    assert all(type(pair.source) is str for pair in mined.pairs), "database drivers treat enums each their own way"
    served_sides = [
        frozenset((p.chosen_interaction, p.rejected_interaction)) for p in mined.pairs if p.chosen_interaction
    ]
    assert len(set(served_sides)) == len(served_sides)
    for example in mined.unpaired:
        assert is_usable(known[example.interaction])
        assert all(example.interaction not in (p.chosen_interaction, p.rejected_interaction) for p in mined.pairs)
