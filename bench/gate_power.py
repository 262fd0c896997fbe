"""Does asking again keep the gate's error rate, and how likely does it pass a candidate that it should pass?

    python -m bench.gate_power [--rounds 2000] [--prompts 100 150 186 300] [--margin 0.05]

Made-up answers, no model: each prompt has a rate of refusals of its own, and a candidate refuses more often by `change`
on average, most of it on a few prompts. Each row is one number of prompts: how often a candidate passes that is as good
as its parent, loses a quarter or half of the margin, or all of it, with one look and with the looks of the default
settings, and what `retrain.looks.chance_to_pass` says beforehand. Then, counted out and not drawn, the candidates that
the bounds are worst for: all of the loss on few prompts, and nothing else changes. Exits 1 if a drawn candidate that
loses all of the margin passes significantly more often than `alpha`. Writes var/bench/gate_power.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.special import bdtr, bdtrc

from pawl.settings import GateSettings
from retrain.examination import DISAGREEMENT
from retrain.gate import Check, Verdict, judge
from retrain.looks import Look, chance_to_pass, looks_of, plan_looks
from retrain.measurements import Measurements, Paired

OUT = Path("var/bench/gate_power.json")
PARENT_RATE, SPREAD = 0.05, 4.0
"""Refusals by the parent, and how alike the prompts are in it: the sum of the two numbers of a beta distribution."""
TOUCHED = 0.25
"""The share of prompts on which a worse candidate is worse."""
SURELY = 0.001


class Simulated(NamedTuple):
    """One kind of candidate on so many prompts."""

    n_prompts: int
    change: float
    looks: tuple[int, ...]
    n: int
    n_passed: int
    n_failed: int
    n_answers: float
    """To each prompt on average."""
    foretold: float
    """By `chance_to_pass`, at the last look."""


def draw(rng: np.random.Generator, n_prompts: int, n_answers: int, change: float, looks: Sequence[int]) -> Measurements:
    """What a gate would measure of over-refusal; the other checks have nothing."""
    parent = rng.beta(PARENT_RATE * SPREAD, (1 - PARENT_RATE) * SPREAD, n_prompts)
    touched = rng.random(n_prompts) < TOUCHED
    candidate = np.where(touched, parent + (1 - parent) * change / (TOUCHED * (1 - PARENT_RATE)), parent)
    shape = (n_prompts, n_answers)
    said = [(rng.random(shape) < rate[:, None]).astype(float).ravel() for rate in (parent, candidate)]
    units = tuple(str(prompt) for prompt in range(n_prompts) for _ in range(n_answers))
    paired = Paired(units, tuple(said[0]), tuple(said[1]))
    return Measurements("parent", "candidate", over_refusal=paired, looks=tuple(looks))


def decide(measured: Measurements, settings: GateSettings) -> Check:
    """The check on over-refusal."""
    return next(check for check in judge(measured, settings).checks if check.name == "over_refusal")


def simulate(n_prompts: int, change: float, looks: Sequence[int], margin: float, n: int, seed: int = 0) -> Simulated:
    """Judge `n` candidates of a kind."""
    settings = GateSettings(over_refusal_margin=margin)
    rng = np.random.default_rng([seed, n_prompts, round(1e6 * change), *looks])
    checks = [decide(draw(rng, n_prompts, looks[-1], change, looks), settings) for _ in range(n)]
    last = looks_of(looks, settings.alpha)[-1]
    return Simulated(
        n_prompts,
        change,
        tuple(looks),
        n,
        sum(check.verdict == Verdict.PASS for check in checks),
        sum(check.verdict == Verdict.FAIL for check in checks),
        sum(check.n_answers or 0 for check in checks) / n,
        chance_to_pass(n_prompts, last, margin, disagreement=disagreement(), change=-change),
    )


def worst(n_prompts: int, looks: Sequence[int], margin: float) -> float:
    """How likely a candidate passes that refuses each prompt always or as little as its parent, which refuses none.

    Every answer to a prompt is the same, so that all looks see the same; how many prompts it refuses is a binomial
    number with the margin as its rate.
    """
    settings = GateSettings(over_refusal_margin=margin)
    units = tuple(str(prompt) for prompt in range(n_prompts) for _ in range(looks[-1]))
    parent = (0.0,) * len(units)
    n_refused = -1
    while n_refused < n_prompts:
        lost = (n_refused + 1) * looks[-1]
        paired = Paired(units, parent, (1.0,) * lost + parent[lost:])
        if decide(Measurements("p", "c", over_refusal=paired, looks=tuple(looks)), settings).verdict != Verdict.PASS:
            break
        n_refused += 1
    return float(bdtr(n_refused, n_prompts, margin)) if n_refused >= 0 else 0.0


def disagreement() -> float:
    """The share of answers in which two models differ that refuse alike: 2 E[p (1 - p)] of the beta distribution."""
    spread = PARENT_RATE * (1 - PARENT_RATE) / (SPREAD + 1)
    return 2 * (PARENT_RATE * (1 - PARENT_RATE) - spread)


def broken(one: Simulated, margin: float, alpha: float) -> str | None:
    """Why this should not have been: what loses all that is allowed passes more often than `alpha`, not by chance."""
    if one.change < margin or bdtrc(one.n_passed - 1, one.n, alpha) >= SURELY:
        return None
    return f"{one.n_prompts} prompts, looks at {one.looks}: {one.n_passed} of {one.n} passed that lose the margin"


def rows(found: Sequence[Simulated]) -> Iterator[tuple[str, ...]]:
    """For people."""
    for one in found:
        yield (
            str(one.n_prompts),
            "+".join(map(str, one.looks)),
            f"{100 * one.change:.2g}",
            f"{one.n_passed / one.n:.1%}",
            f"{one.n_failed / one.n:.1%}",
            f"{one.n_answers:.1f}",
            f"{one.foretold:.0%}",
        )


def foretold(gate: GateSettings) -> Iterator[tuple[str, ...]]:
    """How likely an equal of the parent passes, where one answer in ten differs by chance; nothing is drawn."""
    last = looks_of(plan_looks(gate.samples_per_prompt, gate.max_samples_per_prompt), gate.alpha)[-1]
    for margin in (0.05, 0.02):
        for n in (100, 150, 300):
            looks = (Look(1, gate.alpha), Look(2, gate.alpha), last)
            chances = [chance_to_pass(n, look, margin, disagreement=DISAGREEMENT) for look in looks]
            yield (str(n), f"{100 * margin:.0f}", *(f"{chance:.0%}" for chance in chances))


def main() -> None:
    """Simulate, print, write; 1 where the error rate is not kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2000, help="candidates of each kind")
    parser.add_argument("--prompts", type=int, nargs="+", default=[100, 150, 186, 300])
    parser.add_argument("--margin", type=float, default=0.05)
    options = parser.parse_args()
    gate = GateSettings()
    plans = ((1,), (2,), plan_looks(gate.samples_per_prompt, gate.max_samples_per_prompt))
    changes = [part * options.margin for part in (0.0, 0.25, 0.5, 1.0)]
    found = [
        simulate(n, change, looks, options.margin, options.rounds)
        for n in options.prompts
        for looks in plans
        for change in changes
    ]
    plain = Table("prompts", "margin, points", "1 answer", "2 answers", f"up to {plans[-1][-1]}", box=None)
    for row in foretold(gate):
        plain.add_row(*row)
    table = Table("prompts", "looks at", "loses, points", "passes", "fails", "answers each", "foretold", box=None)
    for row in rows(found):
        table.add_row(*row)
    worst_case = Table("looks at", "margin, points", "prompts", "the worst candidate passes", box=None)
    for looks in (plans[0], plans[-1]):
        for margin in (0.05, 0.02):
            most, n = max((worst(n, looks, margin), n) for n in range(50, 301, 5))
            worst_case.add_row("+".join(map(str, looks)), f"{100 * margin:.0f}", str(n), f"{most:.1%}")
    Console(width=110).print(plain, "", table, "", worst_case)
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps([one._asdict() for one in found], indent=2) + "\n")
    problems = [text for one in found if (text := broken(one, options.margin, gate.alpha))]
    print(*problems, sep="\n")
    raise SystemExit(bool(problems))


if __name__ == "__main__":
    main()
