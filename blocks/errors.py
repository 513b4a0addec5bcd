"""Errors that a user reads, without a traceback. The exit code is 2 for wrong input and 1 for a PuzzleFailure."""

import errno


class PuzzleError(Exception):
    """A message for the user: what is wrong, what is allowed, what to do."""


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
    """True when an error, or one that caused it, says that a disk is full: from the system, safetensors or SQLite."""
    while error is not None:
        text = str(error).lower()
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "no space left on device" in text or "database or disk is full" in text:
            return True
        error = error.__cause__ or error.__context__
    return False
