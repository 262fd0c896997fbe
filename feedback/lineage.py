"""From a pair back to the interactions, models and experiments behind it, and on to the models that learned from it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from feedback.interactions import Interaction
from feedback.judged.verdict_store import show_verdict
from feedback.store import get_interaction, get_pair
from pawl import registry
from pawl.database import Database
from pawl.schema import models, pairs, rollouts, runs

SHOWN = (
    "completion_id",
    "created_at",
    "alias",
    "model",
    "experiment",
    "assigned_variant",
    "served_variant",
    "probability",
    "phase",
    "route_version",
    "finish_reason",
    "completion",
)


def trace_pair(database: Database, pair_id: str, runs_dir: Path | None = None) -> dict[str, Any] | None:
    """A pair, what it came from, and the runs and models that learned from it; None if there is none.

    What it came from includes what a judge said of the two answers, with scores, if one was asked.

    Args:
        runs_dir: Where runs keep their files: these also know pairs that a run met in earlier rounds.
    """
    found = get_pair(database, pair_id)
    if found is None:
        return None
    pair, first_run = found
    return {
        **asdict(pair),
        "first_run": first_run,
        "chosen_from": _shown(database, pair.chosen_interaction),
        "rejected_from": _shown(database, pair.rejected_interaction),
        "verdict": show_verdict(database, pair.chosen_interaction, pair.rejected_interaction),
        "runs": _runs_of(database, pair_id, first_run, runs_dir),
    }


def trace_interaction(database: Database, interaction_id: str, runs_dir: Path | None = None) -> dict[str, Any] | None:
    """An interaction, the pairs that were made of it, and the runs and models that learned from those."""
    shown = _shown(database, interaction_id)
    if shown is None:
        return None
    p = pairs.c
    sides = sa.or_(p.chosen_interaction == interaction_id, p.rejected_interaction == interaction_id)
    query = sa.select(p.id, p.source, p.margin, p.chosen_interaction, p.first_run).where(sides).order_by(p.id)
    with database.read() as connection:
        found = connection.execute(query).all()
    made = [
        {
            "id": row.id,
            "source": row.source,
            "margin": row.margin,
            "side": "chosen" if row.chosen_interaction == interaction_id else "rejected",
            "runs": _runs_of(database, row.id, row.first_run, runs_dir),
        }
        for row in found
    ]
    return {**shown, "pairs": made}


def _shown(database: Database, interaction_id: str | None) -> dict[str, Any] | None:
    interaction: Interaction | None = get_interaction(database, interaction_id) if interaction_id else None
    if interaction is None:
        return None
    return {name: getattr(interaction, name) for name in SHOWN} | _served_by(database, interaction)


def _served_by(database: Database, interaction: Interaction) -> dict[str, Any]:
    """The frozen configuration of the experiment, and what made the model; None where it is not known."""
    experiment = database.first_row(sa.select(rollouts.c.config_hash).where(rollouts.c.id == interaction.experiment))
    m = models.c
    made = database.first_row(sa.select(m.run_id, m.dataset_sha, m.parent).where(m.name == interaction.model))
    return {
        "config_hash": experiment["config_hash"] if experiment else None,
        "model_run": made["run_id"] if made else None,
        "model_dataset": made["dataset_sha"] if made else None,
        "model_parent": made["parent"] if made else None,
    }


def _runs_of(database: Database, pair_id: str, first_run: str | None, runs_dir: Path | None) -> list[dict[str, Any]]:
    """The runs that trained on a pair, each with its models and all that descend from them."""
    with database.read() as connection:
        known = {row.id: row for row in connection.execute(sa.select(runs.c.id, runs.c.status, runs.c.detail))}
        trained = {run for run, row in known.items() if pair_id in (json.loads(row.detail).get("new_pair_ids") or ())}
        trained |= {first_run} if first_run else set()
        trained |= _runs_with(pair_id, runs_dir) if runs_dir else set()
        return [
            {
                "run": run,
                "status": known[run].status if run in known else None,
                "is_first_promoted": run == first_run,
                "models": _models_after(connection, run),
            }
            for run in sorted(trained)
        ]


def _models_after(connection: sa.Connection, run: str) -> list[dict[str, Any]]:
    after = registry.models_after(connection, run)
    states: Mapping[str, str] = {
        row.name: row.state
        for row in connection.execute(sa.select(models.c.name, models.c.state).where(models.c.name.in_(list(after))))
    }
    return [{"name": name, "state": states[name], "through": through} for name, through in sorted(after.items())]


def _runs_with(pair_id: str, runs_dir: Path) -> set[str]:
    manifests = runs_dir.glob("*/build/manifest.json")
    return {path.parents[1].name for path in manifests if pair_id in json.loads(path.read_text()).get("pair_ids", ())}
