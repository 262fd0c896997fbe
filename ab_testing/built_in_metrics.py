"""What every experiment on Pawl is reported in, declared on the columns of `EXPERIMENT_COLUMNS`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

from ab_testing.analysis.metrics import Metric, mean, quantile, ratio

FROZEN: Final = "metrics"
"""Where the audit trail's line of an experiment's start has the fingerprint of its metrics."""

EXPERIMENT_COLUMNS: Final[Mapping[str, str]] = {
    "user_id": "who was randomised, as a number",
    "variant": "the variant assigned at the first exposure, whatever was served",
    "phase": "of the ramp at the first exposure",
    "probability": "of that variant, when it was assigned, among users who are analysed",
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
    "log_latency": "natural logarithm of latency_s",
    "ttft_s": "until its first byte",
    "may_return": "1 on the first row of a user who has had the time to come back",
    "returned": "1 on that row if the user came back on a later day",
    "before_answers": "on the first row of a user: answers in the weeks before the experiment, if there were any",
    "before_tokens": "of those answers",
    "before_latency_s": "of those answers, added up",
    "before_ttft_s": "of those answers, added up",
    "before_thumbs_up": "which of those answers got",
    "before_thumbs_down": "which of those answers got",
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
    # On the logarithm a few answers that took minutes do not decide; 0.1 is a tenth longer.
    ratio("latency_log", "log_latency", "answered", direction="down_is_good", role="guardrail", margin=0.1),
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
_PASTS: Final[Mapping[str, str]] = {
    "thumbs_up_rate": "before_thumbs_up",
    "thumbs_down_rate": "before_thumbs_down",
    "latency_mean_s": "before_latency_s",
    "ttft_mean_s": "before_ttft_s",
    "answer_tokens": "before_tokens",
    "answers_per_user": "before_answers",
}
"""What tells of the same before the experiment, by metric."""


def built_in(*, is_ramp: bool, maturity_s: float = 0.0, has_past: bool = False) -> tuple[Metric, ...]:
    """The metrics of an experiment.

    Args:
        is_ramp: users came in several phases; then there are no quantiles, which cannot be compared within phases.
        maturity_s: age of an answer from which what users said of it counts.
        has_past: users were here before the experiment; what they did then takes noise away (CUPED).
    """
    said = tuple(replace(metric, maturity_s=maturity_s) for metric in _FEEDBACK)
    metrics = (*said, *_SAFETY, *_SERVICE, *(() if is_ramp else _TAILS), *_HABITS)
    return tuple(map(_with_past, metrics)) if has_past else metrics


def metrics_hash(metrics: Sequence[Metric]) -> str:
    """Fingerprint of all declarations, as the audit trail keeps it from the launch: with other metrics, it is another
    experiment.

    >>> metrics_hash(built_in(is_ramp=False)) == metrics_hash(built_in(is_ramp=False, maturity_s=60.0))
    False
    """
    return hashlib.sha256(json.dumps([metric.metric_hash for metric in metrics]).encode()).hexdigest()


def frozen_hash(maturity_s: float) -> str:
    """That of everything which a report on a split of this version of Pawl may show."""
    return metrics_hash(built_in(is_ramp=False, maturity_s=maturity_s, has_past=True))


def launch_hashes(experiment: Mapping[str, object], maturity_s: float) -> dict[str, object]:
    """What the audit trail keeps from the launch: fingerprints of the metrics, and of these with the whole split.

    Args:
        experiment: as `Experiment.to_json` has it, variants, weights and salt.
        maturity_s: `rollout.maturity_s`.
    """
    metrics = frozen_hash(maturity_s)
    whole = json.dumps([experiment, metrics], sort_keys=True)
    return {FROZEN: metrics, "declaration": hashlib.sha256(whole.encode()).hexdigest()}


def _with_past(metric: Metric) -> Metric:
    past = _PASTS.get(metric.name)
    if past is None:
        return metric
    return replace(metric, covariate=past, covariate_denominator="before_answers" if metric.kind == "ratio" else None)
