"""Report on an experiment from any table, without a server: `from ab_testing.analysis import analyse, ratio`.

The only `__init__.py` that re-exports, because people type this line in notebooks; nothing inside imports from here.
"""

from ab_testing.analysis.errors import AnalysisError, InvalidMetric, InvalidTable, MomentsDoNotFit
from ab_testing.analysis.metrics import Metric, exceedance, mean, proportion, quantile, ratio
from ab_testing.analysis.report import Effect, Report
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
    "analyse",
    "exceedance",
    "mean",
    "proportion",
    "quantile",
    "ratio",
]
