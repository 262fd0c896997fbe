"""The filters on stored pairs: what the database knows of them counts, and so does what was said since."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from feedback.filters.reasons import Reason
from feedback.filters.stored import Judges, filter_stored, served_answers
from feedback.interactions import Status
from feedback.store import Score, save_scores
from monitoring.refusal import classify_response
from pawl.database import Database
from pawl.errors import ConfigurationError
from pawl.settings import FilterSettings
from tests.feedback.filters.pairs import assistant, make_pair
from tests.pawl.records import interaction_id, save, served

A, B, C = (interaction_id(number) for number in (1, 2, 3))
PAIR = make_pair(1, chosen_interaction=A, rejected_interaction=B, principals=())
EDIT = make_pair(2, "You fool.", chosen_interaction=None, rejected_interaction=B, principals=())


def score(about: str, toxicity: float) -> Score:
    return Score(about, toxicity, toxicity >= 0.5, "comply", False, "test", 1.0)


def test_what_is_known_of_the_answers_is_read(database: Database) -> None:
    save(
        database,
        [served(1, key_id="k", user_id="ann"), served(2, is_complete=False), served(3, status=Status.SHUTDOWN)],
    )
    save_scores(database, [score(A, 0.25)])
    found = served_answers(database, [PAIR, make_pair(3, chosen_interaction=C, rejected_interaction="unknown")])
    assert found.keys() == {A, B, C}
    assert found[A].owner == "k/ann"
    assert (found[A].toxicity, found[A].response, found[A].is_harmful_prompt) == (0.25, "comply", False)
    assert (found[B].toxicity, found[B].response, found[B].is_harmful_prompt) == (None, None, None)
    assert [found[each].is_complete for each in (A, B, C)] == [True, False, False]


def test_each_source_of_evidence_counts(database: Database) -> None:
    save(database, [served(1), served(2)])
    assert filter_stored(database, [PAIR, EDIT], FilterSettings(), Judges()).kept == (PAIR, EDIT)
    scorer = Judges(score_toxicity=lambda texts: [0.9 if "fool" in text else 0.0 for text in texts])
    assert filter_stored(database, [PAIR, EDIT], FilterSettings(), scorer).dropped == {Reason.TOXIC_CHOSEN: 1}
    save_scores(database, [score(A, 0.9)])
    assert filter_stored(database, [PAIR, EDIT], FilterSettings(), scorer).dropped == {Reason.TOXIC_CHOSEN: 2}
    judges = Judges(classify_response, lambda _: False)
    refusing = make_pair(3, "I'm sorry, but I can't help with that.", chosen_interaction=None, rejected_interaction=A)
    assert filter_stored(database, [refusing], FilterSettings(), judges).dropped == {Reason.REFUSES_BENIGN: 1}


def test_who_opts_out_is_not_learned_from_any_more(database: Database, tmp_path: Path) -> None:
    save(database, [served(1, key_id="k", user_id="ann"), served(2, key_id="k", user_id="bob")])
    pairs = [PAIR, make_pair(4, rejected_interaction=B, chosen_interaction=None)]
    assert filter_stored(database, pairs, FilterSettings(opted_out=["ann"]), Judges()).kept == (pairs[1],)
    names = tmp_path / "opted-out"
    names.write_text("\n k/bob \n")
    settings = FilterSettings(opted_out_file=names)
    assert filter_stored(database, pairs, settings, Judges()).dropped == {Reason.OPTED_OUT: 2}


def test_nobody_is_trained_on_while_the_list_cannot_be_read(database: Database, tmp_path: Path) -> None:
    settings = FilterSettings(opted_out_file=tmp_path / "missing")
    with pytest.raises(ConfigurationError, match="opted_out_file"):
        filter_stored(database, [PAIR], settings, Judges())


def test_who_calls_a_tool_has_not_refused(database: Database) -> None:
    calling = assistant("I can't help with that.", tool_calls=[{"function": {"name": "look", "arguments": "{}"}}])
    judges = Judges(classify_response, lambda _: False)
    for chosen, dropped in ((calling, {}), (assistant(calling["content"]), {Reason.REFUSES_BENIGN: 1})):
        pair = dataclasses.replace(EDIT, chosen=chosen, rejected=assistant("Water them."))
        assert filter_stored(database, [pair], FilterSettings(), judges).dropped == dropped
