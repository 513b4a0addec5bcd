"""Checkpoints of a GKD at work: every process writes its slices, and a manifest with digests makes them count.

`torch.distributed.checkpoint` writes and reads the slices as safetensors, so nothing is unpickled, and another number
of processes can go on. A folder gets its name when all of it is on the disk; then the one before it is deleted.
"""

import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as read_slices
from torch.distributed.checkpoint.state_dict_saver import save as write_slices

from blocks.errors import DamagedBlock
from blocks.files import sha256_of
from blocks.library import read_value, write_value
from blocks.records import Value
from tasks.distill.sharding import Group
from tasks.running.progress import say

MANIFEST = "checkpoint.json"
# torch's word on a process that saves alone, which is what is wanted of it
warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)


class Course(Value):
    """How far a training is. `step` is also its place in the data: the order of sequences follows from the seed.

    learning_rate: what the profile names, or what was tried and fitted. curve: (step, validation KL). waited: how many
    measurements ago the best was. There is no state of random numbers: training draws none (no dropout).
    """

    step: int = 0
    learning_rate: float
    tried: tuple[tuple[float, float], ...] = ()
    losses: tuple[tuple[float, float], ...] = ()
    curve: tuple[tuple[int, float], ...]
    best_step: int = 0
    waited: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0

    @property
    def best_kl(self) -> float:
        """The validation KL of the weights that are kept."""
        return dict(self.curve)[self.best_step]


class _Manifest(Value):
    course: Course
    files: dict[str, str]


def save(folder: Path, course: Course, tensors: Mapping[str, Tensor], group: Group) -> None:
    """Write a checkpoint below `folder` in place of the one before it. All processes call this together."""
    name = f"checkpoint-{course.step:08d}"
    part = folder / f".{name}.part"
    if group.first:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    group.gather(None)
    writer = HuggingFaceStorageWriter(str(part), save_distributed=True)
    write_slices(dict(tensors), storage_writer=writer, no_dist=group.size == 1)
    files = {key: digest for found in group.gather(_digests(part, group)) for key, digest in found.items()}
    if group.first:
        write_value(part / MANIFEST, _Manifest(course=course, files=files))
        before = list(folder.glob("checkpoint-*"))
        shutil.rmtree(folder / name, ignore_errors=True)  # a damaged one, after which training began again
        part.rename(folder / name)
        for old in before:
            if old.name != name:
                shutil.rmtree(old, ignore_errors=True)
    group.gather(None)


def load(folder: Path, tensors: Mapping[str, Tensor], group: Group) -> Course | None:
    """Read the last whole checkpoint into `tensors`, in place; None where there is none. All processes call this."""
    for path in reversed(_folders(folder)):
        course = checked(path, group)
        if course is None:
            continue
        read_slices(dict(tensors), storage_reader=HuggingFaceStorageReader(str(path)), no_dist=group.size == 1)
        return course
    return None


def checked(path: Path, group: Group) -> Course | None:
    """How far a checkpoint's training was, if all its files have their digests."""
    try:
        manifest = read_value(path / MANIFEST, _Manifest)
        whole = all(manifest.files.get(key) == digest for key, digest in _digests(path, group).items())
        whole &= all((path / key).is_file() for key in manifest.files)
    except (DamagedBlock, OSError):
        whole = False
    if all(group.gather(whole)):
        return manifest.course
    if group.first:
        say(f"{path} is damaged: it is not used, and training starts again from what was before it")
    return None


def best_weights(path: Path) -> dict[str, Tensor]:
    """The best weights until a checkpoint, whole, whatever the number of processes that wrote their slices."""
    sizes = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    best = {
        name: torch.empty(held.size)
        for name, held in sizes.items()
        if name.startswith("best.") and isinstance(held, TensorStorageMetadata)
    }
    read_slices(best, storage_reader=HuggingFaceStorageReader(str(path)), no_dist=True)
    return {name.removeprefix("best."): tensor for name, tensor in best.items()}


def drop(folder: Path) -> None:
    """Delete all checkpoints, once the result is there."""
    for path in [*folder.glob("checkpoint-*"), *folder.glob(".checkpoint-*.part")]:
        shutil.rmtree(path, ignore_errors=True)


def last(folder: Path) -> Path | None:
    """The newest checkpoint."""
    return next(reversed(_folders(folder)), None)


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("checkpoint-*") if (path / MANIFEST).is_file())


def _digests(path: Path, group: Group) -> dict[str, str]:
    """Digests of this process's part of the files, each of which one process reads."""
    return {file.name: sha256_of(file) for file in sorted(path.glob("*.safetensors"))[group.rank :: group.size]}
