"""What can go wrong between a user's signal and a preference pair.

FeedbackError (a PawlError)
├── DamagedExport       an exported file is not what its manifest says
├── InvalidFeedback     a feedback call that does not say what it must; the HTTP layer answers 400
└── SpoolUnavailable    the local spool cannot be opened or written; exit code 3
"""

from __future__ import annotations

from pawl.errors import PawlError


class FeedbackError(PawlError):
    """Base of every error this package raises on purpose."""


class DamagedExport(FeedbackError):
    """An exported file is not what its manifest says."""


class InvalidFeedback(FeedbackError):
    """A feedback body that cannot be accepted; the text never repeats what the user wrote in a text field."""

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param
        """The field at fault."""


class SpoolUnavailable(FeedbackError):
    """The local spool cannot take records."""

    exit_code = 3
