"""From samples to medians, ratios, verdicts and tables in Markdown. Nothing here measures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

from bench.measures import CAPACITY_PER_S, MEASURES, OVERLOAD_FACTORS, PACED_CONNECTIONS, SUITES, Measure, Sample
from bench.targets import RECORDS_OFF, RECORDS_ON, TARGETS

DIRECT, LIMIT, ROUTER, LITELLM = "direct", "haproxy", "vllm-router", "litellm"
ORDER = tuple(target.name for target in TARGETS)
SATURATED = 0.93
"""A gateway that used less of its core was held up by something else, the load generator for instance."""
HELD_UP = " \\*"


@dataclass(frozen=True, slots=True)
class Row:
    """The medians of one target over all rounds of one measure."""

    target: str
    n_rounds: int
    per_s: float
    lowest_per_s: float
    highest_per_s: float
    per_cpu_s: float | None
    """Answers per second of processor time, which other people's work on the core hardly changes."""
    latency_p50_us: float
    latency_p99_us: float
    first_byte_p50_us: float
    first_byte_p99_us: float
    gap_p99_us: float
    refused_share: float
    refusal_p99_us: float
    health_p99_us: float
    share: float
    background_share: float
    others_share: float
    idle_mb: float
    resident_mb: float
    resident_all_mb: float
    errors: int
    problem: str | None


class Check(NamedTuple):
    """One threshold and whether it was met; None: not measured."""

    text: str
    value: float | None
    bound: float
    is_at_least: bool
    unit: str

    @property
    def is_met(self) -> bool | None:
        if self.value is None:
            return None
        return self.value >= self.bound if self.is_at_least else self.value <= self.bound


Rows = Mapping[tuple[str, str], Row]
"""By measure and target."""


def rows_of(samples: Iterable[Sample]) -> dict[tuple[str, str], Row]:
    """The medians."""
    grouped: dict[tuple[str, str], list[Sample]] = {}
    for sample in samples:
        grouped.setdefault((sample.measure, sample.target), []).append(sample)
    return {key: _row(key[1], group) for key, group in grouped.items()}


def _row(target: str, samples: Sequence[Sample]) -> Row:
    taken = [(sample, sample.load) for sample in samples if sample.load is not None]
    rates = [load.per_s for _, load in taken] or [0.0]
    asked = sum(load.started for _, load in taken)
    is_overload = MEASURES[samples[0].measure].kind == "overload"
    refused = sum(load.refused for _, load in taken)
    return Row(
        target=target,
        n_rounds=len(taken),
        per_s=median(rates),
        lowest_per_s=min(rates),
        highest_per_s=max(rates),
        per_cpu_s=_median(load.per_s / sample.use.share for sample, load in taken if sample.use.share > 0.01) or None,
        latency_p50_us=_median(load.latency.p50_us for _, load in taken),
        latency_p99_us=_median(load.latency.p99_us for _, load in taken),
        first_byte_p50_us=_median(load.first_byte.p50_us for _, load in taken),
        first_byte_p99_us=_median(load.first_byte.p99_us for _, load in taken),
        gap_p99_us=_median(load.gap.p99_us for _, load in taken),
        refused_share=refused / asked if asked else 0.0,
        refusal_p99_us=_median(load.refusal.p99_us for _, load in taken),
        health_p99_us=_median(sample.health.latency.p99_us for sample, _ in taken if sample.health),
        share=_median(sample.use.share for sample, _ in taken),
        background_share=_median(sample.use.background_share for sample, _ in taken),
        others_share=_median(sample.use.others_share for sample, _ in taken),
        idle_mb=_median(sample.use.idle_mb for sample, _ in taken),
        resident_mb=_median(sample.use.resident_mb for sample, _ in taken),
        resident_all_mb=_median(sample.use.resident_all_mb for sample, _ in taken),
        errors=sum(load.errors for _, load in taken) + (0 if is_overload else refused),
        problem=next((sample.problem for sample in samples if sample.problem), None),
    )


def _median(values: Iterable[float]) -> float:
    found = list(values)
    return median(found) if found else 0.0


def ratio(rows: Rows, measure: str, target: str, to: str, value: Callable[[Row], float] | None = None) -> float | None:
    """How many times as much a target does as another; None where either is missing or made errors."""
    ours, theirs = rows.get((measure, target)), rows.get((measure, to))
    if ours is None or theirs is None or not _is_sound(ours) or not _is_sound(theirs):
        return None
    value = value or (lambda row: row.per_s)
    return value(ours) / value(theirs) if value(theirs) > 0 else None


def _is_sound(row: Row) -> bool:
    return row.errors == 0 and row.problem is None and row.n_rounds > 0


def added_us(rows: Rows, target: str, value: Callable[[Row], float]) -> float | None:
    """Latency at one connection beyond that of the engine alone."""
    ours, direct = rows.get(("latency", target)), rows.get(("latency", DIRECT))
    if ours is None or direct is None or not _is_sound(ours):
        return None
    return value(ours) - value(direct)


# ---- thresholds ----


def checks_of(rows: Rows) -> list[Check]:
    """Every threshold of the specification that these measures speak of."""
    whole = [name for name in MEASURES if name.startswith("whole_")]
    streams = [name for name in MEASURES if name.startswith("streams_")]
    return [
        _least_ratio(rows, whole, RECORDS_ON, ROUTER, 1.2, "whole answers, records on, against vllm-router"),
        _least_ratio(rows, whole, RECORDS_ON, LITELLM, 150.0, "whole answers, records on, against LiteLLM"),
        _least_ratio(rows, streams, RECORDS_ON, ROUTER, 3.0, "streams, records on, against vllm-router"),
        _least_ratio(rows, whole, RECORDS_OFF, ROUTER, 2.0, "whole answers, records off, against vllm-router"),
        _least_ratio(rows, streams, RECORDS_OFF, ROUTER, 5.0, "streams, records off, against vllm-router"),
        *_latency_checks(rows),
        *_paced_checks(rows),
        *_memory_checks(rows),
        *_overload_checks(rows),
    ]


def _least_ratio(rows: Rows, measures: Sequence[str], target: str, to: str, bound: float, text: str) -> Check:
    ratios = [found for name in measures if (found := ratio(rows, name, target, to)) is not None]
    return Check(f"{text}: the least ratio", min(ratios, default=None), bound, True, "x")


def _latency_checks(rows: Rows) -> list[Check]:
    quantiles: tuple[tuple[str, Callable[[Row], float]], ...] = (
        ("p50", lambda row: row.latency_p50_us),
        ("p99", lambda row: row.latency_p99_us),
    )
    return [
        _no_worse(f"added latency at one connection, {name}", added_us(rows, RECORDS_ON, q), added_us(rows, ROUTER, q))
        for name, q in quantiles
    ]


def _paced_checks(rows: Rows) -> list[Check]:
    ours, theirs = rows.get(("paced", RECORDS_ON)), rows.get(("paced", ROUTER))
    if ours is None or theirs is None or not (_is_sound(ours) and _is_sound(theirs)):
        return [_no_worse("paced streams", None, None)]
    return [
        _no_worse("paced streams, time to first byte, p99", ours.first_byte_p99_us, theirs.first_byte_p99_us),
        _no_worse("paced streams, gap between chunks, p99", ours.gap_p99_us, theirs.gap_p99_us),
    ]


def _no_worse(text: str, ours: float | None, theirs: float | None) -> Check:
    if ours is None or theirs is None:
        return Check(f"{text}: no more than vllm-router's", None, 0.0, False, "ms")
    return Check(f"{text}: no more than vllm-router's", ours / 1000, theirs / 1000, False, "ms")


def _memory_checks(rows: Rows) -> list[Check]:
    row = rows.get(("paced", RECORDS_ON))
    return [
        Check("resident memory of a worker, idle", row.idle_mb if row else None, 120.0, False, "MB"),
        Check(
            f"more per open stream, at {PACED_CONNECTIONS}",
            per_stream_kb(row) if row else None,
            40.0,
            False,
            "KB",
        ),
    ]


def per_stream_kb(row: Row) -> float:
    """What each open stream adds to the worker's resident memory."""
    return (row.resident_mb - row.idle_mb) * 1000 / PACED_CONNECTIONS


def _overload_checks(rows: Rows) -> list[Check]:
    found = [row for factor in OVERLOAD_FACTORS if (row := rows.get((f"overload_{factor:g}", RECORDS_ON)))]
    worst = rows.get((f"overload_{max(OVERLOAD_FACTORS):g}", RECORDS_ON))
    peak = max((row.per_s for row in found), default=0.0)
    is_measured = worst is not None and worst.problem is None and peak > 0
    return [
        Check(
            "goodput at 3 x capacity, of the peak",
            100 * worst.per_s / peak if worst and is_measured else None,
            90.0,
            True,
            "%",
        ),
        Check(
            "refusals at 3 x capacity, p99",
            worst.refusal_p99_us / 1000 if worst and is_measured else None,
            100.0,
            False,
            "ms",
        ),
        Check("errors at 3 x capacity", float(worst.errors) if worst and is_measured else None, 0.0, False, ""),
    ]


# ---- Markdown ----


def report(rows: Rows, about: Mapping[str, str]) -> str:
    """Everything, with what it was measured on."""
    parts = ["# Gateway benchmark", "\n".join(f"- {name}: {value}" for name, value in about.items())]
    parts += [section(rows, measure) for suite in SUITES for measure in suite.measures if _has(rows, measure.name)]
    parts.append("## Thresholds\n\n" + checks_table(checks_of(rows)))
    return "\n\n".join(parts) + "\n"


def _has(rows: Rows, measure: str) -> bool:
    return any(name == measure for name, _ in rows)


def section(rows: Rows, measure: Measure) -> str:
    """One measure's table under its title."""
    tables = {
        "throughput": throughput_table,
        "latency": latency_table,
        "paced": paced_table,
        "overload": overload_table,
    }
    found = [row for name in ORDER if (row := rows.get((measure.name, name)))]
    problems = [f"{row.target}: {row.problem.strip().splitlines()[-1]}" for row in found if row.problem]
    return "\n\n".join([f"## {measure.title}", tables[measure.kind](rows, measure.name, found), *problems])


def throughput_table(rows: Rows, measure: str, found: Sequence[Row]) -> str:
    """Answers per second, and how they compare."""
    head = ("gateway", "per second", "lowest to highest", "per CPU second", "p50 ms", "p99 ms", "its core",
            "others there", "× vllm-router", "× LiteLLM", "of haproxy", "errors")  # fmt: skip
    lines = [
        (
            row.target,
            f"{row.per_s:,.0f}",
            f"{row.lowest_per_s:,.0f} to {row.highest_per_s:,.0f}",
            f"{row.per_cpu_s:,.0f}" if row.per_cpu_s else "",
            _ms(row.latency_p50_us),
            _ms(row.latency_p99_us),
            _core(row),
            f"{100 * row.others_share:.0f} %" if row.per_cpu_s else "",
            _times(ratio(rows, measure, row.target, ROUTER)),
            _times(ratio(rows, measure, row.target, LITELLM)),
            _percent(ratio(rows, measure, row.target, LIMIT)),
            str(row.errors),
        )
        for row in found
    ]
    note = f"\n\n{HELD_UP} less than {100 * SATURATED:.0f} % of the core: held up by load, engine or other work."
    return markdown(head, lines) + (note if any(HELD_UP in line[6] for line in lines) else "")


def latency_table(rows: Rows, measure: str, found: Sequence[Row]) -> str:
    """Whole answers one at a time, and what the gateway adds."""
    del measure
    head = ("gateway", "p50 µs", "p99 µs", "added p50 µs", "added p99 µs", "errors")
    lines = [
        (
            row.target,
            f"{row.latency_p50_us:,.0f}",
            f"{row.latency_p99_us:,.0f}",
            _number(added_us(rows, row.target, lambda row: row.latency_p50_us)),
            _number(added_us(rows, row.target, lambda row: row.latency_p99_us)),
            str(row.errors),
        )
        for row in found
    ]
    return markdown(head, lines)


def paced_table(rows: Rows, measure: str, found: Sequence[Row]) -> str:
    """Many open streams: smoothness, cost and memory."""
    del rows, measure
    head = ("gateway", "streams/s", "first byte p50 ms", "p99 ms", "chunk gap p99 ms", "its core", "idle MB", "MB",
            "KB per stream", "MB, all its processes", "errors")  # fmt: skip
    lines = [
        (
            row.target,
            f"{row.per_s:,.0f}",
            _ms(row.first_byte_p50_us),
            _ms(row.first_byte_p99_us),
            _ms(row.gap_p99_us),
            f"{100 * row.share:.0f} %"
            + (f" + {100 * row.background_share:.0f} %" if row.background_share > 0.005 else ""),
            f"{row.idle_mb:.0f}",
            f"{row.resident_mb:.0f}",
            f"{per_stream_kb(row):.1f}",
            f"{row.resident_all_mb:.0f}",
            str(row.errors),
        )
        for row in found
    ]
    return markdown(head, lines)


def overload_table(rows: Rows, measure: str, found: Sequence[Row]) -> str:
    """Goodput, and what became of the rest."""
    del rows, measure
    head = (
        "gateway",
        "answered/s",
        "of capacity",
        "p99 ms",
        "refused",
        "refusal p99 ms",
        "health check p99 ms",
        "errors",
    )
    lines = [
        (
            row.target,
            f"{row.per_s:,.0f}",
            f"{100 * row.per_s / CAPACITY_PER_S:.0f} %",
            _ms(row.latency_p99_us),
            f"{100 * row.refused_share:.0f} %",
            _ms(row.refusal_p99_us),
            _ms(row.health_p99_us),
            str(row.errors),
        )
        for row in found
    ]
    return markdown(head, lines)


def checks_table(checks: Sequence[Check]) -> str:
    """Every threshold, and whether it was met."""
    marks = {True: "met", False: "**missed**", None: "not measured"}
    lines = [
        (
            check.text,
            "" if check.value is None else f"{check.value:,.2f} {check.unit}".rstrip(),
            ""
            if check.value is None
            else f"{'≥' if check.is_at_least else '≤'} {check.bound:,.2f} {check.unit}".rstrip(),
            marks[check.is_met],
        )
        for check in checks
    ]
    return markdown(("threshold", "measured", "wanted", "verdict"), lines)


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table.

    >>> print(markdown(("a", "b"), [("1", "2")]))
    | a | b |
    |---|---|
    | 1 | 2 |
    """
    rows = ["| " + " | ".join(cells) + " |" for cells in (head, *lines)]
    return "\n".join([rows[0], "|" + "---|" * len(head), *rows[1:]])


def _core(row: Row) -> str:
    if row.per_cpu_s is None:
        return ""
    background = f" + {100 * row.background_share:.0f} %" if row.background_share > 0.005 else ""
    mark = HELD_UP if row.share + row.background_share + row.others_share < SATURATED else ""
    return f"{100 * row.share:.0f} %{background}{mark}"


def _ms(us: float) -> str:
    return f"{us / 1000:,.2f}" if us else ""


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:,.2f}" if value < 100 else f"{value:,.0f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f} %"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"
