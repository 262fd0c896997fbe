"""The texts in messages."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import orjson

from feedback.folding import normalized, normalized_bytes, one_spaced
from feedback.interactions import Message

MAX_DEPTH = 100
OPENING = frozenset("{[")
"""What a text begins with that is JSON itself."""


def said(message: Message) -> str:
    """What a message says to a reader; of several parts the texts, joined by newlines.

    >>> said({"content": [{"type": "text", "text": "one"}, {"type": "image_url"}, {"type": "text", "text": "two"}]})
    'one\\ntwo'
    """
    content = message.get("content")
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list | tuple) else ()
    return "\n".join(str(part["text"]) for part in parts if isinstance(part, Mapping) and "text" in part)


def question(prompt: Iterable[Message]) -> str:
    """What the user asked last."""
    asked = [message for message in prompt if message.get("role") == "user"]
    return said(asked[-1]) if asked else ""


def plain(text: str) -> str:
    """The text as far as its words and signs go: one case, one kind of space, one form of each character.

    >>> plain("  Hello,\\n WORLD ") == plain("hello, world")
    True
    """
    return one_spaced(normalized(text))


def opening(text: str, n_words: int) -> bytes | None:
    """The first words of `plain`, or None where they take more than a look at each character by itself.

    >>> opening("Hello, WORLD!  How are you?", 2), opening("Ｈello", 2)
    (b'hello, world!', None)
    """
    return normalized_bytes(" ".join(text.split(None, n_words)[:n_words]))


def all_texts(value: object, depth: int = 0) -> Iterator[str]:
    """Every text in a JSON value. One that is JSON itself, such as a tool's arguments, is opened: escapes hide none."""
    if isinstance(value, str):
        yield value
        yield from _opened(value, depth)
    elif isinstance(value, Mapping | list | tuple) and depth <= MAX_DEPTH:
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from all_texts(each, depth + 1)


def _opened(text: str, depth: int) -> Iterator[str]:
    if text[:1] not in OPENING or "\\" not in text:
        return
    try:
        inside = orjson.loads(text)
    except orjson.JSONDecodeError:
        return
    yield from all_texts(inside, depth + 1)
