"""The moments of a cron expression in a time zone."""

from __future__ import annotations

from datetime import UTC, datetime, tzinfo
from zoneinfo import ZoneInfo

from cronsim import CronSim, CronSimError


def next_moment(expression: str, time_zone: str, after: float) -> float:
    """The first moment after this one, in seconds since 1970.

    Raises:
        ValueError: there is none, or the expression or the time zone is not known.

    >>> next_moment("17 3 * * 0", "UTC", 0.0) / 3600
    75.28333333333333
    """
    return _first(expression, time_zone, after, is_backwards=False)


def last_moment(expression: str, time_zone: str, until: float) -> float:
    """The latest moment that is not after this one.

    Raises:
        ValueError: as `next_moment`.

    >>> last_moment("0 * * * *", "UTC", 7200.0), last_moment("0 * * * *", "UTC", 7199.0)
    (7200.0, 3600.0)
    """
    # The search back leaves out where it starts; whole seconds are all that a moment has.
    return _first(expression, time_zone, float(int(until) + 1), is_backwards=True)


def _first(expression: str, time_zone: str, start: float, *, is_backwards: bool) -> float:
    if len(expression.split()) != 5:
        raise ValueError(f"{expression!r} is no cron expression: it has five fields, minute to day of the week")
    zone = _zone(time_zone)
    try:
        moment = next(CronSim(expression, datetime.fromtimestamp(start, zone), reverse=is_backwards))
    except CronSimError as exc:
        raise ValueError(f"{expression!r} is no cron expression: {str(exc).lower()}") from exc
    except StopIteration as exc:
        raise ValueError(f"{expression!r} never comes") from exc
    return moment.timestamp()


def _zone(name: str) -> tzinfo:
    if name.upper() in ("UTC", "ETC/UTC"):
        return UTC  # Known even where the system has no table of time zones.
    try:
        return ZoneInfo(name)
    except (KeyError, OSError, ValueError) as exc:
        raise ValueError(f"no time zone is called {name!r} here") from exc
