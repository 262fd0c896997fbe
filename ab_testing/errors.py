"""What can go wrong in an experiment.

ABTestingError (ValueError)
├── InvalidExperiment    variants, weights or zones that cannot be served
├── InvalidUnit          nobody to assign
├── InvalidCanary        a canary configuration that cannot be run
├── InvalidOutcome       a harm outside [0, 1], or a probability that nobody can have been assigned with
├── InvalidTransition    a decision that the canary's state does not allow
└── InsufficientData     too few units for any honest interval
"""


class ABTestingError(ValueError):
    """Root of this package's errors."""


class InvalidExperiment(ABTestingError):
    """The experiment cannot be served as written."""


class InvalidUnit(ABTestingError):
    """There is no unit to assign."""


class InvalidCanary(ABTestingError):
    """The canary's configuration contradicts itself."""


class InvalidOutcome(ABTestingError):
    """A user's outcome cannot have come from this experiment."""


class InvalidTransition(ABTestingError):
    """The decision does not fit the state it is applied to."""


class InsufficientData(ABTestingError):
    """Too few units to say anything."""
