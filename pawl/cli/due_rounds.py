"""Whether a round is due now, from the database, the settings and the alerts that are firing."""

from __future__ import annotations

from collections.abc import Mapping

import structlog

from pawl.cli.selecting import counts_shown
from pawl.clock import now
from pawl.database import Database
from pawl.errors import Unreachable
from pawl.registry import list_runs, unfinished_run
from pawl.round_alarms import firing_alarms
from pawl.round_checks import Check, newest_answer
from pawl.round_due import Decision, Facts, Needs, decide
from pawl.settings import AlarmSettings, RetrainSettings, Settings

log = structlog.get_logger()


def decide_now(database: Database, settings: Settings, alias: str, n_new: int, left_out: Mapping[str, int]) -> Decision:
    """Whether a round should start now.

    Args:
        n_new: pairs it could train on.
        left_out: pairs that are not trained on, by reason.
    """
    from ab_testing.rollout_store import running_rollout
    from ab_testing.shadow_store import running_shadow

    last = max((run.created_at for run in list_runs(database, alias)), default=None)
    unfinished, rollout = unfinished_run(database, alias), running_rollout(database, alias)
    open_trial = rollout or running_shadow(database, alias)
    facts = Facts(
        n_new=n_new,
        left_out=counts_shown(left_out),
        hours_since_last=None if last is None else (now() - last) / 3600,
        unfinished_run=unfinished.id if unfinished else None,
        open_rollout=open_trial.id if open_trial else None,
        alarms=alarms_now(settings.retrain.alarms, alias),
    )
    return decide(facts, needs_of(settings.retrain))


def needs_of(settings: RetrainSettings) -> Needs:
    return Needs(settings.min_pairs, settings.interval_hours, settings.alarms.min_pairs)


def alarms_now(settings: AlarmSettings, alias: str) -> tuple[str, ...]:
    """None where Prometheus does not answer: a round that is due by its pairs does not wait for it."""
    if settings.prometheus_url is None:
        return ()
    try:
        return firing_alarms(settings.prometheus_url, settings.names, alias)
    except Unreachable as exc:
        log.warning("alarms_unknown", reason=str(exc))
        return ()


def answered(database: Database, alias: str, moment: float) -> str | None:
    """What was said to this moment of the schedule by whoever was first; None while it is to be answered.

    A round that was begun for it and is unfinished is to be resumed.
    """
    newest = newest_answer(database, alias)
    if newest is None or newest.moment is None or newest.moment < moment or is_owed(database, newest):
        return None
    return newest.reason


def is_owed(database: Database, answer: Check) -> bool:
    """Whether there is a round to be brought to its end, or one that was due and whose process died before it began."""
    if unfinished_run(database, answer.alias) is not None:
        return True
    return answer.is_due and all(run.updated_at < answer.at for run in list_runs(database, answer.alias))
