"""What a tick sees of a rollout: only what is new since the last one, whatever lies in the database by now."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import NamedTuple

from ab_testing.assignment import treatment_probability
from ab_testing.canary import Health
from ab_testing.canary_state import CanaryConfig, PhaseCount, UserEvent
from ab_testing.experiment import CONTROL, TREATMENT
from ab_testing.outcomes import COMPLIES, HARMFUL_COMPLIANCE, HARMS, TOXICITY, Matured, matured_users
from ab_testing.replay import Inputs
from ab_testing.rollout_store import Reading, Rollout
from ab_testing.watch import SCORE_PATIENCE_S, Watch, Window, due_windows
from feedback.experiment_users import (
    PAGE_USERS,
    Failures,
    First,
    Harm,
    count_failures,
    count_served,
    count_users,
    exposures_of,
    firsts_of,
    harms_of,
    harms_since,
    has_unscored,
    newest_request,
    newest_score,
    pages_of_users,
    toxic_shares,
)
from pawl.database import Database

HEALTH_WINDOW_S = 60.0
NO_DATA_S = 3600.0
"""After so long without a request of an analysed user nothing is known any more."""
CLOCKS_APART_S = 60.0
"""Requests from further in the future than this mean that somebody's clock is wrong."""
MOST_PAGES = 5
"""Of users in one tick. After an outage of the scorer days of them may be due; the next tick goes on where this one
has stopped. What a decision was made from is kept with it: thousands of users are half a megabyte already."""
OVERLAP_S = 60.0
"""Scores written this much later than their time says are still found, as of scorers whose clocks are apart."""
ROUNDING_S = 1e-3


class Sighting(NamedTuple):
    """What a tick saw, and how far it has read."""

    inputs: Inputs
    cursor: tuple[float, str] | None
    reading: Reading


def look(database: Database, rollout: Rollout, now: float) -> Sighting:
    """Everything new about a running rollout."""
    newest = newest_request(database, rollout.id)
    matured = new_users(database, rollout, now)
    assigned, assigned_until = _new_assignments(database, rollout, newest, now)
    events, reading = _new_events(database, rollout, now)
    health = _health(database, rollout, _missing(database, rollout, newest, matured, now), now)
    return Sighting(
        Inputs(health, matured.outcomes, events, assigned),
        matured.cursor,
        Reading(assigned_until, reading.scored_until, reading.seen),
    )


def new_users(
    database: Database, rollout: Rollout, now: float, page_users: int = PAGE_USERS, most_pages: int = MOST_PAGES
) -> Matured:
    """The users who count now: what `matured_users` finds in all records, of the few that it could find it in.

    No more of them than fill so many pages; who is left is found by the next call, from the cursor on.
    """
    matured = Matured((), rollout.cursor, None)
    horizon = now - rollout.maturity_s + ROUNDING_S  # `matured_users` draws the line itself, to the bit.
    since = rollout.cursor[0] if rollout.cursor else None
    pages = pages_of_users(database, rollout.id, since=since, until=horizon, n_users=page_users)
    for page in islice(pages, most_pages):
        found = _matured(database, rollout, page, matured.cursor, now)
        matured = found._replace(outcomes=matured.outcomes + found.outcomes)
        if found.is_waiting_for_scores:
            break
    return matured


def _matured(
    database: Database, rollout: Rollout, page: Sequence[First], cursor: tuple[float, str] | None, now: float
) -> Matured:
    units = [first.unit_id for first in page if cursor is None or (first.created_at, first.unit_id) > cursor]
    until = page[-1].created_at + rollout.maturity_s + ROUNDING_S
    rows = exposures_of(database, rollout.id, units, page[0].created_at, until)
    return matured_users(
        rows,
        dict.fromkeys(units, True),
        rollout.config.metrics,
        cursor=cursor,
        maturity_s=rollout.maturity_s,
        now=now,
    )


def _new_assignments(
    database: Database, rollout: Rollout, newest: float | None, now: float
) -> tuple[tuple[PhaseCount, ...], float | None]:
    """Users whose time has come, whether or not their answers could be judged.

    Not sooner: a slow answer is recorded late, and whoever counted at once would miss the slower variant's users. And
    not beyond the newest request, so that a clock that jumps ahead skips nobody.
    """
    before = rollout.reading.assigned_until
    after = -math.inf if before is None else before
    until = -math.inf if newest is None else min(now - rollout.maturity_s, newest)
    if not until > after:
        return (), before
    counts = count_users(database, rollout.id, after, until)
    return tuple(_phase_counts(rollout.config, counts)), until


def _phase_counts(config: CanaryConfig, counts: Mapping[tuple[int, str], int]) -> Iterator[PhaseCount]:
    for phase in sorted({phase for phase, _ in counts}):
        likely = treatment_probability(config.steps[phase])
        yield PhaseCount(phase, likely, counts.get((phase, CONTROL), 0), counts.get((phase, TREATMENT), 0))


def _new_events(database: Database, rollout: Rollout, now: float) -> tuple[tuple[UserEvent, ...], Reading]:
    """Each user's first harmful answers, as soon as they are scored."""
    counting = {metric.name for metric in rollout.config.metrics if metric.counts_events}
    before = rollout.reading
    newest = newest_score(database) if counting else None
    if newest is None:
        return (), before
    start = rollout.created_at if before.scored_until is None else before.scored_until
    harms = harms_since(database, rollout.id, start - OVERLAP_S, COMPLIES)
    told = set(before.seen)
    fresh = [harm for harm in harms if harm.interaction_id not in told]
    # By the scores' own time, so that a clock of this process that jumps ahead skips none.
    scored_until = max(start, min(now, newest))
    seen = tuple(harm.interaction_id for harm in harms if harm.scored_at > scored_until - OVERLAP_S)
    reading = Reading(before.assigned_until, scored_until, seen)
    if not fresh:
        return (), reading
    units = sorted({harm.unit_id for harm in fresh})
    earlier = harms_of(database, rollout.id, units, start - OVERLAP_S, COMPLIES)
    counted = [*earlier, *(harm for harm in harms if harm.interaction_id in told)]
    firsts = _uncounted(firsts_of(database, rollout.id, units), rollout.cursor)
    events = first_events(fresh, counted, firsts, rollout.config, counting, rollout.maturity_s)
    return tuple(events), reading


def _uncounted(firsts: Mapping[str, First], cursor: tuple[float, str] | None) -> Mapping[str, First]:
    """Whoever's outcome has counted has shown which side they are on: an event told of later is no fair bet."""
    return {unit: first for unit, first in firsts.items() if cursor is None or (first.created_at, unit) > cursor}


def first_events(
    fresh: Iterable[Harm],
    counted: Iterable[Harm],
    firsts: Mapping[str, First],
    config: CanaryConfig,
    counting: Iterable[str],
    maturity_s: float,
) -> Iterator[UserEvent]:
    """The first event of each user in each metric, of those answers that the user's outcome is made of too.

    Args:
        fresh: What has just been found harmful, in order.
        counted: What had been before, to the same users.
        firsts: Where those of these users came from who are analysed and whose outcome has not counted yet.
        counting: Names of the metrics that count events.
        maturity_s: A user's outcome is what happened within this time of the first exposure.
    """
    ends = {unit: first.created_at + maturity_s for unit, first in firsts.items()}
    done = {(metric, harm.unit_id) for harm in counted if _is_in_time(harm, ends) for metric in metrics_of(harm)}
    for harm in fresh:
        if not _is_in_time(harm, ends):
            continue
        first = firsts[harm.unit_id]
        for metric in metrics_of(harm):
            if metric in counting and (metric, harm.unit_id) not in done:
                done.add((metric, harm.unit_id))
                likely = treatment_probability(config.steps[first.phase])
                yield UserEvent(metric, harm.unit_id, first.assigned_variant == TREATMENT, likely, first.phase)


def _is_in_time(harm: Harm, ends: Mapping[str, float]) -> bool:
    """Not of a user whom a later step moved into a zone, who was not randomised and has no such time."""
    return harm.asked_at <= ends.get(harm.unit_id, -math.inf)


def metrics_of(harm: Harm) -> tuple[str, ...]:
    """What an answer did harm in."""
    is_compliance = harm.is_harmful_prompt and harm.response in COMPLIES
    return (TOXICITY,) * harm.is_toxic + (HARMFUL_COMPLIANCE,) * is_compliance


def _health(database: Database, rollout: Rollout, missing: tuple[str, ...], now: float) -> Health:
    """Hard failures of the last minute in both variants."""
    failures = count_failures(database, rollout.id, now - HEALTH_WINDOW_S)
    canary, control = failures.get(TREATMENT, Failures()), failures.get(CONTROL, Failures())
    return Health(
        canary_requests=canary.requests,
        canary_errors=canary.failures,
        control_requests=control.requests,
        control_errors=control.failures,
        missing=missing,
    )


def _missing(
    database: Database, rollout: Rollout, newest: float | None, matured: Matured, now: float
) -> tuple[str, ...]:
    """Metrics that nobody measures: all while nobody comes or the clocks disagree, the scored ones without a scorer."""
    names = [metric.name for metric in rollout.config.metrics]
    silence = now - max(rollout.created_at, newest or -math.inf)
    if not -CLOCKS_APART_S <= silence < NO_DATA_S:
        return tuple(names)
    if matured.waiting_since is None:
        return ()
    late = now - rollout.maturity_s - SCORE_PATIENCE_S
    is_late = has_unscored(database, rollout.id, matured.waiting_since, late)
    return tuple(name for name in names if HARMS[name].needs_scores) if is_late else ()


def look_after(database: Database, rollout: Rollout, watch: Watch, now: float) -> Inputs:
    """Everything new about a promoted candidate that is watched."""
    served = count_served(database, rollout.alias, rollout.candidate, now - HEALTH_WINDOW_S)
    windows = [
        Window(until, tuple(sorted(toxic_shares(database, rollout.alias, rollout.candidate, after, until))))
        for after, until in due_windows(watch, now)
    ]
    health = Health(canary_requests=served.requests, canary_errors=served.failures)
    return Inputs(health, windows=tuple(windows))
