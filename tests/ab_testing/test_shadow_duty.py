"""Shadow runs before real engines: asked while there is room, never twice, and on to the canary or not."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from ab_testing import shadow_asking, shadow_duty
from ab_testing.experiment import Route
from ab_testing.rollout_orders import open_rollout
from ab_testing.rollout_store import running_rollout
from ab_testing.route_store import write_route
from ab_testing.shadow_duty import ShadowDuty
from ab_testing.shadow_orders import shadow_report, start_shadow, stop_shadow
from ab_testing.shadow_store import (
    ShadowRun,
    get_shadow,
    newest_shadow,
    save_answer,
    save_answer_scores,
    unscored_answers,
)
from feedback.interactions import Interaction, Status
from feedback.recording import conversation_sha
from feedback.retention import DAY_S, Limits, prune
from feedback.store import delete_texts, save_scores
from feedback.tombstones import Subject
from monitoring.harm import default_lexicon
from monitoring.scoring import ScoringDuty
from pawl import leases, registry
from pawl.cli.adapter_keeper import desired_of
from pawl.clock import now as real_now
from pawl.database import Database
from pawl.errors import ConfigurationError, NegativeVerdict, PublishFailed, StaleWrite, Unreachable
from pawl.registry import Model, ModelState
from pawl.schema import shadow_answers, webhook_events
from pawl.settings import Settings
from tests.fake_vllm import FakeVLLM
from tests.feedback.people import eraser
from tests.pawl.records import save, served
from tests.retrain.fake_engine import FakeEngine, serving
from tests.retrain.sealed_samples import place_adapter

ALIAS, CHAMPION, CANDIDATE = "assistant", "base-model", "base-model--r0001-1a2b3c4d"
START = 1_000_000.0
N_PAIRS = 20
ON_SQLITE = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
"""Of what is no matter of the database."""


@dataclass
class World:
    """A database with a champion that answers, an engine with a candidate, and a clock that only tests move."""

    database: Database
    settings: Settings
    now: float = START
    n_asked: int = 0
    outcomes: list[str] = field(default_factory=list)
    _duty: ShadowDuty | None = None

    @property
    def duty(self) -> ShadowDuty:
        self._duty = self._duty or self.another_worker()
        return self._duty

    def another_worker(self) -> ShadowDuty:
        count: Callable[[str, str], None] = lambda _alias, outcome: self.outcomes.append(outcome)  # noqa: E731
        return ShadowDuty(self.settings, clock=lambda: self.now, count=count)

    def start(self, **changes: Any) -> ShadowRun:
        return start_shadow(
            self.database, self.settings, ALIAS, CANDIDATE, actor="tester", clock=lambda: self.now, **changes
        )

    def ask(self, n: int, **changes: Any) -> list[Interaction]:
        """Users ask the champion, and the scorer reads what it says."""
        found = [question(self.n_asked + number, self.now, **changes) for number in range(n)]
        self.n_asked += n
        save(self.database, found)
        self.now += shadow_duty.SETTLE_S + 1
        return found

    def mirror(self) -> None:
        """Until there is nothing to do at once."""
        while self.duty.look(self.database, ALIAS):
            pass

    def score(self) -> None:
        scoring = ScoringDuty(
            self.database,
            lambda texts: [0.9 if "rude" in text else 0.1 for text in texts],
            default_lexicon(),
            threshold=0.5,
            batch_size=64,
            scorer_name="stand-in",
            clock=lambda: self.now,
        )
        while scoring.run_once():
            pass
        while batch := unscored_answers(self.database, 64):
            found = scoring.scores_of([one.interaction for one in batch])
            save_answer_scores(self.database, [one.run_id for one in batch], found)

    def answers(self) -> Sequence[sa.RowMapping]:
        with self.database.read() as connection:
            return connection.execute(sa.select(shadow_answers)).mappings().all()

    def told(self) -> list[str]:
        with self.database.read() as connection:
            events = sa.select(webhook_events.c.type).where(webhook_events.c.type.startswith("shadow."))
            return list(connection.execute(events.order_by(webhook_events.c.at, webhook_events.c.id)).scalars())


def question(number: int, at: float, **changes: Any) -> Interaction:
    fields: dict[str, Any] = {
        "created_at": at + number / 1000,
        "user_id": f"user-{number}",
        "unit_id": f"user-{number}",
        "question": f"What is {number} and {number}?",
        "parameters": {"model": ALIAS, "temperature": 0.5},
    }
    one = served(number, **(fields | changes))
    return replace(one, prompt_sha=conversation_sha(one.alias, one.prompt or (), {}))


def settings_for(url: str, **shadow: Any) -> Settings:
    wanted = {"share": 1.0, "min_pairs": N_PAIRS, "per_minute": 1000, "concurrency": 8, "error_margin": 0.5} | shadow
    rollout = {"shadow": wanted, "toxicity_margin": 0.5, "over_refusal_margin": 0.5}
    models = {ALIAS: {"engines": [url], "champion": CHAMPION}}
    return Settings.model_validate({"serving": {"models": models}, "rollout": rollout})


def register(database: Database, path: Path | None = None, state: ModelState = ModelState.CANDIDATE) -> None:
    where = str(path) if path else None
    model = Model(CANDIDATE, ALIAS, CHAMPION, CHAMPION, None, where, None, None, state, {}, START, START)
    registry.register_model(database, model)


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine is no engine that is away."""
    monkeypatch.setattr("ab_testing.shadow_asking.PROBE_TIMEOUT_S", 60.0)


@pytest.fixture
def engine() -> FakeVLLM:
    return FakeVLLM(CHAMPION, CANDIDATE)


@pytest.fixture
def world(database: Database, engine_url: str) -> World:
    register(database)
    return World(database, settings_for(engine_url))


def test_a_candidate_answers_what_the_champion_was_asked_and_goes_on(world: World, engine: FakeVLLM) -> None:
    world.ask(3)  # Before it began.
    run = world.start(is_ramp=True)
    asked = world.ask(N_PAIRS)
    world.ask(2, is_stored=False)
    world.ask(2, model=CANDIDATE)
    world.ask(2, status=Status.UPSTREAM_ERROR, created_at=START - 100)
    world.mirror()
    rows = world.answers()
    assert {row["interaction_id"] for row in rows} == {one.id for one in asked}
    assert {(row["model"], row["error"], row["completion_tokens"]) for row in rows} == {(CANDIDATE, None, 5)}
    assert [body["model"] for body in engine.seen] == [CANDIDATE] * N_PAIRS
    assert all(body["temperature"] == 0.5 and not body["stream"] for body in engine.seen)
    assert shadow_report(world.database, run)["unscored"] == N_PAIRS
    assert running_rollout(world.database, ALIAS) is None

    world.score()
    world.mirror()
    ended = get_shadow(world.database, run.id)
    opened = running_rollout(world.database, ALIAS)
    assert opened is not None
    assert (ended.status, ended.rollout_id, opened.candidate) == ("passed", opened.id, CANDIDATE)
    assert world.told() == ["shadow.start", "shadow.passed"]


@ON_SQLITE
def test_a_ruder_candidate_is_kept_from_users(world: World, engine: FakeVLLM) -> None:
    run = world.start(is_ramp=True)
    engine.behaviour.text_by_model[CANDIDATE] = "That is a rude question."
    world.ask(N_PAIRS)
    world.mirror()
    world.score()
    world.mirror()
    ended = get_shadow(world.database, run.id)
    assert (ended.status, ended.reason) == ("failed", f"worse after {N_PAIRS} pairs: toxicity")
    assert running_rollout(world.database, ALIAS) is None
    assert registry.get_model(world.database, CANDIDATE).state == ModelState.RETIRED
    found = {row["metric"]: row for row in shadow_report(world.database, run)["differences"]}
    assert (found["toxicity"]["champion"], found["toxicity"]["candidate"]) == (0.0, 1.0)
    assert found["toxicity"]["ci_lower"] > 0.5
    assert world.told() == ["shadow.start", "shadow.failed"]


def test_another_worker_asks_nothing_twice(world: World, engine: FakeVLLM) -> None:
    world.start()
    world.ask(6)
    world.mirror()
    second = world.another_worker()
    while second.look(world.database, ALIAS):
        pass
    assert len(engine.seen) == 6


@ON_SQLITE
def test_a_share_is_a_share(world: World, engine: FakeVLLM) -> None:
    world.settings = settings_for(world.settings.serving.models[ALIAS].engines[0], share=0.25, min_pairs=500)
    world.start()
    world.ask(60)
    world.mirror()
    assert 0 < len(engine.seen) <= 33  # 15 are expected; more than five standard deviations either way.


@ON_SQLITE
@pytest.mark.parametrize("trouble", ["queue", "dead engine", "failures", "busy"])
def test_users_come_first(world: World, engine: FakeVLLM, trouble: str) -> None:
    """Nothing is asked while they need the engine, and everything afterwards."""
    world.start()
    world.ask(4)
    if trouble == "queue":
        engine.n_waiting = 1
    elif trouble == "failures":
        world.ask(1, status=Status.UPSTREAM_ERROR)
    elif trouble == "busy":
        engine.behaviour.status = 503
    else:
        url = world.settings.serving.models[ALIAS].engines[0]
        models = {ALIAS: {"engines": [url, "http://127.0.0.1:9"], "champion": CHAMPION}}
        two = Settings.model_validate({"serving": {"models": models}, "rollout": world.settings.rollout.model_dump()})
        ShadowDuty(two, clock=lambda: world.now).look(world.database, ALIAS)
        assert engine.seen == []
    if trouble != "dead engine":
        world.mirror()
    assert world.answers() == []
    engine.n_waiting, engine.behaviour.status = 0, 200
    world.now += shadow_duty.TROUBLE_S + shadow_duty.MINUTE_S
    world.mirror()
    assert len(world.answers()) == 4


def test_a_long_answer_is_asked_about_too(world: World, engine: FakeVLLM) -> None:
    """It began before others that are known already, and ended after them."""
    world.start()
    began = world.now
    world.ask(2)
    world.mirror()
    assert len(engine.seen) == 2
    world.now += 60
    world.ask(1, created_at=began, latency_ms=60_000.0)
    world.mirror()
    assert len(engine.seen) == 3
    world.mirror()
    assert len(engine.seen) == 3


def test_a_failure_counts_from_its_end(world: World, engine: FakeVLLM) -> None:
    world.start()
    world.ask(4)
    world.ask(1, status=Status.UPSTREAM_ERROR, created_at=world.now - 120, latency_ms=120_000.0)
    world.mirror()
    assert engine.seen == []
    world.now += shadow_duty.TROUBLE_S
    world.mirror()
    assert len(engine.seen) == 4


@ON_SQLITE
def test_a_question_that_no_engine_takes_holds_up_no_other(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.settings = settings_for(world.settings.serving.models[ALIAS].engines[0], concurrency=1)
    world.start()
    stubborn, *others = world.ask(3)
    real = shadow_asking.ask_all

    async def ask_all(engines: Sequence[str], questions: Sequence[Interaction], *given: Any) -> shadow_asking.Asked:
        if questions[0].id == stubborn.id:
            return shadow_asking.Asked(1, "answered 504")
        return await real(engines, questions, *given)

    monkeypatch.setattr("ab_testing.shadow_duty.ask_all", ask_all)
    for _ in range(3):
        world.mirror()
    assert {row["interaction_id"] for row in world.answers()} == {one.id for one in others}


@ON_SQLITE
def test_engines_that_cannot_take_the_canary_are_not_asked_at_every_look(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = world.start(is_ramp=True)
    world.ask(N_PAIRS)
    world.mirror()
    world.score()
    tried: list[float] = []

    def open_rollout(*_: Any, **__: Any) -> str:
        tried.append(world.now)
        raise Unreachable("an engine is away")

    monkeypatch.setattr("ab_testing.shadow_duty.open_rollout", open_rollout)
    began = world.now
    for _ in range(3):
        world.mirror()
        world.now += 1
    world.now = began + shadow_duty.TROUBLE_S
    world.mirror()
    assert tried == [began, began + shadow_duty.TROUBLE_S]
    assert get_shadow(world.database, run.id).status == "running"


def test_every_engine_has_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    engines, asked = ("http://one", "http://two", "http://three"), set()

    async def nothing(*_: Any) -> None:
        return None

    async def ask(_client: Any, url: str, *_: Any) -> shadow_asking.Busy:
        asked.add(url)
        return shadow_asking.Busy("busy")

    monkeypatch.setattr("ab_testing.shadow_asking.why_not_now", nothing)
    monkeypatch.setattr("ab_testing.shadow_asking.ask", ask)
    limits = shadow_asking.Limits(1.0, 0, 1000)
    for number in range(20):
        one = question(number, START)
        asyncio.run(shadow_asking.ask_all(engines, [one], CANDIDATE, limits, real_now, lambda _: None))
    assert asked == set(engines)


@ON_SQLITE
def test_no_more_a_minute_than_are_allowed(world: World, engine: FakeVLLM) -> None:
    world.settings = settings_for(world.settings.serving.models[ALIAS].engines[0], per_minute=3, concurrency=2)
    world.start()
    world.ask(8)
    world.mirror()
    assert len(engine.seen) == 3
    world.now += shadow_duty.MINUTE_S + 1
    world.mirror()
    assert len(engine.seen) == 6


@ON_SQLITE
@pytest.mark.parametrize(
    ("behaviour", "error"),
    [({"status": 500}, "http_500"), ({"status": 400}, "http_400"), ({"delay_s": 30.0}, "timeout")],
)
def test_what_is_the_candidates_own_fault_counts_against_it(
    world: World, engine: FakeVLLM, behaviour: dict[str, Any], error: str
) -> None:
    url = world.settings.serving.models[ALIAS].engines[0]
    world.settings = settings_for(url, timeout_s=0.3 if error == "timeout" else 20.0)
    run = world.start()
    world.ask(2)
    for name, value in behaviour.items():
        setattr(engine.behaviour, name, value)
    world.mirror()
    assert [row["error"] for row in world.answers()] == [error, error]
    assert shadow_report(world.database, run)["errors"] == {error: 2}
    world.score()
    assert all(row["scored_at"] is None for row in world.answers())


@ON_SQLITE
def test_who_opted_out_is_not_asked_about(world: World, engine: FakeVLLM) -> None:
    filters = {"feedback": {"filters": {"opted_out": ["user-0"]}}}
    world.settings = Settings.model_validate(world.settings.model_dump() | filters)
    world.start()
    world.ask(2)
    world.mirror()
    assert len(engine.seen) == 1
    assert sorted(world.outcomes) == ["left_out", "ok"]


@ON_SQLITE
def test_without_a_verdict_it_is_held_for_a_person(world: World) -> None:
    run = world.start(is_ramp=True)
    world.ask(2)
    world.mirror()
    world.now += run.rules.max_time_s
    world.mirror()
    ended = get_shadow(world.database, run.id)
    assert (ended.status, ended.reason) == ("held", f"no verdict in time: 0 of {N_PAIRS} pairs")
    assert running_rollout(world.database, ALIAS) is None


@ON_SQLITE
def test_it_ends_when_another_champion_comes(world: World) -> None:
    run = world.start()
    with world.database.write() as connection:
        write_route(connection, Route(ALIAS, 0, "another-model", None), epoch=0, at=world.now)
    world.mirror()
    assert get_shadow(world.database, run.id).reason == "the champion is another-model now"


def test_it_ends_when_a_person_starts_the_canary(world: World) -> None:
    run = world.start()
    world.now += 1
    opened = open_rollout(
        world.database, world.settings, ALIAS, CANDIDATE, actor="operator:eve", clock=lambda: world.now
    )
    world.mirror()
    ended = get_shadow(world.database, run.id)
    assert (ended.status, ended.rollout_id) == ("stopped", opened)


def test_a_canary_that_it_opened_itself_is_told_so_after_a_kill(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    run = world.start(is_ramp=True)
    world.ask(N_PAIRS)
    world.mirror()
    world.score()
    with monkeypatch.context() as patched:
        patched.setattr(shadow_duty, "end_run", _killed)
        with pytest.raises(KeyboardInterrupt):
            world.mirror()
    opened = running_rollout(world.database, ALIAS)
    assert opened is not None
    assert get_shadow(world.database, run.id).status == "running"
    world.now += 1
    world.another_worker().look(world.database, ALIAS)
    ended = get_shadow(world.database, run.id)
    assert (ended.status, ended.rollout_id) == ("passed", opened.id)
    assert ended.reason == f"no worse by any margin after {N_PAIRS} pairs"
    assert world.told() == ["shadow.start", "shadow.passed"]


def _killed(*_: object, **__: object) -> bool:
    raise KeyboardInterrupt


def test_one_run_at_a_time_and_a_stop_is_final(world: World, engine: FakeVLLM) -> None:
    run = world.start()
    with pytest.raises(NegativeVerdict, match=run.id):
        world.start()
    stop_shadow(world.database, run, "enough", actor="operator:eve", clock=lambda: world.now)
    with pytest.raises(NegativeVerdict, match="over"):
        stop_shadow(world.database, run, "enough", actor="operator:eve", clock=lambda: world.now)
    world.ask(2)
    world.mirror()
    assert engine.seen == []
    assert newest_shadow(world.database, ALIAS, candidate=CANDIDATE) == get_shadow(world.database, run.id)


def test_a_worker_that_slept_ends_and_keeps_nothing(world: World) -> None:
    run = world.start()
    world.ask(2)
    epoch = leases.acquire(world.database, "shadow/assistant", "slept", ttl_s=1.0, now=1.0)
    assert epoch is not None
    fenced = leases.FencedDatabase(world.database, "shadow/assistant", epoch)
    leases.acquire(world.database, "shadow/assistant", "another", ttl_s=1.0, now=3.0)
    with pytest.raises((StaleWrite, ExceptionGroup)):
        world.duty.look(fenced, ALIAS)
    assert world.answers() == []
    assert get_shadow(world.database, run.id).status == "running"


@ON_SQLITE
def test_the_gates_word_and_the_alias_count(world: World, database: Database) -> None:
    registry.set_state(database, CANDIDATE, ModelState.REJECTED, now=START)
    with pytest.raises(NegativeVerdict, match="rejected"):
        world.start()
    assert world.start(is_forced=True).rules.is_forced
    other = {"other": {"engines": ["http://127.0.0.1:9"], "champion": CHAMPION}}
    settings = Settings.model_validate({"serving": {"models": other}})
    with pytest.raises(ConfigurationError, match="a version of assistant"):
        start_shadow(database, settings, "other", CANDIDATE, actor="tester", clock=real_now)


def test_its_adapter_is_proven_first_and_stays_loaded(database: Database, tmp_path: Path) -> None:
    register(database, place_adapter(tmp_path, CANDIDATE), ModelState.RETIRED)
    with serving(FakeEngine(base=CHAMPION)) as engine:
        world = World(database, settings_for(engine.url))
        engine.ignores_weights = True
        with pytest.raises(PublishFailed):
            world.start()
        assert newest_shadow(database) is None
        engine.ignores_weights = False
        run = world.start()
        assert engine.adapters.keys() == {CANDIDATE}
        later = START + 30 * DAY_S
        assert [one.name for one in desired_of(database, world.settings.serving, ALIAS, later).wanted] == [CANDIDATE]
        stop_shadow(database, run, "enough", actor="operator:eve", clock=lambda: world.now)
        assert desired_of(database, world.settings.serving, ALIAS, later).unwanted == {CANDIDATE}


@pytest.mark.parametrize("way", ["erase", "delete", "retention"])
def test_answers_go_with_their_questions(world: World, tmp_path: Path, way: str) -> None:
    world.start()
    first, second = world.ask(2)
    world.mirror()
    if way == "erase":
        at_work = eraser(world.database, tmp_path, clock=lambda: world.now)
        subject = Subject("user-0")
        report = at_work.erase(at_work.bury(at_work.tombstone(subject, "ticket 7")), subject)
        assert report.counts["shadow_answers"] == 1
    elif way == "delete":
        assert delete_texts(world.database, first.id, {})
    else:
        moment = second.created_at - 1e-4 + DAY_S
        assert prune(world.database, Limits(1.0, None, None), moment, batch_rows=9, max_batches=9).counts == {
            "interactions": 1,
            "shadow_answers": 1,
        }
    assert [row["interaction_id"] for row in world.answers()] == [second.id]
    world.mirror()
    assert len(world.answers()) == 1


def test_what_is_erased_while_the_candidate_answers_is_not_kept(
    world: World, engine: FakeVLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.start()
    (one,) = world.ask(1)

    def erased_first(*given: Any) -> bool:
        delete_texts(world.database, one.id, {})
        return save_answer(*given)

    monkeypatch.setattr("ab_testing.shadow_duty.save_answer", erased_first)
    world.mirror()
    assert len(engine.seen) == 1
    assert (world.answers(), world.outcomes) == ([], ["gone"])


@ON_SQLITE
def test_personal_data_is_taken_out_where_records_are_redacted(world: World, engine: FakeVLLM) -> None:
    guarded = world.settings.model_dump()
    guarded["serving"]["guards"]["redact"] = True
    world.settings = Settings.model_validate(guarded)
    engine.behaviour.text_by_model[CANDIDATE] = "Write to ann.lee@gmail.com."
    world.start()
    world.ask(1)
    world.mirror()
    assert "[EMAIL_1]" in world.answers()[0]["answer"]


@ON_SQLITE
def test_scores_of_a_harmless_answer_are_not_invented(world: World) -> None:
    world.start()
    world.ask(1)
    world.mirror()
    save_scores(world.database, [])
    assert {row["scored_at"] for row in world.answers()} == {None}
    world.score()
    row = world.answers()[0]
    assert (row["is_toxic"], row["response"], row["is_harmful_prompt"]) == (False, "comply", False)
