"""What people and rounds order of shadow runs: begin one, end one, say what one has shown."""

from __future__ import annotations

import secrets
from typing import Any

from ab_testing.experiment import Route
from ab_testing.outcomes import HARMFUL_COMPLIANCE, OVER_REFUSAL, TOXICITY
from ab_testing.rollout_orders import MAX_ACTOR_CHARS, check_candidate, load_everywhere, plain
from ab_testing.rollout_rules import canary_config
from ab_testing.route_store import load_route
from ab_testing.shadow import ERRORS, ShadowRules, judge, report
from ab_testing.shadow_store import (
    RUNNING,
    ShadowRun,
    count_answers,
    end_run,
    insert_run,
    read_joined,
    running_shadow,
)
from pawl import registry
from pawl.clock import Clock
from pawl.database import Database
from pawl.errors import ConfigurationError, NegativeVerdict
from pawl.settings import RolloutSettings, Settings, ShadowSettings

DEFAULT_SHARE = 0.1


def rules_of(rollout: RolloutSettings, shadow: ShadowSettings, *, is_ramp: bool, is_forced: bool) -> ShadowRules:
    """The rules of a run, frozen at its start. The margins are those that the canary must rule out later."""
    margins = {
        TOXICITY: rollout.toxicity_margin,
        OVER_REFUSAL: rollout.over_refusal_margin,
        ERRORS: shadow.error_margin,
    }
    if rollout.harmful_compliance_margin is not None:
        margins[HARMFUL_COMPLIANCE] = rollout.harmful_compliance_margin
    return ShadowRules(
        share=shadow.share or DEFAULT_SHARE,
        salt=secrets.token_hex(16),
        min_pairs=shadow.min_pairs,
        max_time_s=shadow.max_time_s,
        alpha=shadow.alpha,
        margins=margins,
        is_ramp=is_ramp,
        is_forced=is_forced,
    )


def start_shadow(
    database: Database,
    settings: Settings,
    alias: str,
    candidate: str,
    *,
    actor: str,
    clock: Clock,
    wanted: ShadowSettings | None = None,
    is_ramp: bool = False,
    is_forced: bool = False,
) -> ShadowRun:
    """Have a registered candidate answer in the dark, once every engine has proven to serve it.

    Args:
        wanted: in the place of `rollout.shadow`.
        is_ramp: go on to a canary if it is no worse.
        is_forced: also one that the gate rejected.

    Raises:
        PawlError: it cannot be started; says why.
    """
    model = registry.get_model(database, candidate)
    served = settings.serving.models[alias]
    check_candidate(database, served, alias, model, is_forced=is_forced)
    canary_config(settings.rollout)  # Wrong settings are told now, not when the run is over.
    route = load_route(database, alias) or Route(alias, 0, served.champion)
    if candidate == route.champion:
        raise ConfigurationError(f"{candidate} is the champion of {alias} already")
    if (running := running_shadow(database, alias)) is not None:
        raise NegativeVerdict(f"{alias} has a shadow run already: {running.id} of {running.candidate}")
    rules = rules_of(settings.rollout, wanted or settings.rollout.shadow, is_ramp=is_ramp, is_forced=is_forced)
    registry.take_up(database, candidate, now=clock())
    load_everywhere(served, model, settings.engine.max_lora_rank)
    now = clock()
    run = ShadowRun(
        id=f"sh_{secrets.token_hex(6)}",
        alias=alias,
        champion=route.champion,
        candidate=candidate,
        status=RUNNING,
        reason="",
        rules=rules,
        actor=actor[:MAX_ACTOR_CHARS],
        rollout_id=None,
        created_at=now,
        updated_at=now,
    )
    insert_run(database, run)
    return run


def stop_shadow(database: Database, run: ShadowRun, reason: str, *, actor: str, clock: Clock) -> None:
    """End a run by order of a person; what was paired stays.

    Raises:
        NegativeVerdict: it is over.
    """
    if not end_run(database, run, "stopped", plain(reason), actor=actor[:MAX_ACTOR_CHARS], now=clock()):
        raise NegativeVerdict(f"{run.id} is over")


def shadow_report(database: Database, run: ShadowRun) -> dict[str, Any]:
    """Where a run stands, and every paired difference so far."""
    pairs = read_joined(database, run.id)
    verdict = judge(pairs, run.rules)
    counts = count_answers(database, run.id)
    return {
        "id": run.id,
        "alias": run.alias,
        "champion": run.champion,
        "candidate": run.candidate,
        "status": run.status,
        "reason": run.reason or verdict.reason,
        "verdict": verdict.finding,
        "rollout": run.rollout_id,
        "pairs": len(pairs),
        "unscored": counts["unscored"],
        "errors": {name: n for name, n in sorted(counts.items()) if name not in ("scored", "unscored")},
        "share": run.rules.share,
        "margins": dict(run.rules.margins),
        "differences": [one._asdict() for one in report(pairs)],
        "created_at": run.created_at,
        "updated_at": run.updated_at,
    }
