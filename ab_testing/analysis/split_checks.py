"""Whether users came in the shares intended: if not, whoever is missing was not missed by chance (SRM).

A report's differences are worth nothing where a variant lost some of its users, and nothing else in it would show that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import special, stats

from ab_testing.analysis.errors import AnalysisError
from ab_testing.analysis.tables import FloatArray, IntArray

CONCENTRATION = 100.0
"""Of the Dirichlet prior, in users: between 100 and 1000 small mismatches show soon enough."""
MISMATCH_ALPHA = 0.001
"""How often, over all looks, equal data may be called a mismatch."""
_FEWEST_EXPECTED = 5.0
"""Users of a variant below which the chi-squared distribution does not hold."""


class SplitCheck(NamedTuple):
    """How the users of one phase, or of all phases together, were divided."""

    counts: dict[str, int]
    expected: dict[str, float]
    """Users of each variant, had the weights been kept to the dot."""
    p_value: float | None
    """Of the chi-squared test, at one look; None with fewer than five users expected anywhere."""
    log_bayes_factor: float
    """Against the intended split; above ln(1 / alpha) at any look with probability at most alpha if it is kept."""

    @property
    def is_mismatch(self) -> bool:
        return self.log_bayes_factor >= -math.log(MISMATCH_ALPHA)


def check_split(counts: Mapping[str, int], weights: Mapping[str, float]) -> SplitCheck:
    """Compare the users of each variant with the variants' weights, which may be on any scale.

    >>> check_split({"control": 520, "treatment": 480}, {"control": 0.5, "treatment": 0.5}).is_mismatch
    False
    >>> check_split({"control": 600, "treatment": 400}, {"control": 1, "treatment": 1}).is_mismatch
    True

    Raises:
        AnalysisError: No weight is positive, or users have a variant of weight zero.
    """
    total = math.fsum(weights.values())
    names = [name for name, weight in sorted(weights.items()) if weight > 0]
    strangers = sorted(name for name, count in counts.items() if count and name not in names)
    if not names or strangers or not math.isfinite(total):
        raise AnalysisError(f"a split needs positive weights of every variant that has users; see {strangers or names}")
    seen = np.array([counts.get(name, 0) for name in names])
    shares = np.array([weights[name] / total for name in names])
    expected = seen.sum() * shares
    return SplitCheck(
        counts=dict(zip(names, seen.tolist(), strict=True)),
        expected=dict(zip(names, expected.tolist(), strict=True)),
        p_value=_chi_squared(seen, expected),
        log_bayes_factor=_log_bayes_factor(seen, shares),
    )


def together(checks: Sequence[SplitCheck]) -> SplitCheck:
    """Return the check of all phases at once: evidence of phases multiplies, whatever their weights were."""
    names = sorted({name for check in checks for name in check.counts})
    counts = {name: sum(check.counts.get(name, 0) for check in checks) for name in names}
    expected = {name: math.fsum(check.expected.get(name, 0.0) for check in checks) for name in names}
    known = [(_statistic(check), len(check.counts) - 1) for check in checks if check.p_value is not None]
    freedom = sum(freedom for _, freedom in known)
    p_value = float(stats.chi2.sf(math.fsum(value for value, _ in known), freedom)) if freedom else None
    return SplitCheck(counts, expected, p_value, math.fsum(check.log_bayes_factor for check in checks))


def _chi_squared(seen: IntArray, expected: FloatArray) -> float | None:
    if len(seen) < 2 or expected.min() < _FEWEST_EXPECTED:
        return None
    return float(stats.chi2.sf(((seen - expected) ** 2 / expected).sum(), len(seen) - 1))


def _statistic(check: SplitCheck) -> float:
    return math.fsum((seen - check.expected[name]) ** 2 / check.expected[name] for name, seen in check.counts.items())


def _log_bayes_factor(seen: IntArray, shares: FloatArray) -> float:
    """Dirichlet-multinomial against multinomial (Lindon and Malek, NeurIPS 2022), for any number of variants."""
    prior = CONCENTRATION * shares
    marginal = special.gammaln(CONCENTRATION) - special.gammaln(CONCENTRATION + seen.sum())
    return float(
        marginal + (special.gammaln(prior + seen) - special.gammaln(prior) - special.xlogy(seen, shares)).sum()
    )
