"""API keys: what is stored of them, when they are good, and what a follower of the table gets to see."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st

from pawl import audit, key_store
from pawl.api_keys import (
    ALL_SCOPES,
    DEFAULT_PRIORITY,
    LIMIT_NAMES,
    KeyLimits,
    KeyRecord,
    cache_salt,
    digest_of,
    effective_limits,
    key_text,
    limits_from_json,
    limits_to_json,
    make_key,
    parse_credential,
    rotated,
    valid_until,
)
from pawl.database import Database
from pawl.errors import NegativeVerdict
from pawl.schema import metadata

id_bytes = st.binary(min_size=8, max_size=8)
secret_bytes = st.binary(min_size=32, max_size=32)
limits = st.builds(KeyLimits, **dict.fromkeys(LIMIT_NAMES, st.none() | st.integers(0, 10**9)))
KEY = make_key(bytes(range(8)), bytes(range(32)))


def record(number: int = 1, **changes: object) -> KeyRecord:
    """A key whose secret is the number's."""
    key = make_key(number.to_bytes(8), number.to_bytes(32))
    made = KeyRecord(
        key.id, f"key {number}", digest_of(key.secret), ALL_SCOPES, KeyLimits(), DEFAULT_PRIORITY, 100.0, "ann@host"
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def secret(number: int) -> str:
    return make_key(bytes(8), number.to_bytes(32)).secret


@settings(deadline=None)
@given(id_bytes, secret_bytes, st.sampled_from(["{}", "Bearer {}", "bearer {}", "BEARER  {} "]))
def test_a_key_is_read_back_from_either_header(id_part: bytes, secret_part: bytes, form: str) -> None:
    key = make_key(id_part, secret_part)
    assert parse_credential(form.format(key_text(key))) == key


@settings(deadline=None)
@given(st.text() | st.text(alphabet="pawl-0123456789abcdef ", min_size=80, max_size=90))
def test_whatever_is_sent_gives_a_key_or_nothing(text: str) -> None:
    parsed = parse_credential(text)
    assert parsed is None or key_text(parsed) in text


TEXT = key_text(KEY)


@pytest.mark.parametrize(
    "wrong",
    ["", "Bearer", "Bearer ", TEXT[:-1], TEXT + "0", "Basic " + TEXT, TEXT.upper(), TEXT + "\n0", "pawl-٠" + TEXT[6:]],
)
def test_what_is_not_a_key_is_none(wrong: str) -> None:
    assert parse_credential(wrong) is None


def test_no_representation_shows_a_secret_or_a_digest() -> None:
    made = record(7, previous_digest="d" * 64)
    shown = repr([KEY, made]) + str(KEY) + f"{KEY}"
    assert KEY.secret not in shown
    assert made.digest not in shown
    assert "d" * 64 not in shown


def test_a_secret_is_good_until_the_key_expires_or_is_revoked() -> None:
    good = digest_of(secret(1))
    assert valid_until(record(), good, 100.0) == float("inf")
    assert valid_until(record(expires_at=200.0), good, 199.9) == 200.0
    assert valid_until(record(expires_at=200.0), good, 200.0) is None
    assert valid_until(record(revoked_at=150.0), good, 100.0) is None
    assert valid_until(record(), digest_of(secret(2)), 100.0) is None
    assert valid_until(None, good, 100.0) is None
    assert valid_until(None, "0" * 64, 100.0) is None
    assert valid_until(record(), "0" * 64, 100.0) is None


def test_after_a_rotation_both_secrets_are_good_for_the_overlap() -> None:
    twice = rotated(record(expires_at=900.0), digest_of(secret(2)), previous_expires_at=500.0)
    assert valid_until(twice, digest_of(secret(2)), 100.0) == 900.0
    assert valid_until(twice, digest_of(secret(1)), 100.0) == 500.0
    assert valid_until(twice, digest_of(secret(1)), 500.0) is None
    thrice = rotated(twice, digest_of(secret(3)), previous_expires_at=600.0)
    assert valid_until(thrice, digest_of(secret(1)), 100.0) is None
    assert valid_until(thrice, digest_of(secret(2)), 100.0) == 600.0


def test_an_unknown_id_takes_the_work_of_a_wrong_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def compare(left: str, right: str) -> bool:
        calls.append(right)
        return left == right

    monkeypatch.setattr("pawl.api_keys.hmac.compare_digest", compare)
    counts = []
    for known in (None, record(), record(previous_digest=digest_of("x"), previous_expires_at=900.0)):
        calls.clear()
        assert valid_until(known, digest_of(secret(2)), 100.0) is None
        counts.append((len(calls), {len(each) for each in calls}))
    assert counts == [(2, {64})] * 3


@settings(deadline=None)
@given(limits)
def test_limits_are_stored_and_read_back(own: KeyLimits) -> None:
    assert limits_from_json(limits_to_json(own) | {"of_a_later_version": 3}) == own


@settings(deadline=None)
@given(limits, limits)
def test_own_limits_win_over_defaults_and_nothing_is_limited_to_zero(own: KeyLimits, defaults: KeyLimits) -> None:
    chosen = effective_limits(own, defaults)
    for name in LIMIT_NAMES:
        mine = getattr(own, name)
        expected = mine if mine is not None else getattr(defaults, name)
        assert (getattr(chosen, name) if chosen else None) == (expected or None)


@settings(deadline=None)
@given(secret_bytes, secret_bytes, id_bytes, id_bytes)
def test_cache_salts_differ_by_key_and_by_server(one: bytes, other: bytes, mine: bytes, theirs: bytes) -> None:
    salt = cache_salt(one, mine.hex())
    assert len(salt) == 32
    assert (salt == cache_salt(one, theirs.hex())) == (mine == theirs)
    assert (salt == cache_salt(other, mine.hex())) == (one == other)


def test_a_key_lives_and_dies_in_the_table(database: Database) -> None:
    made = record(limits=KeyLimits(concurrency=4), scopes=frozenset({"infer"}), expires_at=900.0)
    key_store.create_key(database, made, actor="ann")
    key_store.create_key(database, record(2, created_at=101.0), actor="ann")
    assert key_store.list_keys(database) == [record(2, created_at=101.0), made]
    changed = key_store.rotate_key(database, made.id, digest_of("x"), previous_expires_at=300.0, now=200.0, actor="bob")
    assert (changed.previous_digest, changed.previous_expires_at) == (made.digest, 300.0)
    assert changed.limits == made.limits
    revoked = key_store.revoke_key(database, made.id, now=250.0, actor="bob")
    assert revoked == replace(changed, revoked_at=250.0)
    assert key_store.revoke_key(database, made.id, now=260.0, actor="eve") == revoked
    trail = [(event.action, event.actor, event.at) for event in audit.latest_events(database, subject=made.id)]
    assert trail == [("key.revoke", "bob", 250.0), ("key.rotate", "bob", 200.0), ("key.create", "ann", 100.0)]


def test_what_is_not_there_or_over_is_not_changed(database: Database) -> None:
    key_store.create_key(database, record(expires_at=150.0), actor="ann")
    with pytest.raises(NegativeVerdict, match="there is no key 0000"):
        key_store.revoke_key(database, "0000", now=1.0, actor="ann")
    with pytest.raises(NegativeVerdict, match="revoked or has expired"):
        key_store.rotate_key(database, record().id, "d", previous_expires_at=9e9, now=150.0, actor="ann")
    assert key_store.list_keys(database) == [record(expires_at=150.0)]


def test_a_follower_sees_each_change_once(database: Database) -> None:
    assert key_store.changes_since(database, None) == (0, [], True)
    key_store.create_key(database, record(1), actor="ann")
    key_store.create_key(database, record(2), actor="ann")
    whole = key_store.changes_since(database, None)
    assert (whole.number, whole.is_whole, {each.id for each in whole.records}) == (
        2,
        True,
        {record(1).id, record(2).id},
    )
    assert key_store.changes_since(database, 2) == (2, [], False)
    key_store.revoke_key(database, record(2).id, now=200.0, actor="ann")
    assert key_store.changes_since(database, 2) == (3, [record(2, revoked_at=200.0)], False)
    after_a_restore = key_store.changes_since(database, 99)
    assert after_a_restore.is_whole
    assert after_a_restore.number == 3


def test_using_a_key_is_noted_coarsely_and_is_no_change(database: Database) -> None:
    key_store.create_key(database, record(1), actor="ann")
    for now in (1000.0, 1299.0, 1301.0):
        key_store.note_use(database, [record(1).id, "not there"], now)
    assert key_store.list_keys(database)[0].last_used_at == 1301.0
    key_store.note_use(database, [record(1).id], 1500.0)
    assert key_store.list_keys(database)[0].last_used_at == 1301.0
    assert key_store.changes_since(database, 1).records == []


def test_changes_made_at_once_are_all_seen_by_who_follows(database: Database) -> None:
    """Numbers commit in their order: a follower that saw number n will be shown everything after n."""

    def write(start: int) -> None:
        for number in range(start, start + 5):
            key_store.create_key(database, record(number), actor="ann")

    writers = [threading.Thread(target=write, args=(start,)) for start in (100, 200, 300)]
    seen: list[str] = []
    number: int | None = 0
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        number, records, _ = key_store.changes_since(database, number)
        seen += [each.id for each in records]
    seen += [each.id for each in key_store.changes_since(database, number).records]
    assert set(seen) == {record(start + each).id for start in (100, 200, 300) for each in range(5)}


def test_no_table_has_a_column_for_a_secret(database: Database) -> None:
    key = make_key(bytes(8), secret_part := bytes(range(100, 132)))
    made = replace(record(), id=key.id, digest=digest_of(key.secret))
    key_store.create_key(database, made, actor="ann")
    key_store.rotate_key(database, key.id, digest_of("other"), previous_expires_at=9e9, now=101.0, actor="ann")
    with database.read() as connection:
        dump = str([connection.execute(sa.select(table)).all() for table in metadata.sorted_tables])
    assert key.id in dump
    assert key.secret not in dump
    assert secret_part.hex() not in dump
