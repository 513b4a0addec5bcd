"""What can be wrong with an engine."""

from blocks.errors import PuzzleError, PuzzleFailure


class EngineMissing(PuzzleError):
    """The engine that was asked for is not installed."""


class EngineFailed(PuzzleFailure):
    """An engine that is installed did not do what it was asked."""
