"""The scoring duty: every kept answer once, under the labels of what served it, and nothing invented."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import sqlalchemy as sa

from feedback.interactions import Status
from monitoring.errors import ScoringFailed
from monitoring.harm import default_lexicon
from monitoring.metrics import REGISTRY
from monitoring.scoring import ScoringDuty, last_question, was_withheld
from pawl.database import Database
from pawl.schema import scores
from tests.pawl.records import interaction_id, save, served

HARMFUL = "How do I poison my neighbour's dog?"
REFUSAL = "I'm sorry, but I can't help with that."


class Scorer:
    """Finds toxic what says so, and remembers what it was shown."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def __call__(self, texts: Sequence[str]) -> list[float]:
        self.seen += texts
        return [0.9 if "toxic" in text else 0.1 for text in texts]


def duty(database: Database, scorer: Scorer, batch_size: int = 2) -> ScoringDuty:
    return ScoringDuty(
        database,
        scorer,
        default_lexicon(),
        threshold=0.5,
        batch_size=batch_size,
        scorer_name="stand-in",
        clock=lambda: 77.0,
    )


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def stored(database: Database) -> dict[str, sa.Row[tuple[object, ...]]]:
    with database.read() as connection:
        return {row.interaction_id: row for row in connection.execute(sa.select(scores))}


def counted(name: str, variant: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, {"model": "assistant", "variant": variant, **labels}) or 0.0


def test_each_kept_answer_is_scored_once(database: Database) -> None:
    save(database, [served(number, completion=said(f"answer {number}")) for number in range(5)])
    scorer = Scorer()
    scoring = duty(database, scorer)
    assert [scoring.run_once() for _ in range(4)] == [2, 2, 1, 0]
    assert scorer.seen == [f"answer {number}" for number in range(5)]
    assert set(stored(database)) == {interaction_id(number) for number in range(5)}
    save(database, [served(5)])
    assert [duty(database, scorer).run_once() for _ in range(2)] == [1, 0]


def test_two_workers_that_read_the_same_batch_count_it_once(database: Database) -> None:
    save(database, [served(number) for number in range(4)])
    before = counted("pawl_scored_responses_total", "control")

    def slow(texts: Sequence[str]) -> list[float]:
        """While this worker scores four answers, another stores and counts two of them."""
        assert duty(database, Scorer(), batch_size=2).run_once() == 2
        return [0.1 for _ in texts]

    scoring = ScoringDuty(
        database, slow, default_lexicon(), threshold=0.5, batch_size=9, scorer_name="slow", clock=lambda: 88.0
    )
    assert scoring.run_once() == 4
    assert sorted(row.scored_at for row in stored(database).values()) == [77.0, 77.0, 88.0, 88.0]
    assert counted("pawl_scored_responses_total", "control") - before == 4


def test_what_it_says_of_an_answer(database: Database) -> None:
    save(
        database,
        [
            served(1, completion=said("a toxic remark")),
            served(2, question=HARMFUL, completion=said(REFUSAL)),
            served(3, completion=said(REFUSAL)),
        ],
    )
    duty(database, Scorer(), batch_size=10).run_once()
    found = stored(database)
    told = {number: found[interaction_id(number)] for number in (1, 2, 3)}
    assert [bool(told[number].is_toxic) for number in (1, 2, 3)] == [True, False, False]
    assert [bool(told[number].is_harmful_prompt) for number in (1, 2, 3)] == [False, True, False]
    assert [told[number].response for number in (2, 3)] == ["refuse", "refuse"]
    assert told[1].scorer.startswith("stand-in+refusal-")
    assert told[1].scored_at == 77.0


def test_it_counts_under_the_variant_that_served(database: Database) -> None:
    names = ("pawl_scored_responses_total", "pawl_toxic_responses_total")
    before = {(name, variant): counted(name, variant) for name in names for variant in ("control", "treatment")}
    harmful = counted("pawl_refusals_total", "treatment", kind="harmful")
    benign = counted("pawl_refusals_total", "treatment", kind="benign")
    asked = counted("pawl_harmful_requests_total", "treatment"), counted("pawl_benign_requests_total", "treatment")
    # Assigned to the treatment but served by the control: the answer is the control's.
    save(database, [served(1, assigned_variant="treatment", completion=said("a toxic remark"))])
    save(database, [served(2, served_variant="treatment", question=HARMFUL, completion=said(REFUSAL))])
    save(database, [served(3, served_variant="treatment", completion=said(REFUSAL))])
    duty(database, Scorer(), batch_size=10).run_once()
    grown = {key: counted(*key) - value for key, value in before.items()}
    assert grown == {(names[0], "control"): 1, (names[0], "treatment"): 2, (names[1], "control"): 1} | {
        (names[1], "treatment"): 0
    }
    assert counted("pawl_refusals_total", "treatment", kind="harmful") - harmful == 1
    assert counted("pawl_refusals_total", "treatment", kind="benign") - benign == 1
    assert counted("pawl_harmful_requests_total", "treatment") - asked[0] == 1
    assert counted("pawl_benign_requests_total", "treatment") - asked[1] == 1


def test_there_is_nothing_to_score_in_what_was_not_kept(database: Database) -> None:
    save(
        database,
        [
            served(1, is_stored=False, prompt=None, completion=None),
            served(2, completion=None, status=Status.UPSTREAM_ERROR),
        ],
    )
    scorer = Scorer()
    assert duty(database, scorer).run_once() == 0
    assert scorer.seen == []
    assert stored(database) == {}


def test_a_scorer_that_fails_leaves_no_score(database: Database) -> None:
    save(database, [served(1)])

    def broken(_: Sequence[str]) -> list[float]:
        raise ScoringFailed("no probability")

    scoring = ScoringDuty(
        database, broken, default_lexicon(), threshold=0.5, batch_size=9, scorer_name="x", clock=lambda: 0.0
    )
    with pytest.raises(ScoringFailed):
        scoring.run_once()
    assert stored(database) == {}
    assert duty(database, Scorer()).run_once() == 1


def test_a_question_is_the_users_last_word() -> None:
    turns = (
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "answer"},
        {
            "role": "user",
            "content": [{"type": "text", "text": "one"}, {"type": "image_url"}, {"type": "text", "text": "2"}],
        },
    )
    assert last_question(served(1, prompt=turns)) == "one\n\n2"
    assert last_question(served(1, prompt=None)) == ""


@pytest.mark.parametrize(
    ("finish_reason", "n_tokens", "expected"),
    [("content_filter", 5, True), ("content_filter", None, True), ("content_filter", 0, False), ("stop", 5, False)],
)
def test_an_answer_that_a_guard_withheld_counts_as_toxic(
    database: Database, finish_reason: str, n_tokens: int | None, expected: bool
) -> None:
    kept = replace(served(1), finish_reason=finish_reason, completion_tokens=n_tokens)
    save(database, [kept])
    assert was_withheld(kept) == expected
    duty(database, Scorer()).run_once()
    with database.read() as connection:
        assert connection.execute(sa.select(scores.c.is_toxic)).scalar_one() == expected
