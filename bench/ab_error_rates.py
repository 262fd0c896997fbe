"""How often verdicts on a canary are wrong when they are looked at all the time, and how fast they are right.

    python -m bench.ab_error_rates [--sims N] [--seed S] [--only rollback,promotion,delay,canaries]

Every way of deciding sees the same simulated users: our bets after each user, the others at fifty looks. Three
questions: how often a canary that is no worse is called worse, how often one that is worse by exactly the margin is
called safe, and how many users a worse one reaches before it is noticed. A fourth part runs whole canaries through the
state machine.

In the same run the fast bets are compared with the real classes, and the written-out form of gbstats with the package,
if the interpreter has it (`pip install numpy pandas scipy pydantic`, then `pip install --no-deps gbstats==0.8.0`).
Writes var/bench/ab_error_rates.json; exits 1 if one of our verdicts is wrong more often than allowed, or late.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bench.ab_rivals import Agreement, gbstats_version
from bench.ab_studies import NEVER, NEW_HARM, STUDIES, Batch, First, Study, allowed, joined, run_batch
from bench.ab_whole_canaries import SCENARIOS, Summary, run_scenario

PARTS = ("rollback", "promotion", "delay", "canaries")
SLOWEST = 1.15
"""How many times the users of the fastest valid way ours may take."""
MOST_NEW_EVENTS = 5
"""Harmful events of a kind that the control never has, until half of the canaries are rolled back."""

_BATCH = 125
_PROVEN = 2
_CALLED = 4
_OURS = ("harm bet", "event share", "canary", "benefit side", "margin bet")
_OTHERS = (
    "tutorial, per interaction", "tutorial", "gbstats, per interaction", "gbstats", "reporting sequence",
)  # fmt: skip
_FAST_AND_VALID = ("gbstats", "harm bet", "event share")
_TITLES = {
    "rollback": "False rollback: share of equal canaries ever called worse (others: different, in brackets worse)",
    "promotion": "False promotion: share of canaries worse by exactly the margin that are ever called safe",
    "delay": "Delay: median canary users (harmful events) until a worse canary is noticed [share noticed]",
}


class Found(NamedTuple):
    """One study, simulated."""

    study: Study
    batch: Batch
    seconds: float


class Verdict(NamedTuple):
    """Whether one of our columns keeps a promise."""

    promise: str
    value: float
    limit: float
    is_share: bool = True

    @property
    def holds(self) -> bool:
        # What was never noticed is not as fast as what was never noticed either.
        return math.isfinite(self.value) and self.value <= self.limit


def rate(first: First) -> float:
    return float((first.look < NEVER).mean())


def rate_error(first: First) -> float:
    """Monte Carlo standard error, never below that of one case."""
    sims = len(first.look)
    found = max(rate(first), 1 / sims)
    return math.sqrt(found * max(1 - found, 1 / sims) / sims)


def median_users(first: First) -> float:
    """Return the median over all simulations; infinite where fewer than half were noticed."""
    return float(np.median(np.where(first.look < NEVER, first.canary_users, np.inf)))


def median_error(first: First) -> float:
    """Monte Carlo standard error of the median, from the order statistics one standard deviation to each side."""
    users = np.sort(np.where(first.look < NEVER, first.canary_users, np.inf))
    middle, reach = len(users) / 2, math.sqrt(len(users)) / 2
    low, high = users[max(int(middle - reach), 0)], users[min(int(middle + reach), len(users) - 1)]
    return float(high - low) / 2 if math.isfinite(high) else math.inf


def median_events(first: First) -> float:
    noticed = first.look < NEVER
    return float(np.median(first.canary_events[noticed])) if noticed.any() else math.nan


def verdicts_on(study: Study, firsts: Mapping[str, First]) -> Iterator[Verdict]:
    """What was promised of our columns in this study."""
    if study.question == "delay":
        yield from _delay_verdicts(study, firsts)
        return
    for name in study.judged:
        yield Verdict(f"{study.name}: {name}", rate(firsts[name]), allowed(len(firsts[name].look)))


def _delay_verdicts(study: Study, firsts: Mapping[str, First]) -> Iterator[Verdict]:
    (name,) = study.judged
    taken = median_users(firsts[name])
    best = min(median_users(firsts[other]) for other in _FAST_AND_VALID if other in firsts)
    yield Verdict(f"{study.name}: {name}, users beside the best here", taken, SLOWEST * best, False)
    if study.published is not None:
        yield Verdict(f"{study.name}: {name}, users beside the best published", taken, SLOWEST * study.published, False)
    if study is NEW_HARM:
        yield Verdict(f"{study.name}: {name}, events", median_events(firsts[name]), MOST_NEW_EVENTS, False)


def canary_verdict(summary: Summary) -> Verdict | None:
    if summary.error is None or summary.error_rate is None:
        return None
    return Verdict(f"whole canary, {summary.name}: {summary.error}", summary.error_rate, summary.allowed)


def main() -> None:
    """Simulate, print, write down."""
    arguments = _arguments()
    started = time.perf_counter()
    package = gbstats_version()
    print(f"gbstats {package}" if package else "gbstats is not installed: its written-out form was not compared")
    verdicts: list[Verdict] = []
    report: dict[str, object] = {"sims": arguments.sims, "seed": arguments.seed, "gbstats": package}
    with ProcessPoolExecutor(arguments.processes, mp_context=get_context("spawn")) as pool:
        for part in arguments.only:
            if part == "canaries":
                summaries = _run_canaries(pool, arguments.canary_sims, arguments.seed)
                verdicts += [verdict for summary in summaries if (verdict := canary_verdict(summary))]
                report[part] = [summary.to_json() for summary in summaries]
                continue
            found = _run_part(pool, part, arguments.sims, arguments.seed)
            verdicts += [verdict for one in found for verdict in verdicts_on(one.study, one.batch.firsts)]
            verdicts.append(_gbstats_verdict(part, found))
            report[part] = [_to_json(one) for one in found]
    _print_verdicts(verdicts)
    print(f"{time.perf_counter() - started:.0f} s")
    report["verdicts"] = [verdict._asdict() | {"holds": verdict.holds} for verdict in verdicts]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(_finite(report), indent=1, allow_nan=False) + "\n")
    raise SystemExit(int(not all(verdict.holds for verdict in verdicts)))


def run_study(study: Study, sims: int, seed: int, *, proven: int = _PROVEN, called: int = _CALLED) -> Batch:
    """Simulate a study in this process: the same numbers for the same seed, however many processes `main` has."""
    return joined(
        [
            run_batch(*batch, proven if first else 0, called if first else 0)
            for first, batch in _batches(study, sims, seed)
        ]
    )


def _batches(study: Study, sims: int, seed: int) -> Iterator[tuple[bool, tuple[Study, np.random.SeedSequence, int]]]:
    for number, first in enumerate(range(0, sims, _BATCH)):
        sequence = np.random.SeedSequence([seed, number, *study.name.encode()])
        yield number == 0, (study, sequence, min(_BATCH, sims - first))


def _run_part(pool: ProcessPoolExecutor, part: str, sims: int, seed: int) -> list[Found]:
    studies = [study for study in STUDIES if study.question == part]
    pending: list[list[Future[Batch]]] = [
        [
            pool.submit(run_batch, *batch, _PROVEN if first else 0, _CALLED if first else 0)
            for first, batch in _batches(study, sims, seed)
        ]
        for study in studies
    ]
    print(f"\n{_TITLES[part]}\n")
    columns = [*_OTHERS, *_OURS]
    found = []
    for study, futures in zip(studies, pending, strict=True):
        started = time.perf_counter()
        batch = joined([future.result() for future in futures])
        found.append(Found(study, batch, time.perf_counter() - started))
    columns = [name for name in columns if any(name in one.batch.firsts for one in found)]
    print("| world | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for one in found:
        print(f"| {one.study.name} | " + " | ".join(_cell(one, name) for name in columns) + " |", flush=True)
    print("\n" + _agreement(found), flush=True)
    return found


def _cell(found: Found, name: str) -> str:
    first = found.batch.firsts.get(name)
    if first is None:
        return "–"
    if found.study.question == "delay":
        return _delay_cell(found.study, first)
    worse = found.batch.firsts.get(f"{name}, harm side")
    one_sided = "" if worse is None else f" ({100 * rate(worse):.1f})"
    return f"{100 * rate(first):.1f} ± {100 * rate_error(first):.1f} %{one_sided}"


def _delay_cell(study: Study, first: First) -> str:
    users = median_users(first)
    events = f" ({median_events(first):.0f})" if study.is_event and rate(first) else ""
    share = f" [{100 * rate(first):.0f} %]" if rate(first) < 0.99 else ""
    return f"{users:.0f} ± {median_error(first):.0f}{events}{share}" if math.isfinite(users) else f"never{share}"


def _gbstats_verdict(part: str, found: Sequence[Found]) -> Verdict:
    return Verdict(
        f"{part}: decisions of gbstats that its written-out form changes", _total(found).other_decisions, 0, False
    )


def _total(found: Sequence[Found]) -> Agreement:
    total = Agreement()
    for one in found:
        total = total.plus(one.batch.gbstats)
    return total


def _agreement(found: Sequence[Found]) -> str:
    total = _total(found)
    bets = max(one.batch.bets_differ_by for one in found)
    sequences = max(one.batch.sequences_differ_by for one in found)
    lines = [
        f"Fast bets beside the real classes, log wealth at every look: differ by at most {bets:.1e}.",
        f"Sequences beside the reports' own function: differ by at most {sequences:.1e}.",
        f"gbstats: {total.calls} calls of the package differ by at most {total.largest_difference:.1e}, "
        f"{total.other_decisions} decisions differ.",
    ]
    return "\n".join(lines if total.calls else lines[:2])


def _run_canaries(pool: ProcessPoolExecutor, sims: int, seed: int) -> list[Summary]:
    print(f"\nWhole canaries through the state machine, {sims} of each\n")
    pending = [pool.submit(run_scenario, scenario, sims=sims, seed=seed) for scenario in SCENARIOS]
    summaries = []
    for future in pending:
        summaries.append(future.result())
        print(summaries[-1].row(), flush=True)
    return summaries


def _print_verdicts(verdicts: Sequence[Verdict]) -> None:
    print("\n| promise | found | allowed | holds |\n|---|---|---|---|")
    for verdict in verdicts:
        values = (verdict.value, verdict.limit)
        found, limit = (f"{100 * value:.2f} %" if verdict.is_share else f"{value:.1f}" for value in values)
        print(f"| {verdict.promise} | {found} | {limit} | {'yes' if verdict.holds else 'NO'} |")
    broken = sum(not verdict.holds for verdict in verdicts)
    print(f"\n{len(verdicts)} promises, {broken} broken.")


def _to_json(found: Found) -> dict[str, object]:
    columns = {
        name: {
            "rate": rate(first),
            "rate_error": rate_error(first),
            "median_canary_users": median_users(first),
            "median_error": median_error(first),
            "median_canary_events": median_events(first),
            "noticed_at_most_5_events": float(((first.look < NEVER) & (first.canary_events <= MOST_NEW_EVENTS)).mean()),
        }
        for name, first in found.batch.firsts.items()
    }
    batch = found.batch
    return {
        "world": found.study.name,
        "columns": columns,
        "gbstats": batch.gbstats._asdict(),
        "bets_differ_by": batch.bets_differ_by,
        "sequences_differ_by": batch.sequences_differ_by,
    }


def _finite(value: object) -> object:
    """Write what is not a number JSON can hold as null."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sims", type=int, default=2000)
    parser.add_argument("--canary-sims", type=int, default=60, help="whole canaries of each kind")
    parser.add_argument("--seed", type=int, default=20_262)
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(PARTS), help=",".join(PARTS))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("var/bench/ab_error_rates.json"))
    arguments = parser.parse_args()
    if unknown := set(arguments.only) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    return arguments


if __name__ == "__main__":
    main()
