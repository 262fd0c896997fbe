"""Feedback bodies are checked to the letter; of a principal's events only the last counts."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from feedback.errors import InvalidFeedback
from feedback.interactions import FeedbackEvent
from feedback.signals import (
    MAX_TEXT_CHARS,
    TEXTS,
    Feedback,
    Signal,
    Thumbs,
    has_text,
    latest,
    parse_feedback,
    thumb_of,
    without_text,
)
from tests.pawl.records import feedback

ID = "chatcmpl-" + "a" * 48
OTHER = "chatcmpl-" + "b" * 48


def body(**fields: object) -> dict[str, object]:
    return {"completion_id": ID, "type": "thumbs", "value": "up"} | fields


def refusal(sent: Mapping[str, object]) -> InvalidFeedback:
    with pytest.raises(InvalidFeedback) as caught:
        parse_feedback(sent)
    return caught.value


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("thumbs", "up"),
        ("thumbs", "down"),
        ("rating", 0),
        ("rating", 1),
        ("rating", 0.25),
        ("edit", "x" * MAX_TEXT_CHARS),
        ("choice", OTHER),
        ("regenerate", OTHER),
        ("report", "harmful"),
        ("report", "wrong"),
        ("report", "refused"),
        ("report", "other"),
        ("copy", True),
        ("comment", "x" * MAX_TEXT_CHARS),
    ],
)
def test_every_kind_of_the_contract_is_accepted(kind: str, value: object) -> None:
    parsed = parse_feedback(body(type=kind, value=value))
    assert (parsed.completion_id, parsed.type, parsed.value) == (ID, kind, value)


def test_every_kind_has_a_case_above() -> None:
    marks = test_every_kind_of_the_contract_is_accepted.pytestmark  # type: ignore[attr-defined]
    assert {kind for kind, _ in marks[0].args[1]} == set(Signal)


def test_optional_fields_are_kept_and_null_means_absent() -> None:
    full = parse_feedback(body(reason="too long", comment="see line 2", tags={"locale": "de"}, user="u1"))
    assert full == Feedback(ID, Signal.THUMBS, "up", "too long", "see line 2", {"locale": "de"}, "u1")
    bare = parse_feedback(body(reason=None, comment=None, tags=None, user=None))
    assert bare == Feedback(ID, Signal.THUMBS, "up")


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"completion_id": None}, "completion_id"),
        ({"completion_id": ""}, "completion_id"),
        ({"completion_id": 7}, "completion_id"),
        ({"completion_id": "x" * 129}, "completion_id"),
        ({"type": "applause"}, "type"),
        ({"type": None}, "type"),
        ({"type": ["thumbs"]}, "type"),
        ({"value": "sideways"}, "value"),
        ({"value": True}, "value"),
        ({"value": None}, "value"),
        ({"type": "rating", "value": True}, "value"),
        ({"type": "rating", "value": "0.5"}, "value"),
        ({"type": "rating", "value": math.nan}, "value"),
        ({"type": "rating", "value": math.inf}, "value"),
        ({"type": "rating", "value": -math.inf}, "value"),
        ({"type": "rating", "value": 1.0001}, "value"),
        ({"type": "rating", "value": 10**400}, "value"),
        ({"type": "rating", "value": -1}, "value"),
        ({"type": "edit", "value": "x" * (MAX_TEXT_CHARS + 1)}, "value"),
        ({"type": "edit", "value": " \n"}, "value"),
        ({"type": "choice", "value": ID}, "value"),
        ({"type": "choice", "value": 3}, "value"),
        ({"type": "choice", "value": "x" * 129}, "value"),
        ({"type": "regenerate", "value": ID}, "value"),
        ({"type": "report", "value": "rude"}, "value"),
        ({"type": "copy", "value": False}, "value"),
        ({"type": "copy", "value": 1}, "value"),
        ({"type": "copy", "value": "true"}, "value"),
        ({"type": "comment", "value": "x" * (MAX_TEXT_CHARS + 1)}, "value"),
        ({"comment": "x" * (MAX_TEXT_CHARS + 1)}, "comment"),
        ({"comment": 5}, "comment"),
        ({"reason": "x" * 1_001}, "reason"),
        ({"user": ""}, "user"),
        ({"user": "x" * 513}, "user"),
        ({"tags": ["a"]}, "tags"),
        ({"tags": {"a": 1}}, "tags"),
        ({"tags": {"": "x"}}, "tags"),
        ({"tags": {"x" * 65: "x"}}, "tags"),
        ({"tags": {"a": "x" * 513}}, "tags"),
        ({"tags": {str(i): "x" for i in range(17)}}, "tags"),
        ({"stars": 5}, "stars"),
    ],
)
def test_anything_else_is_refused_naming_the_field(changes: dict[str, object], param: str) -> None:
    error = refusal(body(**changes))
    assert error.param == param
    assert str(error)


def test_a_missing_field_is_refused() -> None:
    for field in ("completion_id", "type", "value"):
        sent = body()
        del sent[field]
        assert refusal(sent).param == field


def test_the_largest_tags_are_accepted() -> None:
    tags = {f"{i:064}": "x" * 512 for i in range(16)}
    assert parse_feedback(body(tags=tags)).tags == tags


def test_an_error_does_not_repeat_what_the_user_wrote() -> None:
    secret = "my-secret-words "
    assert "secret" not in str(refusal(body(type="edit", value=secret * 100_000)))


def test_an_odd_field_name_is_safe_to_send_back() -> None:
    error = refusal(body(**{"\ud800\x00" + "x" * 500: 1}))
    json.dumps([str(error), error.param]).encode("ascii")
    assert error.param.isascii()
    assert error.param.isprintable()
    assert len(error.param) < 100


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "completion_id": st.just(ID) | JSON_VALUES,
            "type": st.sampled_from(list(map(str, Signal))) | JSON_VALUES,
            "value": st.sampled_from(["up", "down", "other", OTHER]) | JSON_VALUES,
            "reason": JSON_VALUES,
            "tags": JSON_VALUES,
            "user": JSON_VALUES,
            "extra": JSON_VALUES,
        },
    )
)
def test_any_json_object_is_either_read_or_refused(sent: dict[str, object]) -> None:
    with suppress(InvalidFeedback):
        parsed = parse_feedback(sent)
        assert "extra" not in sent
        assert parsed.completion_id == sent["completion_id"]
        assert not (parsed.type == Signal.RATING and isinstance(sent["value"], bool))


def make_event(number: int, *, of: str = "fb_a", at: float = 0.0, is_retraction: bool = False) -> FeedbackEvent:
    value = None if is_retraction else "up"
    return feedback(
        "a" * 48, value=value, id=f"{number:032x}", feedback_id=of, created_at=at, is_retraction=is_retraction
    )


def test_the_last_event_wins_and_a_retraction_removes() -> None:
    first, second = make_event(1, at=1.0), make_event(2, at=2.0)
    gone = make_event(3, of="fb_b", at=5.0), make_event(4, of="fb_b", at=6.0, is_retraction=True)
    back = make_event(6, of="fb_c", at=5.0), make_event(5, of="fb_c", at=4.0, is_retraction=True)
    assert latest([second, first, *gone, *back]) == {"fb_a": second, "fb_c": back[0]}


def test_at_the_same_time_the_larger_id_wins() -> None:
    low, high = make_event(1), make_event(2)
    assert latest([high, low]) == {"fb_a": high}


HISTORIES = st.lists(
    st.tuples(st.sampled_from(["fb_a", "fb_b", "fb_c"]), st.integers(0, 4), st.booleans()), max_size=12
).map(lambda drawn: [make_event(i, of=of, at=at, is_retraction=gone) for i, (of, at, gone) in enumerate(drawn)])


@given(HISTORIES, st.data())
def test_neither_arrival_order_nor_redelivery_matters(events: Sequence[FeedbackEvent], data: st.DataObject) -> None:
    again = data.draw(st.lists(st.sampled_from(events), max_size=5)) if events else []
    arrived = data.draw(st.permutations([*events, *again]))
    assert list(latest(arrived).items()) == list(latest(events).items())


@given(HISTORIES)
def test_what_stands_is_the_newest_of_its_id(events: Sequence[FeedbackEvent]) -> None:
    standing = latest(events)
    for feedback_id in {event.feedback_id for event in events}:
        newest = max((e for e in events if e.feedback_id == feedback_id), key=lambda e: (e.created_at, e.id))
        assert standing.get(feedback_id) == (None if newest.is_retraction else newest)


@pytest.mark.parametrize(
    ("kind", "value", "thumb"),
    [
        ("thumbs", "up", Thumbs.UP),
        ("thumbs", "down", Thumbs.DOWN),
        ("rating", 0.75, Thumbs.UP),
        ("rating", 1, Thumbs.UP),
        ("rating", 0.74, None),
        ("rating", 0.26, None),
        ("rating", 0.25, Thumbs.DOWN),
        ("rating", 0.0, Thumbs.DOWN),
        ("comment", "up", None),
        ("copy", True, None),
    ],
)
def test_what_says_up_or_down(kind: str, value: str | float, thumb: Thumbs | None) -> None:
    assert thumb_of(kind, value) is thumb


@pytest.mark.parametrize("kind", ["thumbs", "rating"])
def test_a_retraction_says_neither(kind: str) -> None:
    assert thumb_of(kind, None) is None


WORDS = st.none() | st.text(min_size=1, max_size=5)
SPOKEN = st.builds(
    lambda kind, value, reason, comment, tags, gone: replace(
        make_event(1, is_retraction=gone),
        type=kind,
        value=None if gone else value if kind in TEXTS else "up",
        reason=reason,
        comment=comment,
        tags=tags,
    ),
    st.sampled_from(sorted(Signal)),
    st.text(min_size=1, max_size=5),
    WORDS,
    WORDS,
    st.none() | st.dictionaries(st.text(max_size=3), st.text(max_size=3), min_size=1, max_size=2),
    st.booleans(),
)


@given(SPOKEN)
def test_without_text_only_the_signal_is_left(event: FeedbackEvent) -> None:
    silent = without_text(event)
    assert not has_text(silent)
    assert without_text(silent) == silent
    assert (silent == event) == (not has_text(event))
    assert (silent.id, silent.type, silent.is_retraction) == (event.id, event.type, event.is_retraction)
    assert silent.value == event.value or event.type in TEXTS
