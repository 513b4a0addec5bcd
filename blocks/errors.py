"""Errors that a user reads, without a traceback. The exit code is 2 for wrong input and 1 for a PuzzleFailure."""

import difflib
import errno
from collections.abc import Sequence


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


class TooLittleText(CorpusError):
    """The documents do not fill what is asked of them."""


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


def first_line(error: BaseException, most: int = 300) -> str:
    """The first line of another library's message, cut to `most` characters, to be quoted in a sentence of ours."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:most]


def first_names(names: Sequence[str]) -> str:
    """Two of many names, and how many there are beside them."""
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")


def did_you_mean(given: str, known: Sequence[str]) -> str:
    """` Did you mean NAME?` for the known name that is spelled most alike; empty where none is alike."""
    near = difflib.get_close_matches(given.lower(), known, n=1)
    return f" Did you mean {near[0]}?" if near else ""
