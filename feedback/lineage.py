"""From a pair back to the interactions, the models and the runs behind it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from feedback.interactions import Interaction
from feedback.store import get_interaction, get_pair
from pawl.database import Database

SHOWN = (
    "completion_id",
    "created_at",
    "model",
    "experiment",
    "assigned_variant",
    "served_variant",
    "probability",
    "finish_reason",
    "completion",
)


def trace_pair(database: Database, pair_id: str) -> dict[str, Any] | None:
    """A pair, the interactions it came from, and the first promoted run that trained on it; None if there is none."""
    found = get_pair(database, pair_id)
    if found is None:
        return None
    pair, first_run = found
    return {
        **asdict(pair),
        "first_run": first_run,
        "chosen_from": _shown(database, pair.chosen_interaction),
        "rejected_from": _shown(database, pair.rejected_interaction),
    }


def _shown(database: Database, interaction_id: str | None) -> dict[str, Any] | None:
    interaction: Interaction | None = get_interaction(database, interaction_id) if interaction_id else None
    return {name: getattr(interaction, name) for name in SHOWN} if interaction else None
