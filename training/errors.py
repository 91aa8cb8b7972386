"""What can go wrong, each with the exit code a script sees.

    EliteError            70  a fault of ours
    |- UsageError          2  a flag, key or value that cannot be honoured
    |- DataError          65  the input is there and cannot be trained on
    |- MissingInput       66  the input is not there or cannot be read
    |- DoesNotFit         71  the machine is too small for what was asked
    |- CannotWrite        73  the output cannot be written
    |- Interrupted        75  stopped from outside; `resume` continues
    |- StoppedByUser     130  Ctrl+C; `resume` continues
    |- Problems            *  several of the above at once; the exit code of the first

A message says what happened, the value, the limit and the way out, in one line.
"""

from __future__ import annotations

from collections.abc import Iterable


class EliteError(Exception):
    """Base of every error that ends the command with one line instead of a traceback."""

    exit_code = 70


class UsageError(EliteError):
    """A flag, a configuration key or a value that cannot be honoured."""

    exit_code = 2


class DataError(EliteError):
    """The input exists but holds nothing that can be trained on."""

    exit_code = 65


class MissingInput(EliteError):
    """A repository, base model or run that does not exist or cannot be read."""

    exit_code = 66


class DoesNotFit(EliteError):
    """No plan for this request fits the machine."""

    exit_code = 71


class CannotWrite(EliteError):
    """The output exists, cannot be written, or its disk has no room."""

    exit_code = 73


class Interrupted(EliteError):
    """SIGTERM or a lost subprocess; the run directory can be resumed."""

    exit_code = 75


class StoppedByUser(EliteError):
    """Ctrl+C; the run directory can be resumed."""

    exit_code = 130


class Problems(EliteError):
    """Several problems found in one look, so that all can be mended at once.

    `exit_code` is the first problem's: callers add them in the order they checked.
    """

    def __init__(self, problems: Iterable[EliteError]):
        self.problems = tuple(problems)
        if not self.problems:
            raise ValueError("Problems needs at least one problem")
        self.exit_code = self.problems[0].exit_code
        super().__init__("\n".join(str(problem) for problem in self.problems))


def raise_all(problems: Iterable[EliteError]) -> None:
    """Raise nothing, the one problem, or all of them as `Problems`."""
    found = tuple(problems)
    if len(found) == 1:
        raise found[0]
    if found:
        raise Problems(found)
