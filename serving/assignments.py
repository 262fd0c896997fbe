"""Who sees which variant, remembered: drawing it takes microseconds, and most users ask more than once."""

from __future__ import annotations

from ab_testing.assignment import Assignment, assign
from ab_testing.experiment import Route

MAX_UNITS = 20_000
"""Of one alias; when there are more, all are drawn anew."""


class AssignmentCache:
    """The assignments of named units, for as long as their route stays the same."""

    def __init__(self) -> None:
        self._route: dict[str, Route] = {}
        self._known: dict[str, dict[str, Assignment]] = {}

    def of(self, route: Route, unit: str) -> Assignment:
        """The assignment of a named unit."""
        if self._route.get(route.alias) is not route:
            self._route[route.alias] = route
            self._known[route.alias] = {}
        known = self._known[route.alias]
        assignment = known.get(unit)
        if assignment is None:
            if len(known) >= MAX_UNITS:
                known.clear()
            assignment = known[unit] = assign(route, unit)
        return assignment
