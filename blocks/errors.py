"""The family of errors that are the user's to mend: one sentence, exit code 2, no traceback."""


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


class DamagedBlock(PuzzleError):
    """A stored tensor file is missing or its digest differs from the one in its record."""
