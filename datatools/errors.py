"""The errors that datatools and pipelines raise when the caller, the data or the machine is at fault.

Every message says what was wrong, where, what was expected and what to do. The command line prints it as one line
`error: ...` and exits with `exit_code`. A bug raises any other exception and keeps its traceback.
"""

from optim.unknown import did_you_mean as did_you_mean


class DatatoolsError(Exception):
    """Base class of the three errors below.

    Attributes:
        exit_code: exit status of the command line.

    Example:
        >>> from datatools import DataError, DatatoolsError
        >>> issubclass(DataError, DatatoolsError)
        True

    """

    exit_code = 1


class UsageError(DatatoolsError):
    """The request is invalid: an unknown name, an impossible budget, or contradictory settings.

    Example:
        >>> from datatools import Budget, UsageError
        >>> try:
        ...     Budget.parse("120%")
        ... except UsageError as error:
        ...     error.exit_code
        2

    """

    exit_code = 2


class DataError(DatatoolsError):
    """A file or a row is not as expected: malformed, damaged, missing, or from another run.

    Example:
        >>> from datatools import DataError, files
        >>> try:
        ...     files.read_bytes("/nowhere/rows.jsonl")
        ... except DataError as error:
        ...     print(error)
        cannot read /nowhere/rows.jsonl: No such file or directory; check the path

    """

    exit_code = 3


class EnvironmentProblem(DatatoolsError):
    """The machine cannot do it now: no space, no permission, a folder in use, too little memory, or no network.

    Example:
        >>> from datatools import EnvironmentProblem
        >>> EnvironmentProblem.exit_code
        4

    """

    exit_code = 4
