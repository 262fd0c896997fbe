"""`pawl pairs review`: people decide on the pairs that the defence against poisoning holds back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from pawl.cli.context import JsonFlag, current_database, current_settings, operator, print_fields, print_rows
from pawl.clock import now

if TYPE_CHECKING:
    from feedback.poisoning.reviews import Decision, WaitingPair

SHOWN_CHARS = 80
ModelOption = Annotated[str | None, typer.Option("--model", help="Only pairs of this model alias.")]
ReasonOption = Annotated[str | None, typer.Option("--reason", help="Only pairs that are held back for this reason.")]
LimitOption = Annotated[int, typer.Option("--limit", min=1)]
PairIds = Annotated[list[str], typer.Argument(metavar="ID...")]

review = typer.Typer(invoke_without_command=True, help="The queue of pairs in quarantine; without a word, the list.")


@review.callback()
def queue(
    context: typer.Context,
    model: ModelOption = None,
    reason: ReasonOption = None,
    limit: LimitOption = 50,
    as_json: JsonFlag = False,
) -> None:
    """The queue of pairs in quarantine; without a word, the list."""
    if context.invoked_subcommand is None:
        review_list(model, reason, limit, as_json)


@review.command("list")
def review_list(
    model: ModelOption = None, reason: ReasonOption = None, limit: LimitOption = 50, as_json: JsonFlag = False
) -> None:
    """What waits for a decision, the oldest first."""
    from feedback.poisoning.reviews import list_waiting

    with current_database(current_settings()) as database:
        rows = [_shown(waiting) for waiting in list_waiting(database, model, reason, limit)]
    print_rows(rows, as_json=as_json, columns=("id", "reason", "source", "principals", "prompt", "chosen", "rejected"))


@review.command("accept")
def review_accept(pair_ids: PairIds, as_json: JsonFlag = False) -> None:
    """Let pairs in: they are trained on from the next round."""
    from feedback.poisoning.reviews import Decision

    _decide(pair_ids, Decision.ACCEPTED, as_json=as_json)


@review.command("reject")
def review_reject(pair_ids: PairIds, as_json: JsonFlag = False) -> None:
    """Keep pairs out for good."""
    from feedback.poisoning.reviews import Decision

    _decide(pair_ids, Decision.REJECTED, as_json=as_json)


def _decide(pair_ids: list[str], decision: Decision, *, as_json: bool) -> None:
    from feedback.poisoning.reviews import decide

    reviewer = operator()
    with current_database(current_settings()) as database:
        decide(database, pair_ids, decision, reviewer=reviewer, now=now())
    print_fields({"decision": decision.value, "pairs": pair_ids, "reviewer": reviewer}, as_json=as_json)


def _shown(waiting: WaitingPair) -> dict[str, Any]:
    from feedback.poisoning.evidence import text_of

    pair = waiting.pair
    return {
        "id": waiting.id,
        "reason": waiting.reason,
        "source": waiting.source,
        "principals": list(waiting.principals),
        "quarantined_at": waiting.quarantined_at,
        "prompt": _excerpt("\n".join(map(text_of, pair.prompt))),
        "chosen": _excerpt(text_of(pair.chosen)),
        "rejected": _excerpt(text_of(pair.rejected)),
    }


def _excerpt(text: str) -> str:
    """The beginning; all of a pair is in `pawl pairs show`."""
    return text if len(text) <= SHOWN_CHARS else f"{text[: SHOWN_CHARS - 1]}…"
