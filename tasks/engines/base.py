"""What every engine is here: a class that says whether it is installed, and loads an export; a session that runs it."""

import dataclasses
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from blocks.records import Turn

ROOT = Path(__file__).resolve().parents[2]


def own_code() -> dict[str, str]:
    """Environment in which a process finds this very code, wherever it is started."""
    return {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """How an export is loaded. exact: full float32 inside the engine where it has a choice, for comparing logits."""

    precision: str = "float32"
    threads: int = 1
    batch_size: int = 1
    context_tokens: int = 512
    exact: bool = False


@dataclass(frozen=True, kw_only=True)
class Process:
    """What runs one model apart: a command that answers as tasks/engines/worker.py does, and its `load` question."""

    command: tuple[str, ...]
    environment: Mapping[str, str]
    load: Mapping[str, Any]


class Session(ABC):
    """One loaded model."""

    vocab_size: int

    @abstractmethod
    def logits(self, tokens: Sequence[int]) -> Tensor:
        """(T, vocabulary) float32 logits of one sequence of T tokens."""

    @abstractmethod
    def request(self, prompt: Tensor, steps: int, grow: int = 0) -> Turn:
        """Time one prefill of `prompt` (B, P), then `steps` greedy decode steps of B tokens each.

        `grow` tokens a sequence are run untimed between the two.
        """

    @abstractmethod
    def generate(self, tokens: Sequence[int], steps: int) -> list[int]:
        """The next `steps` tokens of one sequence, greedy."""

    @abstractmethod
    def close(self) -> None:
        """Give back what the engine holds."""


class Engine(ABC):
    """One engine. `format` is the export it loads, `precisions` those that its exports can have here."""

    name: ClassVar[str]
    format: ClassVar[str]
    precisions: ClassVar[tuple[str, ...]]

    @abstractmethod
    def missing(self) -> str | None:
        """What to install, None when the engine is there."""

    @abstractmethod
    def version(self) -> str:
        """Name and version of what would run. Raises EngineMissing."""

    @abstractmethod
    def load(self, path: Path, how: LoadOptions) -> Session:
        """Load an export. Raises EngineMissing, EngineFailed."""

    def process(self, path: Path, how: LoadOptions) -> Process:
        """What runs an export in a process of its own: by default this interpreter with this engine."""
        return Process(
            command=(sys.executable, "-m", "tasks.engines.worker"),
            environment=own_code() | {"OMP_NUM_THREADS": str(how.threads)},
            load={"engine": self.name, "path": str(path.resolve()), "how": dataclasses.asdict(how)},
        )
