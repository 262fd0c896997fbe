"""How many tokens a request may cost, and how many it did: what limits are counted in."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from serving.request_fields import CompletionRequest

BYTES_PER_TOKEN: Final = 4
"""Of English text in common tokenizers, roughly; only until the engine has counted."""
OUTPUT_GUESS: Final = 512
"""For a request that sets no bound of its own."""
USAGE: Final = re.compile(rb'"(prompt_tokens|completion_tokens|input_tokens|output_tokens)": ?(\d{1,9})')
TAIL_BYTES: Final = 4096
"""The engine's counts stand at the end of an answer."""


def estimated_tokens(request: CompletionRequest, raw: bytes) -> int:
    """What to set aside for a request before it runs: its text, and the longest answer it allows."""
    output = 0 if request.route == "embeddings" else (request.max_output_tokens or OUTPUT_GUESS)
    return len(raw) // BYTES_PER_TOKEN + output * request.n_choices


def tokens_used(parts: Sequence[bytes], raw: bytes, *, is_stream: bool) -> int:
    """What a request cost by the engine's own count; where it gave none, a token for each event that came.

    >>> tokens_used([b'{"usage": {"prompt_tokens": 7, "completion_tokens": 5}}'], b"", is_stream=False)
    12
    >>> tokens_used([b'data: {"a": 1}\\n\\ndata: {"a": 2}\\n\\n'], bytes(8), is_stream=True)
    4
    """
    body = b"".join(parts[-8:])[-TAIL_BYTES:]
    counts = {name: int(value) for name, value in USAGE.findall(body)}
    if counts:
        return sum(counts.values())
    prompt = len(raw) // BYTES_PER_TOKEN
    if is_stream:
        return prompt + sum(part.count(b"data:") for part in parts)
    return prompt + sum(map(len, parts)) // BYTES_PER_TOKEN
