"""What can go wrong while measuring quality.

MonitoringError
├── ScorerUnavailable     the toxicity scorer cannot be trusted to score; there is no score, never a score of zero
├── ScoringFailed         a working scorer gave no usable score for these texts
├── BadPattern            a pattern of the harm lexicon cannot be used
└── BadExpression         an alert or panel holds an expression that cannot be read
"""

from pawl.errors import ConfigurationError, PawlError


class MonitoringError(PawlError):
    """Base of every error the monitoring package raises on purpose."""


class ScorerUnavailable(MonitoringError):
    """The scorer's weights are missing, broken or fail the self-test; the text says which."""


class ScoringFailed(MonitoringError):
    """The scorer gave something that is not a probability."""


class BadPattern(MonitoringError, ConfigurationError):
    """A pattern of the harm lexicon does not compile, matches everything, or there is none; exit code 2."""

    exit_code = 2


class BadExpression(MonitoringError):
    """An expression has a quote or bracket that is never closed."""
