"""`pawl db` and `pawl pairs`: records and what is mined from them."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer

from pawl.cli import judging
from pawl.cli.context import (
    JsonFlag,
    chosen_alias,
    current_database,
    current_settings,
    print_fields,
    print_rows,
    refuse,
)
from pawl.cli.mining_place import OnOption, mining_place
from pawl.cli.reviewing import review
from pawl.cli.selecting import counts_shown, defence_shown, select_mined, select_stored, select_thumbs, shown
from pawl.clock import now
from pawl.database import open_database, upgrade
from pawl.errors import NegativeVerdict
from pawl.ids import completion_suffix

ModelOption = Annotated[str | None, typer.Option("--model", help="The model alias; needed when there are several.")]

db = typer.Typer(no_args_is_help=True, help="The shared database.")
pairs = typer.Typer(no_args_is_help=True, help="Preference pairs.")


def register(app: typer.Typer) -> None:
    app.add_typer(db, name="db")
    app.add_typer(pairs, name="pairs")
    pairs.add_typer(review, name="review")
    judging.register(pairs)


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
def pairs_mine(model: ModelOption = None, on: OnOption = None, as_json: JsonFlag = False) -> None:
    """Mine pairs from what users said; prints what was found, what may be trained on, and why the rest may not."""
    from feedback.mining import mine_alias
    from feedback.retention import kept_since
    from feedback.similarity.configured import similarity_of

    settings = current_settings()
    alias = chosen_alias(settings, model)
    with current_database(settings, reads_much=True) as database, mining_place(settings, on) as place:
        at = now()
        since = kept_since(settings.retention.pairs_days, at)
        least = settings.feedback.judge.min_margin
        near = similarity_of(settings.feedback.similarity)
        mined = mine_alias(database, alias, at, since=since, min_judged_margin=least, place=place, similarity=near)
        selected = select_mined(database, settings, alias, place=place)
    summary = {
        "pairs": mined.n_pairs,
        "added": mined.n_added,
        "withdrawn": mined.n_withdrawn,
        "unpaired": mined.n_unpaired,
        "by_source": dict(mined.by_source),
        "skipped": dict(mined.skipped),
        "filtered": shown(selected.filtered),
        "defence": defence_shown(selected.defended),
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
def pairs_show(given: Annotated[str, typer.Argument(metavar="ID")], as_json: JsonFlag = False) -> None:
    """One pair with everything behind it and after it; or, by a completion's id, the pairs made of that one.

    Behind it: the interactions, the models and experiments that served them. After it: the runs that trained on it, and
    the models that learned from it, by descent too.
    """
    from feedback.lineage import trace_interaction, trace_pair

    settings = current_settings()
    suffix = completion_suffix(given)
    with current_database(settings) as database:
        runs_dir = settings.retrain.runs_dir
        trace = trace_interaction(database, suffix, runs_dir) if suffix else trace_pair(database, given, runs_dir)
    if trace is None:
        raise NegativeVerdict(f"there is no {'completion' if suffix else 'pair'} {given}")
    print_fields(trace, as_json=as_json)


@pairs.command("export")
def pairs_export(
    out: Annotated[Path, typer.Option("--out", help="The file to write; its manifest lies beside it.")],
    layout: Annotated[str, typer.Option("--format", help="trl, kto, openai, or pawl for whole pairs.")] = "trl",
    model: ModelOption = None,
) -> None:
    """Write the pairs that may be trained on as JSON lines, or as Parquet where the name ends in .parquet."""
    from feedback.export import ExportFormat, read_manifest, write_export
    from feedback.pair_stream import PairsById

    settings = current_settings()
    if layout not in set(ExportFormat):
        raise typer.BadParameter(f"must be one of {', '.join(ExportFormat)}", param_hint="--format")
    with current_database(settings) as database, mining_place(settings) as place:
        alias, is_wanted = chosen_alias(settings, model), layout == ExportFormat.KTO
        selected = select_stored(database, settings, alias)
        found = PairsById(database, selected.defended.accepted)
        singles, left_out = select_thumbs(database, settings, alias, place=place) if is_wanted else ((), {})
        try:
            n_rows = write_export(out, found, singles, layout=ExportFormat(layout))
        except OSError as exc:
            raise refuse(f"cannot write {out}: {exc.strerror}") from exc
    typer.echo(f"{n_rows} rows in {out}")
    unfit = read_manifest(out)["left_out"]
    if unfit:
        typer.echo(f"left out, for no chat template can show them: {counts_shown(unfit)}")
    if left_out:
        typer.echo(f"single thumbs left out: {counts_shown(left_out)}")
