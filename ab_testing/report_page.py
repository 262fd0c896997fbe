"""A report as one page of HTML: every effect with its interval drawn, nothing loaded from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Final

from ab_testing.analysis.report import Effect, Report, Verdict

WIDTH: Final = 240
"""Of a drawn interval, in pixels."""
_COLOURS: Final[Mapping[Verdict, str]] = {
    "better": "#1a7f37",
    "worse": "#cf222e",
    "not_worse": "#57606a",
    "unclear": "#9a6700",
    "insufficient_data": "#afb8c1",
}
_STYLE: Final = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; color: #1f2328; }
table { border-collapse: collapse; width: 100%; }
th, td { border-bottom: 1px solid #d0d7de; padding: .35rem .6rem; text-align: left; vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
small { color: #57606a; }
"""


def page(report: Report, *, title: str, facts: Mapping[str, object]) -> str:
    """The whole page.

    Args:
        facts: what is said above the tables, by name.
    """
    segments = sorted({effect.segment for effect in report if effect.segment is not None})
    tables = [_table([effect for effect in report if effect.segment is None], report.alpha)]
    for segment in segments:
        tables.append(f"<h2>{escape(segment)}</h2>")
        tables.append(_table([effect for effect in report if effect.segment == segment], report.alpha))
    said = "".join(f"<li>{escape(name)}: {escape(str(value))}</li>" for name, value in facts.items())
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style><h1>{escape(title)}</h1><ul>{said}</ul>{''.join(tables)}</html>\n"
    )


def _table(effects: Sequence[Effect], alpha: float) -> str:
    heads = ("metric", "variant", "control", "treatment", "difference", f"{1 - alpha:.0%} interval", "", "verdict")
    head = "".join(f"<th>{name}</th>" for name in heads)
    return f"<table><tr>{head}</tr>{''.join(map(_row, effects))}</table>"


def _row(effect: Effect) -> str:
    notes = "; ".join(filter(None, (effect.reason, *effect.notes)))
    cells = [
        f"<td>{escape(effect.metric)}<br><small>{escape(effect.role)}</small></td>",
        f"<td>{escape(effect.treatment)}</td>",
        _number(effect.control_value.value),
        _number(effect.treatment_value.value),
        _number(effect.estimate, sign="+"),
        f'<td class="number">{_bounds(effect)}</td>',
        f"<td>{_drawing(effect)}</td>",
        f'<td><b style="color:{_COLOURS[effect.verdict]}">{effect.verdict.replace("_", " ")}</b>'
        f"<br><small>{escape(notes)}</small></td>",
    ]
    return f"<tr>{''.join(cells)}</tr>"


def _number(value: float | None, sign: str = "") -> str:
    return f'<td class="number">{"" if value is None else format(value, f"{sign}.4g")}</td>'


def _bounds(effect: Effect) -> str:
    """At one look, and below it at all looks at once where that is known."""
    lines = [f"{each.lower:+.4g} to {each.upper:+.4g}" for each in (effect.interval, effect.sequence) if each]
    return "<br><small>always: ".join(lines) + ("</small>" if len(lines) > 1 else "")


def _drawing(effect: Effect) -> str:
    """The interval about zero; of a width that is its own, for metrics have no common scale."""
    if effect.interval is None or effect.estimate is None:
        return ""
    widest = effect.sequence or effect.interval
    reach = 1.1 * max(abs(widest.lower), abs(widest.upper), abs(effect.estimate))
    if reach == 0.0:
        return ""

    def at(value: float) -> float:
        return WIDTH / 2 * (1 + value / reach)

    colour = _COLOURS[effect.verdict]
    thin, thick = (at(widest.lower), at(widest.upper)), (at(effect.interval.lower), at(effect.interval.upper))
    return (
        f'<svg width="{WIDTH}" height="20" role="img" aria-label="{effect.estimate:+.4g}">'
        f'<line x1="{WIDTH / 2}" x2="{WIDTH / 2}" y1="0" y2="20" stroke="#afb8c1"/>'
        f'<line x1="{thin[0]:.1f}" x2="{thin[1]:.1f}" y1="10" y2="10" stroke="{colour}"/>'
        f'<line x1="{thick[0]:.1f}" x2="{thick[1]:.1f}" y1="10" y2="10" stroke="{colour}" stroke-width="5"/>'
        f'<circle cx="{at(effect.estimate):.1f}" cy="10" r="4" fill="{colour}"/></svg>'
    )
