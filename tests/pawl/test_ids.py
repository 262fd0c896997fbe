"""Ids and tokens that prove themselves: nobody else's, and none that was touched."""

from __future__ import annotations

import uuid

from hypothesis import assume, given
from hypothesis import strategies as st

from pawl.ids import (
    Principal,
    check_feedback_token,
    completion_suffix,
    created_at,
    feedback_id,
    make_completion_suffix,
    make_feedback_token,
    owns,
    parse_feedback_id,
    uuid7,
)

SECRET = b"sixteen bytes of secret"
names = st.text(max_size=20)
principals = st.builds(Principal, key_id=names, user=names)
moments = st.floats(min_value=0, max_value=4e9)
random_bytes = st.binary(min_size=10, max_size=10)


def suffix_of(owner: Principal, now_s: float = 1_700_000_000.0, random: bytes = bytes(10)) -> str:
    return make_completion_suffix(SECRET, uuid7(now_s, random), owner)


@given(principals, moments, random_bytes)
def test_the_owner_owns_what_was_made(owner: Principal, now_s: float, random: bytes) -> None:
    suffix = suffix_of(owner, now_s, random)
    assert completion_suffix(f"chatcmpl-{suffix}") == suffix
    assert owns(SECRET, suffix, owner)
    assert owns(SECRET, suffix, Principal(owner.key_id))
    assert abs(created_at(suffix) - now_s) < 0.0015


@given(principals, st.integers(0, 47), st.integers(1, 15))
def test_a_changed_digit_is_noticed(owner: Principal, position: int, change: int) -> None:
    assume(owner.user)
    suffix = suffix_of(owner)
    digit = f"{int(suffix[position], 16) ^ change:x}"
    assert not owns(SECRET, suffix[:position] + digit + suffix[position + 1 :], owner)


@given(principals, principals)
def test_it_is_nobody_elses(owner: Principal, caller: Principal) -> None:
    assume(caller.key_id != owner.key_id or (caller.user and caller.user != owner.user))
    assert not owns(SECRET, suffix_of(owner), caller)


@given(principals)
def test_another_secret_owns_nothing(owner: Principal) -> None:
    assert not owns(b"another secret, as long", suffix_of(owner), owner)


@given(st.lists(moments, min_size=2), random_bytes)
def test_ids_sort_as_they_were_made(times: list[float], random: bytes) -> None:
    ids = [uuid7(at, random) for at in sorted(times)]
    assert ids == sorted(ids)


@given(moments, random_bytes)
def test_a_unique_part_is_a_version_7_uuid(now_s: float, random: bytes) -> None:
    made = uuid.UUID(hex=uuid7(now_s, random))
    assert (made.version, made.variant) == (7, uuid.RFC_4122)


@given(st.text(max_size=70))
def test_no_other_text_is_a_completion_id(text: str) -> None:
    assert completion_suffix(text) is None
    assert parse_feedback_id(text) is None


def test_what_nearly_is_an_id_is_none() -> None:
    suffix = suffix_of(Principal("key", "ann"))
    near = (
        suffix,
        f"chatcmpl-{suffix[:-1]}",
        f"chatcmpl-{suffix}0",
        f"chatcmpl-{suffix.upper()}",
        f" chatcmpl-{suffix}",
    )
    for text in (*near, f"chatcmpl-{suffix}\n", f"chatcmpl-{'٣' * 48}"):
        assert completion_suffix(text) is None


@given(st.sampled_from(["thumbs", "rating", "edit", "comment"]))
def test_a_feedback_id_tells_its_kind_and_completion(kind: str) -> None:
    suffix = suffix_of(Principal("key", "ann"))
    assert parse_feedback_id(feedback_id(kind, suffix)) == (kind, suffix)


@given(st.integers(1, 2**32), st.floats(0, 2**33))
def test_a_token_passes_until_it_expires(expires_at: int, now_s: float) -> None:
    suffix = suffix_of(Principal("key", "ann"))
    token = make_feedback_token(SECRET, suffix, expires_at)
    assert check_feedback_token(SECRET, token, suffix, now_s) == (now_s < expires_at)


@given(st.data())
def test_a_token_is_for_one_completion_and_cannot_be_touched(data: st.DataObject) -> None:
    suffix, other = suffix_of(Principal("key", "ann")), suffix_of(Principal("key", "ben"))
    token = make_feedback_token(SECRET, suffix, 2_000_000_000)
    position = data.draw(st.integers(0, len(token) - 1))
    letter = data.draw(st.characters().filter(lambda letter: letter != token[position]))
    assert not check_feedback_token(SECRET, token, other, 0.0)
    assert not check_feedback_token(SECRET, token[:position] + letter + token[position + 1 :], suffix, 0.0)


@given(st.text())
def test_any_other_text_is_no_token(text: str) -> None:
    assert not check_feedback_token(SECRET, text, suffix_of(Principal()), 0.0)
