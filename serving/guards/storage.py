"""What is done to records on their way to the database: redaction, timed and counted. Runs off the event loop."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

from feedback.interactions import FeedbackEvent, Interaction
from feedback.redaction import redact_event, redact_interaction, redact_text
from feedback.storing import unchanged, unchanged_event, unchanged_text
from monitoring.metrics import GUARD_FINDINGS, GUARD_SECONDS
from pawl.settings import GuardSettings


class Preparation(NamedTuple):
    """What is done to each kind of record."""

    interaction: Callable[[Interaction], Interaction]
    event: Callable[[FeedbackEvent], FeedbackEvent]
    letter: Callable[[str], str]
    """To the text of a record that is put aside."""


def preparation_of(settings: GuardSettings) -> Preparation:
    """What the drains do to what they move."""
    if not settings.redact:
        return Preparation(unchanged, unchanged_event, unchanged_text)
    return Preparation(_interaction, _event, redact_text)


def _interaction(interaction: Interaction) -> Interaction:
    started = time.perf_counter()
    redacted = redact_interaction(interaction)
    GUARD_SECONDS.labels("redaction").observe(time.perf_counter() - started)
    if redacted is not interaction:
        GUARD_FINDINGS.labels("redaction", "replace").inc()
    return redacted


def _event(event: FeedbackEvent) -> FeedbackEvent:
    redacted = redact_event(event)
    if redacted != event:
        GUARD_FINDINGS.labels("redaction", "replace").inc()
    return redacted
