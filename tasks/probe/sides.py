"""The models that are probed: the parent, the child of a finished run, and its best baseline."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from blocks.compute import Compute
from blocks.errors import PuzzleError
from blocks.library import digest_of, made_once, read_value
from blocks.parent import config_of
from blocks.records import ChildReport, CorpusInfo, ParentInfo, Value
from tasks.evaluate.compare import LINEAGE, Contender, Lineage, parent_contender, served
from tasks.running.progress import Progress, part_of

REPORT = "report.json"
ValueT = TypeVar("ValueT", bound=Value)


@dataclass(frozen=True, kw_only=True)
class SeenText:
    """The text that the stages of a run saw, the corpus first, and the parent that reads it."""

    workspace: Path
    parent: ParentInfo
    texts: tuple[CorpusInfo, ...]

    @property
    def corpus(self) -> CorpusInfo:
        """The run's own corpus."""
        return self.texts[0]

    @property
    def parent_folder(self) -> Path:
        """The parent's config, weights and tokenizer."""
        return self.workspace / self.parent.folder


@dataclass(frozen=True, kw_only=True)
class ProbedRun:
    """A finished run. dtype: of the weights of its child, and of its baseline."""

    workspace: Path
    folder: Path
    report: ChildReport
    lineage: Lineage
    dtype: torch.dtype

    @property
    def parent_folder(self) -> Path:
        """See `SeenText`."""
        return self.seen.parent_folder

    @property
    def seen(self) -> SeenText:
        """The text that stages saw."""
        texts = (self.lineage.corpus, *self.lineage.capabilities)
        return SeenText(workspace=self.workspace, parent=self.lineage.parent, texts=texts)

    @property
    def trained(self) -> int:
        """The longest context that stages saw, in tokens."""
        return max(text.sequence_length for text in self.seen.texts)

    @property
    def context(self) -> int | None:
        """The longest that the parent was made for, where its config says."""
        return getattr(config_of(self.parent_folder), "max_position_embeddings", None)

    @property
    def models(self) -> tuple[Contender, ...]:
        """The parent first, then the child as `child`, then the baseline."""
        child, rival = self.lineage.child, self.lineage.rival
        own = (parent_contender(child.architecture), child.model_copy(update={"name": "child"}))
        return own if rival is None else (*own, rival)

    @property
    def notes(self) -> tuple[str, ...]:
        """What is not as in the run's own report."""
        found, reported = list[str](), any(one.capabilities for one in self.report.candidates)
        if reported and not self.lineage.capabilities:
            found.append(
                "the texts of the run's capabilities are not known, so the child may have been trained on some of what "
                "it is probed on: give `puzzle optimize` once more, which writes them down"
            )
        if self.lineage.child.cache:
            found.append(
                f"keys and values are float32 here, not {self.lineage.child.cache} as the child is served with"
            )
        return tuple(found)


def open_run(child: Path) -> ProbedRun:
    """The run that made a child. PuzzleError where its report or lineage are not beside it."""
    folder = child.resolve().parent
    for name in (REPORT, LINEAGE):
        if not (folder / name).is_file():
            raise PuzzleError(
                f"{folder} holds no {name}, so neither the child's parent nor its text is known: name a workspace with "
                "a finished run, or the child in its runs/."
            )
    report, lineage = read_value(folder / REPORT, ChildReport), read_value(folder / LINEAGE, Lineage)
    dtype = getattr(config_of(child), "dtype", None)
    named = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    return ProbedRun(
        workspace=folder.parents[1], folder=folder, report=report, lineage=lineage, dtype=named or torch.float32
    )


@dataclass(kw_only=True)
class Bench:
    """Models of a run with the weights that they are served with, one in memory at a time."""

    run: ProbedRun
    compute: Compute
    _held: tuple[str, Any] = field(default=("", None), init=False)

    def path(self, which: Contender, **more: Any) -> Path:
        """Where is stored what was found of a model as it is probed. more: what else decides."""
        parent = self.run.lineage.parent.fingerprint
        key = digest_of(model=which.served_key, dtype=str(self._dtype(which)), parent=parent, **more)
        return self.run.workspace / "probes" / f"{key}.json"

    def of_each(
        self, kind: type[ValueT], find: Callable[[Contender, Progress], ValueT], progress: Progress, **more: Any
    ) -> dict[str, ValueT]:
        """What `find` finds of every model, by name; what is stored is not computed again. more: see `path`."""
        models, workspace, found = self.run.models, self.run.workspace, dict[str, ValueT]()
        in_memory_first = sorted(models, key=lambda which: which.name != self._held[0])
        for part, which in enumerate(in_memory_first):
            own = partial(find, which, part_of(progress, part, len(models)))
            found[which.name] = made_once(self.path(which, **more), kind, workspace, own)
        return {which.name: found[which.name] for which in models}

    def model(self, which: Contender) -> Any:
        """A model for forward passes. Who trains it takes it by `take`."""
        if self._held[0] != which.name:
            self._held = ("", None)
            run = self.run
            model = served(which, run.lineage.parent, run.workspace, self.compute, self._dtype(which))
            self._held = (which.name, model)
        return self._held[1]

    def take(self, which: Contender) -> Any:
        """A model that nobody else is given."""
        model = self.model(which)
        self._held = ("", None)
        return model

    def _dtype(self, which: Contender) -> torch.dtype:
        """The parent, with which all are compared, keeps its own weights whatever the children are exported in."""
        return torch.float32 if which.stage == "parent" else self.run.dtype
