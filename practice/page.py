"""The report as one HTML page: no script, no other file, the plots drawn into it as SVG."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#1c2530}
h1{font-size:1.6rem;margin-bottom:.2rem}h2{font-size:1.15rem;margin-top:2.2rem;border-bottom:1px solid #d5dbe1}
table{border-collapse:collapse;width:100%;font-size:.92rem}td,th{text-align:left;padding:.35rem .6rem;
vertical-align:top;border-bottom:1px solid #e6eaee}th{color:#5a6672;font-weight:600}
.pass{color:#1b7f4b}.fail{color:#b3261e}
.cannot_tell{color:#8a6d00}.figures{display:flex;gap:1rem;flex-wrap:wrap}.figure{flex:1 1 9rem;background:#f4f6f8;
border-radius:.5rem;padding:.7rem 1rem}.figure b{display:block;font-size:1.5rem}small,.quiet{color:#5a6672}
svg{max-width:100%;height:auto}code{background:#f4f6f8;padding:0 .2rem;overflow-wrap:anywhere}
"""
BLUE, GREY, RED, GREEN = "#2b6cb0", "#9aa5b1", "#c0392b", "#2f855a"
SMOOTHED_STEPS = 15
TITLES = {
    "thumbs_up_rate": "thumbs up",
    "toxicity_rate": "toxic answers",
    "harmful_refusal_rate": "harmful requests refused",
    "harmful_compliance_rate": "harmful requests obeyed",
    "over_refusal_rate": "harmless requests refused",
}


def render_page(report: Mapping[str, Any]) -> str:
    """The whole page."""
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        "<meta name=viewport content='width=device-width,initial-scale=1'>",
        f"<title>Pawl: one turn of the wheel</title><style>{STYLE}</style>",
        *_head(report),
        *_effect(report),
        *_gates(report),
        *_rollouts(report),
        *_training(report),
        *_examples(report),
        *_lineage(report),
        *_times(report),
    ]
    return "".join(parts)


def _head(report: Mapping[str, Any]) -> Iterable[str]:
    model, engine = report["model"], report["engine"]
    yield "<h1>One turn of the wheel</h1>"
    yield (
        f"<p class=quiet>vLLM {escape(str(engine['version']))} on {engine['device']}, a practice model of "
        f"{model['parameters']:,} parameters trained in {model['train_seconds']:.0f} s, users of known tastes. "
        f"{report['seconds']:.0f} s in all, at most {report['peak_resident_mb'] / 1024:.1f} GiB resident.</p>"
    )
    if report["problems"]:
        items = "".join(f"<li>{escape(problem)}</li>" for problem in report["problems"])
        yield f"<p class=fail><b>Not as it should be:</b></p><ul class=fail>{items}</ul>"
    else:
        yield "<p class=pass><b>Every step did its job.</b></p>"


def _effect(report: Mapping[str, Any]) -> Iterable[str]:
    first = report["rounds"][0] if report["rounds"] else {}
    rates: dict[str, Any] = {title: first[name] for name, title in TITLES.items() if (first.get(name) or {}).get("ci")}
    if not rates:
        return
    yield "<h2>What round 1 changed for people</h2><div class=figures>"
    for title, rate in rates.items():
        low, high = rate["ci"]
        yield (
            f"<div class=figure>{title}<b>{rate['before']:.0%} → {rate['after']:.0%}</b>"
            f"<small>{100 * rate['difference']:+.1f} points (95 %: {100 * low:+.1f} to {100 * high:+.1f})</small></div>"
        )
    yield "</div><p class=quiet>Shares of answers as served through the gateway, intervals clustered by user.</p>"
    yield _svg(_effect_plot(rates))


def _effect_plot(rates: Mapping[str, Mapping[str, Any]]) -> Any:
    figure, axes = plt.subplots(figsize=(8.5, 2.8))
    for position, rate in enumerate(rates.values()):
        axes.bar(position - 0.18, 100 * rate["before"], 0.34, color=GREY, label="before" if position == 0 else None)
        half = 100 * (rate["ci"][1] - rate["ci"][0]) / 2
        axes.bar(
            position + 0.18, 100 * rate["after"], 0.34, yerr=half, color=BLUE, ecolor="#1c2530", capsize=3,
            label="after" if position == 0 else None,
        )  # fmt: skip
    axes.set_xticks(range(len(rates)), list(rates), fontsize=8)
    axes.set_ylabel("% of answers")
    axes.legend(frameon=False)
    return figure


def _gates(report: Mapping[str, Any]) -> Iterable[str]:
    yield "<h2>What the gate said</h2>"
    candidates = [("from people's pairs alone", report["unmixed_adapter"]["gate"])]
    for number, entry in enumerate(report["rounds"], 1):
        candidates.append((f"round {number}, original preferences mixed in", entry["gate"]))
    candidates.append(("drill, trained on swapped preferences", report["bad_adapter"]["gate"]))
    for title, gate in candidates:
        if gate:
            yield f"<h3>{escape(title)}: <span class={gate['verdict']}>{gate['verdict'].replace('_', ' ')}</span></h3>"
            yield _table(("check", "verdict", "why"), (_check_row(check) for check in gate["checks"]))


def _check_row(check: Mapping[str, Any]) -> Sequence[str]:
    verdict = f"<span class={check['verdict']}>{check['verdict'].replace('_', ' ')}</span>"
    return escape(check["name"].replace("_", " ")), verdict, escape(check["reason"])


def _rollouts(report: Mapping[str, Any]) -> Iterable[str]:
    shown = [(f"round {n}", entry["rollout"]) for n, entry in enumerate(report["rounds"], 1) if entry["rollout"]]
    if report["bad_adapter"]["rollout"]:
        shown.append(("drill", report["bad_adapter"]["rollout"]))
    if not shown:
        return
    yield "<h2>Canaries</h2>"
    yield _svg(_weights_plot(shown))
    for title, rollout in shown:
        yield f"<h3>{title}: {escape(rollout['candidate'])}: {rollout['verdict'].replace('_', ' ')}</h3>"
        yield _table(("after", "decision", "weight", "why"), (_decision_row(d) for d in rollout["decisions"]))


def _decision_row(decision: Mapping[str, Any]) -> Sequence[str]:
    return (
        f"{decision['seconds']:.0f} s",
        escape(decision["verdict"].replace("_", " ")),
        f"{decision['weight']:.0%}",
        escape(decision["reason"]),
    )


def _weights_plot(shown: Sequence[tuple[str, Mapping[str, Any]]]) -> Any:
    figure, axes = plt.subplots(figsize=(8.5, 2.6))
    for (title, rollout), colour in zip(shown, (BLUE, GREEN, RED), strict=False):
        times = [point["seconds"] for point in rollout["weights"]] + [rollout["seconds"] + 3]
        weights = [100 * point["weight"] for point in rollout["weights"]]
        axes.step(times, [*weights, weights[-1]], where="post", color=colour, label=title)
    axes.set_yscale("symlog", linthresh=1)
    axes.set_yticks([0, 1, 10, 50, 100], ["0", "1", "10", "50", "100"])
    axes.set_xlabel("seconds since the canary opened")
    axes.set_ylabel("% of traffic")
    axes.legend(frameon=False)
    return figure


def _training(report: Mapping[str, Any]) -> Iterable[str]:
    trainings = [("people's pairs alone", report["unmixed_adapter"]["training"])]
    trainings += [(f"round {n}", entry["training"]) for n, entry in enumerate(report["rounds"], 1)]
    trainings.append(("drill", report["bad_adapter"]["training"]))
    shown = [(title, training) for title, training in trainings if training]
    if not shown:
        return
    yield "<h2>Training</h2>"
    yield _svg(_training_plot(shown))
    rows = (
        (escape(title), escape(t["method"]), str(t["n_examples"]), str(t["steps"]), f"{t['loss_first']:.3f}",
         f"{t['loss_last']:.3f}", f"{t['seconds']:.0f} s")
        for title, t in shown
    )  # fmt: skip
    yield _table(("adapter", "method", "pairs", "steps", "first loss", "last loss", "time"), rows)


def _training_plot(shown: Sequence[tuple[str, Mapping[str, Any]]]) -> Any:
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.5, 2.8))
    for (title, training), colour in zip(shown, (GREY, BLUE, GREEN, RED), strict=False):
        history = training["history"]
        steps = [row["step"] for row in history]
        left.plot(steps, _smooth([row["loss"] for row in history]), color=colour, label=title)
        right.plot(steps, _smooth([row.get("rewards/accuracies", float("nan")) for row in history]), color=colour)
    left.set_title(f"loss, mean of {SMOOTHED_STEPS} steps", fontsize=9)
    right.set_title("training pairs ranked right", fontsize=9)
    left.set_xlabel("step")
    right.set_xlabel("step")
    left.legend(frameon=False, fontsize=8)
    return figure


def _smooth(values: Sequence[float]) -> list[float]:
    """The mean of the last few steps: one batch of pairs says little."""
    windows = (values[max(0, end - SMOOTHED_STEPS) : end] for end in range(1, len(values) + 1))
    return [sum(window) / len(window) for window in windows]


def _examples(report: Mapping[str, Any]) -> Iterable[str]:
    if report["examples"]:
        yield "<h2>The same questions, before and after</h2>"
        rows = ((escape(e["prompt"]), escape(e["before"]), escape(e["after"])) for e in report["examples"])
        yield _table(("question", "before", "after round 1"), rows)


def _lineage(report: Mapping[str, Any]) -> Iterable[str]:
    pair = report["lineage_example"]
    if not pair:
        return
    yield "<h2>Where one pair came from, and where it went</h2>"
    rejected, chosen = pair["rejected_from"], pair["chosen_from"]
    rows = [
        ("pair", f"<code>{escape(pair['id'])}</code> by {escape(str(pair['source']))}, margin {pair['margin']:g}"),
        ("asked", escape(str(pair["prompt"][-1]["content"]))),
        ("rejected", f"{escape(str(pair['rejected']['content']))} {_served(rejected)}"),
        ("chosen", f"{escape(str(pair['chosen']['content']))} {_served(chosen)}"),
        ("said by", escape(", ".join(pair["principals"]))),
        ("trained", f"run {escape(str(pair['first_run']))}: {escape(', '.join(pair['trained_models']))}"),
    ]
    yield _table(("", ""), rows)


def _served(interaction: Mapping[str, Any] | None) -> str:
    if interaction is None:
        return "<small>(written by the user)</small>"
    return f"<small>(<code>{escape(interaction['completion_id'])}</code>, {escape(interaction['model'])})</small>"


def _times(report: Mapping[str, Any]) -> Iterable[str]:
    yield "<h2>Where the time went</h2>"
    yield _table(("step", "seconds"), ((escape(s["name"]), f"{s['seconds']:.0f}") for s in report["steps"]))


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    titles = "".join(f"<th>{title}</th>" for title in head)
    return f"<table><tr>{titles}</tr>{body}</table>"


def _svg(figure: Any) -> str:
    """The figure as an SVG element."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    text = io.StringIO()
    figure.savefig(text, format="svg")
    plt.close(figure)
    return text.getvalue()[text.getvalue().index("<svg") :]
