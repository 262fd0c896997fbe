"""TensorZero's and Langfuse's feedback, read as our own: by name, by scale, by type; refused where it means nothing."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from feedback.errors import InvalidFeedback
from feedback.signals import Report, Signal, parse_feedback
from pawl.settings import ServingSettings
from serving.feedback_shapes import Meaning, Meanings, from_langfuse, from_tensorzero, meanings_of
from serving.feedback_tokens import tokens_of

ID = "chatcmpl-" + "a" * 48
OTHER = "chatcmpl-" + "b" * 48
MEANINGS: Meanings = {
    "helpful": Meaning(Signal.THUMBS),
    "thumbs_down": Meaning(Signal.THUMBS, low=1, high=0),
    "sentiment": Meaning(Signal.THUMBS, low=-1, high=1),
    "stars": Meaning(Signal.RATING, low=1, high=5),
    "effort": Meaning(Signal.RATING, low=10, high=0),
    "unsafe": Meaning(Signal.REPORT, report=Report.HARMFUL),
    "problem": Meaning(Signal.REPORT),
    "copied": Meaning(Signal.COPY),
    "preferred": Meaning(Signal.CHOICE),
    "demonstration": Meaning(Signal.COMMENT),
}


def tensorzero(name: str, value: Any, **more: Any) -> dict[str, Any]:
    return from_tensorzero({"inference_id": ID, "metric_name": name, "value": value, **more}, MEANINGS)


def langfuse(name: str, value: Any, **more: Any) -> dict[str, Any]:
    return from_langfuse({"traceId": ID, "name": name, "value": value, **more}, MEANINGS)


@pytest.mark.parametrize("read", [tensorzero, langfuse])
@pytest.mark.parametrize(
    ("name", "value", "kind", "own"),
    [
        ("helpful", True, "thumbs", "up"),
        ("helpful", False, "thumbs", "down"),
        ("helpful", 1, "thumbs", "up"),
        ("helpful", 0.0, "thumbs", "down"),
        ("helpful", "up", "thumbs", "up"),
        ("thumbs_down", True, "thumbs", "down"),
        ("thumbs_down", 0, "thumbs", "up"),
        ("sentiment", -1, "thumbs", "down"),
        ("sentiment", 0.2, "thumbs", "up"),
        ("stars", 5, "rating", 1.0),
        ("stars", 2, "rating", 0.25),
        ("effort", 10, "rating", 0.0),
        ("effort", 0, "rating", 1.0),
        ("unsafe", True, "report", "harmful"),
        ("problem", 1, "report", "other"),
        ("problem", "wrong", "report", "wrong"),
        ("copied", True, "copy", True),
        ("preferred", OTHER, "choice", OTHER),
        ("thumbs", True, "thumbs", "up"),
        ("rating", 0.5, "rating", 0.5),
        ("comment", "so so", "comment", "so so"),
    ],
)
def test_a_name_and_a_scale_say_what_a_value_means(read: Any, name: str, value: Any, kind: str, own: Any) -> None:
    body = read(name, value)
    assert body == {"completion_id": ID, "type": kind, "value": own}
    assert parse_feedback(body).value == own


@pytest.mark.parametrize("read", [tensorzero, langfuse])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("helpful", 0.5),
        ("helpful", 2),
        ("helpful", "yes"),
        ("helpful", None),
        ("stars", 0),
        ("stars", 6),
        ("stars", 10**400),
        ("stars", float("nan")),
        ("stars", float("inf")),
        ("stars", "5"),
        ("stars", [5]),
        ("unsafe", False),
        ("unsafe", {"x": 1}),
        ("copied", "yes"),
        ("nobody_said", 1),
        (None, 1),
        (7, 1),
        ("", 1),
    ],
)
def test_what_means_nothing_is_refused(read: Any, name: Any, value: Any) -> None:
    with pytest.raises(InvalidFeedback) as caught:
        read(name, value)
    assert caught.value.param in ("value", "name", "metric_name")


def test_an_unknown_name_says_where_it_could_be_made_known() -> None:
    with pytest.raises(InvalidFeedback, match=r"'nobody_said' is not known here.*serving.feedback_names"):
        tensorzero("nobody_said", 1)


def test_an_odd_name_is_safe_to_send_back() -> None:
    with pytest.raises(InvalidFeedback) as caught:
        langfuse("\ud800\x00" * 500, 1)
    assert str(caught.value).isascii()
    assert len(str(caught.value)) < 300


def test_the_installations_own_meaning_wins() -> None:
    body = {"inference_id": ID, "metric_name": "demonstration", "value": "Like this."}
    assert from_tensorzero(body, {})["type"] == "edit"
    assert from_tensorzero(body, MEANINGS)["type"] == "comment"


def test_content_blocks_that_are_text_are_one_text() -> None:
    blocks = [{"type": "text", "text": "Like "}, {"type": "text", "text": "this."}]
    assert from_tensorzero({"inference_id": ID, "metric_name": "demonstration", "value": blocks}, {})["value"] == (
        "Like this."
    )
    for odd in ([{"type": "tool_call", "name": "f"}], [{"type": "text"}], ["Like this."]):
        with pytest.raises(InvalidFeedback, match="content blocks"):
            from_tensorzero({"inference_id": ID, "metric_name": "demonstration", "value": odd}, {})


def test_exactly_one_target_and_tags_pass() -> None:
    both = {"inference_id": ID, "episode_id": ID, "metric_name": "helpful", "value": True}
    for targets in ({}, {"inference_id": None}, {"inference_id": ID, "episode_id": ID}):
        with pytest.raises(InvalidFeedback) as caught:
            from_tensorzero({"metric_name": "helpful", "value": True, **targets}, MEANINGS)
        assert caught.value.param == "inference_id"
    alone = {**both, "inference_id": None, "tags": {"author": "Alice"}}
    assert from_tensorzero(alone, MEANINGS)["completion_id"] == ID
    assert from_tensorzero(alone, MEANINGS)["tags"] == {"author": "Alice"}


@pytest.mark.parametrize(
    ("targets", "rated"),
    [
        ({"traceId": ID}, ID),
        ({"observationId": ID}, ID),
        ({"traceId": "4bf92f3577b34da6a3ce929d0e0e4736", "observationId": ID}, ID),
        ({"traceId": ID, "observationId": "00f067aa0ba902b7"}, ID),
        ({"traceId": OTHER, "observationId": ID}, ID),
        ({"traceId": "t"}, "t"),
    ],
)
def test_of_trace_and_observation_the_completion_is_rated(targets: dict[str, str], rated: str) -> None:
    assert from_langfuse({**targets, "name": "thumbs", "value": 1}, {})["completion_id"] == rated


def test_a_score_of_a_session_rates_nothing() -> None:
    with pytest.raises(InvalidFeedback, match="traceId"):
        from_langfuse({"sessionId": "s", "name": "thumbs", "value": 1}, {})


def test_a_scores_type_speaks_where_its_name_does_not() -> None:
    assert langfuse("output", "Like this.", dataType="CORRECTION")["type"] == "edit"
    assert langfuse("anything", "I liked it", dataType="TEXT")["type"] == "comment"
    assert langfuse("helpful", 1, dataType="BOOLEAN")["type"] == "thumbs"
    assert from_langfuse({"traceId": ID, "name": "user-feedback", "value": 0, "dataType": "NUMERIC"}, {})["value"] == (
        "down"
    )


def test_comment_and_metadata_of_a_score_are_kept() -> None:
    body = langfuse("helpful", 1, comment="good", metadata={"screen": "chat", "n": 3, "deep": {"a": [1]}})
    assert body["comment"] == "good"
    assert body["tags"] == {"screen": "chat", "n": "3", "deep": '{"a": [1]}'}
    assert langfuse("helpful", 1, comment="", metadata={}) == {"completion_id": ID, "type": "thumbs", "value": "up"}


def test_settings_say_what_names_mean() -> None:
    names = {"stars": {"signal": "rating", "low": 1, "high": 5}, "bad": {"signal": "report", "report": "wrong"}}
    settings = ServingSettings.model_validate({"feedback_names": names})
    assert meanings_of(settings) == {
        "stars": Meaning(Signal.RATING, 1, 5),
        "bad": Meaning(Signal.REPORT, report=Report.WRONG),
    }
    with pytest.raises(ValueError, match="low and high must differ"):
        ServingSettings.model_validate({"feedback_names": {"flat": {"signal": "rating", "low": 1, "high": 1}}})


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
FIELDS = ("inference_id", "episode_id", "metric_name", "value", "tags", "traceId", "observationId", "name", "dataType")
NAMES = st.sampled_from([*MEANINGS, *Signal, "TEXT", "CORRECTION", ID])


@given(st.fixed_dictionaries({}, optional=dict.fromkeys((*FIELDS, "comment", "metadata"), NAMES | JSON_VALUES)))
def test_any_json_object_is_either_read_or_refused(sent: dict[str, Any]) -> None:
    for read in (from_tensorzero, from_langfuse):
        with suppress(InvalidFeedback):
            assert parse_feedback(read(sent, MEANINGS)).type in set(Signal)


@pytest.mark.parametrize(
    ("headers", "tokens"),
    [
        ({}, ()),
        ({"authorization": "Bearer pawl-0-0"}, ()),
        ({"authorization": f"Bearer ff.{'a' * 48}.{'b' * 32}"}, (f"ff.{'a' * 48}.{'b' * 32}",)),
        ({"x-pawl-feedback-token": ""}, ("",)),
        ({"x-pawl-feedback-token": "a,b ,c"}, ("a", "b", "c")),
        ({"x-pawl-feedback-token": "a", "authorization": f"Bearer ff.{'a' * 48}.{'b' * 32}"}, ("a",)),
        ({"x-pawl-feedback-token": ",".join("abcdefghijkl")}, tuple("abcdefgh")),
    ],
)
def test_tokens_as_callers_show_them(headers: dict[str, str], tokens: tuple[str, ...]) -> None:
    assert tokens_of(headers) == tokens
