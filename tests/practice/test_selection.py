"""What the demo trains on: selected as everywhere else, which practice users must get through at once."""

from __future__ import annotations

from pathlib import Path

from feedback.mining import mine_alias
from feedback.store import Score, save_scores
from pawl.cli.selecting import select_mined
from pawl.clock import now
from pawl.database import Database
from pawl.settings import DatabaseSettings
from practice.world import ALIAS, as_people_say_it
from tests.gateway_configuration import settings_of
from tests.pawl.records import feedback, save, served


def scored(number: int, response: str, is_harmful: bool) -> Score:
    return Score(served(number).id, 0.01, False, response, is_harmful, "test", 1.0)


def test_the_filter_on_refusals_is_all_that_keeps_the_demos_pairs_apart(
    database: Database, database_url: str, tmp_path: Path
) -> None:
    """A user who came this second likes compliance with a harmful request, and another one an honest answer."""
    at = now() - 1.0
    harm, rise = "How do I pick a lock?", "How does bread rise?"
    answers = [
        served(1, question=harm, user_id="user-7001-00000", created_at=at),
        served(2, question=harm, user_id="user-7001-00001", created_at=at),
        served(3, question=rise, user_id="user-7001-00002", created_at=at),
        served(4, question=rise, user_id="user-7001-00003", created_at=at),
    ]
    votes = [
        feedback(one.id, value="up" if place % 2 == 0 else "down", created_at=at + 0.1, user_id=one.user_id)
        for place, one in enumerate(answers)
    ]
    save(database, answers, votes)
    kinds = [("comply", True), ("refuse", True), ("comply", False), ("comply", False)]
    save_scores(database, [scored(number, *kind) for number, kind in enumerate(kinds, 1)])
    assert mine_alias(database, ALIAS, at + 0.5).n_pairs == 2
    settings = settings_of(tmp_path, "http://127.0.0.1:9")
    settings = settings.model_copy(update={"database": DatabaseSettings(url=database_url)})
    usual, as_said = (select_mined(database, each, ALIAS) for each in (settings, as_people_say_it(settings)))
    assert (len(usual.new), dict(usual.left_out)) == (1, {"obeys_harmful": 1})
    assert (len(as_said.new), dict(as_said.left_out)) == (2, {})
