"""The table of request fields, made into plain functions once, at the start."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from serving.errors import BadRequest
from serving.fields.json_schemas import check_json_schema
from serving.fields.nodes import Check, Either, Kinds, ListOf, Node, Object, Problem, Refused, Schema, Value
from serving.fields.table import ROUTES
from serving.fields.values import ANYTHING

MAX_NAME_CHARS = 80
"""Of a name that a client made up, in an answer."""


def compile_routes(allowed: Collection[str]) -> Mapping[str, Check]:
    """One check for each route, with what `serving.allow_fields` lets pass.

    Raises:
        ValueError: an allowed field does not exist or can never be allowed.
    """
    compiler = _Compiler(frozenset(allowed))
    checks = {route: compiler.compile(table, "") for route, table in ROUTES.items()}
    compiler.complain_of_unused()
    return checks


def raise_problem(problem: Problem) -> None:
    """Tell the client.

    Raises:
        BadRequest: always.
    """
    path, message, code = problem
    told = f"{path or 'the body'} {message}" if path.isprintable() else message
    raise BadRequest(told, param=path or None, code=code)


class _Compiler:
    def __init__(self, allowed: frozenset[str]) -> None:
        self._allowed = allowed
        self._used: set[str] = set()

    def complain_of_unused(self) -> None:
        unused = self._allowed - self._used
        if unused:
            raise ValueError(f"serving.allow_fields: no request has a field {', '.join(sorted(unused))}")

    def compile(self, node: Node, path: str) -> Check:
        match node:
            case Value():
                return _value(node)
            case Schema():
                return self._schema(f"{path}.pattern")
            case Object():
                return self._object(node, path)
            case Kinds():
                return self._kinds(node, path)
            case ListOf():
                return _list(self.compile(node.item, path), node)
            case Either():
                return self._either(node, path)

    def _object(self, node: Object, path: str) -> Check:
        values = {name: child for name, child in node.fields.items() if isinstance(child, Value)}
        inner = {n: self.compile(child, _join(path, n)) for n, child in node.fields.items() if n not in values}
        extra = self._allowed_below(path, node.refused)
        refusals = {
            name: _refusal(refused, _join(path, name)) for name, refused in node.refused.items() if name not in extra
        }
        return _object(values, extra | inner, refusals, node)

    def _kinds(self, node: Kinds, path: str) -> Check:
        kinds = {kind: self.compile(child, path) for kind, child in node.kinds.items()}
        extra = self._allowed_below(path, node.refused)
        for kind in extra.keys() & node.refused.keys():
            kinds.setdefault(kind, _value(ANYTHING))
        refusals = {
            kind: _refusal(refused, _join(path, kind)) for kind, refused in node.refused.items() if kind not in kinds
        }
        return _kinds(kinds, refusals, node)

    def _either(self, node: Either, path: str) -> Check:
        wrong = Problem("", f"must be {node.expected}")
        by_type: dict[type, Check] = {}
        for kind, child in ((str, node.text), (list, node.items), (dict, node.object)):
            if child is not None:
                by_type[kind] = self.compile(child, path)

        def check(value: Any) -> Problem | None:
            inner = by_type.get(type(value))
            return wrong if inner is None else inner(value)

        return check

    def _schema(self, pattern: str) -> Check:
        self._used |= self._allowed & {pattern}
        if pattern in self._allowed:
            return lambda value: check_json_schema(value, may_match_patterns=True)
        return lambda value: _tell_way_out(check_json_schema(value), pattern)

    def _allowed_below(self, path: str, refused: Mapping[str, Refused]) -> dict[str, Check]:
        """The fields right below `path` that the operator lets pass."""
        prefix = f"{path}." if path else ""
        names = {name[len(prefix) :] for name in self._allowed if name.startswith(prefix)}
        names = {name for name in names if "." not in name}
        for name in names:
            if name in refused and not refused[name].may_allow:
                raise ValueError(f"serving.allow_fields: {prefix}{name} cannot be allowed: {refused[name].reason}")
            self._used.add(f"{prefix}{name}")
        return dict.fromkeys(names, _value(ANYTHING))


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _refusal(refused: Refused, path: str) -> str:
    way_out = f"`serving.allow_fields: [{path}]` would allow it" if refused.may_allow else "no setting allows it"
    return f"is not accepted by this gateway: {refused.reason}; {way_out}"


def _tell_way_out(problem: Problem | None, setting: str) -> Problem | None:
    if problem is None or not problem[0].endswith(("pattern", "patternProperties")):
        return problem
    return Problem(problem[0], f"{problem[1]}; `serving.allow_fields: [{setting}]` would allow it", problem[2])


def _value(node: Value) -> Check:
    is_good = node.is_good
    wrong = Problem("", f"must be {node.expected}")
    return lambda value: None if is_good(value) else wrong


def _list(check_item: Check, node: ListOf) -> Check:
    low, high = node.low, node.high
    wrong = Problem("", f"must be {node.expected}")
    missing = Problem("", "is missing or empty", "missing_required_parameter")

    def check(value: Any) -> Problem | None:
        if type(value) is not list or len(value) > high:
            return wrong
        if len(value) < low:
            return missing
        for index, item in enumerate(value):
            problem = check_item(item)
            if problem is not None:
                return problem.below(f"[{index}]")
        return None

    return check


def _object(
    values: Mapping[str, Value], checks: Mapping[str, Check], refusals: Mapping[str, str], node: Object
) -> Check:
    wrongs = {name: Problem(name, f"must be {value.expected}") for name, value in values.items()}
    find_value = {name: value.is_good for name, value in values.items()}.get
    wrong = Problem("", f"must be {node.expected}")
    required = node.required
    find = checks.get

    def check(value: Any) -> Problem | None:
        if type(value) is not dict:
            return wrong
        for name, item in value.items():
            is_good = find_value(name)
            if is_good is not None:
                if item is None or is_good(item):
                    continue
                return wrongs[name]
            check_field = find(name)
            if check_field is None:
                return _unknown(name, refusals)
            if item is not None:
                problem = check_field(item)
                if problem is not None:
                    return problem.below(name)
        for name in required:
            if value.get(name) is None:
                return Problem(name, "is missing", "missing_required_parameter")
        return None

    return check


def _unknown(name: str, refusals: Mapping[str, str]) -> Problem:
    message = refusals.get(name, "is not accepted by this gateway")
    return Problem(name[:MAX_NAME_CHARS], message, "unsupported_parameter")


def _kinds(checks: Mapping[str, Check], refusals: Mapping[str, str], node: Kinds) -> Check:
    tag, default = node.tag, node.default
    is_plain = node.is_plain
    wrong = Problem("", f"must be {node.expected}")
    known = Problem(tag, f"must be one of {', '.join(sorted(checks))}")

    def check(value: Any) -> Problem | None:
        if type(value) is not dict:
            return wrong
        if is_plain is not None and is_plain(value):
            return None
        kind = value.get(tag, default)
        if type(kind) is not str:
            return known
        check_kind = checks.get(kind)
        if check_kind is not None:
            return check_kind(value)
        if kind not in refusals:
            return known
        return Problem(kind if kind in value else tag, refusals[kind], "unsupported_parameter")

    return check
