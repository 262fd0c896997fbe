"""What the preflight finds in a training set, with a real tokenizer and with made-up ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from feedback.interactions import Message
from pawl.settings import PreflightSettings
from practice.tokenizer import CHAT_TEMPLATE
from retrain.adapters import base_fingerprint
from retrain.dataset import Origin, TrainingExample, example_of
from retrain.preflight import (
    Encoder,
    check,
    check_round,
    encoder_of,
    reads_tools,
    tokenizer_fingerprint,
)
from tests.retrain.tiny_model import TEMPLATE, make_pair, make_tokenizer
from tests.retrain.tool_model import make_byte_tokenizer, template

EXAMPLES = [example_of(make_pair(number), Origin.NEW) for number in range(20)]


def test_functions_that_were_offered_are_shown_as_the_engine_shows_them() -> None:
    tokenizer = make_byte_tokenizer()
    encoder = encoder_of(tokenizer)
    offered = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
    with_tools, without = (tokenizer.decode(encoder.prompt(EXAMPLES[0].prompt, tools)) for tools in ((offered,), None))
    shown = '{"name": "look", "description": null, "parameters": {"type": "object"}}'
    assert f'{{"type": "function", "function": {shown}}}' in with_tools
    assert "look" not in without


def words(messages: Sequence[Message], _tools: object = None) -> list[int]:
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


def answered(chosen: str, rejected: str, number: int) -> TrainingExample:
    one, other = ({"role": "assistant", "content": text} for text in (chosen, rejected))
    return replace(EXAMPLES[number % 20], chosen=one, rejected=other)


@pytest.mark.parametrize(("chosen", "rejected"), [("good " * 30, "bad"), ("bad", "good " * 30)])
def test_a_set_that_teaches_length_is_a_problem_either_way(chosen: str, rejected: str) -> None:
    lopsided = [answered(chosen, rejected, number) for number in range(40)]
    report = check(lopsided, encoder_of(make_tokenizer()), max_length=64)
    n_longer = 40 if len(chosen) > len(rejected) else 0
    assert report.n_chosen_longer == n_longer
    assert report.length_bias is not None
    assert abs(report.length_bias) > 1
    (problem,) = report.problems
    assert problem.startswith(f"{n_longer} of 40 preferred answers are the longer one")
    assert problem.endswith("(0.37 to 2.72 are allowed): length is what would be learned")
    assert (
        check(
            lopsided, encoder_of(make_tokenizer()), max_length=64, limits=PreflightSettings(max_length_bias=None)
        ).problems
        == ()
    )


def test_a_few_long_answers_are_no_length_bias() -> None:
    """What a small set happens to be like is not known to be a bias, and one of a large set is not its mean."""
    few = [answered("good " * 30, "bad", number) for number in range(10)]
    assert check(few, encoder_of(make_tokenizer()), max_length=64).problems == ()
    rest = [answered("good kind", "bad rude", number) for number in range(60)]
    assert check([*few, *rest], encoder_of(make_tokenizer()), max_length=64).problems == ()


def test_more_may_be_lost_where_the_settings_say_so() -> None:
    long = [answered("good " * 80, "bad " * 80, number) for number in range(20)]
    lost = check([*EXAMPLES, *long], encoder_of(make_tokenizer()), max_length=64)
    assert lost.n_truncated == 20
    assert lost.problems[0].startswith("0 of 40 prompts fill the limit of 64 tokens and 20 answers do not fit")
    allowed = PreflightSettings(max_lost_share=0.5)
    assert check([*EXAMPLES, *long], encoder_of(make_tokenizer()), max_length=64, limits=allowed).problems == ()


def test_every_token_is_counted() -> None:
    encoder = Encoder(prompt=words, conversation=words, stop_ids=frozenset(map(hash, ("kind", "rude"))))
    texts = [
        str(message["content"]).split() for message in (*EXAMPLES[0].prompt, EXAMPLES[0].chosen, EXAMPLES[0].rejected)
    ]
    prompt, chosen, rejected = map(len, texts)
    assert check([EXAMPLES[0]], encoder, max_length=64).n_tokens == 2 * prompt + chosen + rejected


def test_tokens_the_model_has_no_embedding_for_are_a_problem() -> None:
    known = replace(encoder_of(make_tokenizer()), n_known=len(make_tokenizer()) - 1)
    report = check(EXAMPLES, replace(known, n_known=5), max_length=64)
    assert report.problems == (
        "20 of 20 examples have tokens that the model has no embedding for; the tokenizer belongs to another model",
    )
    assert check(EXAMPLES, known, max_length=64).n_unknown_tokens < 20


def parent_of(base: Path) -> dict[str, str]:
    sha = tokenizer_fingerprint(make_tokenizer())
    return {"name": "tiny--r0001-0123abcd", "base_sha": base_fingerprint(str(base)), "tokenizer_sha": sha}


def preflight_problems(base: Path, parent: dict[str, str] | None) -> tuple[str, ...]:
    return check_round(str(base), EXAMPLES, parent, max_length=64, limits=PreflightSettings()).problems


def test_a_round_continues_a_parent_that_was_made_on_this_base_with_this_tokenizer(tiny_base: Path) -> None:
    assert preflight_problems(tiny_base, None) == ()
    assert preflight_problems(tiny_base, parent_of(tiny_base)) == ()
    assert preflight_problems(tiny_base, {"name": "made before tokenizers were recorded"}) == ()


def test_a_parent_of_another_base_is_a_problem(tiny_base: Path) -> None:
    (problem,) = preflight_problems(tiny_base, parent_of(tiny_base) | {"base_sha": "f" * 64})
    assert problem.startswith(
        "the parent tiny--r0001-0123abcd was trained with another base model: its manifest says ffff"
    )


def test_a_parent_of_another_tokenizer_is_a_problem(tiny_base: Path) -> None:
    (problem,) = preflight_problems(tiny_base, parent_of(tiny_base) | {"tokenizer_sha": "e" * 64})
    assert "was trained with another tokenizer: its manifest says eeeeeeeeeeee" in problem


def test_a_tokenizers_fingerprint_is_that_of_what_it_does() -> None:
    """Not of where it lies: the same one made again has the same."""
    sound = tokenizer_fingerprint(make_tokenizer())
    assert sound == tokenizer_fingerprint(make_tokenizer())
    templated, spoken, read = make_tokenizer(), make_tokenizer(), make_tokenizer()
    templated.chat_template = TEMPLATE.replace(" <end> ", " ")
    spoken.eos_token = "<pad>"
    read.add_tokens(["STOP_here"])
    assert len({sound, *map(tokenizer_fingerprint, (templated, spoken, read))}) == 4
