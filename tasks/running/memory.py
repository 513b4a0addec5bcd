"""Out of memory: the same work again in smaller parts, and then a task's retry with back-off."""

from collections.abc import Callable
from typing import TypeVar

import torch

from blocks.runtime import release_memory
from tasks.running.progress import say

ResultT = TypeVar("ResultT")
_SAID = ("out of memory", "can't allocate memory", "not enough memory", "cannot allocate memory")


def out_of_memory(error: BaseException) -> bool:
    """True when memory was short, of the machine or of a device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError | OSError) and any(word in str(error).lower() for word in _SAID)


class Parts:
    """In how many parts a batch is computed: `count` parts at first.

    When memory is short, the batch is tried again in twice as many parts, and later batches start with that number.
    """

    def __init__(self, what: str, most: int, count: int = 1) -> None:
        self.what, self.most, self.count = what, most, count

    def run(self, work: Callable[[int], ResultT]) -> ResultT:
        """`work(parts)`, again with twice as many parts while memory is short; the last error when there is no more
        to halve. `work` starts from nothing each time it is called.
        """
        while True:
            try:
                return work(self.count)
            except Exception as error:
                if not out_of_memory(error) or self.count >= self.most:
                    raise
            self.count = min(2 * self.count, self.most)
            release_memory()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            say(f"{self.what}: out of memory, again in {self.count} parts")
