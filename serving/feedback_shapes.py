"""Feedback in the shapes of TensorZero and Langfuse, read as our own; which name means what is configured.

TensorZero: https://www.tensorzero.com/docs/gateway/api-reference/feedback
Langfuse: https://api.reference.langfuse.com (scores; ingestion, whose `score-create` events its SDKs send in batches)
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from feedback.errors import InvalidFeedback
from feedback.signals import TEXTS, Report, Signal
from pawl.ids import completion_suffix
from pawl.settings import ServingSettings

MIDDLE = 0.5
"""Of a scale: above it a thumb is up, below it down."""


@dataclass(frozen=True)
class Meaning:
    """What a metric's or score's name stands for."""

    signal: Signal
    low: float = 0.0
    """The value that is worst for users; true counts 1, false 0."""
    high: float = 1.0
    """The value that is best for them. Below `low` for what should be rare, such as `thumbs_down`."""
    report: Report = Report.OTHER
    """What a report says that comes as a plain yes."""


Meanings = Mapping[str, Meaning]

OWN: Meanings = {signal.value: Meaning(signal) for signal in Signal}
TENSORZERO: Meanings = {**OWN, "demonstration": Meaning(Signal.EDIT)}
"""TensorZero reserves `comment` and `demonstration`."""
LANGFUSE: Meanings = {**OWN, "user-feedback": Meaning(Signal.THUMBS)}
"""The name in its guide to user feedback."""
BY_DATA_TYPE: Meanings = {"CORRECTION": Meaning(Signal.EDIT), "TEXT": Meaning(Signal.COMMENT)}
"""What a score of these types says whatever its name is."""


def meanings_of(settings: ServingSettings) -> Meanings:
    """What `serving.feedback_names` says."""
    return {
        name: Meaning(Signal(one.signal), one.low, one.high, Report(one.report))
        for name, one in settings.feedback_names.items()
    }


def from_tensorzero(body: Mapping[str, Any], meanings: Meanings) -> dict[str, Any]:
    """A body of `POST /feedback`, as one of `POST /v1/feedback`; whatever is wrong with its parts shows there.

    Raises:
        InvalidFeedback: it names no metric that is known, or not exactly one completion, or its value means nothing.

    >>> from_tensorzero({"inference_id": "chatcmpl-1", "metric_name": "thumbs", "value": True}, {})
    {'completion_id': 'chatcmpl-1', 'type': 'thumbs', 'value': 'up'}
    """
    targets = [body[name] for name in ("inference_id", "episode_id") if body.get(name) is not None]
    if len(targets) != 1:
        raise InvalidFeedback("exactly one of 'inference_id' and 'episode_id' must be given", "inference_id")
    meaning = _meaning({**TENSORZERO, **meanings}, body.get("metric_name"), "metric_name")
    own = {"completion_id": targets[0], "type": meaning.signal.value, "value": _value(meaning, body.get("value"))}
    return own | ({"tags": body["tags"]} if body.get("tags") else {})


def from_langfuse(score: Mapping[str, Any], meanings: Meanings) -> dict[str, Any]:
    """A score, as a body of `POST /v1/feedback`. Of a trace and an observation, the one that is a completion is rated.

    Raises:
        InvalidFeedback: see `from_tensorzero`.

    >>> from_langfuse({"traceId": "chatcmpl-1", "name": "stars", "value": 4}, {"stars": Meaning(Signal.RATING, 1, 5)})
    {'completion_id': 'chatcmpl-1', 'type': 'rating', 'value': 0.75}
    """
    by_type = BY_DATA_TYPE.get(str(score.get("dataType")))
    named = {**LANGFUSE, **meanings}
    meaning = named.get(str(score.get("name"))) or by_type or _meaning(named, score.get("name"), "name")
    own = {
        "completion_id": _completion([score.get("observationId"), score.get("traceId")]),
        "type": meaning.signal.value,
        "value": _value(meaning, score.get("value")),
    }
    optional = {"comment": score.get("comment"), "tags": _tags(score.get("metadata"))}
    return own | {name: value for name, value in optional.items() if value}


def _completion(targets: Iterable[object]) -> object:
    given = [target for target in targets if target is not None]
    if not given:
        raise InvalidFeedback("'traceId' or 'observationId' must be the id of a completion", "traceId")
    return next((one for one in given if isinstance(one, str) and completion_suffix(one)), given[-1])


def _meaning(meanings: Meanings, name: object, param: str) -> Meaning:
    if not isinstance(name, str) or name not in meanings:
        # ascii(): the name is the caller's own.
        raise InvalidFeedback(
            f"{param} {ascii(name)[:80]} is not known here: say what it means under serving.feedback_names", param
        )
    return meanings[name]


def _value(meaning: Meaning, value: object) -> object:
    if meaning.signal in TEXTS:
        return _text(value)
    if meaning.signal is Signal.THUMBS and value not in ("up", "down"):
        return _thumb(meaning, value)
    if meaning.signal is Signal.RATING:
        return _share(meaning, value)
    if meaning.signal is Signal.COPY:
        return bool(_share(meaning, value))
    if meaning.signal is Signal.REPORT and not isinstance(value, str):
        return _report(meaning, value)
    return value


def _text(value: object) -> object:
    """A text as it is; TensorZero's content blocks, where all of them are text, as one."""
    blocks = value if isinstance(value, list) and value else None
    if blocks is None:
        return value
    texts = [block.get("text") for block in blocks if isinstance(block, dict) and block.get("type") == "text"]
    if len(texts) < len(blocks) or not all(isinstance(text, str) for text in texts):
        raise InvalidFeedback("'value' must be a text, or content blocks that are all text", "value")
    return "".join(str(text) for text in texts)


def _share(meaning: Meaning, value: object) -> float:
    """Where a value lies between the worst and the best."""
    if not isinstance(value, int | float):
        raise InvalidFeedback("'value' must be a number or a boolean", "value")
    if not min(meaning.low, meaning.high) <= value <= max(meaning.low, meaning.high):
        raise InvalidFeedback(f"'value' must lie between {meaning.low:g} and {meaning.high:g}", "value")
    return (value - meaning.low) / (meaning.high - meaning.low)


def _thumb(meaning: Meaning, value: object) -> str:
    share = _share(meaning, value)
    if share == MIDDLE:
        raise InvalidFeedback("'value' lies in the middle of its scale, and a thumb is up or down", "value")
    return "up" if share > MIDDLE else "down"


def _report(meaning: Meaning, value: object) -> str:
    if not _share(meaning, value):
        raise InvalidFeedback("'value' of a report must not be false: that reports nothing", "value")
    return meaning.report.value


def _tags(metadata: object) -> dict[str, str]:
    if not isinstance(metadata, Mapping):
        return {}
    return {str(name): value if isinstance(value, str) else json.dumps(value) for name, value in metadata.items()}
