"""What `pawl pairs export` writes trains with TRL as it is: nothing between the command, `load_dataset` and trainer.

The conversations have several turns, system messages, tools that were called with arguments of all shapes, and answers
that call one and say nothing.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import datasets
import pytest
import structlog
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

from feedback.interactions import FeedbackEvent, Interaction, Message
from feedback.store import Score, save_scores
from pawl.cli.main import run
from pawl.database import open_database, upgrade
from pawl.settings import DatabaseSettings
from retrain.base_model import quiet_renames
from tests.pawl.conftest import CONFIG
from tests.pawl.records import feedback, interaction_id, save, served
from tests.retrain.tool_model import make_byte_tokenizer, make_tool_model, template

STEPS = 4
TOOLS: tuple[Mapping[str, Any], ...] = (
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather of a city.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    },
    {
        "type": "function",
        "function": {"name": "get_time", "description": "The time.", "parameters": {"type": "object"}},
    },
)
"""Offered in every conversation that calls one."""
SYSTEM = {"role": "system", "content": "You know the weather and the time."}


def called(name: str, arguments: str, content: str | None = None, call_id: str = "call_1") -> Message:
    """A message that calls a tool, as the API writes it: arguments are JSON in a text."""
    call = {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
    return {"role": "assistant", "content": content, "tool_calls": [call]}


def said(text: str) -> Message:
    return {"role": "assistant", "content": text}


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def result(text: str, call_id: str = "call_1") -> Message:
    return {"role": "tool", "tool_call_id": call_id, "content": text}


CONVERSATIONS: Sequence[tuple[tuple[Message, ...], Message, Message]] = (
    ((user("Why is the sky blue?"),), said("Air scatters blue light most."), said("No idea.")),
    ((user("Name a colour of autumn."),), said("Amber."), said("Colour.")),
    (
        (SYSTEM, user("Hello?"), said("Hello! What may I look up?"), user("What is rain?")),
        said("Water from clouds."),
        said("Wet."),
    ),
    (
        (user("Is it cold in Oslo?"), called("get_weather", '{"city": "Oslo"}'), result('{"celsius": -3}')),
        said("Yes, three below zero."),
        said("It depends."),
    ),
    (
        (user("What will Paris be like, and when?"),),
        called("get_weather", '{"city": "Paris", "days": [1, 2], "units": {"wind": null, "heat": "C"}}', content=""),
        called("get_time", '{"zone": "Europe/Paris", "exact": true}', content=""),
    ),
    (
        (SYSTEM, user("And Rome?"), called("get_weather", "not JSON", call_id="c7"), result("try again", "c7")),
        called("get_weather", '{"city": "Rome", "days": 2.5}', "Once more."),
        said("I cannot."),
    ),
    (
        ({"role": "user", "content": [{"type": "text", "text": "Two"}, {"type": "text", "text": "parts?"}]},),
        said("Two parts."),
        called("get_time", "{}"),
    ),
    (
        (user("What time is it?"), called("get_time", ""), result("noon"), said("Noon."), user("Sure?")),
        said("Yes."),
        said("No."),
    ),
)
UNTRAINABLE: Sequence[tuple[tuple[Message, ...], Message, Message]] = (
    (
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]},),
        said("A cat."),
        said("A dog."),
    ),
    ((user("Half a call?"),), said("Whole."), called("get_weather", '{"city": ')),
)


def offered(prompt: Sequence[Message], liked: Message) -> tuple[Mapping[str, Any], ...] | None:
    return TOOLS if any("tool_calls" in message for message in (*prompt, liked)) else None


def history() -> tuple[list[Interaction], list[FeedbackEvent]]:
    """Each conversation was answered twice, for a user of its own who liked the one and not the other."""
    answers, thumbs = [], []
    for number, (prompt, liked, disliked) in enumerate((*CONVERSATIONS, *UNTRAINABLE)):
        for half, (completion, value) in enumerate(((liked, "up"), (disliked, "down"))):
            which = 2 * number + half + 1
            who: dict[str, Any] = {"user_id": f"user-{number}"}
            sha = f"{number:064x}"
            told = {"prompt": prompt, "prompt_sha": sha, "completion": completion, "tools": offered(prompt, liked)}
            answers.append(served(which, unit_id="u", **told, **who))
            thumbs.append(feedback(interaction_id(which), value=value, created_at=which + 0.5, **who))
    return answers, thumbs


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with that history, mined and exported by the command line in each layout and kind of file."""
    directory = tmp_path_factory.mktemp("exports")
    (directory / "pawl.yaml").write_text(CONFIG.format(directory=directory))
    with closing(open_database(DatabaseSettings(url=f"sqlite:///{directory}/shared.db"))) as database:
        upgrade(database)
        answers, thumbs = history()
        save(database, answers, thumbs)
        save_scores(database, [Score(one.id, 0.01, False, "comply", False, "test", 1.0) for one in answers])
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("PAWL_")]:
            patch.delenv(name)
        patch.chdir(directory)
        assert run(["pairs", "mine"]) == 0
        for name in ("trl.jsonl", "trl.parquet", "kto.jsonl", "kto.parquet", "openai.jsonl"):
            assert run(["pairs", "export", "--format", name.partition(".")[0], "--out", name]) == 0
    structlog.reset_defaults()
    return directory


@pytest.fixture(scope="module")
def tool_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """So small that a second thread would only wait for the first."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield make_tool_model(tmp_path_factory.mktemp("tools"))
    torch.set_num_threads(threads)


def load(exports: Path, name: str, **options: Any) -> datasets.Dataset:
    """As a team would that has never heard of Pawl."""
    kind = {"jsonl": "json", "parquet": "parquet"}[name.partition(".")[2]]
    cache = str(exports / "cache")
    return datasets.load_dataset(kind, data_files=str(exports / name), split="train", cache_dir=cache, **options)


def as_the_engine_reads(message: Message) -> dict[str, Any]:
    """What vLLM hands to a chat template, written down here once more."""
    content = message["content"] or ""
    text = content if isinstance(content, str) else "\n".join(part["text"] for part in content)
    read = {**message, "content": text}
    if "tool_calls" in message:
        (call,) = message["tool_calls"]
        broken = call["function"]["arguments"] in ("", "not JSON")
        arguments = {} if broken else json.loads(call["function"]["arguments"])
        read["tool_calls"] = [{**call, "function": {**call["function"], "arguments": arguments}}]
    return read


def rendered(tokenizer: PreTrainedTokenizerFast, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
    text = tokenizer.apply_chat_template([dict(message) for message in messages], tokenize=False, **options)
    assert isinstance(text, str)
    return text


def wanted(tokenizer: PreTrainedTokenizerFast, **options: Any) -> set[tuple[str, str]]:
    """Every conversation with its better and its worse answer, as the engine would have rendered it."""
    both = set()
    for prompt, liked, disliked in CONVERSATIONS:
        before, tools = list(map(as_the_engine_reads, prompt)), offered(prompt, liked)
        told = {**options, **({"tools": list(tools)} if tools else {})}
        sides = [rendered(tokenizer, [*before, as_the_engine_reads(side)], **told) for side in (liked, disliked)]
        both.add((sides[0], sides[1]))
    return both


def read_back(tokenizer: PreTrainedTokenizerFast, dataset: datasets.Dataset) -> set[tuple[str, str]]:
    """The same from what a DPO trainer has made of its rows."""
    return {
        (
            tokenizer.decode(row["prompt_ids"] + row["chosen_ids"]),
            tokenizer.decode(row["prompt_ids"] + row["rejected_ids"]),
        )
        for row in dataset
    }


def training_options(directory: Path) -> dict[str, Any]:
    return {
        "output_dir": str(directory),
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "max_length": 4096,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "activation_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }


def assert_trained(trainer: DPOTrainer | KTOTrainer, model: Path) -> None:
    """Exactly the steps asked for, finite losses, and every weight another than before."""
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert (trainer.state.global_step, len(losses)) == (STEPS, STEPS)
    assert all(math.isfinite(loss) for loss in losses)
    before = AutoModelForCausalLM.from_pretrained(model).state_dict()
    after = trainer.model.state_dict()
    assert not [name for name, weights in after.items() if torch.equal(weights, before[name])]
    assert all(bool(weights.isfinite().all()) for weights in after.values())


@pytest.mark.training
@pytest.mark.parametrize("name", ["trl.jsonl", "trl.parquet"])
def test_four_steps_of_dpo(exports: Path, tool_model: Path, tmp_path: Path, name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tool_model)
    with quiet_renames():
        arguments = DPOConfig(**training_options(tmp_path))
        trainer = DPOTrainer(
            str(tool_model), args=arguments, train_dataset=load(exports, name), processing_class=tokenizer
        )
        trainer.train()
    assert_trained(trainer, tool_model)
    texts = read_back(tokenizer, trainer.train_dataset)
    assert texts == wanted(tokenizer)
    chosen = [text for text, _ in texts if "What will Paris be like" in text]
    call = (
        '{"name": "get_weather", "arguments": {"city": "Paris", "days": [1, 2], "units": {"wind": null, "heat": "C"}}}'
    )
    assert [text.endswith(f"assistant\n<tool_call>\n{call}\n</tool_call><|im_end|>\n") for text in chosen] == [True]


@pytest.mark.training
def test_four_steps_of_kto(exports: Path, tool_model: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tool_model)
    with quiet_renames():
        arguments = KTOConfig(**training_options(tmp_path))
        trainer = KTOTrainer(
            str(tool_model), args=arguments, train_dataset=load(exports, "kto.jsonl"), processing_class=tokenizer
        )
        trainer.train()
    assert_trained(trainer, tool_model)
    rows = [
        (tokenizer.decode(row["prompt_ids"] + row["completion_ids"]), row["label"]) for row in trainer.train_dataset
    ]
    sides = {
        (side, is_chosen) for pair in wanted(tokenizer) for side, is_chosen in zip(pair, (True, False), strict=True)
    }
    assert set(rows) == sides
    assert len(rows) == 2 * len(CONVERSATIONS)


TEMPLATES = ("qwen2_5", "qwen3", "llama3_1", "gptoss", "gemma4", "glm4moe", "lfm2", "qwen3_5_think")


@pytest.mark.parametrize("name", ["trl.jsonl", "trl.parquet"])
def test_published_templates_render_what_the_engine_rendered(exports: Path, name: str) -> None:
    """Some of them tell a field that is there and empty from one that is not there."""
    tokenizer = make_byte_tokenizer()
    rows = list(load(exports, name))
    for each in TEMPLATES:
        options = {"chat_template": template(each)}
        texts = {
            tuple(rendered(tokenizer, row["prompt"] + row[side], **told) for side in ("chosen", "rejected"))
            for row in rows
            for told in [{**options, **({"tools": json.loads(row["tools"])} if row["tools"] else {})}]
        }
        assert texts == wanted(tokenizer, **options), each


def test_both_kinds_of_file_load_as_the_same(exports: Path) -> None:
    for layout in ("trl", "kto"):
        assert list(load(exports, f"{layout}.jsonl")) == list(load(exports, f"{layout}.parquet"))


def test_what_no_template_can_show_is_left_out_and_counted(
    exports: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(exports)
    assert run(["pairs", "export", "--out", "again.jsonl"]) == 0
    structlog.reset_defaults()
    assert capsys.readouterr().out == (
        "8 rows in again.jsonl\nleft out, for no chat template can show them: 1 broken_tool_call, 1 not_text\n"
    )
    assert (exports / "again.jsonl").read_bytes() == (exports / "trl.jsonl").read_bytes()
    manifest = json.loads((exports / "trl.jsonl.manifest.json").read_text())
    assert (manifest["rows"], manifest["left_out"]) == (len(CONVERSATIONS), {"broken_tool_call": 1, "not_text": 1})


def test_the_openai_layout_is_that_of_its_api(exports: Path) -> None:
    """`input.messages` and one assistant message on each side; arguments stay a text, as the API has them."""
    rows = [json.loads(line) for line in (exports / "openai.jsonl").read_text().splitlines()]
    assert len(rows) == len(CONVERSATIONS) + len(UNTRAINABLE)
    tools = [row["input"]["tools"] for row in rows if "tools" in row["input"]]
    assert tools == [list(TOOLS)] * 4
    for row in rows:
        assert set(row) == {"input", "preferred_output", "non_preferred_output"}
        assert set(row["input"]) in ({"messages"}, {"messages", "tools"})
        outputs = row["preferred_output"] + row["non_preferred_output"]
        assert [message["role"] for message in outputs] == ["assistant", "assistant"]
        calls = [call for message in row["input"]["messages"] + outputs for call in message.get("tool_calls", ())]
        assert all(isinstance(call["function"]["arguments"], str) for call in calls)
