"""From a pair back to what was served."""

from __future__ import annotations

import json

from feedback.lineage import trace_pair
from feedback.mining import mine_alias
from feedback.store import load_pairs, mark_pairs_used
from pawl.database import Database
from tests.pawl.records import feedback, interaction_id, save, served, thumb


def test_a_pair_leads_to_the_answers_their_models_and_the_run(database: Database) -> None:
    canary = {"experiment": "ro_1", "assigned_variant": "treatment", "served_variant": "treatment"}
    liked = served(1, model="base-model--r0001-1a2b3c4d", probability=0.25, **canary)
    save(database, [liked, served(2)], [thumb(1, "up"), thumb(2, "down")])
    mine_alias(database, "assistant", 100.0)
    (pair,) = load_pairs(database, "assistant")
    mark_pairs_used(database, [pair.id], "r0002")
    trace = trace_pair(database, pair.id)
    assert trace is not None
    assert trace["first_run"] == "r0002"
    assert trace["chosen_from"]["model"] == "base-model--r0001-1a2b3c4d"
    assert trace["chosen_from"]["experiment"] == "ro_1"
    assert trace["rejected_from"]["completion_id"] == f"chatcmpl-{interaction_id(2)}"
    assert trace["models"] == ("base-model", "base-model--r0001-1a2b3c4d")
    assert json.loads(json.dumps(trace))["margin"] == 1.0


def test_nobody_served_an_edit(database: Database) -> None:
    edit = feedback(interaction_id(1), "edit", "a better answer", created_at=1.5)
    save(database, [served(1)], [edit])
    mine_alias(database, "assistant", 100.0)
    (pair,) = load_pairs(database, "assistant")
    trace = trace_pair(database, pair.id)
    assert trace is not None
    assert trace["chosen"]["content"] == "a better answer"
    assert trace["chosen_from"] is None
    assert trace["rejected_from"]["completion"]["content"] == "answer 1"


def test_an_unknown_pair_leads_nowhere(database: Database) -> None:
    assert trace_pair(database, "0" * 32) is None
