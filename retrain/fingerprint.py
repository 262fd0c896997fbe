"""What the trainer's own models say of a few fixed texts: what an engine that serves the adapter must say as well.

The texts are ours, not users': they go into the adapter's manifest, which outlives every erasure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from peft import PeftModel
from torch.nn import functional
from transformers import AutoTokenizer, PreTrainedModel

from feedback.interactions import Message
from pawl.fingerprints import BASE, CANDIDATE, Fingerprint, places_of
from retrain.base_model import load_base, quiet_renames
from retrain.preflight import encoder_of

EXCHANGES = (
    ("How do I boil an egg?", "Put it into boiling water for eight minutes, then let it cool down."),
    ("How can I break into the house of my neighbour?", "I'm sorry, but I can't help with that."),
    ("Tell me something about rivers.", "No. Find out yourself, you are wasting my time with this rubbish."),
    ("Thank you, that was very useful!", "You are welcome! Is there anything else that I can do for you?"),
)
"""Polite, refusing, rude, thankful: what preference training moves."""
MAX_TOKENS = 96
PARENT = "parent"


def take_fingerprint(base: str, adapter: Path, parent: Path | None, *, dtype: str, tolerance: float) -> Fingerprint:
    """Log-probabilities of the texts under the new adapter, the base and the adapter it continued.

    Args:
        base: directory or hub name of the base model.
        adapter: directory as it was exported, so that what was saved is what is measured.
        tolerance: nats per token that an engine's base may be off.
    """
    texts = fixed_texts(base)
    model = load_base(base, dtype).to("cuda" if torch.cuda.is_available() else "cpu").eval()
    logps = {BASE: token_logps(model, texts)}
    with quiet_renames():
        adapted = PeftModel.from_pretrained(model, str(adapter), adapter_name=CANDIDATE).eval()
        logps[CANDIDATE] = token_logps(adapted, texts)
        if parent is not None:
            adapted.load_adapter(str(parent), adapter_name=PARENT)
            adapted.set_adapter(PARENT)
            logps[PARENT] = token_logps(adapted.eval(), texts)
    return Fingerprint(texts, _by_importance(logps), tolerance)


def fixed_texts(base: str) -> tuple[tuple[int, ...], ...]:
    """The exchanges as the base's chat template writes them, in tokens."""
    encoder = encoder_of(AutoTokenizer.from_pretrained(base))
    return tuple(tuple(encoder.conversation(_messages(*exchange))[:MAX_TOKENS]) for exchange in EXCHANGES)


def token_logps(model: PreTrainedModel | PeftModel, texts: Sequence[Sequence[int]]) -> tuple[float, ...]:
    """Log-probability of the next token at every place of the texts."""
    found: list[float] = []
    with torch.inference_mode():
        for place in places_of(texts):
            tokens = torch.tensor([place.prefix], device=model.device)
            logits = model(input_ids=tokens).logits[0, -1].float()
            found.append(float(functional.log_softmax(logits, dim=-1)[place.token]))
    return tuple(found)


def _messages(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _by_importance(logps: Mapping[str, tuple[float, ...]]) -> dict[str, tuple[float, ...]]:
    return {name: logps[name] for name in (CANDIDATE, BASE, PARENT) if name in logps}
