"""`pawl pairs judge`: a model compares answers of which people have said too little."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pawl import leases
from pawl.cli.context import JsonFlag, chosen_alias, current_database, current_settings, print_fields
from pawl.clock import now
from pawl.database import Database
from pawl.errors import PawlError
from pawl.settings import Settings

if TYPE_CHECKING:
    from feedback.judged.judging_run import Bench, Session
    from feedback.judged.siblings import Siblings
    from feedback.judged.waiting import Limits

ModelOption = Annotated[str | None, typer.Option("--model", help="The model alias; needed when there are several.")]
LimitOption = Annotated[
    int | None, typer.Option("--limit", min=1, help="Pairs to judge; else feedback.judge.pairs_per_run.")
]
DryRunFlag = Annotated[bool, typer.Option("--dry-run", help="Count what would be sent, and send nothing.")]
AgainFlag = Annotated[
    bool, typer.Option("--again", help="Also what another judge, or the same by another constitution, has judged.")
]


def register(pairs: typer.Typer) -> None:
    pairs.command("judge")(pairs_judge)


def pairs_judge(
    model: ModelOption = None,
    limit: LimitOption = None,
    dry_run: DryRunFlag = False,
    again: AgainFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Have the judge of feedback.judge compare answers to the same conversation; the next mining makes pairs of it."""
    from feedback.judged.waiting import waiting

    settings = current_settings()
    alias = chosen_alias(settings, model)
    bench, limits = bench_of(settings), limits_of(settings)
    only = bench.judging if again else None
    left_out: Counter[str] = Counter()
    problem: PawlError | None = None
    with closing(bench.judge), current_database(settings) as database:
        found = islice(waiting(database, alias, limits, only, left_out), limit or settings.feedback.judge.pairs_per_run)
        if dry_run:
            n_pairs = sum(1 for _ in found)
            told: dict[str, Any] = {"would_judge": n_pairs, "requests": 2 * n_pairs}
        else:
            session = _judge(database, settings, alias, bench, found)
            told = {"judged": session.outcomes.total(), "outcomes": dict(sorted(session.outcomes.items()))}
            problem = session.problem
    print_fields(_shown(alias, bench, left_out) | told, as_json=as_json)
    if problem is not None:
        raise problem


def _judge(database: Database, settings: Settings, alias: str, bench: Bench, found: Iterator[Siblings]) -> Session:
    """With a lease, so that two commands at once do not both pay for the same answers."""
    from feedback.judged.judging_run import judge_all

    lease, ttl_s = f"judge/{alias}", settings.worker.lease_s
    with leases.held(database, lease, leases.this_process(), ttl_s=ttl_s, clock=now):
        return judge_all(database, alias, bench, found, now)


def bench_of(settings: Settings) -> Bench:
    """The judge that is configured, with its constitution.

    Raises:
        ConfigurationError: none is, or one of them cannot be used.
    """
    from feedback.judged.constitution import load_constitution
    from feedback.judged.judge import judge_of
    from feedback.judged.judging_run import Bench

    wanted = settings.feedback.judge
    return Bench(judge_of(wanted), load_constitution(wanted.constitution), wanted.response_format, wanted.concurrency)


def limits_of(settings: Settings) -> Limits:
    """How much may be judged.

    Raises:
        ConfigurationError: the list of those who opted out cannot be read.
    """
    from feedback.filters.stored import opted_out
    from feedback.judged.siblings import Rules
    from feedback.judged.waiting import Limits
    from feedback.retention import kept_since

    feedback, judge = settings.feedback, settings.feedback.judge
    return Limits(
        Rules(judge.pairs_per_conversation, judge.max_chars, opted_out(feedback.filters)),
        judge.pairs_per_principal,
        frozenset(feedback.defence.trusted),
        kept_since(settings.retention.pairs_days, now()),
    )


def _shown(alias: str, bench: Bench, left_out: Counter[str]) -> dict[str, Any]:
    return {
        "alias": alias,
        "judge": bench.judge.model,
        "constitution": {"version": bench.constitution.version, "sha256": bench.constitution.sha256},
        "answers_left_out": dict(sorted(left_out.items())),
    }
