"""What each step of a round did, in one sentence for people."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

Manifest = Mapping[str, Any]

LIKELY = 0.8
"""A check that passes less often than this what should pass holds up too much."""


def what_it_did(step: str, manifest: Manifest) -> str:
    """One sentence from a step's manifest; empty for a step that nothing is known of.

    >>> what_it_did("publish", {"model": "m--r0001-ab", "engines": ["http://a", "http://b"]})
    'm--r0001-ab is loaded, and proven to be, on 2 engines'
    """
    tell = _TELL.get(step)
    return tell(manifest) if tell else ""


def counts(numbers: Mapping[str, int]) -> str:
    """Numbers by name, without those that are zero.

    >>> counts({"new": 3, "original": 0})
    '3 new'
    """
    return ", ".join(f"{n} {name.replace('_', ' ')}" for name, n in numbers.items() if n) or "none"


def _mine(manifest: Manifest) -> str:
    pairs = f"{manifest.get('n_new', 0)} new pairs and {manifest.get('n_earlier', 0)} of earlier rounds were set aside"
    if manifest.get("is_too_few"):
        return f"{pairs}: too few to train on, {manifest.get('min_pairs')} are needed"
    plan = manifest.get("plan", {})
    again = f", but starts again from the base: {plan['reason']}" if plan.get("start") == "rebase" else ""
    return f"{pairs}; the parent is {manifest.get('parent')}{again}"


def _build(manifest: Manifest) -> str:
    told = f"a training set of {counts(manifest.get('by_origin', {}))}"
    held = f"{told}; {len(manifest.get('holdout_ids', ()))} pairs held out"
    missing = {name: n for name, n in manifest.get("shortfalls", {}).items() if n}
    short = f"; short of {counts(missing)}" if missing else ""
    left_out = {name: n for name, n in manifest.get("left_out", {}).items() if isinstance(n, int) and n}
    return f"{held}{short}" + (f"; left out: {counts(left_out)}" if left_out else "")


def _preflight(manifest: Manifest) -> str:
    lost = {"dropped": manifest.get("n_dropped", 0), "truncated": manifest.get("n_truncated", 0)}
    told = f"{manifest.get('n_examples', 0)} examples tokenised; too long: {counts(lost)}"
    return f"{told}{_weakness(manifest.get('gate_chances', {}))}"


def _weakness(chances: Mapping[str, float]) -> str:
    """What a candidate as good as its parent is likely to be held up by.

    >>> _weakness({"echo": 0.99, "over_refusal": 0.37})
    '; with so few probes the gate passes an equal of the parent on over refusal with 37 %'
    """
    weak = [
        f"{name.replace('_', ' ')} with {100 * chance:.0f} %" for name, chance in chances.items() if chance < LIKELY
    ]
    return f"; with so few probes the gate passes an equal of the parent on {', '.join(weak)}" if weak else ""


def _train(manifest: Manifest) -> str:
    result = manifest.get("result", {})
    losses = f"the loss went from {result.get('loss_first', 0.0):.4g} to {result.get('loss_last', 0.0):.4g}"
    steps = f"{result.get('n_steps', 0)} steps on {result.get('n_examples', 0)} examples"
    far = _distance((manifest.get("incremental") or {}).get("drift"))
    return f"{result.get('method', 'training')}: {steps}; {losses}; the adapter is {manifest.get('model')}{far}"


def _distance(drift: Mapping[str, float] | None) -> str:
    if drift is None:
        return ""
    return f", {drift['kl']:.3g} nats per token and {drift['weight_change']:.1%} of the weights off the base"


def _evaluate(manifest: Manifest) -> str:
    return f"{manifest.get('n_answers', 0)} answers and {manifest.get('n_holdout', 0)} held-out pairs were measured"


def _gate(manifest: Manifest) -> str:
    report = manifest.get("report", {})
    reasons = "; ".join(report.get("reasons", ())) or "every check passed"
    overruled = ", which was overruled" if manifest.get("is_overruled") else ""
    return f"{report.get('verdict')}{overruled}: {reasons}"


def _publish(manifest: Manifest) -> str:
    return f"{manifest.get('model')} is loaded, and proven to be, on {len(manifest.get('engines', ()))} engines"


def _canary(manifest: Manifest) -> str:
    if manifest.get("rollout_id"):
        return f"rollout {manifest['rollout_id']} was opened"
    return f"no rollout was opened: {manifest.get('waits') or 'rollout.auto_start is off'}"


_TELL: Final[Mapping[str, Callable[[Manifest], str]]] = {
    "mine": _mine,
    "build": _build,
    "preflight": _preflight,
    "train": _train,
    "evaluate": _evaluate,
    "gate": _gate,
    "publish": _publish,
    "canary": _canary,
}
