"""Which series the alert rules and the dashboard read.

A small reader of PromQL, enough to hold every expression of `pawl-rules.yml` and `pawl-dashboard.json` against the
series the processes emit: names, the labels of their selectors, and the labels they are grouped or matched by.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Final, NamedTuple

from monitoring.errors import BadExpression


class SeriesUse(NamedTuple):
    """One series an expression reads, and the labels it must have for the expression to mean anything."""

    name: str
    labels: frozenset[str]


class _Token(NamedTuple):
    kind: str
    text: str
    position: int


_TOKEN: Final = re.compile(
    r"(?P<space>\s+|\#[^\n]*)"
    r"|(?P<string>\"(?:[^\"\\]|\\.)*\"|'(?:[^'\\]|\\.)*'|`[^`]*`)"
    r"|(?P<variable>\$\{?\w+(?::\w+)?\}?)"
    r"|(?P<name>[A-Za-z_:][A-Za-z0-9_:]*)"
    r"|(?P<number>\d[\w.]*)"
    r"|(?P<sign>=~|!~|!=|==|<=|>=|.)",
    re.DOTALL,
)
_GROUPINGS: Final = frozenset({"by", "without", "on", "ignoring", "group_left", "group_right"})
_NEEDS_LABELS: Final = frozenset({"by", "on"})
_KEYWORDS: Final = _GROUPINGS | {"and", "or", "unless", "offset", "bool", "inf", "nan", "start", "end", "atan2"}
_PAIRS: Final = {")": "(", "]": "[", "}": "{"}


def referenced_series(expr: str) -> set[SeriesUse]:
    """Return the series an expression reads, with the labels it selects or groups them by.

    A grouping counts for the series inside its own aggregation, whether written before or after the parentheses.

    >>> [(use.name, sorted(use.labels)) for use in referenced_series('sum by (le) (rate(a_bucket{x="1"}[5m]))')]
    [('a_bucket', ['le', 'x'])]

    Raises:
        BadExpression: a bracket or quote is not closed.
    """
    tokens = _tokens(expr)
    closing = _matching(expr, tokens)
    groupings = _groupings(tokens, closing)
    return {
        SeriesUse(token.text, _selector_labels(tokens, index, closing) | _grouped_by(index, groupings))
        for index, token in enumerate(tokens)
        if _is_series(tokens, index, closing)
    }


def rule_expressions(rules: Mapping[str, object]) -> dict[str, str]:
    """Return the expression of each alert in a parsed rule file, by the alert's name."""
    return {
        str(rule.get("alert") or rule.get("record")): str(rule["expr"])
        for group in _mappings(rules.get("groups"))
        for rule in _mappings(group.get("rules"))
    }


def dashboard_expressions(dashboard: Mapping[str, object]) -> dict[str, list[str]]:
    """Return the expressions of each panel in a parsed dashboard, rows' own panels included, by the panel's title."""
    return {
        str(panel.get("title")): [str(target["expr"]) for target in _mappings(panel.get("targets"))]
        for panel in _panels(dashboard)
        if panel.get("targets")
    }


def _panels(holder: Mapping[str, object]) -> Iterator[Mapping[str, object]]:
    for panel in _mappings(holder.get("panels")):
        yield panel
        yield from _panels(panel)


def _mappings(value: object) -> list[Mapping[str, object]]:
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, list) else []


def _tokens(expr: str) -> list[_Token]:
    found = (_Token(str(match.lastgroup), match.group(), match.start()) for match in _TOKEN.finditer(expr))
    return [token for token in found if token.kind != "space"]


def _matching(expr: str, tokens: Sequence[_Token]) -> dict[int, int]:
    """Map each opening bracket's index to its closing one's."""
    closing: dict[int, int] = {}
    opened: list[int] = []
    for index, token in enumerate(tokens):
        if token.kind != "sign":
            continue
        if token.text in "\"'`":
            raise BadExpression(f"a quote is not closed at {token.position} in {expr!r}")
        if token.text in "([{":
            opened.append(index)
        elif token.text in _PAIRS:
            if not opened or tokens[opened[-1]].text != _PAIRS[token.text]:
                raise BadExpression(f"unexpected {token.text!r} at {token.position} in {expr!r}")
            closing[opened.pop()] = index
    if opened:
        raise BadExpression(f"{tokens[opened[-1]].text!r} is not closed in {expr!r}")
    return closing


class _Grouping(NamedTuple):
    labels: frozenset[str]
    first: int
    last: int


def _groupings(tokens: Sequence[_Token], closing: Mapping[int, int]) -> list[_Grouping]:
    """Return the label lists of `by` and `on`, each with the span of tokens it is about."""
    return [
        _Grouping(_names(tokens[index + 2 : closing[index + 1]]), *_span(tokens, index, closing))
        for index, token in enumerate(tokens[:-1])
        if token.kind == "name" and token.text in _NEEDS_LABELS and index + 1 in closing
    ]


def _span(tokens: Sequence[_Token], index: int, closing: Mapping[int, int]) -> tuple[int, int]:
    """Return the first and last token a grouping at `index` is about."""
    after = closing[index + 1] + 1
    opening = {end: start for start, end in closing.items()}
    if tokens[index].text == "by" and index - 1 in opening:
        return opening[index - 1], index - 1
    if tokens[index].text == "by" and after in closing:
        return after, closing[after]
    # `on` needs its labels on both operands; what lies beyond them in a longer chain is left to the rule tests.
    return (index, index)


def _names(tokens: Sequence[_Token]) -> frozenset[str]:
    return frozenset(token.text for token in tokens if token.kind == "name")


def _grouped_by(index: int, groupings: Sequence[_Grouping]) -> frozenset[str]:
    return frozenset().union(*(group.labels for group in groupings if group.first <= index <= group.last))


def _is_series(tokens: Sequence[_Token], index: int, closing: Mapping[int, int]) -> bool:
    token = tokens[index]
    if token.kind != "name" or token.text.lower() in _KEYWORDS or _is_called(tokens, index):
        return False
    return not any(start < index < end and _holds_labels(tokens, start) for start, end in closing.items())


def _is_called(tokens: Sequence[_Token], index: int) -> bool:
    """A name before a parenthesis or before `by (...)` is a function or an aggregation."""
    following = tokens[index + 1].text if index + 1 < len(tokens) else ""
    return following == "(" or following in {"by", "without"}


def _holds_labels(tokens: Sequence[_Token], start: int) -> bool:
    """Braces and ranges hold no series, nor do the parentheses of a grouping."""
    return tokens[start].text in "{[" or (start > 0 and tokens[start - 1].text in _GROUPINGS)


def _selector_labels(tokens: Sequence[_Token], index: int, closing: Mapping[int, int]) -> frozenset[str]:
    if index + 1 not in closing or tokens[index + 1].text != "{":
        return frozenset()
    return _names(tokens[index + 2 : closing[index + 1]])
