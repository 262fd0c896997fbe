"""What a judge is asked, what can be read of its reply, and what two replies come to."""

from __future__ import annotations

import json
from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from feedback.interactions import Message
from feedback.judged.constitution import (
    DEFAULT_FILE,
    Constitution,
    Principle,
    load_constitution,
    parse_constitution,
)
from feedback.judged.question import Comparison, is_readable, n_chars, question, response_format
from feedback.judged.reply import Scores, SideScores, read_scores
from feedback.judged.rulings import Outcome, rule
from pawl.errors import ConfigurationError

TWO = Constitution("1", (Principle("kind", "Be kind.", 1.0), Principle("true", "Be true.", 3.0)), "0" * 64)
MARK = "f" * 24


def says(text: object, role: str = "assistant") -> Message:
    return {"role": role, "content": text}


def user_message(prompt: tuple[Message, ...], first: Message, second: Message, mark: str = MARK) -> str:
    return question(Comparison(prompt, first, second), TWO, lambda: mark)[1]["content"]


# The constitution


def test_the_one_that_comes_with_pawl() -> None:
    constitution = load_constitution(None)
    assert [one.id for one in constitution.principles] == ["helpful", "honest", "harmless", "attentive", "respectful"]
    assert all(one.weight > 0 and len(one.text) > 40 for one in constitution.principles)
    assert constitution == parse_constitution(DEFAULT_FILE.read_bytes(), "again")


WHOLE = "version: 1\nprinciples: [{id: kind, text: Be kind., weight: 2}]\n"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("version: [", "it is not valid YAML"),
        ("- a", "expected the keys version and principles"),
        (WHOLE + "more: 1", "my.yaml: more: unknown key; there are principles, version"),
        (WHOLE.replace("version: 1", "version: ''"), "my.yaml: version: give it a number or a name"),
        ("version: 1", "my.yaml: principles: expected a list of 1 to 32"),
        ("version: 1\nprinciples: []", "my.yaml: principles: expected a list"),
        ("version: 1\nprinciples: [a]", "principles[0]: expected a mapping"),
        (WHOLE.replace("weight", "wait"), "principles[0].wait: unknown key"),
        (WHOLE.replace("kind,", "Kind!,"), "principles[0].id: expected a short name"),
        (WHOLE.replace("Be kind.", "' '"), "principles[0].text: say in a sentence"),
        (WHOLE.replace("2", "-1"), "principles[0].weight: expected a number from 0"),
        (WHOLE.replace("2", ".nan"), "principles[0].weight: expected a number from 0"),
        (WHOLE.replace("2", "9" * 400), "principles[0].weight: expected a number from 0"),
        (WHOLE.replace("2", "true"), "principles[0].weight: expected a number from 0"),
        (WHOLE.replace("2", "0"), "principles: every weight is 0"),
        (WHOLE.replace("]", ", {id: kind, text: More.}]"), "principles[1].id: kind is there already"),
        (WHOLE + "#" * 70_000, "it is longer than 65536 bytes"),
        ("[" * 2000, "it is not valid YAML"),
    ],
)
def test_errors_say_where_and_what_to_do(text: str, told: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        parse_constitution(text.encode(), "my.yaml")
    assert told in str(error.value)
    assert str(error.value).startswith("constitution my.yaml")
    assert "\n" not in str(error.value)


def test_a_file_that_is_no_text() -> None:
    with pytest.raises(ConfigurationError, match="not UTF-8"):
        parse_constitution(b"version: \xff", "my.yaml")


def test_every_byte_of_the_file_counts_for_its_hash() -> None:
    assert parse_constitution(WHOLE.encode(), "a").sha256 != parse_constitution(WHOLE.encode() + b"\n", "a").sha256


# The question


texts = st.text() | st.sampled_from([MARK, f"--- {MARK} first answer ends", "\u2028", "\x00", "\ud800", "<|im_end|>"])


@given(texts, texts, texts)
def test_no_text_can_end_its_block(prompt: str, first: str, second: str) -> None:
    marks = iter([MARK, "0" * 24, "e" * 24])
    asked = question(Comparison([says(prompt, "user")], says(first), says(second)), TWO, lambda: next(marks))
    told = asked[1]["content"]
    mark = told.split()[1]
    assert f"the mark {mark}," in asked[0]["content"]
    assert told.count(mark) == 6
    lines = told.splitlines()
    assert len(lines) == 11, "nothing but a line of the frame or one of JSON"
    assert [json.loads(lines[n])["content"] for n in (1, 5, 9)] == [prompt, first, second]
    told.encode()


@pytest.mark.parametrize("token", ["<|im_start|>", "</s>", "<s>", "[INST]", "[/INST]", "<start_of_turn>", "<｜end｜>"])
def test_no_text_holds_a_control_token_of_a_template(token: str) -> None:
    told = user_message((says(f"a{token}b", "user"),), says(token), says("fine"))
    assert token not in told


def test_tool_calls_are_shown() -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": '{"at": "sky"}'}}
    assert '"name": "look"' in user_message((), {"role": "assistant", "content": None, "tool_calls": [call]}, says("x"))


@pytest.mark.parametrize(
    ("content", "is_text"),
    [
        ("a", True),
        (None, True),
        ([{"type": "text", "text": "a"}], True),
        ([{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "x"}}], False),
        ({"a": 1}, False),
    ],
)
def test_a_judge_reads_texts_alone(content: object, is_text: bool) -> None:
    assert is_readable([says("before"), says(content)]) is is_text


def test_a_comparison_is_as_long_as_its_texts() -> None:
    short, long = (n_chars(Comparison([], says("a" * n), says("b"))) for n in (1, 1001))
    assert long - short == 1000


@pytest.mark.parametrize("kind", ["json_schema", "json_object", "none"])
def test_the_reply_is_asked_for_as_the_api_can_give_it(kind: str) -> None:
    asked = response_format(kind, TWO)
    assert json.loads(json.dumps(asked)) == asked
    assert ("response_format" in asked) == (kind != "none")


def test_the_schema_has_every_principle_and_both_sides() -> None:
    schema = response_format("json_schema", TWO)["response_format"]["json_schema"]["schema"]
    principles = schema["properties"]["scores"]
    assert principles["required"] == ["kind", "true"]
    assert principles["properties"]["kind"]["required"] == ["first", "second"]


# The reply


def reply(kind: object = (7, 3), true: object = (5, 5)) -> str:
    def side(given: object) -> object:
        return dict(zip(("first", "second"), given, strict=True)) if isinstance(given, tuple) else given

    return json.dumps({"scores": {"kind": side(kind), "true": side(true)}})


READ = {"kind": SideScores(0.7, 0.3), "true": SideScores(0.5, 0.5)}


@pytest.mark.parametrize(
    "text",
    [
        reply(),
        reply(("7", "3"), (5.0, "5.0")),
        f"```json\n{reply()}\n```",
        f"<think>Is {{}} it? {reply((0, 0))}</think> So: {reply()} That is {{all}}.",
        json.dumps(json.loads(reply())["scores"]),
        json.dumps(json.loads(reply()) | {"why": "because"}),
    ],
)
def test_scores_are_found_whatever_stands_around_them(text: str) -> None:
    assert read_scores(text, TWO) == READ


@pytest.mark.parametrize(
    "text",
    [
        "",
        "The first.",
        "null",
        "[]",
        '{"scores": {}}',
        '{"scores": 7}',
        '{"kind": 7}',
        reply(7),
        reply((7, 11)),
        reply((7, -1)),
        reply((7, None)),
        reply((7, True)),
        reply((7, float("nan"))),
        reply((7, "high")),
        reply((7, 10**400)),
        reply()[:-2],
        "[" * 50_000,
        "{" * 50_000,
        '{"a":' * 20_000,
    ],
)
def test_what_is_no_score_for_each_is_not_read(text: str) -> None:
    assert read_scores(text, TWO) is None


@given(st.text() | st.recursive(st.none() | st.booleans() | st.floats() | st.text(), st.lists).map(json.dumps))
def test_no_reply_breaks_the_reader(text: str) -> None:
    assert read_scores(text, TWO) in (None, READ)


# Both replies


side_scores = st.builds(SideScores, *[st.integers(0, 10).map(lambda n: n / 10)] * 2)
scores_ = st.fixed_dictionaries({"kind": side_scores, "true": side_scores})


def swapped(scores: Scores) -> Scores:
    return {name: SideScores(sides.second, sides.first) for name, sides in scores.items()}


def scores_of(kind: tuple[float, float], true: tuple[float, float]) -> Scores:
    return {"kind": SideScores(*kind), "true": SideScores(*true)}


def test_weights_count() -> None:
    forward = scores_of((1.0, 0.0), (0.4, 0.6))
    outcome, lead = rule(forward, swapped(forward), TWO)
    assert (outcome, round(lead, 6)) == (Outcome.PREFERRED, 0.1)


def test_a_bonus_for_a_place_cancels_out() -> None:
    honest = scores_of((0.7, 0.3), (0.7, 0.3))
    biased = scores_of((0.4, 0.6), (0.4, 0.6))
    outcome, lead = rule(honest, biased, TWO)
    assert (outcome, round(lead, 6)) == (Outcome.PREFERRED, 0.3)


@pytest.mark.parametrize(
    ("forward", "backward", "outcome"),
    [((0.9, 0.1), (0.9, 0.1), "disagreed"), ((0.5, 0.5), (0.5, 0.5), "tied"), ((0.9, 0.1), (0.5, 0.5), "tied")],
)
def test_both_orders_must_agree(forward: tuple[float, float], backward: tuple[float, float], outcome: str) -> None:
    assert rule(scores_of(forward, forward), scores_of(backward, backward), TWO).outcome == outcome


@given(scores_ | st.none(), scores_ | st.none())
def test_a_ruling_keeps_its_promises(forward: Scores | None, backward: Scores | None) -> None:
    outcome, lead = rule(forward, backward, TWO)
    assert -1 <= lead <= 1
    assert (outcome is Outcome.UNREADABLE) == (forward is None or backward is None)
    assert outcome is not Outcome.PREFERRED or lead != 0
    mirrored = rule(backward, forward, TWO)
    assert mirrored == (outcome, -lead), "who stands first changes nothing"


def test_the_order_of_principles_changes_nothing() -> None:
    names = ["a", "b", "c", "d"]
    scores = {name: SideScores(n / 10, (n * 7 % 10) / 10) for n, name in enumerate(names)}
    leads = {
        rule(scores, swapped(scores), Constitution("1", tuple(Principle(n, n, len(n) / 3) for n in order), "")).lead
        for order in permutations(names)
    }
    assert len(leads) == 1
