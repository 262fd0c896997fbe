"""What can go wrong in a retraining round.

RetrainError
├── BadData             pairs, probes or preferences that cannot be used
│   └── DataLeak        a prompt of the hold-out is in the training set
├── PreflightFailed     the training set would not train what it should; the text says how many examples and why
├── TrainingFailed      the training ended without usable weights, or was stopped
├── TrainingInterrupted the process was asked to leave; its training goes on from its checkpoint; exit code 143
├── ProcessLost         a process that trained with others ended in another way; trying again may help; exit code 3
├── EvaluationFailed    something could not be measured
└── CanaryTaken         another rollout has the alias; the candidate waits

`pawl.errors.BadAdapter` is raised here too: files that are not an adapter we serve, or not the ones that were sealed.
"""

from __future__ import annotations

from pawl.errors import BadAdapter as BadAdapter
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


class TrainingInterrupted(RetrainError):
    """SIGTERM came: what was trained is in a checkpoint. Not a failure; the run stays as it is, to be continued."""

    exit_code = 143  # What a shell reports of a process that SIGTERM ended: 128 + 15.


class ProcessLost(RetrainError):
    """One of several training processes was killed, or lost touch with the others."""

    exit_code = 3


class EvaluationFailed(RetrainError):
    """A measurement could not be taken."""


class CanaryTaken(RetrainError):
    """The alias has a running rollout of another candidate; the text says which."""
