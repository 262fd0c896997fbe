"""Stored JSON is read as the standard library reads it, whatever clients sent."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from feedback.stored_json import read_json

scalars = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(st.characters())
surrogates = st.text(st.characters(categories=["Cs"]))
values = st.recursive(
    scalars | surrogates, lambda inner: st.lists(inner) | st.dictionaries(st.text() | surrogates, inner), max_leaves=20
)


@given(values)
def test_what_was_written_is_read_as_it_was(value: object) -> None:
    text = json.dumps(value)
    assert repr(read_json(text)) == repr(json.loads(text))


@pytest.mark.parametrize("text", ['{"b": 1, "a": 2, "b": 3}', "-0", "1E400", "[" * 5000 + "]" * 5000, '"\\u0000"'])
def test_what_others_wrote_is_read_alike(text: str) -> None:
    try:
        expected = repr(json.loads(text))
    except RecursionError:
        with pytest.raises(RecursionError):
            read_json(text)
    else:
        assert repr(read_json(text)) == expected
