"""Whether a measurement of time can be relied on. Whatever shows, stars, keeps or repeats a measurement asks here."""

from collections.abc import Iterable
from typing import Protocol

MEANINGLESS = 0.25  # relative standard error; a figure that is known to a quarter says little about gains of 1.1 to 2


def why_disturbed(busy: str, errors: Iterable[float]) -> str:
    """A sentence for people when a measurement is not reliable, "" when it is.

    Args:
        busy: which other programs computed meanwhile (tasks/running/usage.py), "" for none.
        errors: the relative standard errors of what was measured.
    """
    worst = max(errors, default=0.0)
    if busy:
        return f"the machine was busy: not reliable ({busy})"
    if worst > MEANINGLESS:
        return f"the machine was busy: not reliable (standard errors up to {worst:.0%} of what was measured)"
    return ""


class Measurement(Protocol):
    """What is known of how well something was measured."""

    @property
    def disturbed(self) -> str:
        """Why this measurement cannot be relied on, as `why_disturbed` says it; "" when it can."""

    @property
    def errors(self) -> list[float]:
        """The relative standard errors of what was measured."""


def is_better(new: Measurement, old: Measurement) -> bool:
    """Whether a measurement takes the place of an earlier one of the same thing: a reliable one that of one that is
    not, and of two that are alike in that the one with the smaller errors.
    """
    if bool(new.disturbed) != bool(old.disturbed):
        return not new.disturbed
    return max(new.errors, default=0.0) < max(old.errors, default=0.0)
