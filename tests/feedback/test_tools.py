"""The functions that a request offers: the same by whichever API, kept with the prompt and gone with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st

from feedback.filters.sensitive_pairs import OPERATORS, SensitiveTexts
from feedback.mining import mine_alias, unpaired_examples
from feedback.recording import Exchange, parse_interaction
from feedback.redaction import redact_interaction
from feedback.sensitive.finding import find_credential, find_person
from feedback.store import delete_texts, get_interaction, load_pairs
from feedback.tombstones import forgotten
from feedback.tools import offered_tools
from pawl.database import Database
from pawl.schema import interactions, pairs
from tests.pawl.records import SERVED, interaction, interaction_id, save, served, thumb

ALIAS = "assistant"
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
LOOK = {"name": "look", "description": "Look outside.", "parameters": SCHEMA}
WRAPPED = {"type": "function", "function": LOOK}
JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["name", "function", "type", "x"]), inner)
    ),
    max_leaves=8,
)


@pytest.mark.parametrize(
    ("route", "body"),
    [
        ("chat.completions", {"tools": [WRAPPED]}),
        ("chat.completions", {"tools": [{**WRAPPED, "x": 1}, {"type": "custom", "custom": {"name": "no"}}, "odd"]}),
        ("chat.completions", {"functions": [LOOK]}),
        ("responses", {"tools": [{"type": "function", **LOOK}, {"type": "web_search"}]}),
        ("messages", {"tools": [{"name": "look", "description": "Look outside.", "input_schema": SCHEMA}]}),
    ],
)
def test_every_api_offers_the_same_functions(route: str, body: Mapping[str, Any]) -> None:
    assert offered_tools(body, route) == (WRAPPED,)


@given(JSON, st.sampled_from(["chat.completions", "responses", "messages", "completions"]))
def test_whatever_stands_there_has_a_name_or_is_left_out(given: Any, route: str) -> None:
    found = offered_tools({"tools": given}, route)
    assert found is None or all(isinstance(tool["function"]["name"], str) for tool in found)


def exchange(**changes: Any) -> Exchange:
    known = {**SERVED, "id": interaction_id(1), "completion_id": f"chatcmpl-{interaction_id(1)}", "created_at": 1.0}
    return Exchange(**{**known, "user_id": "ann", "unit_id": "ann", "is_stream": False, **changes})


def test_they_are_recorded_where_the_prompt_is() -> None:
    request = b'{"messages": [{"role": "user", "content": "Rain?"}], "tools": [{"function": {"name": "look"}}]}'
    response = b'{"choices": [{"message": {"content": "No."}, "finish_reason": "stop"}]}'
    kept = parse_interaction(exchange(), request, response)
    assert kept.tools == ({"type": "function", "function": {"name": "look"}},)
    assert parse_interaction(exchange(is_stored=False), request, response).tools is None
    assert forgotten(kept).tools is None


def test_pairs_and_single_thumbs_have_those_of_their_prompt(database: Database) -> None:
    asked = [replace(served(n), tools=(WRAPPED,)) for n in (1, 2)]
    save(
        database,
        [*asked, served(3, question="Why is grass green?")],
        [thumb(1, "up"), thumb(2, "down"), thumb(3, "up")],
    )
    mine_alias(database, ALIAS, 100.0)
    (pair,) = load_pairs(database, ALIAS)
    assert pair.tools == (WRAPPED,)
    assert [example.tools for example in unpaired_examples(database, ALIAS)] == [None]


def test_they_go_with_the_texts(database: Database) -> None:
    save(database, [replace(served(n), tools=(WRAPPED,)) for n in (1, 2)], [thumb(1, "up"), thumb(2, "down")])
    mine_alias(database, ALIAS, 100.0)
    with database.write() as connection:
        connection.execute(pairs.update().values(first_run="r0001"))
    assert delete_texts(database, interaction_id(1), {})
    found = get_interaction(database, interaction_id(1))
    assert found is not None
    assert found.tools is None
    with database.read() as connection:
        assert connection.execute(sa.select(pairs.c.tools)).scalars().all() == [None]
        assert connection.execute(sa.select(sa.func.count(interactions.c.tools))).scalar_one() == 1


def test_what_is_personal_or_secret_is_looked_for_in_them(database: Database) -> None:
    mail = {"type": "function", "function": {**LOOK, "description": "Ask ann@example.com."}}
    assert "example.com" not in str(redact_interaction(interaction("1", tools=(mail,))).tools)
    secret = {"type": "function", "function": {**LOOK, "description": "Use AKIA2E0A8F3B244C9986."}}
    save(database, [replace(served(n), tools=(secret, mail)) for n in (1, 2)], [thumb(1, "up"), thumb(2, "down")])
    mine_alias(database, ALIAS, 100.0)
    (pair,) = load_pairs(database, ALIAS)
    assert SensitiveTexts(find_credential).are_in(pair)
    assert not SensitiveTexts(find_person, skipped_roles=OPERATORS).are_in(pair)
