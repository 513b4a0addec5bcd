"""Errors that a person reads: one sentence, no traceback. Exit code 2 for wrong input, 1 for a PuzzleFailure."""


class PuzzleError(Exception):
    """What is wrong, what is allowed, what to do."""


class UnknownVariant(PuzzleError):
    """A variant label that this parent cannot have."""


class ParentError(PuzzleError):
    """A parent that cannot be loaded, or that no family here understands."""


class CorpusError(PuzzleError):
    """A corpus that cannot be read, or is too small for the profile."""


class InfeasibleBudget(PuzzleError):
    """No architecture of the library keeps the budget."""


class PuzzleFailure(PuzzleError):
    """Something failed that is not the user's input: exit code 1, still one sentence."""


class DamagedBlock(PuzzleFailure):
    """A stored tensor file is missing or its digest differs from the one in its record."""
