"""The worker's part in shadow runs: asks candidates, ends runs that have shown enough, and sends who is no worse on."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import structlog

from ab_testing.rollout_orders import open_rollout
from ab_testing.rollout_store import is_opened_by, newest_rollout
from ab_testing.route_store import load_route
from ab_testing.shadow import Verdict, judge, look_size
from ab_testing.shadow_asking import Asked, Limits, ask_all
from ab_testing.shadow_sampling import is_drawn, why_left_out
from ab_testing.shadow_store import (
    Place,
    ShadowAnswer,
    ShadowRun,
    ShadowStatus,
    answers_of_champion,
    count_answers,
    count_failures,
    end_run,
    read_joined,
    running_shadow,
    save_answer,
    unanswered,
)
from feedback.filters.stored import opted_out
from feedback.interactions import Interaction
from feedback.redaction import redact_interaction
from feedback.store import get_interaction
from pawl.clock import Clock
from pawl.database import Database
from pawl.errors import ConfigurationError, NegativeVerdict, PawlError, UnknownModel
from pawl.settings import Settings

log = structlog.get_logger()

ACTOR = "shadow"
PAGE_ROWS = 500
"""Of the champion's answers that are looked through at once."""
SETTLE_S = 5.0
"""Records come from the gateways in no order: those of the last seconds are left until they are all there."""
LOOK_BACK_S = 3600.0
"""Older questions are not asked any more, so that a slow candidate answers what users ask now."""
TROUBLE_S = 30.0
"""After an engine has failed a user the candidate is asked nothing for so long. So long rests, too, who found no engine
fit to take a canary."""
MINUTE_S = 60.0

Count = Callable[[str, str], None]
"""Is told of each answer: alias and outcome."""


@dataclass
class Walk:
    """Where this process is in one run; another one begins anew, and asks nothing twice."""

    run_id: str
    place: Place
    drawn: deque[str] = field(default_factory=deque)
    sent_at: deque[float] = field(default_factory=deque)
    looked_at: int = 0
    """Pairs of the newest look."""
    rests_until: float = 0.0
    """Before that nothing is asked of engines that could not take the canary."""


class ShadowDuty:
    """Looks after the shadow runs of all aliases. One process at a time holds an alias's lease to call `look`."""

    def __init__(self, settings: Settings, *, clock: Clock, count: Count = lambda _alias, _outcome: None) -> None:
        self._settings = settings
        self._wanted = settings.rollout.shadow
        self._clock = clock
        self._count = count
        self._walks: dict[str, Walk] = {}
        self._longest_s = settings.serving.timeouts.total_s + SETTLE_S

    def look(self, database: Database, alias: str) -> bool:
        """Do what there is to do for an alias now; True if there may be more at once.

        Args:
            database: of the holder of the alias's lease.
        """
        run = running_shadow(database, alias)
        if run is None:
            self._walks.pop(alias, None)
            return False
        walk = self._walks.get(alias)
        if walk is None or walk.run_id != run.id:
            walk = self._walks[alias] = Walk(run.id, Place(run.created_at, ""))
        if self._ends(database, run, walk):
            return False
        return self._mirror(database, run, walk)

    def _ends(self, database: Database, run: ShadowRun, walk: Walk) -> bool:
        """End a run that is overtaken by events, or decided, or too old."""
        route = load_route(database, run.alias)
        rollout = newest_rollout(database, run.alias, candidate=run.candidate)
        if rollout is not None and rollout.created_at >= run.created_at:
            return self._told_late(database, run, rollout.id)
        if route is not None and route.champion != run.champion:
            return self._end(database, run, "stopped", f"the champion is {route.champion} now")
        if self._clock() < walk.rests_until:
            return True
        verdict = self._verdict(database, run, walk)
        if verdict.finding == "failed":
            return self._end(database, run, "failed", verdict.reason)
        if verdict.finding == "passed":
            return self._go_on(database, run, walk, verdict)
        if self._clock() > run.created_at + run.rules.max_time_s:
            return self._end(database, run, "held", f"no verdict in time: {verdict.reason}")
        return False

    def _told_late(self, database: Database, run: ShadowRun, rollout_id: str) -> bool:
        """End a run whose canary is there: a person's, or its own, if a worker was killed before it could tell."""
        if not is_opened_by(database, rollout_id, ACTOR):
            return self._end(database, run, "stopped", f"its canary {rollout_id} was started", rollout_id)
        found = judge(read_joined(database, run.id), run.rules)
        # Who was erased meanwhile is in no pair any more; nevertheless the canary was opened on a passed verdict.
        reason = found.reason if found.finding == "passed" else "no worse by any margin"
        return self._end(database, run, "passed", reason, rollout_id)

    def _verdict(self, database: Database, run: ShadowRun, walk: Walk) -> Verdict:
        """As `judge` finds; pairs are only read when there are enough for another look."""
        is_over_time = self._clock() > run.created_at + run.rules.max_time_s
        counts = count_answers(database, run.id)
        size = look_size(counts.total() - counts["unscored"], run.rules.min_pairs)
        if size <= walk.looked_at and not is_over_time:
            return Verdict("wait", "", walk.looked_at)
        verdict = judge(read_joined(database, run.id), run.rules)
        walk.looked_at = verdict.n_pairs if verdict.finding == "wait" else walk.looked_at
        return verdict

    def _go_on(self, database: Database, run: ShadowRun, walk: Walk, verdict: Verdict) -> bool:
        """Open the canary of a candidate that is no worse, where that was asked for."""
        if not run.rules.is_ramp:
            return self._end(database, run, "passed", verdict.reason)
        try:
            opened = open_rollout(
                database, self._settings, run.alias, run.candidate,
                actor=ACTOR, clock=self._clock, is_forced=run.rules.is_forced,
            )  # fmt: skip
        except (NegativeVerdict, ConfigurationError, UnknownModel) as exc:
            return self._end(database, run, "held", f"{verdict.reason}; but no canary: {exc}")
        except PawlError as exc:  # An engine is away: tried again, until the time is over.
            if self._clock() > run.created_at + run.rules.max_time_s:
                return self._end(database, run, "held", f"{verdict.reason}; but no canary: {exc}")
            log.warning("shadow_canary_waits", run=run.id, reason=str(exc)[:200])
            walk.rests_until = self._clock() + TROUBLE_S
            return True
        return self._end(database, run, "passed", verdict.reason, opened)

    def _end(
        self, database: Database, run: ShadowRun, status: ShadowStatus, reason: str, rollout: str | None = None
    ) -> bool:
        end_run(database, run, status, reason, actor=ACTOR, now=self._clock(), rollout_id=rollout)
        log.info("shadow_ended", run=run.id, alias=run.alias, status=status, reason=reason)
        return True

    def _mirror(self, database: Database, run: ShadowRun, walk: Walk) -> bool:
        """Ask the candidate a few of the questions that wait; True if more do and may be asked now."""
        now = self._clock()
        if not walk.drawn:
            self._draw(database, run, walk, now)
        room = min(self._wanted.concurrency, self._room(walk, now))
        if not room or not walk.drawn:
            return False
        if count_failures(database, run.alias, now - TROUBLE_S, longest_s=self._longest_s):
            return False
        questions = self._questions(database, run, [walk.drawn.popleft() for _ in range(min(room, len(walk.drawn)))])
        asked = self._ask(database, run, questions) if questions else Asked(0, None)
        walk.sent_at.extend([now] * asked.n_sent)
        if asked.problem is not None:
            walk.drawn.extend(question.id for question in questions)  # Behind the others, which may fare better.
            log.info("shadow_waits", run=run.id, reason=asked.problem)
            return False
        return bool(walk.drawn) and self._room(walk, self._clock()) > 0

    def _room(self, walk: Walk, now: float) -> int:
        """How many requests this minute still has."""
        while walk.sent_at and walk.sent_at[0] <= now - MINUTE_S:
            walk.sent_at.popleft()
        return max(0, self._wanted.per_minute - len(walk.sent_at))

    def _draw(self, database: Database, run: ShadowRun, walk: Walk, now: float) -> None:
        """Walk on through what the champion answered, and keep the share that is drawn."""
        if walk.place.at < now - LOOK_BACK_S:
            walk.place = Place(max(run.created_at, now - LOOK_BACK_S), "")
        until, longest_s = now - SETTLE_S, self._longest_s
        page = answers_of_champion(database, run, walk.place, until, PAGE_ROWS, longest_s=longest_s)
        if page:
            walk.place = page[-1]
        drawn = [one.id for one in page if is_drawn(one.id, run.rules.salt, run.rules.share)]
        walk.drawn.extend(unanswered(database, run.id, drawn))

    def _questions(self, database: Database, run: ShadowRun, ids: Sequence[str]) -> list[Interaction]:
        """Those that may be asked, read just before they are."""
        out = opted_out(self._settings.feedback.filters)
        found: list[Interaction] = []
        for one in filter(None, (get_interaction(database, each) for each in unanswered(database, run.id, ids))):
            if why_left_out(one, out) is None:
                found.append(one)
            else:
                self._count(run.alias, "left_out")
        return found

    def _ask(self, database: Database, run: ShadowRun, questions: Sequence[Interaction]) -> Asked:
        """Ask, and keep what the candidate says as it comes."""
        served, serving = self._settings.serving.models[run.alias], self._settings.serving
        limits = Limits(self._wanted.timeout_s, self._wanted.max_waiting, serving.max_answer_bytes)
        by_id = {question.id: question for question in questions}
        outcomes: Counter[str] = Counter()

        def keep(said: ShadowAnswer) -> None:
            is_kept = save_answer(database, run, self._redacted(by_id[said.interaction_id], said))
            outcomes["gone" if not is_kept else "error" if said.error else "ok"] += 1

        asked = asyncio.run(ask_all(served.engines, questions, run.candidate, limits, self._clock, keep))
        for outcome, n in outcomes.items():
            for _ in range(n):
                self._count(run.alias, outcome)
        return asked

    def _redacted(self, question: Interaction, said: ShadowAnswer) -> ShadowAnswer:
        """As the gateway's records are, where it redacts them."""
        if not self._settings.serving.guards.redact or said.answer is None:
            return said
        return said._replace(answer=redact_interaction(_answered(question, said)).completion)


def _answered(question: Interaction, said: ShadowAnswer) -> Interaction:
    return Interaction(**{**vars(question), "completion": said.answer})
