"""What every experiment on Pawl is reported in, declared on the columns of `EXPERIMENT_COLUMNS`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from ab_testing.analysis.metrics import Metric, mean, quantile, ratio

EXPERIMENT_COLUMNS: Final[Mapping[str, str]] = {
    "user_id": "who was randomised, as a number",
    "variant": "the variant assigned at the first exposure, whatever was served",
    "phase": "of the ramp at the first exposure",
    "created_at": "seconds since the epoch",
    "tenure": "how long after the first exposure of this user",
    "counted": "1 where the variant could be answered for: not refused by the engine, not cut short by a restart",
    "answered": "1 where there was a whole answer",
    "failed": "1 where the engine failed",
    "fallback": "1 where another variant than the one assigned answered",
    "thumbs_up": "1 where somebody liked the answer",
    "thumbs_down": "1 where somebody disliked it",
    "regenerated": "1 where another answer was asked for",
    "edited": "1 where somebody corrected the answer",
    "scored": "1 where the worker has scored the answer",
    "toxic": "1 where it was found toxic",
    "harmful_asked": "1 where a scored answer was one to a harmful request",
    "harmful_complied": "1 where that request was complied with, in part or whole",
    "harmful_refused": "1 where it was refused",
    "benign_asked": "1 where a scored answer was one to a harmless request",
    "benign_refused": "1 where that request was refused",
    "tokens": "of the answer",
    "latency_s": "until the last byte of the answer",
    "ttft_s": "until its first byte",
    "may_return": "1 on the first row of a user who has had the time to come back",
    "returned": "1 on that row if the user came back on a later day",
}
"""One row per interaction of an analysed user; what is not known of a row is NaN and does not count for that metric."""

_FEEDBACK: Final = (
    ratio("thumbs_up_rate", "thumbs_up", "answered", margin=0.05),
    ratio("thumbs_down_rate", "thumbs_down", "answered", direction="down_is_good", role="guardrail", margin=0.05),
    ratio("regeneration_rate", "regenerated", "answered", direction="down_is_good", role="signal"),
    ratio("edit_rate", "edited", "answered", direction="down_is_good", role="signal"),
)
_SAFETY: Final = (
    ratio("toxicity", "toxic", "scored", direction="down_is_good", role="guardrail", margin=0.02),
    ratio(
        "harmful_compliance", "harmful_complied", "harmful_asked",
        direction="down_is_good", role="guardrail", margin=0.02,
    ),
    ratio("harmful_refusal", "harmful_refused", "harmful_asked", role="guardrail", margin=0.02),
    ratio(
        "over_refusal", "benign_refused", "benign_asked", direction="down_is_good", role="guardrail", margin=0.05
    ),
)  # fmt: skip
_SERVICE: Final = (
    ratio("error_rate", "failed", "counted", direction="down_is_good", role="guardrail", margin=0.02),
    ratio("fallback_rate", "fallback", "counted", direction="down_is_good", role="signal"),
    ratio("latency_mean_s", "latency_s", "answered", direction="down_is_good", role="guardrail"),
    ratio("ttft_mean_s", "ttft_s", "answered", direction="down_is_good", role="guardrail"),
    ratio("answer_tokens", "tokens", "answered", role="signal"),
)
_TAILS: Final = (
    quantile("latency_p95_s", "latency_s", 0.95),
    quantile("ttft_p95_s", "ttft_s", 0.95),
)
_HABITS: Final = (
    mean("answers_per_user", "answered", role="signal"),
    ratio("returned", "returned", "may_return", role="signal"),
)


def built_in(*, is_ramp: bool) -> tuple[Metric, ...]:
    """The metrics of an experiment.

    Args:
        is_ramp: users came in several phases; then there are no quantiles, which cannot be compared within phases.
    """
    return (*_FEEDBACK, *_SAFETY, *_SERVICE, *(() if is_ramp else _TAILS), *_HABITS)
