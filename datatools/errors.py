"""What datatools and pipelines raise when the caller, the data or the machine is at fault.

Every message says who, what came, what was expected and what to do; the command line prints it as one line
`error: ...` and leaves with `exit_code`. A bug raises anything else and keeps its traceback.
"""

from optim.unknown import did_you_mean as did_you_mean


class DatatoolsError(Exception):
    """Base of the four; `exit_code` is the command line's exit status."""

    exit_code = 1


class UsageError(DatatoolsError):
    """The request makes no sense: an unknown name, an impossible budget, settings that contradict each other."""

    exit_code = 2


class DataError(DatatoolsError):
    """A file or a row is not what was expected: malformed, damaged, missing, or from another run."""

    exit_code = 3


class EnvironmentProblem(DatatoolsError):
    """The machine cannot do it now: no space, no permission, a folder in use, too little memory, no network."""

    exit_code = 4
