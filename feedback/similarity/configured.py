"""How questions are compared, as configured."""

from __future__ import annotations

from feedback.similarity.embedding import Similarity
from feedback.similarity.lexical import LexicalEmbedder
from feedback.similarity.sentence_model import load_sentence_embedder
from pawl.settings import SimilaritySettings


def similarity_of(settings: SimilaritySettings) -> Similarity | None:
    """None when thumbs on nearly the same question are not to be matched.

    Raises:
        EmbedderUnavailable: a model is named that is not on this machine, or what runs it is not installed.
    """
    if not settings.enabled:
        return None
    if settings.model is None:
        how, least, changed = LexicalEmbedder(), settings.min_similarity, settings.max_changed_chars
        return Similarity(how, least, max_changed_chars=changed, neighbours=settings.neighbours)
    model = load_sentence_embedder(settings.model)
    return Similarity(model, settings.model_min_similarity, neighbours=settings.neighbours)
