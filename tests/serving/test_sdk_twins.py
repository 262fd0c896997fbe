"""An answer that is lost on the way: the SDK asks once more, and neither answer counts as a second attempt."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import openai
import pytest

from feedback.interactions import Interaction
from feedback.mining import Mined, mine_alias
from feedback.store import load_pairs
from pawl.ids import completion_suffix
from pawl.settings import Settings
from tests.fake_vllm import FakeVLLM
from tests.serving.conftest import Served, serving
from tests.serving.test_client_retries import counted, more_since, no_time
from tests.serving.test_feedback import events_on

ADA = "ada"


class Line(httpx2.HTTPTransport):
    """A connection to the gateway on which answers can be lost: read to the end, and never handed on."""

    loses_next = False

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        response = super().handle_request(request)
        if not self.loses_next:
            return response
        self.loses_next = False
        response.read()
        response.close()
        raise httpx2.ReadError("the connection broke", request=request)


class Place:
    """A gateway, and the official client on a line of ours."""

    def __init__(self, served: Served, line: Line, client: openai.OpenAI) -> None:
        self.served = served
        self.line = line
        self.client = client

    def ask(self, text: str, *, is_lost: bool = False, **extra: Any) -> str:
        """The id of an answer that Ada has in front of her.

        Args:
            text: What the engine answers; the first answer is another one if that is lost.
            extra: Arguments of the SDK's.
        """
        self.line.loses_next = is_lost
        self.served.engine.behaviour.text = text
        answer = self.client.chat.completions.create(
            model="assistant", messages=[{"role": "user", "content": "When do I water roses?"}], user=ADA, **extra
        )
        return str(answer.id)

    def all_stored(self) -> list[Interaction]:
        """Everything that the engine has answered, in the order in which it was asked."""
        sent = [f"chatcmpl-{headers['x-request-id']}" for headers in self.served.engine.seen_headers]
        return [self.served.stored(completion_id) for completion_id in sent]

    def vote(self, completion_id: str, value: str) -> None:
        body = {"completion_id": completion_id, "type": "thumbs", "value": value, "user": ADA}
        assert self.served.client.post("/v1/feedback", json=body).status_code in (201, 202)
        events_on(self.served, completion_id, 1)

    def mine(self) -> Mined:
        return mine_alias(self.served.gateway.database, "assistant", time.time())

    def sides(self) -> list[tuple[str | None, str]]:
        pairs = load_pairs(self.served.gateway.database, "assistant")
        return [(pair.chosen_interaction, pair.rejected_interaction) for pair in pairs]


@pytest.fixture
def place(make_settings: Callable[..., Settings], engine: FakeVLLM) -> Iterator[Place]:
    with serving(make_settings(), engine) as served, Line() as line:
        client = openai.OpenAI(
            base_url=f"{served.url}/v1", api_key="none", max_retries=2, http_client=httpx2.Client(transport=line)
        )
        client._calculate_retry_timeout = no_time  # type: ignore[method-assign]
        with client:
            yield Place(served, line, client)


def test_a_question_that_is_sent_again_is_no_regeneration(place: Place) -> None:
    before = counted()
    seen = place.ask("In the morning.", is_lost=True)
    lost, kept = place.all_stored()
    assert more_since(before) == {"chat.completions": 1.0}
    assert (lost.regenerate_of, kept.regenerate_of) == (None, None)
    assert (lost.user_id, lost.prompt, kept.completion_id) == (ADA, kept.prompt, seen)
    assert place.mine().by_source == {}
    place.vote(seen, "up")
    mined = place.mine()
    assert (mined.by_source, mined.skipped) == ({}, {"unpaired": 1})


def test_a_regeneration_that_is_sent_again_is_one_pair(place: Place) -> None:
    first = place.ask("Never.")
    seen = place.ask("In the morning.", is_lost=True, metadata={"regenerate_of": first})
    old, lost, kept = place.all_stored()
    assert (lost.regenerate_of, kept.regenerate_of, kept.completion_id) == (old.id, old.id, seen)
    place.vote(seen, "up")
    mined = place.mine()
    assert place.sides() == [(completion_suffix(seen), old.id)]
    assert mined.by_source == {"regeneration": 1}
    assert sum(mined.skipped.values()) == 2  # The lost answer's attempt, and the thumb that confirmed the other.
