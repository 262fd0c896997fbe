"""One run of a judge over what waits for it: several pairs at a time, each verdict kept as soon as it is there."""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

from feedback.errors import JudgeRefuses
from feedback.judged.constitution import Constitution
from feedback.judged.judge import Judge
from feedback.judged.question import Comparison, question, response_format
from feedback.judged.reply import Scores, read_scores
from feedback.judged.rulings import rule
from feedback.judged.siblings import Siblings
from feedback.judged.verdict_store import Heard, Judging, are_kept, save_verdict
from pawl.clock import Clock
from pawl.database import Database
from pawl.errors import ConfigurationError, PawlError

MARK_BYTES = 12
GONE = "gone"
"""The outcome where somebody deleted one of the answers meanwhile."""
GIVE_UP_AFTER = 5
"""When a judge has refused so many requests and taken none, it is not the requests that are wrong."""


@dataclass(frozen=True)
class Bench:
    """Who judges, and how."""

    judge: Judge
    constitution: Constitution
    response_format: str
    concurrency: int

    @property
    def judging(self) -> Judging:
        return Judging(self.judge.model, self.constitution.sha256)


@dataclass
class Session:
    """What a run has done so far."""

    outcomes: Counter[str] = field(default_factory=Counter)
    """Pairs by outcome."""
    n_refused: int = 0
    """Of the unreadable ones, those that the judge did not take."""
    problem: PawlError | None = None
    """Why it ended early."""


def judge_all(database: Database, alias: str, bench: Bench, todo: Iterator[Siblings], clock: Clock) -> Session:
    """Have pairs judged, each read when there is somebody to judge it.

    A judge that goes away, or takes nothing, ends the run; what was judged before is kept, and the rest waits for the
    next one.
    """
    session = Session()

    def hear(pair: Siblings) -> _Ruled:
        return _hear(bench, pair, lambda: are_kept(database, (pair.first, pair.second)), clock)

    with ThreadPoolExecutor(bench.concurrency, thread_name_prefix="judge") as pool:
        try:
            for ruled in _in_parallel(pool, todo, hear, bench.concurrency):
                session.outcomes[_keep(database, alias, ruled, bench.judging)] += 1
                _note_refusal(session, ruled.refusal)
        except PawlError as exc:
            session.problem = exc
        finally:
            bench.judge.stop()
            pool.shutdown(cancel_futures=True)
    return session


class _Ruled(NamedTuple):
    pair: Siblings
    heard: Heard
    refusal: JudgeRefuses | None


def _in_parallel(
    pool: ThreadPoolExecutor, todo: Iterator[Siblings], hear: Callable[[Siblings], _Ruled], n_at_once: int
) -> Iterator[_Ruled]:
    """What the judge says of each, as it comes; no more are read than it is asked about at once.

    Raises:
        PawlError: of one of them it said nothing; after what it says of those that it had been asked about by then.
    """
    running: set[Future[_Ruled]] = set()
    failed: BaseException | None = None
    while True:
        if failed is None:
            running |= {pool.submit(hear, pair) for pair in islice(todo, n_at_once - len(running))}
        if not running:
            break
        done, running = wait(running, return_when=FIRST_COMPLETED)
        for future in done:
            failed = failed or future.exception()
            if future.exception() is None:
                yield future.result()
    if failed is not None:
        raise failed


def _hear(bench: Bench, pair: Siblings, is_there: Callable[[], bool], clock: Clock) -> _Ruled:
    """What the judge says of two answers in either order. Between reading and sending them somebody may erase one."""
    forward = backward = refusal = None
    try:
        forward = _ask(bench, pair.comparison) if is_there() else None
        backward = _ask(bench, pair.comparison.reversed()) if forward is not None and is_there() else None
    except JudgeRefuses as exc:
        refusal = exc
    ruling = rule(forward, backward, bench.constitution)
    return _Ruled(pair, Heard(ruling, forward, backward, pair.attempts + 1, clock()), refusal)


def _ask(bench: Bench, comparison: Comparison) -> Scores | None:
    messages = question(comparison, bench.constitution, lambda: secrets.token_hex(MARK_BYTES))
    reply = bench.judge.ask(messages, response_format(bench.response_format, bench.constitution))
    return read_scores(reply, bench.constitution)


def _keep(database: Database, alias: str, ruled: _Ruled, by: Judging) -> str:
    pair, heard, _ = ruled
    is_kept = save_verdict(database, alias, pair.conversation, (pair.first, pair.second), heard, by)
    return heard.ruling.outcome.value if is_kept else GONE


def _note_refusal(session: Session, refusal: JudgeRefuses | None) -> None:
    """
    Raises:
        ConfigurationError: nothing but refusals.
    """
    if refusal is None:
        return
    session.n_refused += 1
    if session.n_refused == session.outcomes.total() == GIVE_UP_AFTER:
        advice = "check feedback.judge.response_format and parameters"
        raise ConfigurationError(f"{refusal}, and every other one so far: {advice}") from refusal
