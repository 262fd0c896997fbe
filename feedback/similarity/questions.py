"""What was asked, taken apart: the words of the last question, and all that must be the same for two to be compared."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from feedback.filters.message_texts import said
from feedback.interactions import Message
from feedback.messages import canonical_bytes, fingerprint
from feedback.recording import conversation_sha

MAX_CHARS: Final = 2000
"""Of longer questions a model reads but the beginning, and most of them is what they are about."""
_NUMBERS: Final = re.compile(r"\d+")


class Question(NamedTuple):
    """The last question of a conversation."""

    setting: bytes
    """Alike for questions that may be compared: one alias, the same messages before, the same numbers in it."""
    text: str


def question_of(alias: str, prompt_sha: str | None, prompt: Sequence[Message]) -> Question | None:
    """The question that ends a prompt; None when it can be compared with no other.

    Only text is compared, and only where no tools were given: they are known by the prompt's hash alone, together with
    the question. The same goes for prompts that are not kept as they were.
    """
    if not prompt:
        return None
    *before, last = prompt
    if last.get("role") != "user" or not _is_text(last.get("content")):
        return None
    text = said(last)
    if not text.strip() or len(text) > MAX_CHARS or prompt_sha != conversation_sha(alias, tuple(prompt), {}):
        return None
    others = {name: value for name, value in last.items() if name != "content"}
    return Question(fingerprint(canonical_bytes([alias, before, others, _numbers(text)])), text)


def _is_text(content: object) -> bool:
    if isinstance(content, str):
        return True
    parts = content if isinstance(content, list | tuple) else ()
    return bool(parts) and all(isinstance(part, Mapping) and set(part) == {"type", "text"} for part in parts)


def _numbers(text: str) -> list[str]:
    """Another number makes another question, however much it looks like the first, and models see that least.

    >>> _numbers("What is 2 + 13?")
    ['2', '13']
    """
    return _NUMBERS.findall(unicodedata.normalize("NFKC", text))
