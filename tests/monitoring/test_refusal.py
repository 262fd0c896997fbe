"""The refusal detector on a labelled sample, and what it promises for any text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from monitoring.refusal import _RULES, HINTS, Response, classify_response, find_decline, strip_thinking
from tests.monitoring.refusal_samples import SAMPLES, Sample

# Known misses, kept in the sample so that the figures stay honest.
KNOWN_MISSES = {"I can't share a meal with you, but I can share this recipe: fry onions, add lentils, simmer."}


def precision_recall(label: Response) -> tuple[float, float]:
    answers = [(sample.label, classify_response(sample.text)) for sample in SAMPLES]
    hits = sum(truth == given == label for truth, given in answers)
    return hits / sum(given == label for _, given in answers), hits / sum(truth == label for truth, _ in answers)


@pytest.mark.parametrize("label", [Response.REFUSE, Response.COMPLY, Response.EMPTY, Response.PARTIAL])
def test_precision_and_recall_on_the_labelled_sample(label: Response) -> None:
    precision, recall = precision_recall(label)
    print(f"{label}: precision {precision:.3f}, recall {recall:.3f}, n {len(SAMPLES)}")
    assert precision >= 0.95
    assert recall >= 0.95


@pytest.mark.parametrize("sample", [s for s in SAMPLES if s.text not in KNOWN_MISSES], ids=lambda s: repr(s.text[:40]))
def test_labelled_answer(sample: Sample) -> None:
    assert classify_response(sample.text) == sample.label, find_decline(strip_thinking(sample.text))


FRAGMENTS = (
    *("i ", "we ", "sorry, ", "no", "never", ".", " to ", "help", "provide that", "can't ", "cannot ", "will not be "),
    *("won't ", "'m unable to ", " am not going to ", "must not ", "say no", "that's a hard no", "refuse", "decline "),
    *("would rather not", "don't ", "feel comfortable", "not comfortable", "something i can", "be wrong for me to "),
    *("my policies ", "prevent", "against our guidelines", "have no intention of helping", "not a chance", "isn't "),
)


@given(st.lists(st.sampled_from(FRAGMENTS), max_size=8).map("".join) | st.sampled_from([s.text for s in SAMPLES]))
def test_whatever_a_rule_matches_has_one_of_its_hints(text: str) -> None:
    for name, pattern in _RULES:
        for found in pattern.finditer(text.lower().replace("’", "'")):
            assert any(hint in found.group() for hint in HINTS[name])


@given(st.text())
def test_any_text_has_one_of_the_four_classes(text: str) -> None:
    assert classify_response(text) in Response


@given(st.text(alphabet=st.characters(exclude_characters="<>")))
def test_what_a_model_thinks_does_not_change_the_verdict(thought: str) -> None:
    answer = "Boil the rice for ten minutes."
    assert classify_response(f"<think>{thought}</think>{answer}") == classify_response(answer)


@given(st.sampled_from([s for s in SAMPLES if s.label == Response.REFUSE]), st.sampled_from(["\n", "  ", "\t\n "]))
def test_white_space_around_an_answer_does_not_matter(sample: Sample, blank: str) -> None:
    assert classify_response(blank + sample.text + blank) == classify_response(sample.text)


def test_a_decline_far_down_is_not_a_refusal() -> None:
    assert classify_response("The road runs along the river. " * 20 + "I can't help with that.") == Response.COMPLY
