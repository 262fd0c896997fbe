"""What can go wrong on Pawl's own ground.

PawlError
├── ConfigurationError    a setting is missing, unknown or of the wrong type; exit code 2
├── Unreachable           something needed does not answer (database, engine); exit code 3
├── NegativeVerdict       a check ran and said no; exit code 1
├── StaleWrite            somebody else wrote first, or holds a later lease; exit code 1
├── UnknownModel          no model or run of this name is registered; exit code 1
├── RunConflict           another process took the run over, or the cycle has its run already; exit code 1
├── BadAdapter            files that are not an adapter we serve, or not the ones that were sealed; exit code 1
└── PublishFailed         an engine refused an adapter, or serves something else under its name; exit code 1
    └── NotNow            an engine failed at it, or has just forgotten it: trying again may help; exit code 3
"""


class PawlError(Exception):
    """Base of every error Pawl raises on purpose; its text is one clear line for people."""

    exit_code = 1


class ConfigurationError(PawlError):
    """The configuration cannot be used; the text names the key's path."""

    exit_code = 2


class Unreachable(PawlError):
    """Something that is needed does not answer; the text says what and where."""

    exit_code = 3


class NegativeVerdict(PawlError):
    """A check or verdict came out negative."""

    exit_code = 1


class StaleWrite(PawlError):
    """What was to be written is based on something that has changed meanwhile."""

    exit_code = 1


class UnknownModel(PawlError):
    """A name that the registry cannot resolve."""


class RunConflict(PawlError):
    """Two processes, or two runs, where there may be one."""


class BadAdapter(PawlError):
    """An adapter that must not be served."""


class PublishFailed(PawlError):
    """An adapter is not being served as it should."""


class NotNow(PublishFailed):
    """An engine was in no state to take an adapter, or to prove it: it failed, or forgot what it had loaded."""

    exit_code = 3
