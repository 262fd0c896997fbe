"""Who is never learned from: the opted-out, the erased, strangers, and whoever's answer was cut or not to be stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from feedback.erasure_store import completion_step
from feedback.filters.stored import Judges, filter_stored_singles
from feedback.interactions import FeedbackEvent, Interaction, Status
from feedback.mining import mine_alias, unpaired_examples
from feedback.pair_stream import PairsById
from feedback.pairs import PreferencePair, UnpairedExample
from feedback.selection import Rules, select_pairs
from pawl.database import Database
from pawl.settings import DefenceSettings, FilterSettings
from tests.feedback.test_mining import ALIAS, clear
from tests.feedback.test_pairs import events_, iid, interactions_, rate, say, tell
from tests.pawl.records import save

OPTED_OUT = "bob"
USERS = ("ann", OPTED_OUT, "cy")
FILTERS = FilterSettings(opted_out=[OPTED_OUT])
Learned = tuple[Sequence[PreferencePair], Sequence[UnpairedExample]]


def learned(database: Database) -> Learned:
    """What is mined and passes the filters."""
    mine_alias(database, ALIAS, 1000.0)
    selected = select_pairs(database, ALIAS, Rules(FILTERS, DefenceSettings(enabled=False), Judges()), 1000.0)
    pairs = tuple(PairsById(database, selected.new))
    return pairs, filter_stored_singles(database, unpaired_examples(database, ALIAS), FILTERS).kept


def erase(database: Database, numbers: Sequence[int]) -> None:
    for number in numbers:
        with database.write() as connection:
            completion_step(iid(number))(connection)


def may_be_learned_from(one: Interaction) -> bool:
    return one.is_stored and one.is_complete and one.status is Status.OK and one.user_id != OPTED_OUT


def test_of_two_answers_that_were_rated_only_those_of_the_willing_make_a_pair(database: Database) -> None:
    """Each question has an answer rated 1 and one rated 0, and something is the matter with the second but for one."""
    flaws = [
        {},
        {"user_id": OPTED_OUT},
        {"is_stored": False, "prompt": None, "completion": None},
        {"is_complete": False, "finish_reason": "length"},
        {"status": Status.CLIENT_DISCONNECTED},
        {},  # Erased below.
    ]
    answers, said = [], []
    for place, flaw in enumerate(flaws):
        question = ({"role": "user", "content": f"question {place}"},)
        good, bad = say(2 * place, "good", question, user_id="cy"), say(2 * place + 1, "bad", question)
        answers += [good, replace(bad, **flaw)]  # type: ignore[arg-type]
        said += [rate(100.0 + place, 2 * place, 1.0, user_id="cy"), rate(200.0 + place, 2 * place + 1, 0.0)]
    said.append(tell(300.0, "rating", 0, 1.0, user_id=OPTED_OUT, is_retraction=True, feedback_id="another"))
    save(database, answers, said)
    erase(database, [11])
    pairs, singles = learned(database)
    assert [(pair.chosen_interaction, pair.rejected_interaction) for pair in pairs] == [(iid(0), iid(1))]
    assert {single.interaction for single in singles} == {iid(4), iid(6), iid(8), iid(10)}
    assert all(single.label for single in singles)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(interactions_, events_(), st.lists(st.sampled_from(USERS), min_size=6, max_size=6), st.sets(st.integers(0, 5)))
def test_nobody_appears_who_may_not(
    database: Database,
    served: tuple[Interaction, ...],
    said: list[FeedbackEvent],
    owners: list[str],
    erased: set[int],
) -> None:
    clear(database)
    owned = [replace(one, user_id=owner) for one, owner in zip(served, owners, strict=True)]
    save(database, owned, said)
    erase(database, sorted(erased))
    known = {one.id: one for number, one in enumerate(owned) if number not in erased}
    pairs, singles = learned(database)
    for pair in pairs:
        sides = [known[each] for each in (pair.chosen_interaction, pair.rejected_interaction) if each is not None]
        assert all(map(may_be_learned_from, sides))
        assert pair.source == "thumbs" or len({one.key_id for one in sides}) == 1
    assert all(may_be_learned_from(known[single.interaction]) for single in singles)
    behind = [pair.principals for pair in pairs] + [single.principals for single in singles]
    assert not any(principal.endswith(f"/{OPTED_OUT}") for principals in behind for principal in principals)
