"""What can go wrong in a retraining round.

RetrainError
├── BadData             pairs, probes or preferences that cannot be used
│   └── DataLeak        a prompt of the hold-out is in the training set
├── PreflightFailed     the training set would not train what it should; the text says how many examples and why
├── TrainingFailed      the training ended without usable weights
├── BadAdapter          files that are not an adapter we serve, or not the ones that were sealed
├── EvaluationFailed    something could not be measured
└── CanaryTaken         another rollout has the alias; the candidate waits
"""

from __future__ import annotations

from pawl.errors import PawlError


class RetrainError(PawlError):
    """Base of this package's errors."""


class BadData(RetrainError):
    """Input that cannot be read as what it should be."""


class DataLeak(BadData):
    """The hold-out would not be held out."""


class PreflightFailed(RetrainError):
    """The tokenised training set has problems that must be fixed first."""


class TrainingFailed(RetrainError):
    """No usable adapter came out."""


class BadAdapter(RetrainError):
    """An adapter that must not be served."""


class EvaluationFailed(RetrainError):
    """A measurement could not be taken."""


class CanaryTaken(RetrainError):
    """The alias has a running rollout of another candidate; the text says which."""
