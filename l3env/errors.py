"""Every error a user can cause. Each message names the file, row or key and what was expected."""

MOST_CHARACTERS = 4000  # of a message


class L3EnvError(ValueError):
    """Base class: bad input, reported in one line, which is cut where it quotes too much of the input."""

    def __init__(self, message: str = "") -> None:
        if len(message) > MOST_CHARACTERS:
            message = f"{message[: MOST_CHARACTERS - 500]} ... {message[-400:]}"
        super().__init__(message)


class SpecError(L3EnvError):
    """A preset or spec is unknown, or a key of it is unknown, missing or absurd."""


class WorkloadError(L3EnvError):
    """A request table or trace row is invalid."""


class TraceError(WorkloadError):
    """A trace file cannot be found or read."""


class ProfileError(L3EnvError):
    """A table of measurements cannot be read, or a row of it is invalid."""


class PlanError(L3EnvError):
    """A policy returned a plan or knobs that are not legal."""


class PolicyError(L3EnvError):
    """A policy is unknown, cannot be loaded, or leaves work undone for ever."""


class TraceWarning(UserWarning):
    """What a trace file says that its reader should know; the command line shows it as a note."""


class UnusedWarning(TraceWarning):
    """A trace file has columns or fields that nothing reads; all are named at once."""
