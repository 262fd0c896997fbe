"""Secrets and personal data: what is found in a seeded corpus, what is not, and how long it takes."""

from __future__ import annotations

import gc
import time
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feedback.redaction import redact_text
from feedback.sensitive.finding import MAX_LOOK_ALIKES, TOO_MANY, find_credential, find_identity
from tests.feedback.filters import secret_corpus

SEEDS = (0, 1, 2)


def find(text: str) -> str | None:
    return find_credential(text) or find_identity(text)


@pytest.mark.parametrize("seed", SEEDS)
def test_of_500_structured_secrets_99_in_100_are_found(seed: int) -> None:
    cases = secret_corpus.positives(seed)
    missed = Counter(case.kind for case in cases if find(case.text) is None)
    assert len(cases) == 500
    assert missed.total() <= 5, missed


@pytest.mark.parametrize("seed", SEEDS)
def test_of_500_look_alikes_at_most_one_in_100_is_taken_for_one(seed: int) -> None:
    cases = secret_corpus.negatives(seed)
    taken = Counter(case.kind for case in cases if find(case.text) is not None)
    assert len(cases) == 500
    assert taken.total() <= 5, taken


@pytest.mark.parametrize("seed", SEEDS)
def test_redaction_takes_them_out(seed: int) -> None:
    cases = secret_corpus.positives(seed)
    left = [case for case in cases if case.secret in redact_text(case.text)]
    assert len(left) <= 5, left


@pytest.mark.parametrize(("name", "text"), [(case.kind, case.text) for case in secret_corpus.positives(7, 80)])
def test_what_was_taken_out_is_not_found_again(name: str, text: str) -> None:
    assert find(redact_text(text)) is None, name


def test_tables_of_look_alikes_are_given_up() -> None:
    row = "4111 1111 1111 1112\n"
    assert find_identity(row * MAX_LOOK_ALIKES) is None
    assert find_identity(row * (MAX_LOOK_ALIKES + 1)) == TOO_MANY


# Time. Shapes found by searching among repeated pieces for those that take longest, and one for each kind of loop.
SHAPES = (
    *("a@", "@", "a.", "a@a.", "é", "::", "1:", "1.1.", "255.255.", "2001:db8:", "/:1", "fe80::1 "),
    *("1 ", "1", "0 ", "(0", "+49 ", "0697085357 ", "415-555-267", "4111 1111 1111 1112 ", "956110 "),
    *("DE89 3704 ", "DE89370400440532013001 ", "GB29 NWBK ", "12345678A ", "123-45-678", "1 85 07 ", "bsn 123456789 "),
    *("eyJ", "eyJeyJeyJ.", "sk-", "ghp_", "AKIA", "xoxb-", "NRAK-NRAK-", "SKSKSK", "pat", "MTAw.", "1234567890:AA"),
    *("://", "://a:", "://:a/", "password=", "password: a1", "token='a", "secret: ", "bearer ", "basic ", "=", ": "),
    *("-----BEGIN PRIVATE KEY-----", "-----BEGIN RSA PRIVATE KEY-----\nA-b: c\n", "-", "\\n", "\n", "A-b: c\n"),
    *("RSSMRA85T10A562 ", "X1234567 ", "AB 12 34 56 ", "44051401359 pesel ", "?sig=a", "hooks.slack.com/services/T"),
)
SHORT, LONG = 10_000, 100_000
SETTINGS = settings(max_examples=15, deadline=None, derandomize=True)


def cpu_seconds(text: str) -> float:
    """The least of three, of this thread alone: other work on the machine does not count."""
    taken = []
    for _ in range(3):
        started = time.thread_time()
        find(text)
        taken.append(time.thread_time() - started)
    return min(taken)


def growth(short: str, long: str) -> float:
    """How many times as long the longer text takes; less than half a millisecond is not measured well."""
    return cpu_seconds(long) / max(cpu_seconds(short), 0.0005)


def check_time(piece: str, before: str = "", after: str = "") -> None:
    """Ten times as much text takes about ten times as long, whatever it is; and never long.

    What is not linear is at least quadratic here, and takes a hundred times as long. A busy machine may spoil a few
    measurements, but not all.
    """
    short, long = (before + (piece * (size // len(piece) + 1))[:size] + after for size in (SHORT, LONG))
    assert any(growth(short, long) < 15 for _ in range(5))
    assert any(cpu_seconds(long) < 0.5 for _ in range(5))


@pytest.fixture(autouse=True, scope="module")
def _warm() -> None:
    find("ssn 123-45-6788 and 12345678A")  # Loads the rules of numbers of identity.
    gc.collect()


@pytest.mark.parametrize("piece", SHAPES)
def test_the_time_is_linear_for_each_shape(piece: str) -> None:
    check_time(piece)


@SETTINGS
@given(
    st.lists(st.sampled_from(SHAPES) | st.text(max_size=3), min_size=1, max_size=4).map("".join).filter(bool),
    st.sampled_from(("", "-----BEGIN PRIVATE KEY-----\n", "a@", "://a:", "eyJ", "password: ")),
    st.sampled_from(("", "@a.", "!")),
)
def test_the_time_is_linear_for_any_repetition(piece: str, before: str, after: str) -> None:
    check_time(piece, before, after)
