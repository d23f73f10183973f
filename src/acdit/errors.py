"""The errors a user can meet, each with the exit code the command line ends with.

Every message names four things in one breath: the field or path, what was found, what was expected, and the fix.
"""

from __future__ import annotations


def first_line(error: BaseException, limit: int = 160) -> str:
    """The first line of what a library says, for a message of one line; its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:limit]


class AcditError(Exception):
    """A mistake or a fault outside this program. The message is the whole story: it is printed without a traceback.

    Args:
        what: the field or path that is wrong.
        found: what was found there.
        expected: what would have been right.
        fix: what the user can do about it.
    """

    exit_code = 1

    def __init__(self, what: str, *, found: str = "", expected: str = "", fix: str = "") -> None:
        self.what, self.found, self.expected, self.fix = what, found, expected, fix
        parts = [what]
        if found:
            parts.append(f"found {found}")
        if expected:
            parts.append(f"expected {expected}")
        message = "; ".join(parts)
        if fix:
            message += f". Fix: {fix}"
        super().__init__(message)


class ConfigError(AcditError, ValueError):
    """A recipe, an option or an argument is wrong (exit code 2)."""

    exit_code = 2


class DataError(AcditError, ValueError):
    """Input data are missing, corrupt or not what the recipe says (exit code 3)."""

    exit_code = 3


class NonFiniteError(AcditError):
    """A loss, a gradient or a latent is NaN or infinite (exit code 4)."""

    exit_code = 4


class StorageError(AcditError):
    """A checkpoint or a run directory cannot be written, read or trusted (exit code 5)."""

    exit_code = 5


class PeerLostError(AcditError):
    """Another process of the same run is gone (exit code 6)."""

    exit_code = 6
