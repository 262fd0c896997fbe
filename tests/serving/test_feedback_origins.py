"""Browsers on pages of other origins: told that they may send feedback where that is allowed, and nothing else."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pawl.settings import Settings
from serving.feedback_origins import OWN_HEADERS, preflight
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


@pytest.mark.parametrize(
    ("names", "is_granted"),
    [
        ("authorization,content-type,x-langfuse-public-key,x-langfuse-sdk-name,x-langfuse-sdk-version", True),
        ("authorization, x-stainless-lang, x-stainless-retry-count", True),
        (", ".join(f"x-{number}" for number in range(64)), True),
        ("", False),
        ("x-a b", False),
        ("x-a,,x-b", False),
        ("x-a: b", False),
        ("x-\xe9", False),
        ("x" * 65, False),
        (", ".join(f"x-{number}" for number in range(65)), False),
        (",".join(["x" * 64] * 40), False),
    ],
)
def test_sdks_may_send_headers_of_their_own(names: str, is_granted: bool) -> None:
    (granted,) = (
        value for name, value in preflight(names.encode("latin-1")) if name == b"access-control-allow-headers"
    )
    assert granted == (names.encode("latin-1") if is_granted else OWN_HEADERS)


def test_langfuses_sdk_passes_the_preflight(make_settings: Callable[..., Settings], engine: FakeVLLM) -> None:
    names = "authorization,content-type,x-langfuse-sdk-name"
    with serving(make_settings(feedback_origins=[APP]), engine) as served:
        for origin, granted in ((APP, names), (ELSEWHERE, None)):
            asking = {"origin": origin, **ASKING, "access-control-request-headers": names}
            asked = served.client.options("/api/public/ingestion", headers=asking)
            assert asked.headers.get("access-control-allow-headers") == granted


def test_no_other_route_is_opened(make_settings: Callable[..., Settings], engine: FakeVLLM) -> None:
    with serving(make_settings(feedback_origins=["*"]), engine) as served:
        for path in ("/v1/models", "/v1/chat/completions", "/admin/v1/keys", "/metrics"):
            assert GRANT not in served.client.get(path, headers={"origin": APP}).headers
            assert served.client.options(path, headers={"origin": APP, **ASKING}).status_code == 405


def test_programs_without_an_origin_see_no_difference(served: Served) -> None:
    assert GRANT not in rate(served.client, ask(served)).headers
