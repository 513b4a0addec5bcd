"""The interface of engines: an `Engine` says whether it is installed and loads an export; a `Session` runs it."""

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


def python_path() -> dict[str, str]:
    """The environment variable by which a process finds this code, in whatever folder it is started."""
    return {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """How an export is loaded.

    batch_size and context_tokens: the largest request that it has to hold. exact: for comparing logits, the engine
    computes in float32 also where it would otherwise use a shorter format inside. kv_precision: of the KV cache, in
    llama.cpp alone.
    """

    precision: str = "float32"
    threads: int = 1
    batch_size: int = 1
    context_tokens: int = 512
    exact: bool = False
    kv_precision: str = "float16"


@dataclass(frozen=True, kw_only=True)
class EngineProcess:
    """How to run one model in a process of its own.

    command: starts a process that answers questions as tasks/engines/worker.py does. load: arguments of the question
    `load`, which loads the model there.
    """

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

        Between the two, `grow` tokens of each sequence are run without being timed.
        """

    @abstractmethod
    def generate(self, tokens: Sequence[int], steps: int) -> list[int]:
        """The next `steps` tokens of one sequence, greedy."""

    @abstractmethod
    def close(self) -> None:
        """Free what the engine holds."""


class Engine(ABC):
    """One engine. `format` is the kind of export that it loads, `precisions` are those that the export may have."""

    name: ClassVar[str]
    format: ClassVar[str]
    precisions: ClassVar[tuple[str, ...]]

    @abstractmethod
    def missing(self) -> str | None:
        """What has to be installed; None when the engine is there."""

    @abstractmethod
    def version(self) -> str:
        """Name and version of the engine. Raises EngineMissing."""

    @abstractmethod
    def load(self, path: Path, how: LoadOptions) -> Session:
        """Load an export. Raises EngineMissing, EngineFailed."""

    def process(self, path: Path, how: LoadOptions) -> EngineProcess:
        """How to run an export in a process of its own: in this interpreter, unless an engine has another."""
        return EngineProcess(
            command=(sys.executable, "-m", "tasks.engines.worker"),
            environment=python_path() | {"OMP_NUM_THREADS": str(how.threads)},
            load={"engine": self.name, "path": str(path.resolve()), "how": dataclasses.asdict(how)},
        )
