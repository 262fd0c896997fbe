"""Which replica answers: the conversation's own, unless it failed too often and another is there."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from monitoring.metrics import REGISTRY
from serving.replicas import EJECTION_S, FAILURES_TO_EJECT, ReplicaSet, conversation_of
from serving.request_fields import parse_completion_request

SYSTEM = {"role": "system", "content": "Be brief."}


def conversation(*messages: dict[str, Any], model: str = "assistant") -> str:
    raw = orjson.dumps({"model": model, "messages": messages})
    return conversation_of(parse_completion_request(raw, "chat.completions", max_depth=64, max_choices=8))


def prompt(text: str | None) -> str:
    raw = orjson.dumps({"model": "assistant", "prompt": text})
    return conversation_of(parse_completion_request(raw, "completions", max_depth=64, max_choices=8))


def said(role: str, content: object) -> dict[str, Any]:
    return {"role": role, "content": content}


@pytest.mark.parametrize("opening", [(), (SYSTEM,)])
def test_later_turns_are_the_same_conversation(opening: tuple[dict[str, Any], ...]) -> None:
    first = (*opening, said("user", [{"type": "text", "text": "roses?"}]))
    later = (*first, said("assistant", "Yes."), said("user", "And ferns?"))
    assert conversation(*first) == conversation(*later)


def test_other_conversations_differ() -> None:
    one = conversation(SYSTEM, said("user", "roses?"))
    assert one != conversation(SYSTEM, said("user", "ferns?"))
    assert one != conversation(said("user", "roses?"))
    assert one != conversation(SYSTEM, said("user", "roses?"), model="other")
    assert conversation(SYSTEM) != conversation(said("system", "Be long."))


def test_a_prompt_that_grows() -> None:
    assert prompt("x" * 256 + "a") == prompt("x" * 256 + "b" * 1000)
    assert prompt("a") != prompt("b")
    assert prompt(None) == prompt("")


def shown(replica: str) -> float | None:
    return REGISTRY.get_sample_value("pawl_engine_ejected", {"model": "ejected", "replica": replica})


def test_an_ejection_shows_while_it_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 100.0
    monkeypatch.setattr("serving.replicas.time.monotonic", lambda: now_s)
    replicas = ReplicaSet("ejected", ["http://a", "http://b"])
    best = replicas.in_order("some conversation")[0]
    for _ in range(FAILURES_TO_EJECT):
        assert (shown(best.url), replicas.in_order("some conversation")[0]) == (0, best)
        replicas.note_failure(best)
    assert (shown(best.url), replicas.in_order("some conversation")[1]) == (1, best)
    now_s += EJECTION_S
    assert (shown(best.url), replicas.in_order("some conversation")[0]) == (0, best)


def test_the_only_replica_is_never_ejected() -> None:
    replicas = ReplicaSet("ejected", ["http://alone"])
    for _ in range(FAILURES_TO_EJECT):
        replicas.note_failure(replicas.in_order("any")[0])
    assert not replicas.in_order("any")[0].ejected_until
    assert shown("http://alone") == 0
