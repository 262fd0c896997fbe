"""The gateway's guards put together: what is checked, what happens then, and who is told of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from monitoring.metrics import GUARD_FINDINGS, GUARD_SECONDS
from pawl.audit import AuditEvent
from pawl.clock import Clock
from pawl.database import Database
from pawl.errors import ConfigurationError
from pawl.settings import GuardSettings
from serving.call import Call
from serving.guards.audit_trail import AuditTrail
from serving.guards.injection import Finding, find_injection
from serving.guards.output import AnswerGuard, Observer, StreamGuard, WholeGuard
from serving.guards.refusals import About, refused_request, refused_stream
from serving.guards.scorer_client import ScorerClient
from serving.guards.texts import untrusted_texts
from serving.request_fields import CompletionRequest

UNGUARDED = frozenset({"embeddings"})
"""Numbers obey nobody and insult nobody."""
STOP_S = 3.0
PREFIXES = {"responses": "resp_", "completions": "cmpl-"}


class Subject(NamedTuple):
    """Whose answer a line of the trail is about; kept apart from the call, which may be over by then."""

    completion: str
    key_id: str
    alias: str
    variant: str
    route: str


class Verdict(NamedTuple):
    """What the scorer said of some texts."""

    scores: Sequence[float] | None
    """None: there was no telling."""
    bad: tuple[int, ...]
    """Which of them are not to pass."""
    is_bad: bool


class OutputCheck:
    """Asks the scorer, and turns what it says into a verdict."""

    def __init__(self, settings: GuardSettings, scorer: ScorerClient, tell: Callable[..., None]) -> None:
        self._settings = settings
        self._scorer = scorer
        self._tell = tell
        self.window_chars = settings.window_chars

    def ask(self, texts: Sequence[str] | None, told: Callable[[Verdict], None]) -> None:
        """Have texts judged; None stands for an answer that cannot be read."""
        asked_at = time.perf_counter()

        def judge(scores: Sequence[float] | None) -> None:
            GUARD_SECONDS.labels("toxicity").observe(time.perf_counter() - asked_at)
            told(self._verdict(scores))

        if texts is None:
            asyncio.get_running_loop().call_soon(judge, None)
        else:
            self._scorer.ask(texts, judge)

    def _verdict(self, scores: Sequence[float] | None) -> Verdict:
        if scores is None:
            is_bad = self._settings.when_scorer_is_away == "refuse"
            GUARD_FINDINGS.labels("toxicity", "away_refuse" if is_bad else "away_pass").inc()
            return Verdict(None, (), is_bad)
        bad = tuple(place for place, score in enumerate(scores) if score >= self._settings.toxicity_threshold)
        return Verdict(scores, bad, bool(bad))

    def note(self, verdict: Verdict, about: Subject) -> None:
        """Count and write down a verdict that something is not to pass."""
        if not verdict.is_bad:
            return
        if verdict.scores is not None:
            GUARD_FINDINGS.labels("toxicity", self._settings.toxicity).inc()
            self._tell("toxicity", self._settings.toxicity, about, {"toxicity": round(max(verdict.scores), 4)})
        elif self._settings.toxicity == "refuse":
            self._tell("toxicity", "refuse", about, {"toxicity": None, "reason": "the scorer was away"})

    def about(self, call: Call) -> Subject:
        """Whom a verdict would be about."""
        return subject_of(call)

    def naming(self, call: Call) -> About:
        """What the answer of a call says about itself."""
        return about_of(call)


class Guards:
    """What the relay asks. Where a guard is off, the relay has a `None` to look at and nothing else."""

    def __init__(self, settings: GuardSettings, database: Database, clock: Clock) -> None:
        """
        Raises:
            ConfigurationError: the scorer's address is none.
        """
        self._settings = settings
        self._clock = clock
        self._trail = AuditTrail(database)
        self._scorer = _scorer_for(settings)
        self._output = OutputCheck(settings, self._scorer, self._tell) if self._scorer is not None else None
        self.is_active_on_input = settings.injection != "off"
        self.is_active_on_output = self._output is not None

    def start(self) -> None:
        self._trail.start()

    async def close(self) -> None:
        """Let go of the scorer; what waits for the trail is for `stop_trail`."""
        if self._scorer is not None:
            await self._scorer.close()

    def stop_trail(self) -> None:
        """Write the last lines of the trail; blocks for a moment."""
        self._trail.stop(STOP_S)

    def check_input(self, request: CompletionRequest) -> Finding | None:
        """What a request shows of an injection, if it is enough. Pure but for the clock of its metric; any thread."""
        if request.route in UNGUARDED:
            return None
        started = time.perf_counter()
        texts = untrusted_texts(request.body, request.route)
        finding = find_injection(texts, self._settings.injection_threshold)
        GUARD_SECONDS.labels("injection").observe(time.perf_counter() - started)
        return finding

    def is_refused(self, call: Call, finding: Finding) -> bool:
        """Count and write down a finding; whether the request is to be refused for it."""
        action = self._settings.injection
        GUARD_FINDINGS.labels("injection", action).inc()
        detail = {"rules": list(finding.rules), "score": round(finding.score, 2)}
        self._tell("injection", action, subject_of(call), detail)
        return action == "refuse"

    def refusal(self, call: Call) -> bytes:
        """The answer to a refused request, as an engine would have sent it."""
        request = call.request
        about = about_of(call)
        if request.is_stream:
            return refused_stream(about, request.n_choices, wants_usage=request.wants_usage)
        return refused_request(about, request.n_choices)

    def guard_of(self, call: Call) -> AnswerGuard | None:
        """Who guards the answer of one attempt, if anybody does."""
        output = self._output
        if output is None or call.route in UNGUARDED:
            return None
        if self._settings.toxicity == "flag":
            return Observer(call, output)
        return StreamGuard(call, output) if call.request.is_stream else WholeGuard(call, output)

    def _tell(self, guard: str, action: str, about: Subject, detail: dict[str, object]) -> None:
        said = {**detail, "alias": about.alias, "variant": about.variant, "route": about.route}
        actor = about.key_id or "anonymous"
        self._trail.add(AuditEvent(self._clock(), actor, f"guard.{guard}.{action}", about.completion, said))


def open_guards(settings: GuardSettings, database: Database, clock: Clock) -> Guards | None:
    """The guards that are switched on; None when none is that the relay must know of."""
    if settings.injection == "off" and settings.toxicity == "off":
        return None
    return Guards(settings, database, clock)


def _scorer_for(settings: GuardSettings) -> ScorerClient | None:
    if settings.toxicity == "off" or settings.scorer_url is None:
        return None
    try:
        return ScorerClient(settings.scorer_url, timeout_s=settings.scorer_timeout_s)
    except ValueError as exc:
        raise ConfigurationError(f"serving.guards.scorer_url: {exc}") from exc


def subject_of(call: Call) -> Subject:
    """Whom a finding is about."""
    return Subject(about_of(call).id, call.key.id, call.request.alias, call.variant, call.route)


def about_of(call: Call) -> About:
    """Id, model and time of a call's answer, as the engine would name them."""
    name = PREFIXES.get(call.route, "chatcmpl-") + call.suffix
    return About(call.route, name, call.model, int(call.created_at))
