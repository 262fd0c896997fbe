"""What is taken out of records, and what is left alone."""

from __future__ import annotations

import json
import time
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from feedback.interactions import FeedbackEvent, Interaction
from feedback.redaction import TOO_DEEP, Redactor, redact_event, redact_interaction, redact_text
from feedback.sensitive.identities import is_card
from tests.pawl import records

HEX = "0123456789abcdef"
SECRETS = {
    "EMAIL": ["ann.b+c@ex-ample.co.uk", "ÄRGER@example.com"],
    "PHONE": ["+49 (0)30 1234567", "+14155552671", "(415) 555-2671", "415-555-2671", "030/1234567", "0171 2345678"],
    "CARD": ["4111 1111 1111 1111", "5500-0055-5555-5559", "378282246310005"],
    "IBAN": ["DE89 3704 0044 0532 0130 00", "GB82WEST12345698765432", "fr1420041010050500013M02606"],
    "IP": ["192.168.7.20", "2001:db8::8a2e:370:7334", "fe80::1ff:fe23:4567:890a"],
    "API_KEY": [
        "sk-proj-abcDEF0123456789_xyz",
        "AKIAIOSFODNN7EXAMPLE",
        "ghp_" + "a1" * 18,
        "github_pat_" + "a" * 30,
        "pawl-" + HEX + "-" + HEX * 4,
        "xoxb-1234567890-abcdef",
        "hf_" + "aB" * 17,
    ],
    "TOKEN": ["eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9P"],
    "PRIVATE_KEY": [
        "-----BEGIN RSA PRIVATE KEY-----\nMIIEowIBAAKCAQEA1234567890abcdef\nab+/==\n-----END RSA PRIVATE KEY-----"
    ],
}
EACH = [(kind, secret) for kind, secrets in SECRETS.items() for secret in secrets]
CLEAN = [
    "Water the roses in the morning, at 7:30 or so, for 10 minutes.",
    "Order 1234567890 cost 1,234,567.89 in 2024, on 2024-05-06 at 12:30:45.",
    "4111 1111 1111 1112 fails Luhn's test and DE88 3704 0044 0532 0130 00 the other one.",
    "Use std::vector, dead::beef, version 1.2.3 or 1.2.3.4.5, and 127.0.0.1 or ::1.",
    "Tag @someone, mail me @ home, a sk-short, a task-oriented eyJ, and -----BEGIN PRIVATE KEY----- as a title.",
    "3.14159265358979323846264338327950288",
    "f(x) = (2 + 3) * 4 - 10 / 5; [1, 2, 3]; 0x1F; 1e-10; 100 000 000",
    "[EMAIL_1] wrote to [PHONE_2].",
]


def interaction(**fields: Any) -> Interaction:
    """One of somebody with an address for a name, without texts unless they are given."""
    given: dict[str, Any] = {"user_id": "ann@example.com", "prompt": None, "prompt_sha": None, "completion": None}
    return records.interaction("0" * 48, **(given | fields))


@pytest.mark.parametrize(("kind", "secret"), EACH)
@pytest.mark.parametrize("around", ["{}", "it is {}, ok?", '{{"a": "{}"}}', "({})", "a {}\nb", "x={};"])
def test_each_kind_is_found(kind: str, secret: str, around: str) -> None:
    assert redact_text(around.format(secret)) == around.format(f"[{kind}_1]")


@pytest.mark.parametrize("text", CLEAN)
def test_clean_text_is_left_alone(text: str) -> None:
    assert redact_text(text) == text


def test_one_thing_has_one_name_throughout_its_record() -> None:
    arguments = json.dumps({"to": "bob@x.org\nann@x.org", "card": 4111111111111111, "n": [1, True, None]})
    call = {"id": "c", "type": "function", "function": {"name": "send", "arguments": arguments}}
    redacted = redact_interaction(
        interaction(
            prompt=({"role": "user", "content": [{"type": "text", "text": "Write to ann@x.org"}]},),
            completion={"role": "assistant", "content": "To bob@x.org?", "tool_calls": [call]},
            parameters={"stop": ["ann@x.org"], "temperature": 0.5},
        )
    )
    assert redacted.prompt == ({"role": "user", "content": [{"type": "text", "text": "Write to [EMAIL_1]"}]},)
    completion = dict(redacted.completion or {})
    assert completion["content"] == "To [EMAIL_2]?"
    sent = json.loads(completion["tool_calls"][0]["function"]["arguments"])
    assert sent == {"to": "[EMAIL_2]\n[EMAIL_1]", "card": "[CARD_1]", "n": [1, True, None]}
    assert redacted.parameters == {"stop": ["[EMAIL_1]"], "temperature": 0.5}
    assert redacted.user_id == "ann@example.com"


def test_what_has_nothing_to_hide_is_the_same_object() -> None:
    plain = interaction(prompt=({"role": "user", "content": "hello"},), completion={"content": '{"a": [1]}'})
    assert redact_interaction(plain) is plain


def test_feedback_keeps_its_words_and_ids() -> None:
    event = FeedbackEvent(
        "e",
        "f",
        "i",
        "chatcmpl-1",
        "edit",
        "ask ann@x.org",
        False,
        "ann@x.org",
        "+49 30 1234567",
        {"a": "b"},
        "k",
        "u",
        1.0,
    )
    redacted = redact_event(event)
    assert (redacted.value, redacted.reason, redacted.comment) == ("ask [EMAIL_1]", "[EMAIL_1]", "[PHONE_1]")
    choice = FeedbackEvent("e", "f", "i", "c", "choice", "4111111111111111", False, None, None, None, "k", "u", 1.0)
    assert redact_event(choice) == choice


def test_what_is_nested_without_end_is_not_kept() -> None:
    deep: Any = "ann@x.org"
    for _ in range(500):
        deep = [deep]
    assert TOO_DEEP in str(Redactor().walk(deep))
    assert "ann@x.org" not in Redactor().walk("[" * 900 + '"ann@x.org"' + "]" * 900)


pieces = st.one_of(
    st.sampled_from([secret for _, secret in EACH]),
    st.sampled_from([*" .,:;@-+[]()/\\\n0123456789", "[EMAIL_1]", "a", "::", "DE", "sk-", "eyJ", "-----BEGIN "]),
    st.text(max_size=8),
)
texts = st.lists(pieces, max_size=12).map("".join)


@given(texts)
def test_what_was_redacted_stays_as_it_is(text: str) -> None:
    once = redact_text(text)
    assert redact_text(once) == once


@given(
    st.recursive(st.none() | st.booleans() | st.integers() | texts, lambda x: st.lists(x) | st.dictionaries(texts, x))
)
def test_any_value_can_be_walked(value: Any) -> None:
    walked = Redactor().walk(value)
    assert type(walked) is type(value)


@given(st.dictionaries(st.text(max_size=3), texts | st.integers(-(2**53), 2**53), max_size=4))
def test_json_stays_json(value: dict[str, Any]) -> None:
    redacted = Redactor().walk(orjson.dumps(value).decode())
    assert orjson.loads(redacted).keys() == value.keys()


@given(st.integers(10**12, 10**19 - 1))
def test_luhn_agrees_with_its_definition(number: int) -> None:
    total = 0
    for place, digit in enumerate(reversed(str(number))):
        value = int(digit) * (2 if place % 2 else 1)
        total += value - 9 if value > 9 else value
    assert is_card(str(number)) == (total % 10 == 0)


@pytest.mark.parametrize(
    "piece",
    [
        "a@",
        "1 ",
        "-----BEGIN PRIVATE KEY-----",
        "eyJ",
        "a.",
        "::",
        "1.1.",
        "DE89 3704 ",
        "sk-",
        "+1 ",
        "0",
        "Ab: x\\n",
        "a@b.co",
    ],
)
def test_the_time_grows_with_the_text_only(piece: str) -> None:
    text = (piece * 100_000)[:100_000]
    started = time.process_time()
    redact_text(text)
    redact_text("-----BEGIN PRIVATE KEY-----\n" + text + "@a.")
    assert time.process_time() - started < 5.0
