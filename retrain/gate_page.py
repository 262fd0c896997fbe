"""The gate's report for people: one HTML page, no script, nothing fetched, plots drawn into it as SVG.

It shows figures, and answers to the operator's own probes. Prompts that users wrote are not in it, so that it need not
change when one of them is erased. Everything a model wrote is escaped, and a policy in the page forbids all but its own
style.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from retrain.measurements import Measurements, Paired

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:66rem;margin:2rem auto;padding:0 1rem;color:#1c2530}
h1{font-size:1.5rem;margin-bottom:.2rem}h2{font-size:1.1rem;margin-top:2.2rem;border-bottom:1px solid #d5dbe1}
table{border-collapse:collapse;width:100%;font-size:.9rem}td,th{text-align:left;padding:.35rem .6rem;
vertical-align:top;border-bottom:1px solid #e6eaee;overflow-wrap:anywhere}th{color:#5a6672;font-weight:600}
.pass{color:#1b7f4b}.fail{color:#b3261e}.cannot_tell{color:#8a6d00}small,.quiet{color:#5a6672}
svg{max-width:100%;height:auto}svg text{font:12px system-ui,sans-serif;fill:#1c2530}code{background:#f4f6f8}
td.said{white-space:pre-wrap}pre{background:#f4f6f8;padding:.6rem;overflow:auto;font-size:.82rem}
"""
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
COLOURS = {"pass": "#1b7f4b", "fail": "#b3261e", "cannot_tell": "#8a6d00"}
GREY, BLUE = "#9aa5b1", "#2b6cb0"
MAX_EXAMPLES = 24
MAX_ANSWER_CHARS = 600
BINS = 16

WIDTH, LABELS, ROW = 860, 250, 26


class Example(NamedTuple):
    """One probe, and what each model made of it."""

    kind: str
    """Which probes it is from."""
    prompt: str
    parent: str
    parent_response: str
    candidate: str
    candidate_response: str


def render(
    report: Mapping[str, Any],
    measurements: Measurements | None,
    examples: Sequence[Example],
    settings: Mapping[str, Any],
) -> str:
    """The whole page.

    Args:
        report: as `gate.report_as_dict` makes it.
        examples: on prompts that are the operator's.
        settings: by which it was judged.
    """
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        f'<meta http-equiv=Content-Security-Policy content="{POLICY}">',
        "<meta name=viewport content='width=device-width,initial-scale=1'>",
        f"<title>Gate: {escape(str(report['candidate']))}</title><style>{STYLE}</style>",
        *_head(report),
        *_plots(report, measurements),
        *_table(report),
        *_examples(examples),
        f"<h2>Judged by</h2><pre>{escape(json.dumps(settings, indent=1, default=str))}</pre>",
    ]
    return "".join(parts)


def changed(examples: Iterable[Example]) -> list[Example]:
    """Those that the two models met differently, as many of each kind as there is room for."""
    by_kind: dict[str, list[Example]] = {}
    for one in examples:
        if one.parent_response != one.candidate_response:
            by_kind.setdefault(one.kind, []).append(one)
    share = MAX_EXAMPLES // max(1, len(by_kind))
    return [one for some in by_kind.values() for one in some[:share]]


def _head(report: Mapping[str, Any]) -> Iterator[str]:
    verdict = str(report["verdict"])
    yield f"<h1>The gate says <span class={escape(verdict)}>{_words(verdict)}</span></h1>"
    yield f"<p class=quiet><code>{escape(str(report['candidate']))}</code> against its parent "
    yield f"<code>{escape(str(report['parent']))}</code>, on the same prompts.</p>"
    if report["reasons"]:
        items = "".join(f"<li>{escape(str(reason))}</li>" for reason in report["reasons"])
        yield f"<ul class={escape(verdict)}>{items}</ul>"


def _plots(report: Mapping[str, Any], measurements: Measurements | None) -> Iterator[str]:
    rates = [check for check in report["checks"] if _is_rate(check)]
    if rates:
        yield "<h2>Differences and what is allowed</h2>"
        yield "<p class=quiet>Candidate less parent, in points of a hundred. The dot is what was measured, the line "
        yield "its interval, the tick what is allowed.</p>"
        yield forest(rates)
    if measurements is not None and measurements.length is not None and measurements.length.units:
        yield "<h2>Length of the answers, in tokens</h2>"
        yield histogram(measurements.length)


def _is_rate(check: Mapping[str, Any]) -> bool:
    return None not in (check["ci"], check["parent"]) and isinstance(check["limit"], int | float) and _is_share(check)


def _is_share(check: Mapping[str, Any]) -> bool:
    return all(0 <= check[side] <= 1 for side in ("parent", "candidate")) and abs(check["difference"]) <= 1


def forest(checks: Sequence[Mapping[str, Any]]) -> str:
    """Every difference with its interval, one below the other.

    Wins are shown as their distance from one half, like all the others from no difference.
    """
    rows = [_centred(check) for check in checks]
    reach = max(0.05, *(abs(value) for row in rows for value in (*row.interval, row.limit))) * 1.05
    middle, scale = LABELS + (WIDTH - LABELS) / 2, (WIDTH - LABELS) / 2 / reach

    def x(value: float) -> str:
        return f"{middle + scale * value:.1f}"

    height = ROW * len(rows) + 30
    marks = [f"<line x1={x(0)} x2={x(0)} y1=0 y2={height - 24} stroke='{GREY}'/>"]
    for number, row in enumerate(rows):
        y = ROW * number + ROW / 2
        low, high = row.interval
        marks += [
            f"<text x=0 y={y + 4:.1f}>{escape(row.name)}</text>",
            f"<line x1={x(low)} x2={x(high)} y1={y} y2={y} stroke='{row.colour}' stroke-width=2 />",
            f"<circle cx={x(row.estimate)} cy={y} r=4 fill='{row.colour}'/>",
            f"<line x1={x(row.limit)} x2={x(row.limit)} y1={y - 9} y2={y + 9} stroke='#1c2530' stroke-width=2 />",
        ]
    for value in (-reach / 1.05, 0.0, reach / 1.05):
        marks.append(f"<text x={x(value)} y={height - 6} text-anchor=middle>{100 * value:+.0f}</text>")
    return _svg(height, marks)


class _Row(NamedTuple):
    name: str
    estimate: float
    interval: tuple[float, float]
    limit: float
    colour: str


def _centred(check: Mapping[str, Any]) -> _Row:
    is_wins = math.isclose(check["parent"] + check["candidate"], 1.0) and check["difference"] == check["candidate"]
    centre = 0.5 if is_wins else 0.0
    low, high = check["ci"]
    return _Row(
        name=_words(str(check["name"])),
        estimate=check["difference"] - centre,
        interval=(low - centre, high - centre),
        limit=check["limit"] - centre,
        colour=COLOURS.get(str(check["verdict"]), GREY),
    )


def histogram(lengths: Paired) -> str:
    """How long the answers of each model are."""
    longest = max(*lengths.parent, *lengths.candidate, 1.0)
    counts = [_binned(values, longest) for values in (lengths.parent, lengths.candidate)]
    highest = max(map(max, counts))
    height, step = 170, WIDTH / BINS
    marks = []
    for side, (counted, colour) in enumerate(zip(counts, (GREY, BLUE), strict=True)):
        for place, count in enumerate(counted):
            tall = 130 * count / highest
            left = place * step + side * step * 0.42
            marks.append(
                f"<rect x={left:.1f} y={140 - tall:.1f} width={step * 0.4:.1f} height={tall:.1f} fill='{colour}'/>"
            )
    marks += [f"<text x={at:.1f} y=158>{value:.0f}</text>" for at, value in ((0.0, 0.0), (WIDTH - 40, longest))]
    legend = f"<tspan fill='{GREY}'>parent</tspan> <tspan fill='{BLUE}'>candidate</tspan>"
    return _svg(height, [*marks, f"<text x={WIDTH / 2} y=158 text-anchor=middle>{legend}</text>"])


def _binned(values: Sequence[float], longest: float) -> list[int]:
    found = [0] * BINS
    for value in values:
        found[min(BINS - 1, int(BINS * value / longest))] += 1
    return found


def _svg(height: float, marks: Iterable[str]) -> str:
    return f"<svg viewBox='0 0 {WIDTH} {height}' role=img>{''.join(marks)}</svg>"


def _table(report: Mapping[str, Any]) -> Iterator[str]:
    head = ("check", "verdict", "why", "how", "prompts")
    yield "<h2>Every check</h2><table><tr>" + "".join(f"<th>{title}</th>" for title in head) + "</tr>"
    for check in report["checks"]:
        verdict = escape(str(check["verdict"]))
        veto = "" if check.get("is_required", True) else "<br><small>a veto only</small>"
        cells = (
            escape(_words(str(check["name"]))),
            f"<span class={verdict}>{_words(verdict)}</span>{veto}",
            escape(str(check["reason"])),
            escape(_how(check)),
            escape(_asked(check)),
        )
        yield "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
    yield "</table>"


def _how(check: Mapping[str, Any]) -> str:
    p_value, power = check.get("p_value"), check.get("power")
    p = f", p = {p_value:.3g}" if p_value is not None else ""
    passes = f", would pass an equal of the parent with {power:.0%}" if power is not None else ""
    return f"{check.get('method', '')}{p}{passes}"


def _asked(check: Mapping[str, Any]) -> str:
    """How many prompts, and how many answers to each.

    >>> _asked({"n_prompts": 150, "n_answers": 4})
    '150, 4 answers each'
    """
    n_answers = check.get("n_answers")
    return f"{check.get('n_prompts', '')}" + (f", {n_answers} answers each" if n_answers else "")


def _examples(examples: Sequence[Example]) -> Iterator[str]:
    if not examples:
        return
    yield "<h2>Probes that the two met differently</h2>"
    yield "<table><tr><th>probe</th><th>asked</th><th>parent</th><th>candidate</th></tr>"
    for one in examples:
        sides = ((one.parent, one.parent_response), (one.candidate, one.candidate_response))
        said = "".join(
            f"<td class=said>{escape(_short(text))}<br><small>{escape(response)}</small></td>"
            for text, response in sides
        )
        yield f"<tr><td>{escape(_short(one.kind))}</td><td class=said>{escape(_short(one.prompt))}</td>{said}</tr>"
    yield "</table>"


def _short(text: str) -> str:
    printable = "".join(char if char.isprintable() or char in "\n\t" else "\ufffd" for char in text)
    return printable if len(printable) <= MAX_ANSWER_CHARS else printable[:MAX_ANSWER_CHARS] + " ..."


def _words(name: str) -> str:
    return name.replace("_", " ")
