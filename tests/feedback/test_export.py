"""Exports: exact rows, files that load elsewhere, and nothing half-written."""

from __future__ import annotations

import json
import os
import tempfile
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from feedback.errors import DamagedExport
from feedback.export import (
    ExportFormat,
    content_sha256,
    manifest_path,
    read_export,
    read_pairs,
    write_export,
)
from feedback.interactions import Message
from feedback.pairs import PreferencePair, UnpairedExample

ASK: tuple[Message, ...] = ({"role": "user", "content": "Hello?"},)
TOOL_CALL = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": '{"at": 1}'}}
READ_CALL = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": {"at": 1}}}
"""The same as chat templates read it."""


def assistant(text: str | None, **fields: Any) -> Message:
    return {"role": "assistant", "content": text, **fields}


def make_pair(number: int, chosen: Message, rejected: Message, prompt: tuple[Message, ...] = ASK) -> PreferencePair:
    return PreferencePair(
        id=f"{number:032x}",
        alias="assistant",
        source="edit",
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        margin=0.5,
        n_voters=1,
        principals=("key/ann",),
        chosen_interaction=None,
        rejected_interaction="0" * 48,
        models=("base",),
        probability=1.0,
        created_at=1.0,
    )


def make_single(number: int, completion: Message, *, label: bool) -> UnpairedExample:
    return UnpairedExample(
        id=f"{number:032x}",
        alias="assistant",
        prompt=ASK,
        completion=completion,
        label=label,
        interaction=f"{number:048x}",
        model="base",
        principals=("key/ann",),
        created_at=1.0,
    )


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


PAIRS = [make_pair(2, assistant("c"), assistant("d")), make_pair(1, assistant("a", refusal=None), assistant("b"))]


def test_trl_rows_in_the_order_of_their_ids(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    assert write_export(path, PAIRS) == 2
    first, second = read(path)
    assert first == {
        "prompt": [{"role": "user", "content": "Hello?"}],
        "chosen": [{"role": "assistant", "content": "a"}],
        "rejected": [{"role": "assistant", "content": "b"}],
        "pair_id": f"{1:032x}",
        "source": "edit",
        "margin": 0.5,
    }
    assert second["pair_id"] == f"{2:032x}"


def test_openai_rows_keep_parts_and_tool_calls(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "Hello"}, {"type": "text", "text": "there?"}]
    pair = make_pair(1, assistant(None, tool_calls=[TOOL_CALL]), assistant("b"), ({"role": "user", "content": parts},))
    write_export(tmp_path / "o.jsonl", [pair], layout=ExportFormat.OPENAI)
    assert read(tmp_path / "o.jsonl") == [
        {
            "input": {"messages": [{"role": "user", "content": parts}]},
            "preferred_output": [{"role": "assistant", "content": None, "tool_calls": [TOOL_CALL]}],
            "non_preferred_output": [{"role": "assistant", "content": "b"}],
        }
    ]
    write_export(tmp_path / "t.jsonl", [pair])
    assert read(tmp_path / "t.jsonl")[0]["prompt"] == [{"role": "user", "content": "Hello\nthere?"}]


def test_kto_has_each_answer_once_and_none_with_two_labels(tmp_path: Path) -> None:
    pairs = [make_pair(1, assistant("b"), assistant("a")), make_pair(2, assistant("c"), assistant("b"))]
    singles = [make_single(3, assistant("c"), label=True), make_single(4, assistant("d"), label=False)]
    n_rows = write_export(tmp_path / "kto.jsonl", pairs, singles, layout=ExportFormat.KTO)
    rows = read(tmp_path / "kto.jsonl")
    assert n_rows == len(rows) == 3
    assert {row["completion"][0]["content"]: row["label"] for row in rows} == {"a": False, "c": True, "d": False}
    assert all(row["prompt"] == [{"role": "user", "content": "Hello?"}] for row in rows)


@pytest.mark.parametrize("layout", ExportFormat)
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_the_same_pairs_give_the_same_bytes_in_any_order(tmp_path: Path, layout: ExportFormat, suffix: str) -> None:
    pytest.importorskip("pyarrow")
    singles = [make_single(n, assistant(f"s{n}"), label=n % 2 == 0) for n in range(10)]
    one, two = tmp_path / f"one{suffix}", tmp_path / f"two{suffix}"
    write_export(one, odd_pairs(), singles, layout=layout)
    write_export(two, odd_pairs()[::-1], singles[::-1], layout=layout)
    assert one.read_bytes() == two.read_bytes() != b""
    assert manifest_path(one).read_bytes() == manifest_path(two).read_bytes()


def odd_pairs() -> list[PreferencePair]:
    """Everything a client or a model can put into a message, next to a plain pair."""
    return [
        *PAIRS,
        make_pair(3, assistant("\ud800 lone"), assistant("nul \x00, line \u2028 and \U0001f600")),
        make_pair(4, assistant(None, tool_calls=[TOOL_CALL], refusal=None), assistant("b", reasoning_content="hm")),
        make_pair(5, assistant("a"), assistant("b"), ({"role": "user", "content": [{"type": "text", "text": "x"}]},)),
        make_pair(
            6,
            assistant("a"),
            assistant("b"),
            ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x", "n": 10**30}}]},),
        ),
        make_pair(
            7, assistant("a"), assistant("b"), ({"role": "user", "content": "x", "weight": float("nan"), "y": {}},)
        ),
        make_pair(8, assistant("a"), assistant("b"), (*ASK, assistant("mid"), {"role": "user", "content": "more"})),
    ]


@pytest.mark.parametrize(
    ("layout", "columns"),
    [
        (ExportFormat.TRL, {"prompt", "chosen", "rejected", "pair_id", "source", "margin"}),
        (ExportFormat.KTO, {"prompt", "completion", "label"}),
        (ExportFormat.OPENAI, {"input", "preferred_output", "non_preferred_output"}),
    ],
)
def test_the_file_loads_with_datasets_whatever_the_messages_hold(
    tmp_path: Path, layout: ExportFormat, columns: set[str]
) -> None:
    datasets = pytest.importorskip("datasets")
    path = tmp_path / "pairs.jsonl"
    n_rows = write_export(path, odd_pairs(), layout=layout)
    loaded = datasets.load_dataset("json", data_files=str(path), cache_dir=str(tmp_path / "cache"), split="train")
    assert set(loaded.column_names) == columns
    assert len(loaded) == n_rows > len(PAIRS)


def test_texts_come_back_from_datasets_as_they_were(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    path = tmp_path / "pairs.jsonl"
    write_export(path, odd_pairs())
    loaded = datasets.load_dataset("json", data_files=str(path), cache_dir=str(tmp_path / "cache"), split="train")
    rows = {int(row["pair_id"], 16): row for row in loaded}
    assert rows[3]["rejected"][0]["content"] == "nul \x00, line \u2028 and \U0001f600"
    assert rows[3]["chosen"][0]["content"] == "\ufffd lone"
    assert rows[4]["chosen"] == [{"role": "assistant", "content": "", "tool_calls": [READ_CALL]}]
    assert 6 not in rows
    assert [message["content"] for message in rows[8]["prompt"]] == ["Hello?", "mid", "more"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "pairs.jsonl"
    write_export(path, PAIRS[:1])
    before = path.read_bytes()

    def full_disk(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_export(path, PAIRS)
    assert path.read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["pairs.jsonl", "pairs.jsonl.manifest.json"]
    assert len(read_export(path)) == 1


def test_a_pair_changes_only_its_own_line(tmp_path: Path) -> None:
    write_export(tmp_path / "one", PAIRS)
    write_export(tmp_path / "two", [PAIRS[0], replace(PAIRS[1], margin=1.0)])
    one, two = ((tmp_path / name).read_text().splitlines() for name in ("one", "two"))
    assert one[1] == two[1]
    assert one[0] != two[0]


@pytest.mark.parametrize("layout", ExportFormat)
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_no_pairs_make_an_empty_file(tmp_path: Path, layout: ExportFormat, suffix: str) -> None:
    pytest.importorskip("pyarrow")
    path = tmp_path / f"none{suffix}"
    assert write_export(path, [], layout=layout) == 0
    assert read_export(path) == []


texts = st.text(max_size=8) | st.sampled_from(["\ud800", "nul \x00", "\u2028", '{"a": 1}', "null"])
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
calls = st.fixed_dictionaries(
    {"id": texts, "type": st.just("function"), "function": st.fixed_dictionaries({"name": texts, "arguments": texts})}
)
messages: st.SearchStrategy[Message] = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "tool", "system"]), "content": texts | st.none() | json_values},
    optional={
        "tool_calls": st.lists(calls | json_values, max_size=2) | json_values,
        "name": texts,
        "more": json_values,
    },
)
any_pairs = st.lists(
    st.builds(
        PreferencePair,
        id=st.integers(0, 2**64).map(lambda number: f"{number:032x}"),
        alias=texts,
        source=st.sampled_from(["edit", "thumbs"]),
        prompt=st.lists(messages, max_size=3).map(tuple),
        chosen=messages,
        rejected=messages,
        margin=st.floats(0, 1),
        n_voters=st.integers(0, 9),
        principals=st.lists(texts, max_size=3).map(tuple),
        chosen_interaction=st.none() | st.just("c" * 48),
        rejected_interaction=st.just("r" * 48),
        models=st.lists(texts, max_size=2).map(tuple),
        probability=st.floats(0, 1),
        created_at=st.floats(0, 2e9),
    ),
    max_size=4,
    unique_by=lambda pair: pair.id,
)
SETTINGS = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])


@SETTINGS
@given(any_pairs, st.sampled_from(["pairs.jsonl", "pairs.parquet"]))
def test_whole_pairs_come_back_as_they_were(pairs: list[PreferencePair], name: str) -> None:
    pytest.importorskip("pyarrow")
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, name)
        write_export(path, pairs, layout=ExportFormat.PAWL)
        assert read_pairs(path) == sorted(pairs, key=lambda pair: pair.id)


@SETTINGS
@given(any_pairs, st.sampled_from(ExportFormat))
def test_export_and_import_is_the_identity_and_both_files_hold_the_same(
    pairs: list[PreferencePair], layout: ExportFormat
) -> None:
    pytest.importorskip("pyarrow")
    with tempfile.TemporaryDirectory() as directory:
        lines, columns = Path(directory, "pairs.jsonl"), Path(directory, "pairs.parquet")
        write_export(lines, pairs, layout=layout)
        write_export(columns, pairs, layout=layout)
        rows = read_export(lines)
        assert read_export(columns) == rows
        one, two = (json.loads(manifest_path(path).read_bytes()) for path in (lines, columns))
    assert one["content_sha256"] == two["content_sha256"] == content_sha256(rows)
    assert one["sha256"] != two["sha256"]


@pytest.mark.parametrize("layout", ExportFormat)
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_few_rows_are_held_however_many_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: ExportFormat, suffix: str
) -> None:
    pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr("feedback.export_parquet.GROUP_ROWS", 8)
    size, n_pairs = 50_000, 120
    texts = (f"{number} " * (size // 4) for number in range(100, 100 + 2 * n_pairs))
    pairs = (make_pair(number, assistant(next(texts)), assistant(next(texts))) for number in range(n_pairs))
    write_export(tmp_path / f"first.{suffix}", PAIRS, layout=layout)  # What it loads is no row.
    tracemalloc.start()
    try:
        n_rows = write_export(tmp_path / f"pairs.{suffix}", pairs, layout=layout)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert n_rows == n_pairs * (2 if layout is ExportFormat.KTO else 1)
    assert peak < 80 * size < n_pairs * size


def test_in_a_file_of_several_parts_nothing_is_lost_and_the_order_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pyarrow")
    pairs = [make_pair(number, assistant(f"a{number}"), assistant(f"b{number}")) for number in range(25)]
    write_export(tmp_path / "pairs.jsonl", pairs)
    monkeypatch.setattr("feedback.export_parquet.GROUP_ROWS", 10)
    write_export(tmp_path / "pairs.parquet", reversed(pairs))
    assert read_export(tmp_path / "pairs.parquet") == read_export(tmp_path / "pairs.jsonl")


def test_a_file_that_was_changed_or_has_another_layout_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    write_export(path, PAIRS)
    with pytest.raises(DamagedExport, match="whole pairs"):
        read_pairs(path)
    path.write_bytes(path.read_bytes().replace(b"Hello", b"hello"))
    with pytest.raises(DamagedExport, match="changed"):
        read_export(path)
    manifest_path(path).unlink()
    with pytest.raises(DamagedExport, match="manifest"):
        read_export(path)


def test_parquet_loads_with_datasets_as_the_lines_do(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    pair = make_pair(1, assistant(None, tool_calls=[TOOL_CALL]), assistant("b"), (*ASK, assistant("mid"), *ASK))
    path = tmp_path / "pairs.parquet"
    write_export(path, [pair])
    (row,) = datasets.load_dataset("parquet", data_files=str(path), cache_dir=str(tmp_path / "cache"), split="train")
    assert [message["content"] for message in row["prompt"]] == ["Hello?", "mid", "Hello?"]
    assert row["chosen"][0]["tool_calls"] == [READ_CALL]
    assert row["rejected"] == [{"role": "assistant", "content": "b"}]


def test_what_comes_late_in_a_file_has_no_fields_that_others_have(tmp_path: Path) -> None:
    """Types are guessed from the first bytes of JSON lines: a row unlike them would stop the loading further down."""
    datasets = pytest.importorskip("datasets")
    other = {**TOOL_CALL, "function": {"name": "find", "arguments": '{"where": {"x": [1]}}'}}
    told = {"role": "tool", "tool_call_id": "call_1", "content": "there"}
    odd = make_pair(
        999, assistant(None, tool_calls=[TOOL_CALL]), assistant("b"), (*ASK, assistant("", tool_calls=[other]), told)
    )
    path = tmp_path / "pairs.jsonl"
    write_export(path, [*(make_pair(n, assistant(f"a{n}"), assistant(f"b{n}")) for n in range(300)), odd])
    options = {"data_files": str(path), "cache_dir": str(tmp_path / "cache"), "split": "train", "chunksize": 8192}
    loaded = list(datasets.load_dataset("json", **options))
    assert loaded == read_export(path)
    assert len(loaded) == 301
