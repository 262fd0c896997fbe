"""A report's page draws what the report says, and shows names as names."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import numpy as np

from ab_testing.analysis import Columns, analyse, ratio
from ab_testing.report_page import WIDTH, page


def a_page(variant: str = "treatment") -> str:
    users = np.arange(600)
    table = {
        "user_id": users,
        "variant": np.where(users % 2, variant, "control"),
        "liked": (users % 7 == 0) | ((users % 2 == 1) & (users % 3 == 0)),
        "place": np.where(users % 3, "here", "<there>"),
    }
    report = analyse(table, [ratio("liked", "liked", margin=0.05)], columns=Columns(segment="place"))
    return page(report, title="Tone & style", facts={"users": 600})


def test_it_is_well_formed_and_asks_nobody() -> None:
    text = a_page()
    open_tags: list[str] = []

    class Tags(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            del attrs
            if tag not in ("meta", "br"):
                open_tags.append(tag)

        def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            del tag, attrs

        def handle_endtag(self, tag: str) -> None:
            assert open_tags.pop() == tag

    Tags().feed(text)
    assert open_tags == []
    assert "http" not in text.replace("http-equiv", "")
    assert "Tone &amp; style" in text


def test_names_are_no_markup() -> None:
    text = a_page("<script>alert(1)</script>")
    assert "<script" not in text
    assert "&lt;there&gt;" in text


def test_every_interval_lies_in_its_drawing_around_its_estimate() -> None:
    text = a_page()
    drawings = re.findall(r"<svg.*?</svg>", text)
    assert len(drawings) == 3
    for drawing in drawings:
        ends = [float(end) for end in re.findall(r'x[12]="([\d.]+)"', drawing)][2:]
        (point,) = map(float, re.findall(r'cx="([\d.]+)"', drawing))
        assert 0 <= ends[0] <= ends[2] <= point <= ends[3] <= ends[1] <= WIDTH
