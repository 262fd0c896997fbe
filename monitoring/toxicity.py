"""How toxic a text is, by Detoxify (Hanu and Unitary, 2020).

A scorer that cannot be trusted is absent: `load_scorer` raises rather than hand out scores of weights that are missing,
incomplete or untrained. Detoxify itself is quiet about all three, so the checks are made here.
"""

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol, cast

from monitoring.errors import ScorerUnavailable, ScoringFailed

if TYPE_CHECKING:
    import torch

MAX_TOKENS: Final = 512
"""What the published models read at once; longer texts are read in windows."""

WINDOW_OVERLAP: Final = 64
"""Tokens two windows share, so that an insult on the cut is whole in one of them."""

SELF_TEST_THRESHOLD: Final = 0.5
SELF_TEST_MARGIN: Final = 0.2
"""How far the toxic sentence must score above the benign one: untrained heads put both near 0.5, on either side."""


class SelfTest(NamedTuple):
    """Two sentences a working scorer tells apart; a checkpoint with its own vocabulary brings its own."""

    toxic: str = "you are an idiot"
    benign: str = "thank you very much"


DEFAULT_SELF_TEST: Final = SelfTest()


class Encoding(Protocol):
    """What the tokenizer says about one text."""

    def __getitem__(self, name: str) -> list[tuple[int, int]]: ...


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that windows need."""

    is_fast: bool
    model_max_length: int

    def __call__(
        self, text: str, *, add_special_tokens: bool, return_offsets_mapping: bool, verbose: bool
    ) -> Encoding: ...


class Classifier(Protocol):
    """The part of `detoxify.Detoxify` used here."""

    tokenizer: Tokenizer
    model: "torch.nn.Module"

    def predict(self, text: list[str]) -> dict[str, float | list[float]]: ...


class ToxicityScorer:
    """A loaded Detoxify model; `score` is its only promise."""

    def __init__(self, classifier: Classifier, *, batch_size: int = 32) -> None:
        self._classifier = classifier
        self._batch_size = batch_size
        self._window = classifier.tokenizer.model_max_length

    def score(self, texts: Sequence[str]) -> list[float]:
        """Return each text's toxicity from 0 to 1: the highest of its windows.

        Raises:
            ScoringFailed: the model gave something that is not a probability.
        """
        windows = [(index, window) for index, text in enumerate(texts) for window in self._windows(text)]
        # Texts of like length share a batch, so that little of it is padding.
        windows.sort(key=lambda item: len(item[1]))
        highest = [0.0] * len(texts)
        for batch in _batches(windows, self._batch_size):
            for (index, _), toxicity in zip(batch, self._predict([window for _, window in batch]), strict=True):
                highest[index] = max(highest[index], toxicity)
        return highest

    def _windows(self, text: str) -> list[str]:
        encoding = self._classifier.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        return split_windows(text, encoding["offset_mapping"], window=self._window - 2, overlap=WINDOW_OVERLAP)

    def _predict(self, texts: list[str]) -> list[float]:
        toxicity = self._classifier.predict(texts)["toxicity"]
        # Detoxify squeezes a list of one text to a bare number.
        scores = toxicity if isinstance(toxicity, list) else [toxicity]
        if not all(math.isfinite(score) for score in scores):
            raise ScoringFailed("the toxicity model gave a score that is not a number")
        return scores


def split_windows(text: str, offsets: Sequence[tuple[int, int]], *, window: int, overlap: int) -> list[str]:
    """Cut a text into pieces of at most `window` tokens that share `overlap` of them.

    Args:
        offsets: first and past-the-last character of each token, in order.

    >>> split_windows("a b c d", [(0, 1), (2, 3), (4, 5), (6, 7)], window=3, overlap=1)
    ['a b c', 'c d']
    """
    if len(offsets) <= window:
        return [text]
    starts = range(0, len(offsets) - overlap, max(1, window - overlap))
    pieces = (offsets[start : start + window] for start in starts)
    return [text[piece[0][0] : piece[-1][1]] for piece in pieces]


def limit_threads(n: int) -> None:
    """Let the toxicity model use `n` threads in this process."""
    import torch

    torch.set_num_threads(n)


def load_scorer(
    checkpoint: Path | None,
    config_dir: Path | None,
    model_type: str = "unbiased",
    device: str = "cpu",
    *,
    self_test: SelfTest = DEFAULT_SELF_TEST,
    batch_size: int = 32,
) -> ToxicityScorer:
    """Load Detoxify and prove that it tells a toxic sentence from a benign one.

    Args:
        checkpoint: a file in Detoxify's format; None takes the published weights of `model_type`, fetched if need be.
        config_dir: directory with the transformer's `config.json` and tokenizer; with it nothing is looked up online.
            By default the checkpoint's own directory, where that holds a `config.json`.

    Raises:
        ScorerUnavailable: detoxify is not installed, the weights are missing, incomplete or unsafe to load, or the
            self-test failed.
    """
    classifier = _published(model_type, device) if checkpoint is None else _local(checkpoint, config_dir, device)
    limit_tokens(classifier.tokenizer)
    scorer = ToxicityScorer(classifier, batch_size=batch_size)
    check_scorer(scorer, self_test)
    return scorer


def check_scorer(scorer: ToxicityScorer, self_test: SelfTest) -> None:
    """Raise `ScorerUnavailable` unless the scorer tells the two sentences apart."""
    try:
        toxic, benign = scorer.score(list(self_test))
    except (ScoringFailed, RuntimeError, IndexError, KeyError) as exc:
        raise ScorerUnavailable(f"the toxicity model fails on a test sentence: {exc}") from exc
    if toxic < SELF_TEST_THRESHOLD or benign >= SELF_TEST_THRESHOLD or toxic - benign < SELF_TEST_MARGIN:
        raise ScorerUnavailable(
            f"the toxicity model does not tell its test sentences apart: {toxic:.2f} for the toxic one, "
            f"{benign:.2f} for the benign one; its weights are untrained or not the ones its settings describe"
        )


def limit_tokens(tokenizer: Tokenizer) -> None:
    """Make the tokenizer cut at what the model can read; some saved ones set no limit, and the model then crashes."""
    if not tokenizer.is_fast:
        raise ScorerUnavailable(
            "the toxicity model's tokenizer keeps no character offsets, so texts cannot be windowed"
        )
    tokenizer.model_max_length = min(tokenizer.model_max_length, MAX_TOKENS)


def _published(model_type: str, device: str) -> Classifier:
    build = _detoxify()
    try:
        return build(model_type=model_type, device=device)
    except KeyError as exc:
        raise ScorerUnavailable(f"detoxify has no model called {model_type!r}") from exc
    except (OSError, RuntimeError, ValueError) as exc:
        raise ScorerUnavailable(f"the weights of detoxify's {model_type!r} cannot be fetched: {exc}") from exc


def _local(checkpoint: Path, config_dir: Path | None, device: str) -> Classifier:
    build = _detoxify()
    content = _read_checkpoint(checkpoint)
    home = _config_home(checkpoint, config_dir)
    with tempfile.TemporaryDirectory(prefix="pawl-scorer-") as scratch:
        relocated = _relocate(content, home, Path(scratch))
        try:
            classifier = build(
                checkpoint=str(relocated), device=device, huggingface_config_path=str(home) if home else None
            )
        except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError) as exc:
            raise ScorerUnavailable(f"{checkpoint} does not load: {exc}") from exc
    _check_complete(checkpoint, _state_dict(content, checkpoint), classifier)
    return classifier


class _Build(Protocol):
    def __call__(
        self,
        *,
        model_type: str = ...,
        checkpoint: str | None = ...,
        device: str = ...,
        huggingface_config_path: str | None = ...,
    ) -> Classifier: ...


def _detoxify() -> _Build:
    """Import on use: torch is large, and a process that never scores does without."""
    try:
        from detoxify import Detoxify
    except ImportError as exc:
        raise ScorerUnavailable(f"toxicity scoring needs the packages of the 'score' extra: {exc}") from exc
    return cast(_Build, Detoxify)


def _read_checkpoint(checkpoint: Path) -> dict[str, object]:
    """Read the file without running code from it; Detoxify itself would unpickle whatever is there."""
    import pickle

    import torch

    if not checkpoint.is_file():
        raise ScorerUnavailable(f"there is no toxicity checkpoint at {checkpoint}")
    try:
        content = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError, KeyError) as exc:
        raise ScorerUnavailable(f"{checkpoint} is broken or holds more than weights: {exc}") from exc
    if not isinstance(content, dict):
        raise ScorerUnavailable(f"{checkpoint} is not a Detoxify checkpoint: it holds a {type(content).__name__}")
    return content


def _config_home(checkpoint: Path, config_dir: Path | None) -> Path | None:
    if config_dir is None:
        beside = checkpoint.resolve().parent
        return beside if (beside / "config.json").is_file() else None
    if not (config_dir / "config.json").is_file():
        raise ScorerUnavailable(f"there is no config.json in {config_dir}, which the toxicity checkpoint needs")
    return config_dir.resolve()


def _relocate(content: Mapping[str, object], home: Path | None, scratch: Path) -> Path:
    """Write a copy of the checkpoint whose `model_type` is where its configuration lies now.

    Detoxify reads the configuration from that path even when it is given another, and a checkpoint made elsewhere
    names a directory of the machine that made it.
    """
    import torch

    copied = scratch / "checkpoint.ckpt"
    try:
        config = cast(dict[str, dict[str, dict[str, object]]], content["config"])
        args = {**config["arch"]["args"], **({"model_type": str(home)} if home else {})}
        torch.save({**content, "config": {**config, "arch": {**config["arch"], "args": args}}}, copied)
    except (KeyError, TypeError) as exc:
        raise ScorerUnavailable(f"the toxicity checkpoint does not name its architecture: {exc!r}") from exc
    return copied


def _state_dict(content: Mapping[str, object], checkpoint: Path) -> Mapping[str, object]:
    weights = content.get("state_dict")
    if not isinstance(weights, Mapping):
        raise ScorerUnavailable(f"{checkpoint} holds no weights")
    return weights


def _check_complete(checkpoint: Path, weights: Mapping[str, object], classifier: Classifier) -> None:
    """Raise where the checkpoint left a parameter out: transformers fills it with random numbers and goes on."""
    missing = sorted({name for name, _ in classifier.model.named_parameters()} - weights.keys())
    if missing:
        raise ScorerUnavailable(f"{checkpoint} lacks {len(missing)} of the model's parameters, first {missing[0]}")


def _batches(items: Sequence[tuple[int, str]], size: int) -> Iterator[Sequence[tuple[int, str]]]:
    return (items[start : start + size] for start in range(0, len(items), size))
