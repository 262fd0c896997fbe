"""The event filter: whatever the chunks, the same events pass."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from serving.sse import EventFilter

TEXT = b'data: {"choices":[{"index":0,"delta":{"content":"data: {\\"error\\": 1}"}}]}\n\n'
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":7}}\n\n'
ERROR = b'data: {"error": {"message": "EngineCore died"}}\n\n'
DONE = b"data: [DONE]\n\n"


def fed(stream: bytes, cuts: set[int]) -> tuple[bytes, EventFilter]:
    """What passes of a stream that comes in pieces."""
    events = EventFilter(drop_usage=True)
    edges = [0, *sorted(cuts), len(stream)]
    return b"".join(events.feed(stream[a:b]) for a, b in pairwise(edges)), events


@given(cuts=st.sets(st.integers(1, len(TEXT + USAGE + DONE) - 1), max_size=8))
def test_an_answer_that_ends_well(cuts: set[int]) -> None:
    passed, events = fed(TEXT + USAGE + DONE, cuts)
    assert (passed, events.has_ended, events.has_failed) == (TEXT, True, False)


@given(cuts=st.sets(st.integers(1, len(TEXT + ERROR + DONE) - 1), max_size=8))
def test_an_error_ends_the_stream_and_done_after_it_means_nothing(cuts: set[int]) -> None:
    passed, events = fed(TEXT + ERROR + DONE, cuts)
    assert (passed, events.has_ended, events.has_failed) == (TEXT, True, True)
