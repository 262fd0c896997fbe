"""What can go wrong in a report.

ABTestingError
└── AnalysisError
    ├── InvalidMetric      a metric that cannot be measured as declared
    ├── InvalidTable       a column is missing, or holds what it must not
    └── MomentsDoNotFit    moments of different metrics, or of overlapping users, cannot be merged
"""

from __future__ import annotations

from ab_testing.errors import ABTestingError


class AnalysisError(ABTestingError):
    """Root of the report's errors."""


class InvalidMetric(AnalysisError):
    """The metric contradicts itself."""


class InvalidTable(AnalysisError):
    """The table cannot be read as the analysis needs it."""


class MomentsDoNotFit(AnalysisError):
    """Two sets of moments do not belong together."""
