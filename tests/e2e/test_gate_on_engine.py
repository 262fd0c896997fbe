"""What the gate asks of an engine, asked of the real one: log-probabilities of tokens that were sampled."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from practice.model import PracticeModel
from practice.world import ALIAS, BASE_NAME
from retrain.divergence import sample_tokens, score_tokens
from retrain.evaluation import load_probes
from retrain.generations import Sampling
from serving.stack import Stack

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

SAMPLING = Sampling(1.0, 40, 1, 7)


def test_the_engine_says_how_likely_an_answer_was_as_the_model_itself_does(
    stack: Stack, practice_model: PracticeModel
) -> None:
    url = stack.settings.serving.models[ALIAS].engines[0]
    probes = load_probes(practice_model.benign_probes, 12)
    answers = sample_tokens(url, BASE_NAME, probes, SAMPLING)
    assert [answer.probe_id for answer in answers] == [probe.id for probe in probes]
    scored = score_tokens(url, [BASE_NAME], answers)[BASE_NAME]
    model = AutoModelForCausalLM.from_pretrained(practice_model.path)
    for answer, logp in zip(answers, scored, strict=True):
        tokens = torch.tensor([answer.tokens])
        with torch.no_grad():
            logps = model(input_ids=tokens).logits[0, :-1].float().log_softmax(-1)
        own = logps.gather(1, tokens[0, 1:, None])[answer.start - 1 :, 0]
        assert logp == pytest.approx(float(own.sum()), abs=0.02)
    stop = json.loads((practice_model.path / "config.json").read_text())["eos_token_id"]
    assert any(answer.tokens[-1] == stop for answer in answers)  # The end of an answer is one of its tokens.


def test_a_text_is_as_likely_the_second_time(stack: Stack, practice_model: PracticeModel) -> None:
    """What the engine has cached of a prompt must not shorten the list, nor change it."""
    url = stack.settings.serving.models[ALIAS].engines[0]
    answers = sample_tokens(url, BASE_NAME, load_probes(practice_model.benign_probes, 10), SAMPLING)
    first, second = (score_tokens(url, [BASE_NAME], answers)[BASE_NAME] for _ in range(2))
    assert first == pytest.approx(second, abs=0.01)
    assert all(logp < 0 for logp in first)
