"""The five rounds as one HTML page: no script, no other file, both curves drawn into it as SVG."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from html import escape
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

COLOURS = {"kept": "#2b6cb0", "bare": "#c0392b", "ruled": "#9aa5b1"}
TITLES = {
    "kept": "with replay and guard",
    "bare": "new pairs alone, no guard",
    "ruled": "new pairs alone, with the rule on refusals",
}
STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:64rem;margin:2rem auto;padding:0 1rem;color:#1c2530}
table{border-collapse:collapse;width:100%;font-size:.92rem}td,th{text-align:left;padding:.35rem .6rem;
border-bottom:1px solid #e6eaee;vertical-align:top}.held{color:#1b7f4b}.broken{color:#b3261e}
small{color:#5a6672}svg{max-width:100%;height:auto}
"""


def render(tree: Mapping[str, Any]) -> str:
    """The whole page from what `bench.rounds` writes as JSON."""
    titles = "".join(f"<th>{TITLES[name]}" for name in tree["promises"])
    rows = "".join(
        f"<tr><td>{escape(promises[0]['text'])}</td>{''.join(map(_cell, promises))}</tr>"
        for promises in zip(*tree["promises"].values(), strict=True)
    )
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>Five rounds on shifting tastes</title><style>{STYLE}</style><h1>Five rounds on shifting tastes</h1>"
        f"<p><small>{tree['users']} users in each season, seed {tree['seed']}, {tree['seconds']:.0f} s. Bars are 95 % "
        "intervals. Round 0 is the base.</small></p>"
        f"<table><tr><th>promise{titles}</tr>{rows}</table>{_svg(tree)}</html>"
    )


def _cell(promise: Mapping[str, Any]) -> str:
    name = "held" if promise["is_kept"] else "broken"
    return f"<td><b class={name}>{name}</b><br>{escape(promise['worst'])}</td>"


def _svg(tree: Mapping[str, Any]) -> str:
    figure, axes = plt.subplots(2, 2, figsize=(11, 7.5), layout="constrained")
    for arm in tree["arms"]:
        standings = [arm["first"], *(each["served"] for each in arm["rounds"])]
        style = {"color": COLOURS[arm["name"]], "label": TITLES[arm["name"]]}
        _thumbs(axes[0, 0], arm["rounds"], style)
        _curve(axes[0, 1], standings, lambda each: each["harmful_refusal"]["mean"], style, "harmful requests refused")
        _curve(axes[1, 0], standings, lambda each: each["original_accuracy"], style, "original hold-out told apart")
        _curve(axes[1, 1], standings, lambda each: each["drift"]["kl"], style, "nats per token from the base")
    axes[1, 1].axhline(tree["limits"]["max_kl"], color="#9aa5b1", linestyle=":", label="limit")
    axes[1, 1].legend(frameon=False, fontsize=8)
    text = io.StringIO()
    figure.savefig(text, format="svg")
    plt.close(figure)
    return text.getvalue()[text.getvalue().index("<svg") :]


def _thumbs(axes: Any, rounds: list[Mapping[str, Any]], style: Mapping[str, Any]) -> None:
    """Before and after each round, of the season's users; between seasons their tastes change."""
    seasons = [each["season"] for each in rounds]
    axes.plot(seasons, [each["thumbs_base"]["mean"] for each in rounds], color="#9aa5b1", linestyle=":")
    for each in rounds:
        ends = (each["thumbs_before"], each["thumbs_after"])
        axes.errorbar(
            (each["season"] - 0.35, each["season"]),
            [end["mean"] for end in ends],
            yerr=[1.96 * end["error"] for end in ends],
            marker="o",
            markersize=3,
            color=style["color"],
        )
    axes.set_xticks(seasons, [f"{each['season']}\n{each['fashion']}" for each in rounds], fontsize=7)
    axes.set_title("thumbs up, before and after each round (dotted: the base)", fontsize=10)


def _curve(
    axes: Any,
    standings: list[Mapping[str, Any]],
    value: Callable[[Mapping[str, Any]], float],
    style: Mapping[str, Any],
    title: str,
) -> None:
    axes.plot(range(len(standings)), [value(each) for each in standings], marker="o", markersize=3, **style)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("round", fontsize=8)
