"""Personal data and secrets taken out of records before they are stored: found by shape, replaced by placeholders.

Everything here is pure. A placeholder says what stood there and which one it was within its record (`[EMAIL_1]`), so
that a conversation about two people stays one about two people. What is found is in `feedback/sensitive/`; names,
addresses and whatever else has no shape stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

import orjson

from feedback.interactions import FeedbackEvent, Interaction
from feedback.sensitive.finding import kinds_worth_trying
from feedback.sensitive.kinds import Kind, places

MAX_DEPTH: Final = 100
TOO_DEEP: Final = "[TOO_DEEP]"
MAX_PASSES: Final = 20
"""Two do for what people write; more are for texts made to need them."""


def redact_interaction(interaction: Interaction) -> Interaction:
    """The same interaction without personal data and secrets in prompt, completion, tools and parameters, at any depth.

    Ids, and who asked, stay as they are: they are what erasure, limits and experiments go by.
    """
    redactor = Redactor()
    prompt, completion = interaction.prompt, interaction.completion
    redacted = replace(
        interaction,
        prompt=tuple(redactor.walk(message) for message in prompt) if prompt is not None else None,
        completion=redactor.walk(completion) if completion is not None else None,
        parameters=redactor.walk(interaction.parameters),
        tools=tuple(redactor.walk(tool) for tool in interaction.tools) if interaction.tools is not None else None,
    )
    return redacted if redactor.n_found else interaction


def redact_event(event: FeedbackEvent) -> FeedbackEvent:
    """The same feedback without them in its free texts: an edit, a comment, a reason, tags."""
    redactor = Redactor()
    is_text = event.type in ("edit", "comment")  # The other values are words of ours, or ids.
    return replace(
        event,
        value=redactor.walk(event.value) if is_text else event.value,
        reason=redactor.walk(event.reason),
        comment=redactor.walk(event.comment),
        tags=redactor.walk(event.tags),
    )


def redact_text(text: str) -> str:
    """One text by itself.

    >>> redact_text("Write to ann@example.com or bob@example.com, not to ann@example.com.")
    'Write to [EMAIL_1] or [EMAIL_2], not to [EMAIL_1].'
    """
    return Redactor().redact(text)


class Redactor:
    """Placeholders of one record: the same thing gets the same one, wherever it stands."""

    def __init__(self) -> None:
        self._names: dict[tuple[str, str], str] = {}
        self._counts: dict[str, int] = {}

    @property
    def n_found(self) -> int:
        """Different things taken out so far."""
        return len(self._names)

    def walk(self, value: Any, depth: int = 0) -> Any:
        """A JSON value with every text in it redacted; what is nested too deep to look at is replaced whole."""
        if isinstance(value, str):
            return self._redact_json(value, depth) or self.redact(value)
        if depth > MAX_DEPTH and isinstance(value, Mapping | list | tuple):
            return TOO_DEEP
        if isinstance(value, Mapping):
            return {key: self.walk(item, depth + 1) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.walk(item, depth + 1) for item in value]
        return value

    def _redact_json(self, text: str, depth: int) -> str | None:
        """Arguments and results of tools are JSON in a text: it stays JSON, and escapes hide nothing."""
        if text[:1] not in ("{", "[") or depth > MAX_DEPTH:
            return None
        try:
            parsed = orjson.loads(text)
        except orjson.JSONDecodeError:
            return None
        redacted = self._walk_numbers(parsed, depth + 1)
        if redacted == parsed:
            return text
        return orjson.dumps(redacted).decode()

    def _walk_numbers(self, value: Any, depth: int) -> Any:
        """As `walk`; inside JSON that a model or a tool wrote, a number may be one of a card or a telephone."""
        if depth > MAX_DEPTH:
            return TOO_DEEP
        if isinstance(value, dict):
            return {key: self._walk_numbers(item, depth + 1) for key, item in value.items()}
        if isinstance(value, list):
            return [self._walk_numbers(item, depth + 1) for item in value]
        if isinstance(value, int) and not isinstance(value, bool):
            shown = self.redact(str(value))
            return shown if shown != str(value) else value
        return self.walk(value, depth)

    def redact(self, text: str) -> str:
        """One text. What stood glued to something that was taken out may show only then, so it is looked at again."""
        for _ in range(MAX_PASSES):
            before = text
            for kind in kinds_worth_trying(text):
                text = self._redact_kind(text, kind)
            if text == before:
                break
        return text

    def _redact_kind(self, text: str, kind: Kind) -> str:
        parts: list[str] = []
        done = 0
        for start, end in places(kind, text):
            if end > start:
                parts += [text[done:start], self._placeholder(kind.name, text[start:end])]
                done = end
        return "".join((*parts, text[done:])) if parts else text

    def _placeholder(self, name: str, found: str) -> str:
        known = self._names.get((name, found))
        if known is None:
            self._counts[name] = self._counts.get(name, 0) + 1
            known = self._names[name, found] = f"[{name}_{self._counts[name]}]"
        return known
