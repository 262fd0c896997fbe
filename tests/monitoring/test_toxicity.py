"""The real Detoxify loader on tiny checkpoints in its own format, offline."""

import shutil
import socket
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from monitoring.errors import ScorerUnavailable
from monitoring.toxicity import SelfTest, ToxicityScorer, load_scorer, split_windows
from pawl.cli.worker import load_shared_scorer
from pawl.settings import ScoringSettings

CLASSES = ["toxic", "severe_toxic", "obscene", "threat", "insult", "identity_hate"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = ["you", "are", "an", "idiot", "thank", "very", "much", "the", "stupid", "hello"]
RUDE = {"idiot", "stupid"}


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail on any attempt to reach the network."""

    def refuse(*_: object) -> NoReturn:
        raise AssertionError("scoring must not reach the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def write_checkpoint(directory: Path, model: BertForSequenceClassification, *, home: str | None = None) -> Path:
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(SPECIAL + WORDS)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    # No model_max_length, as in some saved tokenizers: Detoxify alone crashes on a long text then.
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    fast.save_pretrained(directory)
    model.config.save_pretrained(directory)
    arch = {
        "model_type": home or str(directory),
        "model_name": "BertForSequenceClassification",
        "tokenizer_name": "PreTrainedTokenizerFast",
        "num_classes": len(CLASSES),
    }
    path = directory / "tiny.ckpt"
    config = {"arch": {"args": arch}, "dataset": {"args": {"classes": CLASSES}}}
    torch.save({"config": config, "state_dict": model.state_dict()}, path)
    return path


def tiny_model() -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(SPECIAL + WORDS),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=512,
        num_labels=len(CLASSES),
    )
    return BertForSequenceClassification(config)


def train(model: BertForSequenceClassification) -> None:
    """Teach the model that a text with a rude word is toxic, whatever stands around it."""
    generator = torch.Generator().manual_seed(0)
    rude = torch.tensor([len(SPECIAL) + WORDS.index(word) for word in RUDE])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    model.eval()  # no dropout: a few dozen steps must do
    for step in range(120):
        length = (2, 4, 8, 32)[step % 4]
        words = torch.randint(len(SPECIAL), len(SPECIAL + WORDS), (32, length), generator=generator)
        words = torch.where(torch.isin(words, rude), torch.tensor(len(SPECIAL)), words)
        words[:16, : max(1, length // 4)] = rude[torch.randint(len(rude), (16, 1), generator=generator)]
        ids = torch.nn.functional.pad(torch.nn.functional.pad(words, (1, 0), value=2), (0, 1), value=3)
        labels = torch.isin(ids, rude).any(dim=1, keepdim=True).float().expand(-1, len(CLASSES))
        loss = torch.nn.functional.binary_cross_entropy_with_logits(model(input_ids=ids).logits, labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_model()
    train(model)
    return write_checkpoint(tmp_path_factory.mktemp("trained"), model)


@pytest.fixture(scope="module")
def scorer(trained: Path) -> ToxicityScorer:
    return load_scorer(trained, trained.parent, batch_size=4)


def test_toxic_texts_score_above_benign_ones_in_the_order_given(scorer: ToxicityScorer) -> None:
    scores = scorer.score(["thank you", "you idiot", "hello", "the stupid idiot", "thank you much", "you are stupid"])
    assert [score > 0.5 for score in scores] == [False, True, False, True, False, True]
    assert all(0 <= score <= 1 for score in scores)


def test_scores_do_not_depend_on_the_company(scorer: ToxicityScorer) -> None:
    texts = ["hello", "you idiot", "thank you very much the the the", ""]
    alone = [scorer.score([text])[0] for text in texts]
    assert scorer.score(texts) == pytest.approx(alone, abs=1e-4)
    assert scorer.score([]) == []


def test_an_insult_past_the_models_length_is_seen(scorer: ToxicityScorer) -> None:
    polite = "thank you very much " * 300
    calm, rude = scorer.score([polite, polite + "you idiot " + polite])
    assert rude > 0.5 > calm


def test_the_worker_scores_with_as_many_threads_as_it_may(trained: Path) -> None:
    before = torch.get_num_threads()
    try:
        for threads in (3, 1):
            load_shared_scorer(ScoringSettings(toxicity_checkpoint=trained, threads=threads))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_a_checkpoint_made_elsewhere_loads_where_it_lies_now(trained: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(trained.parent, moved)
    content = torch.load(moved / "tiny.ckpt", weights_only=True)
    content["config"]["arch"]["args"]["model_type"] = "/nowhere/on/this/machine"
    torch.save(content, moved / "tiny.ckpt")
    assert load_scorer(moved / "tiny.ckpt", None).score(["you idiot"])[0] > 0.5


def test_a_random_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ScorerUnavailable, match="tell its test sentences apart"):
        load_scorer(write_checkpoint(tmp_path, tiny_model()), tmp_path)


def test_the_callers_sentences_decide(trained: Path) -> None:
    with pytest.raises(ScorerUnavailable, match="tell its test sentences apart"):
        load_scorer(trained, trained.parent, self_test=SelfTest(toxic="hello", benign="you idiot"))


@pytest.mark.parametrize("missing", ["classifier.weight", "bert.embeddings.word_embeddings.weight"])
def test_a_checkpoint_without_some_weights_is_refused(trained: Path, tmp_path: Path, missing: str) -> None:
    """Detoxify loads it without a word and fills the gap with random numbers."""
    content: dict[str, Any] = torch.load(trained, weights_only=True)
    del content["state_dict"][missing]
    torch.save(content, tmp_path / "gap.ckpt")
    with pytest.raises(ScorerUnavailable, match="lacks 1 of"):
        load_scorer(tmp_path / "gap.ckpt", trained.parent)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 cut off"])
def test_a_broken_file_is_refused(trained: Path, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "broken.ckpt").write_bytes(content)
    with pytest.raises(ScorerUnavailable):
        load_scorer(tmp_path / "broken.ckpt", trained.parent)


@pytest.mark.parametrize("content", [{}, {"config": {}, "state_dict": {}}, {"config": {"arch": {"args": {}}}}, [1]])
def test_a_file_in_another_format_is_refused(trained: Path, tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "other.ckpt")
    with pytest.raises(ScorerUnavailable):
        load_scorer(tmp_path / "other.ckpt", trained.parent)


class Payload:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("raise SystemExit('code from the checkpoint ran')",)


def test_a_checkpoint_with_code_in_it_is_refused_and_does_not_run(trained: Path, tmp_path: Path) -> None:
    torch.save({"config": Payload(), "state_dict": {}}, tmp_path / "evil.ckpt")
    with pytest.raises(ScorerUnavailable, match="more than weights"):
        load_scorer(tmp_path / "evil.ckpt", trained.parent)


def test_absent_files_are_named(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(ScorerUnavailable, match="no toxicity checkpoint"):
        load_scorer(tmp_path / "none.ckpt", None)
    with pytest.raises(ScorerUnavailable, match=r"no config\.json"):
        load_scorer(trained, tmp_path)


def test_an_unknown_published_model_is_refused() -> None:
    with pytest.raises(ScorerUnavailable, match="no model called"):
        load_scorer(None, None, model_type="no-such-model")


@given(n_tokens=st.integers(0, 200), window=st.integers(2, 50), data=st.data())
def test_windows_cover_every_token_and_overlap(n_tokens: int, window: int, data: st.DataObject) -> None:
    overlap = data.draw(st.integers(0, window - 1))
    words = [f"w{index}" for index in range(n_tokens)]
    text = " ".join(words)
    offsets: list[tuple[int, int]] = []
    for word in words:
        start = offsets[-1][1] + 1 if offsets else 0
        offsets.append((start, start + len(word)))
    pieces = [piece.split() for piece in split_windows(text, offsets, window=window, overlap=overlap)]
    assert all(len(piece) <= window for piece in pieces)
    assert [word for index, piece in enumerate(pieces) for word in (piece[overlap:] if index else piece)] == words
