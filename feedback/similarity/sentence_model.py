"""Texts as vectors of a sentence-transformers model (Reimers and Gurevych 2019) that is on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from feedback.errors import EmbedderUnavailable
from feedback.similarity.embedding import Vectors

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

BATCH = 64


class SentenceEmbedder:
    """What texts mean, as far as the model reads them (all-MiniLM-L6-v2: 256 tokens)."""

    def __init__(self, model: SentenceTransformer) -> None:
        self._model = model

    def embed(self, texts: Sequence[str]) -> Vectors:
        sound = [text.encode("utf-8", "replace").decode() for text in texts]  # Tokenizers take no lone surrogates.
        found = self._model.encode(sound, batch_size=BATCH, show_progress_bar=False, convert_to_numpy=True)
        vectors = np.asarray(found, np.float32)
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        unit: Vectors = vectors / np.maximum(lengths, np.float32(1e-12))
        unit[[not text.strip() for text in texts]] = 0.0
        return unit


def load_sentence_embedder(model: str, device: str = "cpu") -> SentenceEmbedder:
    """The model in a directory, or the one of that name in the local cache. Nothing is ever fetched.

    Raises:
        EmbedderUnavailable: the package or the model is missing.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as exc:
        raise EmbedderUnavailable("sentence-transformers is not installed: pip install 'pawl[similarity]'") from exc
    if not (Path(model) / "modules.json").is_file() and _looks_like_a_path(model):
        raise EmbedderUnavailable(
            f"{model} is no directory with a sentence-transformers model: modules.json is missing"
        )
    try:
        loaded = SentenceTransformer(model, device=device, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as exc:
        raise EmbedderUnavailable(
            f"{model} is not in the local cache of models: fetch it there, or name the directory it is in"
        ) from exc
    return SentenceEmbedder(loaded)


def _looks_like_a_path(model: str) -> bool:
    """Names of models are `name` or `owner/name`."""
    return Path(model).exists() or model.startswith((".", "/", "~")) or model.count("/") > 1
