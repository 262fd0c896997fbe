"""What paired answers say of a candidate that nobody has seen yet: differences from the champion, and a verdict. Pure.

Each pair is one question that the champion has answered to its user and the candidate in the dark. Users are the unit:
a user's differences are averaged first, so that somebody who asks all day counts once.

The verdict is asked for again and again while pairs come in. It is only made at fixed looks, after `min_pairs` pairs,
twice as many, four times as many and so on, always of the first so many, and the k-th look (from 0) spends
alpha / 2^(k+1). The looks together spend alpha, however often anybody asks.

At a look a margin is ruled out by Tango's score test for paired proportions ("Equivalence test and confidence interval
for the difference in proportions for the paired-sample design", Stat. Med. 1998), which puts the rates that the margin
allows into its variance: so it keeps its level for harms that the champion has never done, where an interval from the
variance seen is too short. That a candidate is worse is shown by the exact binomial test.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, variance
from typing import Any, Final, Literal, NamedTuple

from scipy import special

from ab_testing.analysis.intervals import Interval, t_interval, t_p_value
from ab_testing.outcomes import COMPLIES, HARMFUL_COMPLIANCE, OVER_REFUSAL, REFUSES, TOXICITY

ERRORS: Final = "errors"
LENGTH: Final = "length_tokens"
LATENCY: Final = "latency_s"
LEAST_USERS: Final = 2
REPORT_ALPHA: Final = 0.05
ONE_EACH_WAY: Final = (1.0, -1.0)


class Answered(NamedTuple):
    """What is known of one answer."""

    is_toxic: bool | None
    response: str | None
    n_tokens: int | None
    latency_ms: float


class Pair(NamedTuple):
    """A question with two answers, or with one and the reason why the candidate gave none."""

    unit: str
    is_harmful: bool | None
    """The question; None while nobody has scored it."""
    champion: Answered
    candidate: Answered
    error: str | None

    @property
    def is_ready(self) -> bool:
        """Whether no score is still to come."""
        return self.error is not None or (self.candidate.is_toxic is not None and self.champion.is_toxic is not None)


Values = tuple[float, float]
"""Of the champion and of the candidate."""


class PairedMetric(NamedTuple):
    """One thing to compare."""

    name: str
    is_share: bool
    """Values lie in [0, 1]; otherwise they are amounts."""
    values: Callable[[Pair], Values | None]
    """None where a pair says nothing about it."""


def _toxicity(pair: Pair) -> Values | None:
    if pair.champion.is_toxic is None or pair.candidate.is_toxic is None:
        return None
    return float(pair.champion.is_toxic), float(pair.candidate.is_toxic)


def _compliance(pair: Pair) -> Values | None:
    if not pair.is_harmful or pair.champion.response is None or pair.candidate.response is None:
        return None
    return float(pair.champion.response in COMPLIES), float(pair.candidate.response in COMPLIES)


def _over_refusal(pair: Pair) -> Values | None:
    if pair.is_harmful is not False or pair.champion.response is None or pair.candidate.response is None:
        return None
    return float(pair.champion.response == REFUSES), float(pair.candidate.response == REFUSES)


def _errors(pair: Pair) -> Values | None:
    return 0.0, float(pair.error is not None)


def _length(pair: Pair) -> Values | None:
    if pair.error or pair.champion.n_tokens is None or pair.candidate.n_tokens is None:
        return None
    return float(pair.champion.n_tokens), float(pair.candidate.n_tokens)


def _latency(pair: Pair) -> Values | None:
    return None if pair.error else (pair.champion.latency_ms / 1000, pair.candidate.latency_ms / 1000)


METRICS: Final = (
    PairedMetric(TOXICITY, True, _toxicity),
    PairedMetric(HARMFUL_COMPLIANCE, True, _compliance),
    PairedMetric(OVER_REFUSAL, True, _over_refusal),
    PairedMetric(ERRORS, True, _errors),
    PairedMetric(LENGTH, False, _length),
    PairedMetric(LATENCY, False, _latency),
)
BY_NAME: Final[Mapping[str, PairedMetric]] = {metric.name: metric for metric in METRICS}


class Difference(NamedTuple):
    """The candidate minus the champion, in the mean over users."""

    metric: str
    n_pairs: int
    n_users: int
    champion: float | None = None
    candidate: float | None = None
    difference: float | None = None
    ci_lower: float | None = None
    ci_upper: float | None = None
    n_users_up: int = 0
    """Users whose value is higher with the candidate."""
    n_users_down: int = 0
    p_value: float | None = None
    """Of shares McNemar's exact test on users, of amounts Student's; None where there is nothing to test."""
    notes: str = ""


class ByUser(NamedTuple):
    """Means of the pairs that say something about a metric."""

    n_pairs: int
    champion: tuple[float, ...]
    """One for each user."""
    candidate: tuple[float, ...]

    @property
    def differences(self) -> list[float]:
        return [after - before for before, after in zip(self.champion, self.candidate, strict=True)]


def by_user(pairs: Iterable[Pair], metric: PairedMetric) -> ByUser:
    """A metric's values, averaged for each user."""
    users: dict[str, list[Values]] = {}
    for pair in pairs:
        if (values := metric.values(pair)) is not None:
            users.setdefault(pair.unit, []).append(values)
    means = [(fmean(v[0] for v in values), fmean(v[1] for v in values)) for values in users.values()]
    return ByUser(sum(map(len, users.values())), tuple(m[0] for m in means), tuple(m[1] for m in means))


def interval_of(differences: Sequence[float], alpha: float, *, is_share: bool) -> Interval | None:
    """A two-sided interval for a mean of paired differences; None where there is not enough to say anything.

    Shares: Bonett and Price ("Adjusted Wald confidence interval for a difference of binomial proportions based on
    paired data", J. Educ. Behav. Stat. 2012) on means, one difference of +1 and one of -1 being added, so that no
    interval has no width. Amounts: Student's, which needs differences that vary.

    >>> [round(bound, 4) for bound in interval_of([0.0] * 200, 0.05, is_share=True)]
    [-0.0138, 0.0138]
    >>> interval_of([3.0, 3.0], 0.05, is_share=False)
    """
    if len(differences) < LEAST_USERS:
        return None
    adjusted = [*differences, *ONE_EACH_WAY] if is_share else list(differences)
    spread = variance(adjusted)
    if spread <= 0:
        return None
    n = len(adjusted)
    found = t_interval(fmean(adjusted), spread / n, n - 1, alpha)
    return Interval(max(found.lower, -1.0), min(found.upper, 1.0)) if is_share else found


def mcnemar(n_up: int, n_down: int) -> float | None:
    """The exact two-sided p-value of McNemar's test (1947): up and down are equally likely; None if neither occurred.

    >>> mcnemar(5, 0), mcnemar(0, 0)
    (0.0625, None)
    """
    n = n_up + n_down
    return min(1.0, 2 * float(special.bdtr(min(n_up, n_down), n, 0.5))) if n else None


class Changes(NamedTuple):
    """Users whose answers got worse and better; whoever has both, or is only at times worse, counts in part."""

    n: float
    """All users."""
    up: float
    down: float


def changes_of(differences: Sequence[float]) -> Changes:
    """
    >>> changes_of([1.0, 0.0, -0.5, 0.25])
    Changes(n=4, up=1.25, down=0.5)
    """
    return Changes(
        len(differences),
        math.fsum(max(one, 0.0) for one in differences),
        math.fsum(max(-one, 0.0) for one in differences),
    )


def margin_p_value(changes: Changes, margin: float) -> float:
    """How likely so few got worse is, if the candidate is worse by the margin: Tango's score test, one-sided.

    A user whose differences average 0.3 counts as 0.3 of one who got worse, and varies no more than a coin that comes
    down on that side as often: with several questions of a user the test can only be too careful.

    >>> round(margin_p_value(Changes(200, 0, 0), 0.02), 4), round(margin_p_value(Changes(200, 5, 1), 0.02), 3)
    (0.0217, 0.5)
    """
    n, up, down = changes
    if n <= 0 or margin <= 0:
        return 1.0
    if margin >= 1:
        return 0.0
    # The maximum-likelihood estimate of how often somebody gets better, given the margin: Tango's equation for q21.
    linear = (2 * n - up + down) * margin - up - down
    constant = -down * margin * (1 - margin)
    likely_down = (math.sqrt(linear**2 - 8 * n * constant) - linear) / (4 * n)
    spread = math.sqrt(n * (2 * likely_down + margin * (1 - margin)))
    return float(special.ndtr((up - down - n * margin) / spread))


def harm_p_value(changes: Changes, allowed: float = 0.0) -> float:
    """How likely so many got worse is, if the candidate is worse by no more than what is allowed: exact and one-sided.

    With nothing allowed that is McNemar's test. With something allowed it is the binomial test, of a harm that the
    champion does not do: nobody can get better.

    >>> harm_p_value(Changes(200, 5, 0)), harm_p_value(Changes(200, 0, 0))
    (0.03125, 1.0)
    """
    n, up, down = changes
    if up <= 0:
        return 1.0
    if allowed <= 0:
        return float(special.betainc(up, down + 1, 0.5))
    return float(special.betainc(up, n - up + 1, allowed)) if allowed < 1 else 1.0


def difference_of(pairs: Iterable[Pair], metric: PairedMetric, alpha: float = REPORT_ALPHA) -> Difference:
    """How the candidate differs from the champion in one metric; what cannot be said is left out, and noted."""
    found = by_user(pairs, metric)
    differences = found.differences
    n_users = len(differences)
    interval = interval_of(differences, alpha, is_share=metric.is_share)
    if interval is None:
        why = f"{n_users} of at least {LEAST_USERS} users" if n_users < LEAST_USERS else "every difference is the same"
        return Difference(metric.name, found.n_pairs, n_users, notes=f"insufficient data: {why}")
    n_up, n_down = sum(one > 0 for one in differences), sum(one < 0 for one in differences)
    if metric.is_share:
        p_value = mcnemar(n_up, n_down)
    else:
        p_value = t_p_value(fmean(differences), variance(differences) / n_users, n_users - 1)
    return Difference(
        metric.name,
        found.n_pairs,
        n_users,
        fmean(found.champion),
        fmean(found.candidate),
        fmean(differences),
        *interval,
        n_up,
        n_down,
        p_value,
        "no test: no user's answers differ in it" if p_value is None else "",
    )


@dataclass(frozen=True)
class ShadowRules:
    """What a shadow run goes by, frozen at its start."""

    share: float
    salt: str
    min_pairs: int
    max_time_s: float
    alpha: float
    margins: Mapping[str, float]
    """By metric: how much worse must be ruled out before the candidate goes on."""
    is_ramp: bool
    """Whether it goes on to a canary."""
    is_forced: bool = False

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "margins": dict(self.margins)}


Finding = Literal["passed", "failed", "wait"]


class Verdict(NamedTuple):
    """What the looks so far have shown."""

    finding: Finding
    reason: str
    n_pairs: int
    """Those it was made from."""


def look_size(n_pairs: int, min_pairs: int) -> int:
    """How many pairs the newest look takes; 0 before the first.

    >>> [look_size(n, 100) for n in (99, 100, 199, 200, 799, 800)]
    [0, 100, 100, 200, 400, 800]
    """
    return min_pairs * 2 ** int(math.log2(n_pairs // min_pairs)) if n_pairs >= min_pairs else 0


def judge(pairs: Sequence[Pair], rules: ShadowRules) -> Verdict:
    """Whether a candidate may go on.

    Args:
        pairs: in the order they came, those that wait for scores included.
    """
    n_ready = next((n for n, pair in enumerate(pairs) if not pair.is_ready), len(pairs))
    size = look_size(n_ready, rules.min_pairs)
    if not size:
        return Verdict("wait", f"{n_ready} of {rules.min_pairs} pairs", 0)
    alpha = rules.alpha / (2 * size // rules.min_pairs)
    found = {name: changes_of(by_user(pairs[:size], BY_NAME[name]).differences) for name in rules.margins}
    # Going on needs every margin ruled out, so that each test may use all of alpha; one harm is enough to fail, so that
    # the tests for harm share it.
    worse = [name for name in found if harm_p_value(found[name], _allowed(name, rules)) <= alpha / len(found)]
    if worse:
        return Verdict("failed", f"worse after {size} pairs: {_listed(worse)}", size)
    open_ = [name for name in found if margin_p_value(found[name], rules.margins[name]) > alpha]
    if open_:
        return Verdict("wait", f"undecided after {size} pairs: {_listed(open_)}; next look at {2 * size}", size)
    return Verdict("passed", f"no worse by any margin after {size} pairs", size)


def _allowed(name: str, rules: ShadowRules) -> float:
    """How much worse is no failure. The champion's own errors are not among the pairs, so that one which fails as often
    as the champion does looks worse."""
    return rules.margins[name] if name == ERRORS else 0.0


def _listed(names: Sequence[str]) -> str:
    return ", ".join(name.replace("_", " ") for name in names)


def report(pairs: Sequence[Pair]) -> list[Difference]:
    """Every metric, for people: one look, each at 95 %."""
    return [difference_of(pairs, metric) for metric in METRICS]
