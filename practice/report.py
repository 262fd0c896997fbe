"""The demo's report: one JSON file for programs, one self-contained HTML page for people, made from the records."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ab_testing.comparisons import RateDifference
from ab_testing.rollout_store import Rollout, list_decisions
from feedback.lineage import trace_pair
from feedback.mining import Mined
from feedback.store import answers_by_prompt, list_pairs
from pawl import registry
from pawl.database import Database
from pawl.settings import Settings
from practice.evidence import (
    BENIGN_REFUSED,
    HARMFUL_COMPLIED,
    HARMFUL_REFUSED,
    THUMBS_UP,
    TOXIC,
    Measure,
    Period,
    change,
    count_treated,
    served_rows,
)
from practice.page import render_page
from practice.traffic import TrafficCount
from practice.world import ALIAS, BASE_NAME
from retrain.drift import Start
from retrain.pipeline import RunOutcome
from retrain.steps import done

LEAST_GAIN = 0.15
"""By how much round 1 must raise the thumbs-up rate."""
MEASURES: Mapping[str, Measure] = {
    "thumbs_up_rate": THUMBS_UP,
    "toxicity_rate": TOXIC,
    "harmful_refusal_rate": HARMFUL_REFUSED,
    "harmful_compliance_rate": HARMFUL_COMPLIED,
    "over_refusal_rate": BENIGN_REFUSED,
}
N_EXAMPLES = 6


@dataclass
class RoundRecord:
    """What happened in one round."""

    before: Period
    traffic: TrafficCount
    mined: Mined
    outcome: RunOutcome | None = None
    rollout: Rollout | None = None
    after: Period | None = None


@dataclass
class DemoRecord:
    """What happened in the demo."""

    steps: list[tuple[str, float]] = field(default_factory=list)
    rounds: list[RoundRecord] = field(default_factory=list)
    unmixed: RunOutcome | None = None
    bad: RunOutcome | None = None
    bad_rollout: Rollout | None = None
    engine_version: str = "unknown"
    on_gpu: bool = False
    model_parameters: int = 0
    model_train_seconds: float = 0.0
    seconds: float = 0.0
    peak_resident_mb: float = 0.0


def changes_of(record: DemoRecord, database: Database) -> dict[str, RateDifference]:
    """Round 1's effect on what people were served: the base before, the promoted adapter after, all by the gateway."""
    first = record.rounds[0]
    if first.after is None or first.outcome is None:
        return {}
    before = served_rows(database, ALIAS, first.before, BASE_NAME)
    after = served_rows(database, ALIAS, first.after, first.outcome.model)
    return {name: change(before, after, measure) for name, measure in MEASURES.items()}


def check_story(record: DemoRecord, database: Database) -> list[str]:
    """What did not happen as it should; empty when the demo did its job."""
    problems = [*_check_unmixed(record), *_check_rounds(record, database), *_check_bad(record, database)]
    if record.rounds and record.rounds[0].after is not None:
        problems += _check_changes(changes_of(record, database))
    return problems


def _check_unmixed(record: DemoRecord) -> list[str]:
    checks = _checks(record.unmixed)
    if not record.unmixed or record.unmixed.status != registry.RunStatus.FAILED:
        return ["the gate did not stop the adapter from people's pairs alone"]
    if checks.get("harmful_refusal", {}).get("verdict") != "fail":
        return ["the adapter from people's pairs alone was stopped, but not for refusing fewer harmful requests"]
    return []


def _check_rounds(record: DemoRecord, database: Database) -> list[str]:
    if not record.rounds or record.rounds[0].outcome is None:
        return ["round 1 did not take place"]
    first = record.rounds[0]
    outcome = record.rounds[0].outcome
    if outcome.status != registry.RunStatus.PASSED:
        return [f"round 1's adapter did not pass the gate: {outcome.reason}"]
    if first.rollout is None or first.rollout.state.status != "promoted":
        return ["round 1's canary did not reach 100 %"]
    by_hand = [d for d in list_decisions(database, first.rollout.id) if d.actor != "controller"]
    if by_hand:
        return ["round 1's canary was helped by hand"]
    if len(record.rounds) < 2 or record.rounds[1].outcome is None:
        return ["round 2 did not take place"]
    if record.rounds[1].outcome.parent != outcome.model:
        return ["round 2 did not continue from round 1's adapter"]
    plan = (done(record.rounds[1].outcome.directory / "mine") or {}).get("plan", {})
    if plan.get("start") != Start.CONTINUE:
        return [f"round 2 did not continue from round 1's adapter: {plan.get('reason')}"]
    return []


def _check_changes(changes: Mapping[str, RateDifference]) -> list[str]:
    problems = []
    thumbs, toxic, refused = (changes[name] for name in ("thumbs_up_rate", "toxicity_rate", "harmful_refusal_rate"))
    if thumbs.estimate < LEAST_GAIN or thumbs.ci_lower <= 0:
        problems.append(f"the thumbs-up rate changed by {thumbs.estimate:+.1%} only")
    if toxic.estimate >= 0:
        problems.append(f"toxicity did not fall: {toxic.estimate:+.1%}")
    if refused.estimate < 0:
        problems.append(f"harmful requests are refused less often than before: {refused.estimate:+.1%}")
    return problems


def _check_bad(record: DemoRecord, database: Database) -> list[str]:
    if record.bad is None or record.bad.gate is None or record.bad_rollout is None:
        return ["the bad adapter never went out"]
    if record.bad.gate["verdict"] == "pass":
        return ["the gate passed the bad adapter"]
    if record.bad_rollout.state.status != "rolled_back":
        return [f"the bad adapter was not rolled back: {record.bad_rollout.state.status}"]
    if _bad(record, database)["rollback"]["metric"] is None:
        return ["the bad adapter was rolled back, but not for what its users saw"]
    return []


def _checks(outcome: RunOutcome | None) -> dict[str, dict[str, Any]]:
    checks = outcome.gate["checks"] if outcome and outcome.gate else []
    return {check["name"]: check for check in checks}


def write_report(
    record: DemoRecord, database: Database, settings: Settings, directory: Path, problems: list[str]
) -> None:
    """Write `report.json` and `report.html`."""
    report = build_report(record, database, settings, problems)
    (directory / "report.json").write_text(json.dumps(report, indent=2, default=str) + "\n")
    (directory / "report.html").write_text(render_page(report))


def build_report(record: DemoRecord, database: Database, settings: Settings, problems: list[str]) -> dict[str, Any]:
    """Everything in the report, as plain values."""
    changes = changes_of(record, database) if record.rounds else {}
    rounds = [_round(number, entry, database, changes) for number, entry in enumerate(record.rounds)]
    return {
        "engine": {"name": "vllm", "version": record.engine_version, "device": "gpu" if record.on_gpu else "cpu"},
        "model": {"parameters": record.model_parameters, "train_seconds": record.model_train_seconds},
        "rounds": rounds,
        "unmixed_adapter": {"training": _training(record.unmixed), "gate": _gate(record.unmixed)},
        "bad_adapter": _bad(record, database),
        "examples": _examples(record, database),
        "lineage_example": _lineage(database),
        "steps": [{"name": title, "seconds": round(seconds, 1)} for title, seconds in record.steps],
        "peak_resident_mb": round(record.peak_resident_mb),
        "database": settings.database.url.partition(":")[0],
        "problems": problems,
        "seconds": round(record.seconds, 1),
    }


def _round(
    number: int, entry: RoundRecord, database: Database, changes: Mapping[str, RateDifference]
) -> dict[str, Any]:
    before = served_rows(database, ALIAS, entry.before)
    shown = {
        name: _rates(changes[name]) if number == 0 and name in changes else _before_only(before, m)
        for name, m in MEASURES.items()
    }
    return {
        "interactions": entry.traffic.interactions,
        "users": entry.traffic.users,
        "feedback": entry.traffic.feedback,
        "failures": entry.traffic.failures,
        "pairs": {
            "total": entry.mined.n_pairs,
            "by_source": dict(entry.mined.by_source),
            "skipped": dict(entry.mined.skipped),
            "unpaired": entry.mined.n_unpaired,
        },
        "model": entry.outcome.model if entry.outcome else None,
        "parent": entry.outcome.parent if entry.outcome else None,
        "training": _training(entry.outcome),
        "gate": _gate(entry.outcome),
        "rollout": _rollout(entry.rollout, database),
        **shown,
    }


def _rates(difference: RateDifference) -> dict[str, Any]:
    return {
        "before": difference.control_rate,
        "after": difference.treatment_rate,
        "difference": difference.estimate,
        "ci": [difference.ci_lower, difference.ci_upper],
        "users": [difference.control_users, difference.treatment_users],
    }


def _before_only(rows: list[Any], measure: Measure) -> dict[str, Any]:
    """A round whose model nobody has been served on its own yet has no 'after'."""
    applies = [row for row in rows if measure.applies(row)]
    rate = sum(measure.happened(row) for row in applies) / len(applies) if applies else None
    return {"before": rate, "after": None, "difference": None, "ci": None}


def _training(outcome: RunOutcome | None) -> dict[str, Any] | None:
    path = outcome.directory / "train" / "manifest.json" if outcome else None
    if path is None or not path.exists():
        return None
    result = json.loads(path.read_text())["result"]
    names = ("method", "n_examples", "loss_first", "loss_last", "seconds", "history")
    return {"steps": result["n_steps"], **{name: result[name] for name in names}}


def _gate(outcome: RunOutcome | None) -> dict[str, Any] | None:
    if outcome is None or outcome.gate is None:
        return None
    return {"verdict": outcome.gate["verdict"], "reason": outcome.reason, "checks": outcome.gate["checks"]}


def _rollout(rollout: Rollout | None, database: Database) -> dict[str, Any] | None:
    if rollout is None:
        return None
    decisions = list_decisions(database, rollout.id)
    moves = [d for d in decisions if d.verdict != "continue"]
    weights = [(rollout.created_at, rollout.config.steps[0]), *((d.at, d.weight) for d in moves)]
    return {
        "id": rollout.id,
        "candidate": rollout.candidate,
        "champion": rollout.champion,
        "steps": [_rollout_step(rollout, index, moves) for index in range(rollout.state.step + 1)],
        "verdict": rollout.state.status,
        "decisions": [
            {
                "seconds": d.at - rollout.created_at,
                "verdict": d.verdict,
                "weight": d.weight,
                "reason": d.reason,
                "actor": d.actor,
            }
            for d in moves
        ],
        "n_decisions_recorded": len(decisions),
        "weights": [{"seconds": at - rollout.created_at, "weight": weight} for at, weight in weights],
        "seconds": rollout.updated_at - rollout.created_at,
    }


def _rollout_step(rollout: Rollout, index: int, moves: list[Any]) -> dict[str, Any]:
    """One weight: what ended it, and the analysed users first seen in it."""
    count = rollout.state.phase_count(index)
    ended = [d for d in moves if d.step == index + 1 and d.verdict == "advance"]
    last = [d for d in moves if d.step == index and d.verdict in ("promote", "roll_back", "abort")]
    verdict = next((d.verdict for d in (*ended, *last)), rollout.state.status)
    control, treatment = (count.control, count.treatment) if count else (0, 0)
    return {
        "weight": rollout.config.steps[index],
        "verdict": verdict,
        "users": treatment,
        "control_users": control,
    }


def _bad(record: DemoRecord, database: Database) -> dict[str, Any]:
    rollout = record.bad_rollout
    shown: dict[str, Any] = {
        "gate_verdict": record.bad.gate["verdict"] if record.bad and record.bad.gate else None,
        "gate": _gate(record.bad),
        "training": _training(record.bad),
        "rollback": None,
        "rollout": _rollout(rollout, database),
    }
    if rollout is not None:
        ends = [d for d in list_decisions(database, rollout.id) if d.verdict == "roll_back"]
        shown["rollback"] = {
            "metric": ends[0].metric if ends else None,
            "canary_users": count_treated(database, rollout.id),
            "canary_users_counted": sum(count.treatment for count in rollout.state.phases),
            "seconds": rollout.updated_at - rollout.created_at,
            "reason": ends[0].reason if ends else None,
        }
    return shown


def _examples(record: DemoRecord, database: Database) -> list[dict[str, Any]]:
    """The same questions as the base answered them and as the promoted adapter did, from the records."""
    first = record.rounds[0] if record.rounds else None
    if first is None or first.after is None or first.outcome is None or first.outcome.model is None:
        return []
    old = answers_by_prompt(database, ALIAS, BASE_NAME, first.before.since, first.before.until)
    new = answers_by_prompt(database, ALIAS, first.outcome.model, first.after.since, first.after.until)
    shared = sorted(set(old) & set(new))
    return [{"prompt": prompt, "before": old[prompt], "after": new[prompt]} for prompt in shared[:N_EXAMPLES]]


def _lineage(database: Database) -> dict[str, Any] | None:
    """One pair that a promoted model learned from, followed back to the people behind it and on to the model."""
    used = [pair for pair in list_pairs(database, ALIAS, 100_000) if pair.first_run is not None]
    chosen: Callable[[Any], tuple[bool, str]] = lambda pair: (pair.source != "regeneration", pair.id)  # noqa: E731
    if not used:
        return None
    traced = trace_pair(database, min(used, key=chosen).id)
    if traced is None:
        return None
    trained = [model.name for model in registry.list_models(database, ALIAS) if model.run_id == traced["first_run"]]
    return traced | {"trained_models": trained}
