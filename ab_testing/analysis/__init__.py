"""Report on an experiment from any table, without a server: `from ab_testing.analysis import analyse, ratio`.

This `__init__.py` re-exports, because people type this line in notebooks; nothing inside imports from here. Each name
is looked up when it is first asked for, so that a gateway which needs one interval does not load all of the statistics.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from ab_testing.analysis.errors import AnalysisError, InvalidMetric, InvalidTable, MomentsDoNotFit
    from ab_testing.analysis.metrics import Metric, exceedance, mean, proportion, quantile, ratio
    from ab_testing.analysis.report import Effect, Report
    from ab_testing.analysis.split_checks import SplitCheck, check_split
    from ab_testing.analysis.table_analysis import Columns, analyse

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

_HOMES: Final = {
    "errors": ("AnalysisError", "InvalidMetric", "InvalidTable", "MomentsDoNotFit"),
    "metrics": ("Metric", "exceedance", "mean", "proportion", "quantile", "ratio"),
    "report": ("Effect", "Report"),
    "split_checks": ("SplitCheck", "check_split"),
    "table_analysis": ("Columns", "analyse"),
}


def __getattr__(name: str) -> object:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
