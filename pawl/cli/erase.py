"""`pawl erase`: forget a person, everywhere, and say what had been learned from them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pawl.cli.context import JsonFlag, current_database, current_settings, operator, print_fields, refuse
from pawl.errors import NegativeVerdict

MAX_REASON_CHARS = 500


def register(app: typer.Typer) -> None:
    app.command()(erase)


def erase(
    user: Annotated[str | None, typer.Option("--user", help="As the requests named them.")] = None,
    key: Annotated[str | None, typer.Option("--key", help="Only under this API key, by its public id.")] = None,
    completion: Annotated[str | None, typer.Option("--completion", help="One completion instead, by its id.")] = None,
    reason: Annotated[str, typer.Option("--reason", help="Kept with the tombstone; a ticket, not a name.")] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be found.")] = False,
    rewrite: Annotated[
        bool, typer.Option("--rewrite/--no-rewrite", help="Leave no byte in the database's files; locks its tables.")
    ] = True,
    wait: Annotated[
        float, typer.Option("--wait", help="Seconds to wait for every gateway to confirm.", min=0.0)
    ] = 30.0,
    reapply: Annotated[
        Path | None, typer.Option("--reapply", help="Instead, do again what this file of tombstones says.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Remove what a person sent up to now: texts, feedback, pairs, records on their way, rows of training sets.

    What stays is who answered when and how fast, as if to nobody, and a tombstone that names nobody, so that neither an
    old spool nor a restored backup brings anything back. Models that learned from it are listed, and marked.
    """
    from pawl.cli.erasing import erase_now, eraser_of, foreseen, reapply_file, subject_from

    settings = current_settings()
    subject = None if reapply else subject_from(user, key, completion)
    if len(reason) > MAX_REASON_CHARS:
        raise refuse(f"--reason: at most {MAX_REASON_CHARS} characters")
    with current_database(settings) as database:
        eraser = eraser_of(settings, database, actor=operator())
        if subject is None:
            shown = reapply_file(eraser, reapply or Path())
        elif dry_run:
            shown = foreseen(eraser, subject)
        else:
            shown = erase_now(settings, eraser, eraser.tombstone(subject, reason), subject, rewrite, wait)
    print_fields(shown, as_json=as_json)
    if late := shown.get("unconfirmed"):
        raise NegativeVerdict(f"not confirmed within {wait:g} s: {', '.join(late)}")
