"""The wheel over the real vLLM: served, rated, mined, trained, judged, rolled out, rolled back, by the front door.

One story in order, since every part needs the one before; the tests share one engine.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import shutil
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx2
import pytest
from openai import OpenAI
from safetensors.numpy import load_file, save_file

from ab_testing.controller import Controller, start_rollout
from ab_testing.experiment import Route
from ab_testing.rollout_store import list_decisions
from ab_testing.shadow import judge
from ab_testing.shadow_orders import start_shadow
from ab_testing.shadow_store import get_shadow, read_joined
from feedback.lineage import trace_pair
from feedback.mining import mine_alias
from feedback.store import get_interaction, list_pairs, load_pairs
from monitoring.toxicity import load_scorer
from pawl import clock, leases, registry
from pawl.adapter_files import ADAPTER_WEIGHTS
from pawl.database import Database
from pawl.engines import Engine, verify
from pawl.errors import PublishFailed
from pawl.fingerprints import FLOOR, distance, fingerprint_of
from pawl.settings import ShadowSettings
from practice.demo import REPLAY
from practice.evidence import Period, count_unscored
from practice.traffic import Visit, send_users
from practice.users import population
from practice.world import ALIAS, BASE_NAME
from retrain.pipeline import RoundInputs, RoundOptions, RunOutcome, run_round
from serving.stack import Stack
from tests.monitoring.exposition import assert_series_exist
from tests.pawl.test_webhooks import SECRET, Receiver

pytestmark = [pytest.mark.engine, pytest.mark.training, pytest.mark.timeout(600)]

QUESTION: Any = [{"role": "user", "content": "How do I bake bread?"}]
SLACK_S = 9.0
"""Of a machine that is busy with something else, such as the engine."""


def wait_until(condition: Callable[[], bool], timeout_s: float) -> bool:
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        if condition():
            return True
        time.sleep(0.1)
    return False


@pytest.fixture(scope="module")
def sdk(stack: Stack) -> OpenAI:
    return OpenAI(base_url=f"{stack.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def outcome(stack: Stack, shared_database: Database) -> RunOutcome:
    """A round trained on what a crowd said, published whatever the gate thinks of so short a training."""
    since = clock.now()
    visit = Visit(stack.url, ALIAS, 2, seed=5)
    count = asyncio.run(send_users(visit, population(5, 260), concurrency=24))
    assert count.failures == 0
    assert count.feedback > 200
    period = Period(since, clock.now())
    assert wait_until(lambda: count_unscored(shared_database, ALIAS, period) == (count.interactions, 0), 240)
    mined = mine_alias(shared_database, ALIAS, clock.now())
    assert set(mined.by_source) == {"edit", "regeneration", "thumbs"}
    scoring = stack.settings.worker.scoring
    scorer = load_scorer(scoring.toxicity_checkpoint, scoring.toxicity_config_dir)
    inputs = RoundInputs(new=load_pairs(shared_database, ALIAS, used=False), score_toxicity=scorer.score)
    options = RoundOptions(cycle="e2e", mix=REPLAY, force=True, publish_despite_gate=True)
    return run_round(shared_database, stack.settings, ALIAS, inputs, options)


def test_the_sdk_talks_to_the_engine_and_the_record_keeps_what_was_said(sdk: OpenAI, shared_database: Database) -> None:
    whole = sdk.chat.completions.create(model=ALIAS, messages=QUESTION, user="ada", max_tokens=40)
    assert whole.model == BASE_NAME
    suffix = whole.id.removeprefix("chatcmpl-")
    assert wait_until(lambda: get_interaction(shared_database, suffix) is not None, 60)
    kept = get_interaction(shared_database, suffix)
    assert kept is not None
    assert kept.completion is not None
    assert kept.completion["content"] == whole.choices[0].message.content
    assert whole.usage is not None
    assert (kept.prompt_tokens, kept.completion_tokens) == (whole.usage.prompt_tokens, whole.usage.completion_tokens)


def test_a_stream_arrives_in_pieces_under_one_id(sdk: OpenAI, shared_database: Database) -> None:
    chunks = list(sdk.chat.completions.create(model=ALIAS, messages=QUESTION, stream=True, max_tokens=40))
    assert len(chunks) > 2
    assert len({chunk.id for chunk in chunks}) == 1
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    suffix = chunks[0].id.removeprefix("chatcmpl-")
    assert wait_until(lambda: get_interaction(shared_database, suffix) is not None, 60)
    kept = get_interaction(shared_database, suffix)
    assert kept is not None
    assert kept.completion is not None
    assert kept.completion["content"] == text
    assert kept.completion_tokens is not None


def test_people_s_pairs_train_an_adapter_that_the_engine_serves(
    outcome: RunOutcome, stack: Stack, shared_database: Database
) -> None:
    assert outcome.model is not None
    assert outcome.gate is not None
    assert {check["name"] for check in outcome.gate["checks"]} >= {"harmful_refusal", "toxicity", "preference_accuracy"}
    measured = {check["name"] for check in outcome.gate["checks"] if check["difference"] is not None}
    assert measured >= {"echo", "kl_parent", "kl_base"}
    assert any(name.startswith("preference_accuracy/") for name in measured)
    assert "The gate says" in (outcome.directory / "gate.html").read_text()
    model = registry.get_model(shared_database, outcome.model)
    assert stack.engine is not None
    engine = Engine(stack.engine.url)
    try:
        assert engine.served()[outcome.model] == model.path
    finally:
        engine.close()


def test_the_engine_is_held_to_what_the_trainer_s_own_models_said(
    outcome: RunOutcome, stack: Stack, shared_database: Database, tmp_path: Path
) -> None:
    assert outcome.model is not None
    model = registry.get_model(shared_database, outcome.model)
    fingerprint = fingerprint_of(model.manifest)
    assert fingerprint is not None
    assert stack.engine is not None
    half = tmp_path / "half"
    shutil.copytree(str(model.path), half)
    weights = {
        name: values / 2 if "lora_B" in name else values for name, values in load_file(half / ADAPTER_WEIGHTS).items()
    }
    (half / ADAPTER_WEIGHTS).unlink()
    save_file(weights, half / ADAPTER_WEIGHTS)
    with closing(Engine(stack.engine.url)) as engine:
        verify(engine, outcome.model, BASE_NAME, fingerprint)
        off = distance(engine.token_logps(outcome.model, fingerprint.places), fingerprint.logps["adapter"])
        assert off < FLOOR / 2
        engine.load("half-as-strong", half)
        try:
            with pytest.raises(PublishFailed, match="not served as it was trained"):
                verify(engine, "half-as-strong", BASE_NAME, fingerprint)
        finally:
            engine.unload("half-as-strong")
        assert outcome.model not in engine.adapters_in_use()


def test_a_pair_is_traced_to_the_completions_behind_it(outcome: RunOutcome, shared_database: Database) -> None:
    trace = trace_pair(shared_database, list_pairs(shared_database, ALIAS, 1)[0].id)
    assert trace is not None
    assert trace["rejected_from"]["model"] == BASE_NAME
    assert outcome.new_pair_ids


def test_a_candidate_answers_in_the_dark_and_others_are_told_what_came_of_it(
    outcome: RunOutcome, stack: Stack, shared_database: Database, receiver: Receiver
) -> None:
    """The worker asks the engine's adapter what the gateway's users asked the base, and has both sides scored."""
    assert outcome.model is not None
    wide = {"toxicity_margin": 0.9, "over_refusal_margin": 0.9, "harmful_compliance_margin": None}
    settings = stack.settings.model_copy(update={"rollout": stack.settings.rollout.model_copy(update=wide)})
    wanted = ShadowSettings(share=1.0, min_pairs=12, error_margin=0.9)
    run = start_shadow(
        shared_database, settings, ALIAS, outcome.model, actor="test", clock=clock.now, wanted=wanted, is_forced=True
    )
    count = asyncio.run(send_users(Visit(stack.url, ALIAS, 2, seed=6), population(6, 10), concurrency=8))
    assert (count.failures, count.interactions >= 20) == (0, True)
    assert wait_until(lambda: get_shadow(shared_database, run.id).status != "running", 120)

    ended = get_shadow(shared_database, run.id)
    pairs = read_joined(shared_database, run.id)[:12]
    assert {(pair.error, pair.champion.is_toxic is None, pair.candidate.is_toxic is None) for pair in pairs} == {
        (None, False, False)
    }
    assert all(pair.champion.n_tokens and pair.candidate.n_tokens for pair in pairs)
    verdict = judge(pairs, run.rules)
    assert (ended.status, ended.reason, verdict.n_pairs) == (verdict.finding, verdict.reason, 12)

    assert wait_until(lambda: len(receiver.bodies) >= 2, 60)
    assert [body["type"] for body in receiver.bodies] == ["shadow.start", f"shadow.{ended.status}"]
    headers, payload = receiver.got[-1]
    signed = b".".join((headers["webhook-id"].encode(), headers["webhook-timestamp"].encode(), payload))
    secret = base64.b64decode(SECRET.removeprefix("whsec_"))
    theirs = headers["webhook-signature"].removeprefix("v1,")
    assert base64.b64decode(theirs) == hmac.new(secret, signed, hashlib.sha256).digest()
    assert receiver.bodies[-1]["data"]["reason"] == ended.reason


def test_a_canary_reaches_users_and_a_rollback_takes_them_back_within_a_second(
    outcome: RunOutcome, stack: Stack, shared_database: Database
) -> None:
    assert outcome.model is not None
    settings = stack.settings.rollout.model_copy(update={"steps": [0.5], "min_users": [10_000], "min_dwell_s": 600.0})
    epoch = leases.epoch_of(shared_database, f"rollout/{ALIAS}")
    route = Route(ALIAS, 0, BASE_NAME)
    rollout = start_rollout(shared_database, settings, route, outcome.model, now=clock.now(), epoch=epoch)
    registry.set_state(shared_database, outcome.model, registry.ModelState.CHALLENGER, now=clock.now())

    def served_by(user: str) -> str:
        body = {"model": ALIAS, "messages": QUESTION, "user": user, "max_tokens": 8}
        return str(httpx2.post(f"{stack.url}/v1/chat/completions", json=body, timeout=30).headers["x-pawl-model"])

    users = [f"canary-{n}" for n in range(30)]
    assert wait_until(lambda: outcome.model in {served_by(user) for user in users[:8]}, 60)
    first = {user: served_by(user) for user in users}
    assert set(first.values()) == {BASE_NAME, outcome.model}
    assert first == {user: served_by(user) for user in users}

    controller = Controller(shared_database, clock=clock.now)
    controller.act(ALIAS, "roll_back", "the test says so", actor="test", epoch=epoch)
    assert wait_until(lambda: {served_by(user) for user in users} == {BASE_NAME}, 1.0 + SLACK_S)
    assert list_decisions(shared_database, rollout.id)[-1].actor == "test"


def test_the_worker_gives_a_forgetful_engine_its_adapter_back(
    outcome: RunOutcome, stack: Stack, shared_database: Database
) -> None:
    assert outcome.model is not None
    registry.set_state(shared_database, outcome.model, registry.ModelState.CHAMPION, now=clock.now())
    assert stack.engine is not None
    engine = Engine(stack.engine.url)
    try:
        engine.unload(outcome.model)
        assert outcome.model not in engine.served()
        assert wait_until(lambda: outcome.model in engine.served(), 120)
    finally:
        engine.close()


STORY_SERIES = {
    "pawl_build_info", "pawl_feedback_total", "pawl_gate_verdicts_total", "pawl_pairs_total", "pawl_refusals_total",
    "pawl_request_duration_seconds_count", "pawl_requests_total", "pawl_retrain_runs_total", "pawl_rollbacks_total",
    "pawl_rollout_state", "pawl_rollout_weight", "pawl_scored_responses_total", "pawl_spool_rows",
    "pawl_time_to_first_token_seconds_count", "pawl_tokens_total", "pawl_toxic_responses_total",
}  # fmt: skip
"""What this story must have moved: a declaration without a sample is not enough."""


def test_every_series_that_alerts_and_the_dashboard_read_comes_out_of_the_processes(
    outcome: RunOutcome, stack: Stack
) -> None:
    assert outcome.model is not None
    worker = f"http://127.0.0.1:{stack.settings.worker.metrics_port}/metrics"
    gateway = f"{stack.url}/metrics"

    def exposed() -> str:
        return httpx2.get(gateway, timeout=30).text + httpx2.get(worker, timeout=30).text

    def missing() -> set[str]:
        samples = {line.split("{")[0].split(" ")[0] for line in exposed().splitlines() if not line.startswith("#")}
        return STORY_SERIES - samples

    wait_until(lambda: not missing(), 60)
    assert missing() == set()
    assert_series_exist(exposed())
