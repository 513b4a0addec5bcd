"""Errors that a person reads: one sentence, no traceback. Exit code 2 for wrong input, 1 for a PuzzleFailure."""

import errno


class PuzzleError(Exception):
    """What is wrong, what is allowed, what to do."""


class UnknownVariant(PuzzleError):
    """A variant label that this parent cannot have."""


class ParentError(PuzzleError):
    """A parent that cannot be loaded, or that no family here understands."""


class ChildError(PuzzleError):
    """A path that holds no child that can be opened."""


class CorpusError(PuzzleError):
    """A corpus that cannot be read, or is too small for the profile."""


class InfeasibleBudget(PuzzleError):
    """No architecture of the library keeps the budget."""


class PuzzleFailure(PuzzleError):
    """Something failed that is not the user's input: exit code 1, still one sentence."""


class DamagedBlock(PuzzleFailure):
    """A stored tensor file is missing or its digest differs from the one in its record."""


def disk_is_full(error: BaseException | None) -> bool:
    """True when there was no room on a disk, whoever says it: the system, safetensors, SQLite."""
    while error is not None:
        said = str(error).lower()
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "no space left on device" in said or "database or disk is full" in said:
            return True
        error = error.__cause__ or error.__context__
    return False
