"""Which replica answers: the conversation's own, unless it is out, overloaded or without the model."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from math import ceil
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from monitoring.metrics import REGISTRY
from pawl.settings import ReplicaSettings
from serving.connections import EnginePool
from serving.replicas import MIN_RETRIES, Replica, ReplicaSet, RetryBudget, all_replicas, conversation_of, replica_sets
from serving.request_fields import FieldLimits, parse_request

RULES = ReplicaSettings(max_concurrency=256)
LIMITS = FieldLimits()
SYSTEM = {"role": "system", "content": "Be brief."}
AFFINITIES = st.integers(0, 2**64 - 1)


class Clock:
    """A time that stands still until it is told otherwise."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def make_sets(
    engines: dict[str, list[str]], clock: Clock | None = None, rules: ReplicaSettings = RULES
) -> dict[str, ReplicaSet]:
    return replica_sets(engines, rules, lambda url: EnginePool(url, connect_s=1.0), clock=clock or Clock())


def make_set(n: int, clock: Clock | None = None, rules: ReplicaSettings = RULES) -> ReplicaSet:
    return make_sets({"assistant": [f"http://replica-{index}" for index in range(n)]}, clock, rules)["assistant"]


def picked(replicas: ReplicaSet, affinity: int, model: str = "base", tried: Sequence[Replica] = ()) -> Replica:
    replica = replicas.pick(affinity, model, tried)
    assert replica is not None
    return replica


def affinities(n: int) -> list[int]:
    rng = random.Random(5)
    return [rng.getrandbits(64) for _ in range(n)]


def eject(replica: Replica) -> None:
    for _ in range(RULES.eject_after):
        replica.started()
        replica.ended("failed")


# Whose conversation it is.


def test_a_conversation_stays_with_its_replica_and_all_get_their_part() -> None:
    replicas = make_set(5)
    homes = Counter(picked(replicas, affinity) for affinity in affinities(20_000))
    assert {picked(replicas, 7).url for _ in range(100)} == {picked(make_set(5), 7).url}
    # 4,000 each; the standard deviation is 57.
    assert all(3_700 < n < 4_300 for n in homes.values())
    assert len(homes) == 5


def test_those_of_a_lost_replica_spread_over_all_others() -> None:
    replicas = make_set(5)
    lost = replicas.replicas[2]
    moved = [affinity for affinity in affinities(20_000) if picked(replicas, affinity) is lost]
    heirs = Counter(picked(replicas, affinity, tried=[lost]) for affinity in moved)
    assert set(heirs) == set(replicas.replicas) - {lost}
    assert all(0.21 < n / len(moved) < 0.29 for n in heirs.values())


@given(st.integers(2, 9), st.lists(AFFINITIES, min_size=1, max_size=50), st.data())
def test_removing_a_replica_moves_only_its_own_conversations(n: int, conversations: list[int], data: Any) -> None:
    replicas = make_set(n)
    lost = data.draw(st.sampled_from(replicas.replicas))
    before = {affinity: picked(replicas, affinity) for affinity in conversations}
    eject(lost)
    for affinity, home in before.items():
        after = picked(replicas, affinity)
        assert after is home if home is not lost else after is not lost


# Load.


@given(st.integers(2, 6), st.lists(st.tuples(st.booleans(), AFFINITIES), max_size=120), st.floats(1.0, 2.0))
def test_the_load_bound_is_never_exceeded(n: int, events: list[tuple[bool, int]], bound: float) -> None:
    rules = RULES.model_copy(update={"load_bound": bound, "max_concurrency": 12})
    replicas = make_set(n, rules=rules)
    running: list[Replica] = []
    for is_end, affinity in events:
        if is_end and running:
            running.pop(affinity % len(running)).ended("ok")
            continue
        replica = replicas.pick(affinity, "base")
        if replica is None:
            assert len(running) == replicas.capacity
            continue
        replica.started()
        running.append(replica)
        assert replica.n_running <= min(ceil(bound * len(running) / n + 1e-9), 12)
    assert sum(replica.n_running for replica in replicas.replicas) == len(running)


def test_a_bound_of_one_means_equal_shares() -> None:
    replicas = make_set(3, rules=RULES.model_copy(update={"load_bound": 1.0}))
    for _ in range(30):
        picked(replicas, 7).started()
    assert [replica.n_running for replica in replicas.replicas] == [10, 10, 10]


def test_one_hot_conversation_overflows_to_the_same_second_choice() -> None:
    replicas = make_set(4)
    first = picked(replicas, 7)
    second = picked(replicas, 7, tried=[first])
    order: list[Replica] = []
    for _ in range(100):
        order.append(picked(replicas, 7))
        order[-1].started()
    assert order[:2] == [first, second]
    assert max(Counter(order).values()) <= ceil(1.25 * 100 / 4)


@given(AFFINITIES, st.floats(0.0, 10.0))
def test_while_one_returns_slowly_all_are_served_and_it_gets_no_more_than_its_share(affinity: int, back: float) -> None:
    clock = Clock()
    rules = RULES.model_copy(update={"max_concurrency": 20})
    replicas = make_set(3, clock, rules)
    returning = replicas.replicas[1]
    eject(returning)
    assert replicas.capacity == 40
    clock.now_s += rules.eject_s + back
    share = returning.health.share(clock.now_s)
    assert share > 0.0
    replicas.refresh()
    assert replicas.capacity == int(20 * (2 + share))
    for n_running in range(1, replicas.capacity + 1):
        picked(replicas, affinity + n_running * 2**50 & 2**64 - 1).started()
        assert returning.n_running <= ceil(rules.load_bound * n_running * share / (2 + share) + 1e-9)


def test_a_single_replica_takes_as_much_as_it_may() -> None:
    replicas = make_set(1, rules=RULES.model_copy(update={"max_concurrency": 2}))
    for _ in range(2):
        picked(replicas, 0).started()
    assert (replicas.is_single, replicas.capacity, replicas.pick(0, "base")) == (True, 2, None)
    replicas.replicas[0].ended("neutral")
    assert replicas.pick(0, "base") is replicas.replicas[0]


# Health.


def shown(replica: Replica, alias: str = "assistant") -> float | None:
    return REGISTRY.get_sample_value("pawl_engine_ejected", {"model": alias, "replica": replica.url})


def views(replica: Replica, alias: str = "assistant") -> tuple[float | None, ...]:
    """How many processes have it in service, and out."""
    labels = {"model": alias, "replica": replica.url}
    return tuple(REGISTRY.get_sample_value("pawl_engine_views", labels | {"state": state}) for state in ("in", "out"))


def test_an_ejection_shows_while_it_lasts_and_tells_the_capacity() -> None:
    clock = Clock()
    replicas = make_set(2, clock)
    best, other = picked(replicas, 7), picked(replicas, 7, tried=[picked(replicas, 7)])
    capacities: list[int] = []
    replicas.follow(capacities.append)
    assert (shown(best), picked(replicas, 7)) == (0, best)
    eject(best)
    assert (shown(best), picked(replicas, 7)) == (1, other)
    assert (views(best), views(other)) == ((0, 1), (1, 0))
    clock.now_s += RULES.eject_s
    replicas.tick()
    assert (shown(best), shown(other)) == (0, 0)
    clock.now_s += RULES.slow_start_s
    replicas.tick()
    assert picked(replicas, 7) is best
    assert capacities == [512, 256, 256 + 25, 512]


def test_what_the_client_did_is_not_held_against_the_replica() -> None:
    replicas = make_set(2)
    best = picked(replicas, 7)
    for _ in range(100):
        best.started()
        best.ended("neutral")
    assert (best.n_running, picked(replicas, 7)) == (0, best)


@pytest.mark.parametrize("n", [1, 3])
def test_when_all_are_out_all_are_used(n: int) -> None:
    clock = Clock()
    replicas = make_set(n, clock)
    homes = [picked(replicas, affinity) for affinity in affinities(50)]
    for replica in replicas.replicas:
        replica.probed(False, None)
        replica.probed(False, None)
    assert [shown(replica) for replica in replicas.replicas] == [1] * n
    assert [picked(replicas, affinity) for affinity in affinities(50)] == homes
    assert replicas.capacity == n * RULES.max_concurrency
    replicas.replicas[-1].probed(True, None)
    assert {picked(replicas, affinity) for affinity in affinities(50)} == {replicas.replicas[-1]}
    # Nobody can stand in for it, so that it is not spared.
    assert replicas.capacity == RULES.max_concurrency


# Models.


def test_a_model_is_asked_of_those_that_have_it() -> None:
    replicas = make_set(3)
    having, lacking, silent = replicas.replicas
    having.probed(True, frozenset({"base", "tuned"}))
    lacking.probed(True, frozenset({"base"}))
    assert {picked(replicas, affinity, "tuned") for affinity in affinities(50)} == {having, silent}
    assert {picked(replicas, affinity, "base") for affinity in affinities(50)} == {having, lacking, silent}
    silent.lacks("tuned")
    assert {picked(replicas, affinity, "tuned") for affinity in affinities(50)} == {having}
    eject(having)
    assert {picked(replicas, affinity, "tuned") for affinity in affinities(50)} == {lacking}


def test_a_model_that_nobody_lists_is_tried_until_all_have_refused_it() -> None:
    replicas = make_set(2)
    for replica in replicas.replicas:
        replica.probed(True, frozenset({"base"}))
    for _ in replicas.replicas:
        assert replicas.has_model("new")
        picked(replicas, 7, "new").lacks("new")
    assert (replicas.has_model("new"), replicas.pick(7, "new")) == (False, None)
    replicas.replicas[0].probed(True, frozenset({"base"}))
    assert not replicas.has_model("new")
    replicas.replicas[0].probed(True, frozenset({"base", "new"}))
    assert picked(replicas, 7, "new") is replicas.replicas[0]


def test_a_replica_without_a_list_is_asked_again_after_the_next_probe() -> None:
    replicas = make_set(1)
    replicas.replicas[0].lacks("new")
    assert not replicas.has_model("new")
    replicas.replicas[0].probed(True, None)
    assert replicas.has_model("new")


def test_a_failed_probe_keeps_the_list() -> None:
    replicas = make_set(2)
    replicas.replicas[0].probed(True, frozenset({"base"}))
    replicas.replicas[0].probed(False, None)
    assert {picked(replicas, affinity, "tuned") for affinity in affinities(50)} == {replicas.replicas[1]}


def test_aliases_share_the_replicas_of_an_address() -> None:
    sets = make_sets({"one": ["http://a", "http://b"], "two": ["http://b", "http://b"]})
    shared = sets["two"].replicas[0]
    assert sets["two"].is_single
    assert sets["one"].replicas[1] is shared
    assert [replica.url for replica in all_replicas(sets.values())] == ["http://a", "http://b"]
    eject(shared)
    assert (shown(shared, "one"), shown(shared, "two")) == (1, 1)
    shared.started()
    for replica_set in sets.values():
        replica_set.tick()
        labels = {"model": replica_set.alias, "replica": "http://b"}
        assert REGISTRY.get_sample_value("pawl_replica_requests_running", labels) == 1


# Retries.


@given(st.lists(st.tuples(st.floats(0.0, 2.0), st.booleans()), max_size=300), st.floats(0.0, 1.0))
def test_retries_are_a_share_of_the_requests_of_any_ten_seconds(events: list[tuple[float, bool]], share: float) -> None:
    clock = Clock()
    budget = RetryBudget(share, clock=clock)
    requests: list[float] = []
    retries: list[float] = []
    for gap, is_failure in events:
        clock.now_s += gap
        budget.note_request()
        requests.append(clock.now_s)
        if is_failure and budget.may_retry():
            retries.append(clock.now_s)
            since = clock.now_s - 10.0
            n_requests, n_retries = (sum(at > since for at in times) for times in (requests, retries))
            assert n_retries <= max(MIN_RETRIES, share * n_requests)


def test_the_budget_is_there_to_be_used() -> None:
    clock = Clock()
    budget = RetryBudget(0.2, clock=clock)
    n_retries = 0
    for _ in range(2000):
        clock.now_s += 0.02
        budget.note_request()
        n_retries += budget.may_retry()
    assert 0.17 * 2000 <= n_retries <= 0.2 * 2000


def test_light_traffic_may_retry_and_none_is_none() -> None:
    clock = Clock()
    budget = RetryBudget(0.2, clock=clock)
    before = REGISTRY.get_sample_value("pawl_retries_total")
    assert before is not None
    assert [budget.may_retry() for _ in range(MIN_RETRIES + 1)] == [True] * MIN_RETRIES + [False]
    assert REGISTRY.get_sample_value("pawl_retries_total") == before + MIN_RETRIES
    clock.now_s += 12.0
    assert budget.may_retry()
    assert not RetryBudget(0.0, clock=clock).may_retry()


# Conversations.


def conversation(*messages: dict[str, Any], model: str = "assistant", **more: Any) -> int:
    return asked("chat.completions", {"model": model, "messages": messages, **more})


def asked(route: str, body: dict[str, Any]) -> int:
    return conversation_of(parse_request(orjson.dumps(body), route, LIMITS))


def said(role: str, content: object) -> dict[str, Any]:
    return {"role": role, "content": content}


@pytest.mark.parametrize("opening", [(), (SYSTEM,), (said("system", "long " * 1000),)])
@pytest.mark.parametrize("content", ["roses?", [{"type": "text", "text": "roses?"}], "roses? " * 1000, "\u0000é😀"])
def test_later_turns_are_the_same_conversation(opening: tuple[dict[str, Any], ...], content: object) -> None:
    first = (*opening, said("user", content))
    later = (*first, said("assistant", "Yes."), said("user", "And ferns?"))
    assert conversation(*first) == conversation(*later)
    assert 0 <= conversation(*first) < 2**64


def test_other_conversations_differ() -> None:
    long = "x" * 3000
    openings = [
        (SYSTEM, said("user", "roses?")),
        (SYSTEM, said("user", "ferns?")),
        (said("user", "roses?"),),
        (SYSTEM,),
        (said("system", "Be long."),),
        (said("user", long),),
        (said("user", long + "x"),),
        (said("user", long + "y"),),
    ]
    hashes = [conversation(*opening, model=alias) for opening in openings for alias in ("assistant", "other")]
    assert len(set(hashes)) == len(hashes)


def test_a_prompt_that_grows() -> None:
    def prompt(text: str) -> int:
        return asked("completions", {"model": "assistant", "prompt": text})

    assert prompt("x" * 256 + "a") == prompt("x" * 256 + "b" * 1000)
    assert prompt("a") != prompt("b")


def test_responses_open_with_text_or_with_messages() -> None:
    def response(given: object, **more: object) -> int:
        return asked("responses", {"model": "assistant", "input": given, **more})

    later = [said("user", "roses?"), said("assistant", "Yes."), said("user", "And ferns?")]
    assert response("roses?") == response(later)
    assert response("roses?") != response("ferns?")
    assert response("roses?", instructions="Be brief.") != response("roses?")


def test_anthropics_messages_have_their_system_prompt_outside() -> None:
    def message(*messages: dict[str, Any], **more: object) -> int:
        return asked("messages", {"model": "assistant", "max_tokens": 9, "messages": messages, **more})

    first, later = said("user", "roses?"), (said("assistant", "Yes."), said("user", "And ferns?"))
    assert message(first, system="Be brief.") == message(first, *later, system="Be brief.")
    assert message(first, system="Be brief.") != message(first)


@pytest.mark.parametrize("given", ["text", ["text", "more"], [1, 2, 3], [[1, 2], [3]]])
def test_texts_to_embed_have_a_place_too(given: object) -> None:
    embed = {"model": "assistant", "input": given}
    assert asked("embeddings", embed) == asked("embeddings", embed)
