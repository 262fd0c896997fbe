"""Browsers on pages of other origins: told that they may send feedback where that is allowed, and nothing else."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pawl.settings import Settings
from tests.fake_vllm import FakeVLLM
from tests.serving.conftest import Served, serving
from tests.serving.test_feedback import ask, rate

APP = "https://app.example.com"
ELSEWHERE = "https://elsewhere.example.com"
GRANT = "access-control-allow-origin"
ASKING = {"access-control-request-method": "POST", "access-control-request-headers": "x-pawl-feedback-token"}
FEEDBACK_PATHS = [
    "/v1/feedback",
    "/v1/feedback/fb_thumbs_0",
    "/feedback",
    "/api/public/scores",
    "/api/public/ingestion",
]


@pytest.mark.parametrize(("allowed", "granted"), [([APP], [APP]), (["*"], [APP, ELSEWHERE]), ([], [])])
def test_a_page_learns_whether_it_may_send(
    make_settings: Callable[..., Settings], engine: FakeVLLM, allowed: list[str], granted: list[str]
) -> None:
    with serving(make_settings(feedback_origins=allowed), engine) as served:
        completion_id = ask(served)
        for origin in (APP, ELSEWHERE):
            for path in FEEDBACK_PATHS:
                asked = served.client.options(path, headers={"origin": origin, **ASKING})
                assert asked.headers.get(GRANT) == (origin if origin in granted else None)
                assert asked.status_code == (204 if origin in granted else 405)
                assert asked.headers["x-request-id"]
                if origin in granted:
                    assert "x-pawl-feedback-token" in asked.headers["access-control-allow-headers"]
                    assert asked.headers["vary"] == "origin"
            for answer in (
                rate(served.client, completion_id, headers={"origin": origin}),
                rate(served.client, "chatcmpl-1", headers={"origin": origin}),
                served.client.post("/feedback", json={}, headers={"origin": origin}),
                served.client.delete("/v1/feedback/fb_thumbs_0", headers={"origin": origin}),
            ):
                assert answer.headers.get(GRANT) == (origin if origin in granted else None)
                assert answer.headers["x-request-id"]


def test_no_other_route_is_opened(make_settings: Callable[..., Settings], engine: FakeVLLM) -> None:
    with serving(make_settings(feedback_origins=["*"]), engine) as served:
        for path in ("/v1/models", "/v1/chat/completions", "/admin/v1/keys", "/metrics"):
            assert GRANT not in served.client.get(path, headers={"origin": APP}).headers
            assert served.client.options(path, headers={"origin": APP, **ASKING}).status_code == 405


def test_programs_without_an_origin_see_no_difference(served: Served) -> None:
    assert GRANT not in rate(served.client, ask(served)).headers
