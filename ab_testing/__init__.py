"""Experiments: `from ab_testing import analyse, ratio` reports on any table, without a server.

People type that line in notebooks, so these names are here too, and are looked up when they are first asked for: what
only assigns users to variants loads no statistics. Nothing inside imports from here.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ab_testing.analysis import (
        AnalysisError,
        Columns,
        Effect,
        InvalidMetric,
        InvalidTable,
        Metric,
        MomentsDoNotFit,
        Report,
        SplitCheck,
        analyse,
        check_split,
        exceedance,
        mean,
        proportion,
        quantile,
        ratio,
    )

__all__ = [
    "AnalysisError",
    "Columns",
    "Effect",
    "InvalidMetric",
    "InvalidTable",
    "Metric",
    "MomentsDoNotFit",
    "Report",
    "SplitCheck",
    "analyse",
    "check_split",
    "exceedance",
    "mean",
    "proportion",
    "quantile",
    "ratio",
]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("ab_testing.analysis"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
