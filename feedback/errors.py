"""What can go wrong between a user's signal and a preference pair.

FeedbackError (a PawlError)
├── DamagedExport       an exported file is not what its manifest says
├── EmbedderUnavailable the model that questions are compared with, or what runs it, is not on this machine
├── InvalidFeedback     a feedback call that does not say what it must; the HTTP layer answers 400
├── JudgeRefuses        a judge does not take a request; others it may
├── NoCluster           there is no Ray cluster to mine on; exit code 3
├── SpoolUnavailable    the local spool cannot be opened or written; exit code 3
└── WorkerLost          a process that mined a part of the history ended before it was done; exit code 3
"""

from __future__ import annotations

from pawl.errors import PawlError


class FeedbackError(PawlError):
    """Base of every error this package raises on purpose."""


class DamagedExport(FeedbackError):
    """An exported file is not what its manifest says."""


class EmbedderUnavailable(FeedbackError):
    """Questions cannot be compared as configured."""


class InvalidFeedback(FeedbackError):
    """A feedback body that cannot be accepted; the text never repeats what the user wrote in a text field."""

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param
        """The field at fault."""


class JudgeRefuses(FeedbackError):
    """A judge answered that it does not take what it was asked."""


class NoCluster(FeedbackError):
    """No cluster answers, and none could be started."""

    exit_code = 3


class SpoolUnavailable(FeedbackError):
    """The local spool cannot take records."""

    exit_code = 3


class WorkerLost(FeedbackError):
    """Whoever worked on a part is gone, and what came of the part with it."""

    exit_code = 3
