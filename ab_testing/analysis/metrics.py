"""What an experiment measures, declared once and frozen: each kind of metric is made by the function of its name."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from ab_testing.analysis.errors import InvalidMetric

Kind = Literal["ratio", "mean", "proportion", "exceedance", "quantile"]
Direction = Literal["up_is_good", "down_is_good"]
Role = Literal["success", "guardrail", "signal"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One number per variant, and how to judge a difference in it."""

    name: str
    kind: Kind
    numerator: str
    """Column that is added up (ratio, mean), looked for (proportion) or compared (exceedance, quantile)."""
    denominator: str | None = None
    """Column of what each row weighs in a ratio, e.g. 1 where the row is eligible; None counts rows."""
    direction: Direction = "up_is_good"
    role: Role = "success"
    margin: float | None = None
    """Harm that is still tolerated, as an absolute difference; also sets the scale of the confidence sequence."""
    maturity_s: float = 0.0
    """Age in seconds from which a row counts: feedback comes late, and later for newer users."""
    clip: float | None = None
    """Values of a row above it count as it; frozen before launch."""
    level: float | None = None
    """The share below the quantile, or the limit that an exceedance exceeds."""
    covariate: str | None = None
    """Column that is the numerator's twin from before the user's first exposure; it removes variance (CUPED)."""
    covariate_denominator: str | None = None
    """The same for the denominator of a ratio; None stands for 1 per user."""

    def __post_init__(self) -> None:
        if not self.name or not self.numerator:
            raise InvalidMetric("a metric needs a name and a column")
        for field in ("margin", "clip", "level", "maturity_s"):
            value = getattr(self, field)
            if value is not None and not math.isfinite(value):
                raise InvalidMetric(f"metric {self.name!r}: {field} must be finite, got {value}")
        _check_kind(self)

    @property
    def metric_hash(self) -> str:
        """Fingerprint of the whole declaration: a change of it is a new experiment."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def ratio(
    name: str,
    numerator: str,
    denominator: str | None = None,
    *,
    direction: Direction = "up_is_good",
    role: Role = "success",
    margin: float | None = None,
    maturity_s: float = 0.0,
    clip: float | None = None,
    covariate: str | None = None,
    covariate_denominator: str | None = None,
) -> Metric:
    """Sum over sum, users being the unit: thumbs-up per eligible interaction.

    >>> ratio("thumbs_up_rate", "thumbs_up", "eligible").kind
    'ratio'
    """
    return Metric(
        name=name, kind="ratio", numerator=numerator, denominator=denominator, direction=direction, role=role,
        margin=margin, maturity_s=maturity_s, clip=clip, covariate=covariate,
        covariate_denominator=covariate_denominator,
    )  # fmt: skip


def mean(
    name: str,
    numerator: str,
    *,
    direction: Direction = "up_is_good",
    role: Role = "success",
    margin: float | None = None,
    maturity_s: float = 0.0,
    clip: float | None = None,
    covariate: str | None = None,
) -> Metric:
    """Sum per user, averaged over users: interactions per user."""
    return Metric(
        name=name, kind="mean", numerator=numerator, direction=direction, role=role, margin=margin,
        maturity_s=maturity_s, clip=clip, covariate=covariate,
    )  # fmt: skip


def proportion(
    name: str,
    numerator: str,
    *,
    direction: Direction = "up_is_good",
    role: Role = "success",
    margin: float | None = None,
    maturity_s: float = 0.0,
) -> Metric:
    """Share of users with at least one row where the column is above zero: users who saw anything toxic."""
    return Metric(
        name=name, kind="proportion", numerator=numerator, direction=direction, role=role, margin=margin,
        maturity_s=maturity_s,
    )  # fmt: skip


def exceedance(
    name: str,
    value: str,
    limit: float,
    *,
    direction: Direction = "down_is_good",
    role: Role = "guardrail",
    margin: float | None = None,
    maturity_s: float = 0.0,
) -> Metric:
    """Share of rows above a frozen limit: bounded and additive, so to be preferred to a quantile for decisions."""
    return Metric(
        name=name, kind="exceedance", numerator=value, direction=direction, role=role, margin=margin,
        maturity_s=maturity_s, level=limit,
    )  # fmt: skip


def quantile(
    name: str,
    value: str,
    share: float,
    *,
    direction: Direction = "down_is_good",
    role: Role = "guardrail",
    margin: float | None = None,
    maturity_s: float = 0.0,
) -> Metric:
    """The value that `share` of all rows do not exceed: the 95th percentile of latency."""
    return Metric(
        name=name, kind="quantile", numerator=value, direction=direction, role=role, margin=margin,
        maturity_s=maturity_s, level=share,
    )  # fmt: skip


def check_names(metrics: Sequence[Metric]) -> None:
    """Raise unless every metric has a name of its own.

    Raises:
        InvalidMetric: There is no metric, or two share a name.
    """
    names = [metric.name for metric in metrics]
    if not names or len(set(names)) < len(names):
        raise InvalidMetric(f"need metrics with different names, got {names}")


def _check_kind(metric: Metric) -> None:
    name = f"metric {metric.name!r}"
    if metric.kind == "quantile" and not (metric.level is not None and 0 < metric.level < 1):
        raise InvalidMetric(f"{name}: a quantile needs a share between 0 and 1, got {metric.level}")
    if metric.kind == "exceedance" and metric.level is None:
        raise InvalidMetric(f"{name}: an exceedance needs a limit")
    if metric.margin is not None and metric.margin <= 0:
        raise InvalidMetric(f"{name}: margin must be above 0, got {metric.margin}")
    if metric.maturity_s < 0:
        raise InvalidMetric(f"{name}: maturity_s must be >= 0, got {metric.maturity_s}")
    if metric.covariate_denominator and not (metric.kind == "ratio" and metric.covariate):
        raise InvalidMetric(f"{name}: only a ratio with a covariate has a covariate_denominator")
