"""What users can say about a completion, and which of their words count."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

from feedback.errors import InvalidFeedback
from feedback.interactions import FeedbackEvent

MAX_ID_CHARS = 128
MAX_USER_CHARS = 512
MAX_TEXT_CHARS = 2**20
"""Of an edit or a comment: as long as any answer that a user may have in front of them."""
MAX_REASON_CHARS = 1_000
MAX_TAGS = 16
MAX_TAG_NAME_CHARS = 64
MAX_TAG_VALUE_CHARS = 512

LIKED_FROM = 0.75
DISLIKED_TO = 0.25
"""Of ratings: the outer quarters say as much as a thumb does, and what is between says neither."""

Value = str | float | bool


class Signal(StrEnum):
    """The kinds of feedback."""

    THUMBS = "thumbs"
    RATING = "rating"
    EDIT = "edit"
    """The text the user wanted instead."""
    CHOICE = "choice"
    """Another completion was preferred over this one."""
    REGENERATE = "regenerate"
    """Another completion replaced this one."""
    REPORT = "report"
    COPY = "copy"
    COMMENT = "comment"


class Thumbs(StrEnum):
    UP = "up"
    DOWN = "down"


_THUMBS = {thumb.value: thumb for thumb in Thumbs}

TEXTS = frozenset({Signal.EDIT, Signal.COMMENT})
"""Whose value is what somebody wrote."""


class Report(StrEnum):
    HARMFUL = "harmful"
    WRONG = "wrong"
    REFUSED = "refused"
    OTHER = "other"


@dataclass(frozen=True)
class Feedback:
    """A feedback call that passed every check."""

    completion_id: str
    type: Signal
    value: Value
    reason: str | None = None
    comment: str | None = None
    tags: Mapping[str, str] | None = None
    user: str | None = None
    """The caller's user, when the body names one."""


FIELDS = frozenset(Feedback.__dataclass_fields__)


def parse_feedback(body: Mapping[str, object]) -> Feedback:
    """Read a feedback call. A null optional field is an absent one; a field nobody defined is refused.

    Raises:
        InvalidFeedback: a field is missing, unknown, of the wrong type, out of range or too long.

    >>> parse_feedback({"completion_id": "chatcmpl-1", "type": "thumbs", "value": "up"}).value
    'up'
    >>> parse_feedback({"completion_id": "chatcmpl-1", "type": "rating", "value": True})
    Traceback (most recent call last):
    ...
    feedback.errors.InvalidFeedback: 'value' of a rating must be a number from 0 to 1
    """
    _refuse_unknown_fields(body)
    completion_id = _text(body.get("completion_id"), "completion_id", MAX_ID_CHARS)
    signal = _signal(body.get("type"))
    return Feedback(
        completion_id=completion_id,
        type=signal,
        value=_value(signal, body.get("value"), completion_id),
        reason=_optional_text(body, "reason", MAX_REASON_CHARS),
        comment=_optional_text(body, "comment", MAX_TEXT_CHARS),
        tags=_tags(body.get("tags")),
        user=_optional_text(body, "user", MAX_USER_CHARS),
    )


def latest(events: Iterable[FeedbackEvent]) -> dict[str, FeedbackEvent]:
    """The events that count, by feedback id: the last one of each, unless it is a retraction.

    Last is by time, then by id, so neither the order of arrival nor a second delivery matters. The result is in
    that order too.
    """
    last = {event.feedback_id: event for event in sorted(events, key=_order)}
    standing = sorted((event for event in last.values() if not event.is_retraction), key=_order)
    return {event.feedback_id: event for event in standing}


def thumb_of(kind: str, value: Value | None) -> Thumbs | None:
    """What a signal says of the answer as a whole, if it says up or down; a retraction has no value and says neither.

    A rating counts from `LIKED_FROM` as up and to `DISLIKED_TO` as down, so four stars of five are liked and two
    are disliked, once they are brought to 0...1.

    >>> [thumb_of("rating", value) for value in (0.75, 0.5)]
    [<Thumbs.UP: 'up'>, None]
    """
    if kind == Signal.THUMBS:
        return _THUMBS.get(str(value))
    if kind != Signal.RATING or not isinstance(value, float | int):
        return None
    return Thumbs.UP if value >= LIKED_FROM else Thumbs.DOWN if value <= DISLIKED_TO else None


def has_text(event: FeedbackEvent) -> bool:
    """Whether an event holds anything that somebody wrote."""
    return bool((event.type in TEXTS and event.value) or event.reason or event.comment or event.tags)


def without_text(event: FeedbackEvent) -> FeedbackEvent:
    """The signal alone, for a completion of which no text may be kept."""
    value = "" if event.type in TEXTS and not event.is_retraction else event.value
    return replace(event, value=value, reason=None, comment=None, tags=None)


def _order(event: FeedbackEvent) -> tuple[float, str]:
    return (event.created_at, event.id)


def _refuse_unknown_fields(body: Mapping[str, object]) -> None:
    unknown = next((field for field in body if field not in FIELDS), None)
    if unknown is not None:
        # ascii(): the name is the caller's own, and may hold what no log or JSON reader wants to see.
        name = ascii(unknown[:MAX_TAG_NAME_CHARS])
        raise InvalidFeedback(f"unknown field {name}; known are {', '.join(sorted(FIELDS))}", name[1:-1])


def _text(value: object, param: str, max_chars: int) -> str:
    if not isinstance(value, str):
        raise InvalidFeedback(f"'{param}' must be a text", param)
    if not value.strip():
        raise InvalidFeedback(f"'{param}' must not be empty", param)
    if len(value) > max_chars:
        raise InvalidFeedback(f"'{param}' must have at most {max_chars} characters, not {len(value)}", param)
    return value


def _optional_text(body: Mapping[str, object], param: str, max_chars: int) -> str | None:
    value = body.get(param)
    return None if value is None else _text(value, param, max_chars)


def _signal(value: object) -> Signal:
    if not isinstance(value, str) or value not in list(Signal):
        raise InvalidFeedback(f"'type' must be one of {', '.join(Signal)}", "type")
    return Signal(value)


def _value(signal: Signal, value: object, completion_id: str) -> Value:
    parsed = _VALUES[signal](value)
    if signal in (Signal.CHOICE, Signal.REGENERATE) and parsed == completion_id:
        raise InvalidFeedback(f"'value' of a {signal} must be another completion's id", "value")
    return parsed


def _rating(value: object) -> float:
    # A bool is an int to Python; NaN fails both comparisons and an infinity one.
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise InvalidFeedback("'value' of a rating must be a number from 0 to 1", "value")
    return abs(float(value))


def _copy(value: object) -> bool:
    if value is not True:
        raise InvalidFeedback("'value' of a copy must be true", "value")
    return True


def _one_of(signal: Signal, words: type[StrEnum]) -> Callable[[object], str]:
    def parse(value: object) -> str:
        if not isinstance(value, str) or value not in list(words):
            raise InvalidFeedback(f"'value' of a {signal} must be one of {', '.join(words)}", "value")
        return value

    return parse


def _text_of(max_chars: int) -> Callable[[object], str]:
    return lambda value: _text(value, "value", max_chars)


_VALUES: Mapping[Signal, Callable[[object], Value]] = {
    Signal.THUMBS: _one_of(Signal.THUMBS, Thumbs),
    Signal.RATING: _rating,
    Signal.EDIT: _text_of(MAX_TEXT_CHARS),
    Signal.CHOICE: _text_of(MAX_ID_CHARS),
    Signal.REGENERATE: _text_of(MAX_ID_CHARS),
    Signal.REPORT: _one_of(Signal.REPORT, Report),
    Signal.COPY: _copy,
    Signal.COMMENT: _text_of(MAX_TEXT_CHARS),
}


def _tags(value: object) -> dict[str, str] | None:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise InvalidFeedback("'tags' must be an object of texts", "tags")
    if len(value) > MAX_TAGS:
        raise InvalidFeedback(f"'tags' must have at most {MAX_TAGS} entries, not {len(value)}", "tags")
    return dict(_tag(name, text) for name, text in value.items())


def _tag(name: object, text: object) -> tuple[str, str]:
    if not isinstance(name, str) or not 1 <= len(name) <= MAX_TAG_NAME_CHARS:
        raise InvalidFeedback(f"a tag's name must be a text of 1 to {MAX_TAG_NAME_CHARS} characters", "tags")
    if not isinstance(text, str) or len(text) > MAX_TAG_VALUE_CHARS:
        raise InvalidFeedback(f"a tag's value must be a text of at most {MAX_TAG_VALUE_CHARS} characters", "tags")
    return name, text
