"""`pawl db` and `pawl pairs`: records and what is mined from them."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer

from pawl.cli.context import (
    JsonFlag,
    chosen_alias,
    current_database,
    current_settings,
    print_fields,
    print_rows,
    refuse,
)
from pawl.clock import now
from pawl.database import open_database, upgrade
from pawl.errors import NegativeVerdict

ModelOption = Annotated[str | None, typer.Option("--model", help="The model alias; needed when there are several.")]

db = typer.Typer(no_args_is_help=True, help="The shared database.")
pairs = typer.Typer(no_args_is_help=True, help="Preference pairs.")


def register(app: typer.Typer) -> None:
    app.add_typer(db, name="db")
    app.add_typer(pairs, name="pairs")


@db.command("upgrade")
def db_upgrade() -> None:
    """Bring the schema to this version's. Safe to run twice, and from several processes at once."""
    with closing(open_database(current_settings().database)) as database:
        typer.echo(f"schema at {upgrade(database)}")


@db.command("check")
def db_check(as_json: JsonFlag = False) -> None:
    """Whether the database answers and its schema is this version's."""
    with current_database(current_settings()) as database:
        url = database.engine.url.render_as_string(hide_password=True)
    print_fields({"database": url, "schema": "current"}, as_json=as_json)


@pairs.command("mine")
def pairs_mine(model: ModelOption = None, as_json: JsonFlag = False) -> None:
    """Mine pairs from what users said; prints what was found, and every group that gave none by reason."""
    from feedback.mining import mine_alias

    settings = current_settings()
    with current_database(settings) as database:
        mined = mine_alias(database, chosen_alias(settings, model), now())
    summary = {
        "pairs": mined.n_pairs,
        "added": mined.n_added,
        "withdrawn": mined.n_withdrawn,
        "unpaired": mined.n_unpaired,
        "by_source": dict(mined.by_source),
        "skipped": dict(mined.skipped),
    }
    print_fields(summary, as_json=as_json)


@pairs.command("list")
def pairs_list(
    model: ModelOption = None,
    limit: Annotated[int, typer.Option("--limit", min=1)] = 50,
    as_json: JsonFlag = False,
) -> None:
    """The newest pairs."""
    from feedback.store import list_pairs

    with current_database(current_settings()) as database:
        rows = [listing._asdict() for listing in list_pairs(database, model, limit)]
    print_rows(rows, as_json=as_json, columns=("id", "source", "margin", "n_voters", "first_run"))


@pairs.command("show")
def pairs_show(pair_id: Annotated[str, typer.Argument(metavar="ID")], as_json: JsonFlag = False) -> None:
    """One pair with everything behind it: the interactions, who served them, and the runs that learned from it."""
    from feedback.lineage import trace_pair

    with current_database(current_settings()) as database:
        trace = trace_pair(database, pair_id)
    if trace is None:
        raise NegativeVerdict(f"there is no pair {pair_id}")
    print_fields(trace, as_json=as_json)


@pairs.command("export")
def pairs_export(
    out: Annotated[Path, typer.Option("--out", help="The file to write.")],
    layout: Annotated[str, typer.Option("--format", help="trl, kto or openai.")] = "trl",
    model: ModelOption = None,
) -> None:
    """Write all pairs as JSON lines."""
    from feedback.export import ExportFormat, write_export
    from feedback.mining import unpaired_examples
    from feedback.store import load_pairs

    settings = current_settings()
    if layout not in set(ExportFormat):
        raise typer.BadParameter(f"must be one of {', '.join(ExportFormat)}", param_hint="--format")
    with current_database(settings) as database:
        alias = chosen_alias(settings, model)
        found = load_pairs(database, alias)
        unpaired = unpaired_examples(database, alias) if layout == ExportFormat.KTO else ()
    try:
        n_rows = write_export(out, found, unpaired, layout=ExportFormat(layout))
    except OSError as exc:
        raise refuse(f"cannot write {out}: {exc.strerror}") from exc
    typer.echo(f"{n_rows} rows in {out}")
