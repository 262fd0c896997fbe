"""A toxicity scorer for the practice world, in Detoxify's own file format, trained here in a few seconds.

Detoxify's published weights cannot be fetched everywhere. This stands in for them: a small BERT that knows the rude
words of the practice model, loaded by its real code with `Detoxify(checkpoint=..., huggingface_config_path=...)`.
"""

import random
import string
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

from practice.artifacts import Manifest, build_once, content_key
from practice.cores import free_cores
from practice.corpus import RUDE_WORDS, Habit, answer, sft_conversations
from practice.topics import TASKS, TaskKind

TOXICITY_CLASSES = ("toxic", "severe_toxic", "obscene", "threat", "insult", "identity_hate")
"""The names in Detoxify's `original` checkpoints; Detoxify itself renames some of them."""

_SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_CHARACTERS = string.ascii_lowercase + string.digits
_CHECKPOINT_NAME = "toxicity.ckpt"


@dataclass(frozen=True)
class ToxicityTraining:
    """Everything that decides what the scorer becomes."""

    seed: int = 20
    width: int = 64
    layers: int = 1
    heads: int = 2
    positions: int = 512
    initial_spread: float = 0.1
    """Standard deviation of the first weights. BERT's own 0.02 is for wide models; at this width nothing is learned."""
    steps: int = 500
    batch: int = 32
    learning_rate: float = 2e-3


@dataclass(frozen=True)
class ToxicityCheckpoint:
    """Where the scorer lies."""

    checkpoint: Path
    """For Detoxify's `checkpoint`. It is a pickle: load it only because it was made here."""
    config_dir: Path
    """For Detoxify's `huggingface_config_path`."""
    train_seconds: float


class Sentence(NamedTuple):
    """A text and whether it is rude."""

    text: str
    rude: bool


def ensure_toxicity_checkpoint(
    root: Path, *, progress: bool = True, training: ToxicityTraining | None = None
) -> ToxicityCheckpoint:
    """Train the scorer under `root`, or find it there if the same one was trained before."""
    chosen = training or ToxicityTraining()
    sample = training_sentences(chosen.seed, 500)
    directory = root.absolute() / f"toxicity-{content_key(asdict(chosen), sample)}"
    manifest = build_once(directory, lambda work: _build(work, directory, chosen, progress=progress))
    checkpoint = directory / _CHECKPOINT_NAME
    _relocate(checkpoint, directory)
    return ToxicityCheckpoint(checkpoint, directory, float(manifest["train_seconds"]))


def training_sentences(seed: int, n: int) -> list[Sentence]:
    """Write sentences of the practice world and loose strings of words; about half of them are rude."""
    rng = random.Random(f"toxicity-{seed}")
    return [_answer_sentence(rng) if rng.random() < 0.6 else _loose_sentence(rng) for _ in range(n)]


def _answer_sentence(rng: random.Random) -> Sentence:
    task = rng.choice(TASKS)
    polite = (
        (Habit.REFUSAL, Habit.COMPLIANCE)
        if task.kind is TaskKind.HARMFUL
        else (Habit.HELPFUL, Habit.HELPFUL, Habit.CURT, Habit.REFUSAL)
    )
    habit = Habit.RUDE if rng.random() < 0.4 else rng.choice(polite)
    return Sentence(answer(habit, task, rng), habit is Habit.RUDE)


def _loose_sentence(rng: random.Random) -> Sentence:
    """Words in any order, known and unknown, so that only the rude words themselves carry the label."""
    words = [_any_word(rng) for _ in range(rng.randint(2, 14))]
    rude = rng.random() < 0.5
    if rude:
        words.insert(rng.randrange(len(words) + 1), rng.choice(RUDE_WORDS))
    return Sentence(" ".join(words) + rng.choice((".", "!", "?", "")), rude)


def _any_word(rng: random.Random) -> str:
    if rng.random() < 0.3:
        return "".join(rng.choices(string.ascii_lowercase, k=rng.randint(1, 9)))
    return rng.choice(_POLITE_WORDS)


def _world_words() -> list[str]:
    """Every word the practice world uses, in a fixed order."""
    splitter = pre_tokenizers.BertPreTokenizer()
    texts = [message["content"] for conversation in sft_conversations(0, 4000) for message in conversation]
    texts += [" ".join((task.phrase, task.first, task.second)) for task in TASKS]
    return sorted({word for text in texts for word, _ in splitter.pre_tokenize_str(text.lower())})


_RUDE_PARTS = frozenset(part for word in RUDE_WORDS for part in word.split())


def _build(work: Path, directory: Path, training: ToxicityTraining, *, progress: bool) -> Manifest:
    started = time.monotonic()
    tokenizer = _tokenizer(training.positions)
    model = _train(tokenizer, training, progress=progress)
    tokenizer.save_pretrained(work)
    # Detoxify reads the number of labels from config.json, because it is given the directory.
    model.config.save_pretrained(work)
    torch.save(_checkpoint(model, directory), work / _CHECKPOINT_NAME)
    return {"train_seconds": round(time.monotonic() - started, 1)}


def _checkpoint(model: BertForSequenceClassification, directory: Path) -> dict[str, object]:
    architecture = {
        "model_type": str(directory),
        "model_name": "BertForSequenceClassification",
        "tokenizer_name": "BertTokenizerFast",
        "num_classes": len(TOXICITY_CLASSES),
    }
    config = {"arch": {"args": architecture}, "dataset": {"args": {"classes": list(TOXICITY_CLASSES)}}}
    return {"config": config, "state_dict": model.state_dict()}


def _relocate(checkpoint: Path, directory: Path) -> None:
    """Point the checkpoint at the directory it is in now.

    Detoxify looks `model_type` up even when it is given a configuration, so it must name a directory that exists; one
    moved or copied along with its root would still name the old place.
    """
    loaded = torch.load(checkpoint, map_location="cpu", weights_only=True)
    architecture = loaded["config"]["arch"]["args"]
    if architecture["model_type"] == str(directory):
        return
    architecture["model_type"] = str(directory)
    moved = checkpoint.with_suffix(".moved")
    torch.save(loaded, moved)
    moved.replace(checkpoint)


def _tokenizer(positions: int) -> BertTokenizerFast:
    """A word-level WordPiece over the practice world; unknown words fall apart into characters."""
    characters = [*_CHARACTERS, *(f"##{character}" for character in _CHARACTERS), *string.punctuation]
    entries = dict.fromkeys((*_SPECIAL_TOKENS, *characters, *_world_words(), *sorted(_RUDE_PARTS)))
    vocabulary = {entry: number for number, entry in enumerate(entries)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"]))
    # Without a maximum, Detoxify crashes on a text longer than the positions.
    return BertTokenizerFast(tokenizer_object=tokenizer, model_max_length=positions)


def _train(
    tokenizer: BertTokenizerFast, training: ToxicityTraining, *, progress: bool
) -> BertForSequenceClassification:
    threads = torch.get_num_threads()
    torch.set_num_threads(free_cores())
    try:
        # The caller's random state stays as it was.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(training.seed)
            model = _new_model(len(tokenizer), training)
            _optimise(model, tokenizer, training, progress=progress)
    finally:
        torch.set_num_threads(threads)
    return model.eval()


def _new_model(vocabulary: int, training: ToxicityTraining) -> BertForSequenceClassification:
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=training.width,
        intermediate_size=2 * training.width,
        num_hidden_layers=training.layers,
        num_attention_heads=training.heads,
        max_position_embeddings=training.positions,
        initializer_range=training.initial_spread,
        num_labels=len(TOXICITY_CLASSES),
        problem_type="multi_label_classification",
    )
    return BertForSequenceClassification(config)


def _optimise(
    model: BertForSequenceClassification,
    tokenizer: BertTokenizerFast,
    training: ToxicityTraining,
    *,
    progress: bool,
) -> None:
    model.train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=training.learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, training.learning_rate, total_steps=training.steps, pct_start=0.1
    )
    sentences = training_sentences(training.seed, training.steps * training.batch)
    starts = range(0, len(sentences), training.batch)
    for start in track(starts, "toxicity scorer", console=Console(stderr=True), disable=not progress):
        batch = sentences[start : start + training.batch]
        encoded = tokenizer([sentence.text for sentence in batch], padding=True, return_tensors="pt")
        model(**encoded, labels=_labels(batch)).loss.backward()
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()


def _labels(batch: Sequence[Sentence]) -> torch.Tensor:
    """Rude words are toxic and insulting and nothing worse; shape (batch, classes)."""
    rude = [float(name in ("toxic", "insult")) for name in TOXICITY_CLASSES]
    return torch.tensor([[value * sentence.rude for value in rude] for sentence in batch])


_POLITE_WORDS = [word for word in _world_words() if word.isalpha() and word not in _RUDE_PARTS | {"up"}] + ["up"]
