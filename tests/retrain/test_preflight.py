"""What the preflight finds in a training set, with a real tokenizer and with made-up ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from feedback.interactions import Message
from practice.tokenizer import CHAT_TEMPLATE
from retrain.dataset import Origin, TrainingExample, example_of
from retrain.preflight import Encoder, check, encoder_of, reads_tools
from tests.retrain.tiny_model import TEMPLATE, make_pair, make_tokenizer
from tests.retrain.tool_model import make_byte_tokenizer, template

EXAMPLES = [example_of(make_pair(number), Origin.NEW) for number in range(20)]


def words(messages: Sequence[Message]) -> list[int]:
    return [hash(word) for message in messages for word in str(message["content"]).split()]


def test_a_sound_set_has_no_problems() -> None:
    report = check(EXAMPLES, encoder_of(make_tokenizer()), max_length=64)
    assert report.problems == ()
    assert report.n_examples == 20
    assert report.mean_length_difference == 0
    assert 0 < report.longest < 64


def test_templates_that_leave_tool_calls_out_or_refuse_them_are_told_from_those_that_show_them() -> None:
    tokenizer = make_byte_tokenizer()
    told = {}
    for name in ("qwen2_5", "llama3_1", "qwen3", "llama3", "gemma3", "phi3", "cohere2"):
        tokenizer.chat_template = template(name)
        told[name] = reads_tools(tokenizer)
    assert told == dict.fromkeys(("qwen2_5", "llama3_1", "qwen3"), True) | dict.fromkeys(
        ("llama3", "gemma3", "phi3", "cohere2"), False
    )
    for written in (CHAT_TEMPLATE, TEMPLATE, None):
        tokenizer.chat_template = written
        assert not reads_tools(tokenizer)


def test_long_prompts_and_answers_are_counted_apart() -> None:
    prompt_only = len(encoder_of(make_tokenizer()).prompt(EXAMPLES[0].prompt))
    dropped = check(EXAMPLES[:5], encoder_of(make_tokenizer()), max_length=prompt_only)
    assert (dropped.n_dropped, dropped.n_truncated) == (5, 0)
    truncated = check(EXAMPLES[:5], encoder_of(make_tokenizer()), max_length=prompt_only + 1)
    assert (truncated.n_dropped, truncated.n_truncated) == (0, 5)
    assert "5 answers do not fit" in truncated.problems[0]


def test_a_template_that_never_ends_a_turn_is_a_problem() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE.replace(" <end> ", " ")
    report = check(EXAMPLES, encoder_of(tokenizer), max_length=64)
    assert report.n_missing_stop == 20
    assert "20 of 20 answers end without a stop token" in report.problems[0]


def test_a_template_that_renders_the_prompt_anew_is_a_problem() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE.replace("'<assistant> ' -}}{%- endif", "'<assistant> kind ' -}}{%- endif")
    report = check(EXAMPLES, encoder_of(tokenizer), max_length=64)
    assert report.n_prefix_mismatch == 20
    assert any("rendered differently" in problem for problem in report.problems)


def test_the_length_difference_is_chosen_minus_rejected() -> None:
    longer = replace(EXAMPLES[0], chosen={"role": "assistant", "content": "one two three four five six"})
    encoder = Encoder(prompt=words, conversation=words, stop_ids=frozenset({hash("six"), hash("rude")}))
    assert check([longer], encoder, max_length=64).mean_length_difference == 2


def test_an_answer_preferred_to_itself_is_a_problem() -> None:
    pointless = replace(EXAMPLES[0], chosen=EXAMPLES[0].rejected)
    report = check([pointless], encoder_of(make_tokenizer()), max_length=64)
    assert report.problems == ("1 of 1 examples prefer an answer to itself",)


def test_an_empty_set_is_a_problem() -> None:
    nothing: list[TrainingExample] = []
    assert check(nothing, encoder_of(make_tokenizer()), max_length=64).problems == ("there is nothing to train on",)
