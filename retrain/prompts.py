"""Prompts to answer: from a file, or those that people gave feedback on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from feedback.chat_messages import unfit
from feedback.filters.holdout import prompt_key
from feedback.interactions import Message
from retrain.errors import BadData

Prompt = tuple[Message, ...]


def parse_prompts(text: str) -> list[Prompt]:
    """Read a JSON list, or JSON lines, of questions, of lists of messages, or of objects with such a `prompt`.

    >>> parse_prompts('["What is tea?"]')
    [({'role': 'user', 'content': 'What is tea?'},)]

    Raises:
        BadData: something is none of these; the text names its place.
    """
    return [_prompt(number, row) for number, row in enumerate(_rows(text), 1)]


def distinct(prompts: Iterable[Prompt]) -> list[Prompt]:
    """Each prompt once, where it came first, and none that no chat template can show."""
    found: dict[str, Prompt] = {}
    for prompt in prompts:
        if unfit(prompt) is None:
            found.setdefault(prompt_key(prompt), prompt)
    return list(found.values())


def _rows(text: str) -> list[Any]:
    try:
        whole = json.loads(text)
        return list(whole) if isinstance(whole, list) else [whole]
    except ValueError:
        pass
    try:
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    except ValueError as exc:
        raise BadData("prompts: neither a JSON list nor JSON lines") from exc


def _prompt(number: int, row: object) -> Prompt:
    given = row.get("prompt") if isinstance(row, Mapping) else row
    if isinstance(given, str):
        return ({"role": "user", "content": given},)
    if not isinstance(given, list) or not given or not all(map(_is_message, given)):
        raise BadData(f"prompts, number {number}: neither a question nor a list of messages")
    return tuple(given)


def _is_message(message: object) -> bool:
    return isinstance(message, Mapping) and isinstance(message.get("role"), str)
