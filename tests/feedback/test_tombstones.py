"""Tombstones: they tell who was erased to whoever has the secret, and nothing to anybody else."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from feedback.tombstone_store import TombstoneFile
from feedback.tombstones import Erased, Owner, Subject, Tombstone, digest_of, forgotten, key_check
from tests.feedback.people import SECRET, said_to

NAMES = st.text(min_size=1, max_size=20)
TIMES = st.floats(0, 1e10)
OF_USERS = st.tuples(NAMES, st.none() | NAMES).map(lambda names: Subject(*names))
SUBJECTS = OF_USERS | NAMES.map(lambda name: Subject(completion=name))


def tombstone(subject: Subject, until: float, secret: bytes = SECRET) -> Tombstone:
    return Tombstone(digest_of(secret, subject), until, "", key_check(secret))


@given(SUBJECTS, SUBJECTS)
def test_different_subjects_have_different_digests(one: Subject, other: Subject) -> None:
    assert (digest_of(SECRET, one) == digest_of(SECRET, other)) == (one == other)


@given(SUBJECTS)
def test_without_the_secret_a_digest_says_nothing(subject: Subject) -> None:
    assert digest_of(SECRET, subject) != digest_of(b"another secret of some length", subject)


@given(NAMES, NAMES, NAMES, TIMES, TIMES)
def test_what_a_user_sent_up_to_then_is_covered(user: str, other: str, key: str, until: float, at: float) -> None:
    erased = Erased(SECRET, [tombstone(Subject(user), until)])
    assert erased.covers(Owner(key, user, None, at)) == (at <= until)
    assert erased.covers(Owner(key, other, None, at)) == (other == user and at <= until)


@given(NAMES, NAMES, NAMES)
def test_a_key_limits_it(user: str, key: str, other: str) -> None:
    erased = Erased(SECRET, [tombstone(Subject(user, key), 10.0)])
    assert erased.covers(Owner(key, user, None, 10.0))
    assert erased.covers(Owner(other, user, None, 10.0)) == (other == key)


def test_nobody_in_particular_is_never_erased() -> None:
    erased = Erased(SECRET, [tombstone(Subject(""), 10.0), tombstone(Subject("ann"), 10.0)])
    assert not erased.covers(Owner("k", None, "c", 1.0))
    assert not erased.covers(Owner("k", "", "c", 1.0))


def test_a_completion_is_covered_whoever_it_was_for() -> None:
    erased = Erased(SECRET, [tombstone(Subject(completion="c1"), 10.0)])
    assert erased.covers(Owner("k", None, "c1", 99.0))
    assert not erased.covers(Owner("k", None, "c2", 1.0))


def test_the_latest_of_several_counts() -> None:
    stones = [tombstone(Subject("ann"), until) for until in (5.0, 20.0, 10.0)]
    assert Erased(SECRET, stones).until("k", "ann") == 20.0


def test_tombstones_of_another_secret_are_seen() -> None:
    stones = [tombstone(Subject("ann"), 1.0), tombstone(Subject("bob"), 1.0, b"another secret of some length")]
    assert Erased(SECRET, stones).n_of_another_secret == 1


def test_what_stays_of_an_interaction_says_nothing_of_the_person() -> None:
    left = forgotten(said_to("ann", 1, regenerate_of="0" * 48))
    assert "ann" not in str(left)
    assert (left.model, left.created_at, left.latency_ms) == ("base-model", 1.0, 10.0)
    assert forgotten(said_to("ann", 2)).unit_id != left.unit_id


def test_the_file_keeps_each_once(tmp_path: Path) -> None:
    file = TombstoneFile(tmp_path / "state" / "tombstones.jsonl")
    assert file.read() == set()
    stones = {tombstone(Subject("ann"), 1.5), tombstone(Subject("b\ud800b"), 2.5)}
    for _ in range(2):
        file.add(stones)
    assert file.read() == stones
    assert len(file.path.read_text().splitlines()) == 2
    assert "ann" not in file.path.read_text()


def test_a_torn_line_costs_itself_alone(tmp_path: Path) -> None:
    file = TombstoneFile(tmp_path / "tombstones.jsonl")
    first, second, third = (tombstone(Subject(name), 1.0) for name in ("ann", "bob", "cid"))
    file.add([first, second])
    torn = file.path.read_text().rstrip("\n")[:-7]
    file.path.write_text(torn)
    assert len(file.read()) == 1
    file.add([third])
    assert third in file.read()
    assert len(file.read()) == 2
