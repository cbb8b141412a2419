"""Errors that a person can cause, each with the exit code that the command line gives it."""


class AutoparError(Exception):
    """What was asked, what there is, what to do next. ``exit_code`` is the CLI's (2: usage)."""

    exit_code = 2


class InfeasibleError(AutoparError):
    """No strategy fits; the message names the nearest miss."""

    exit_code = 3


class UnsupportedModelError(AutoparError):
    """The model cannot be traced, or has operators that autopar has no rule for (all listed)."""

    exit_code = 4


class OutOfTimeError(AutoparError):
    """The time budget ended before any strategy was found."""

    exit_code = 5


class InterruptedSearchError(AutoparError):
    """Ctrl-C came before any strategy was found."""

    exit_code = 130


class PlanMismatchError(AutoparError):
    """A plan does not belong to this model, world size or version of the format."""


class VerificationError(AutoparError):
    """What was executed differs from what the plan promised."""

    exit_code = 1


class PeerError(AutoparError):
    """Another process of the run ended, or did not answer in time; this one cannot go on."""

    exit_code = 1
