"""Requests that SDKs send again are told from first ones."""

from __future__ import annotations

import openai
import pytest

from monitoring.metrics import REGISTRY
from serving.routes import HOT_PATHS
from tests.serving.conftest import Served
from tests.serving.talk import CHAT, QUESTION


def counted() -> dict[str, float]:
    """By route."""
    found = {route: REGISTRY.get_sample_value("pawl_client_retries_total", {"route": route}) for route in HOT_PATHS}
    return {route: value or 0.0 for route, value in found.items()}


def more_since(before: dict[str, float]) -> dict[str, float]:
    return {route: value - before[route] for route, value in counted().items() if value != before[route]}


@pytest.mark.parametrize(
    ("said", "is_retry"), [(None, False), ("0", False), ("1", True), ("2", True), ("17", True), ("x" * 900, True)]
)
def test_a_request_that_says_it_is_a_retry_is_counted(served: Served, said: str | None, is_retry: bool) -> None:
    before = counted()
    headers = {} if said is None else {"x-stainless-retry-count": said}
    assert served.client.post(CHAT, json=QUESTION, headers=headers).status_code == 200
    assert more_since(before) == ({"chat.completions": 1.0} if is_retry else {})


def test_the_official_client_is_counted_each_time_it_tries_again(served: Served) -> None:
    before = counted()
    served.engine.behaviour.status = 500
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=2)
    client._calculate_retry_timeout = no_time  # type: ignore[method-assign]
    with client, pytest.raises(openai.InternalServerError):
        client.chat.completions.create(model="assistant", messages=[{"role": "user", "content": "x"}])
    assert more_since(before) == {"chat.completions": 2.0}


def no_time(*_: object, **__: object) -> float:
    """To wait before another attempt."""
    return 0.0
