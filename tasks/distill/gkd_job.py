"""A GKD from its start to its result: in this process on one device, through torchrun on several.

What is asked lies in a file, `job.json` in the folder of the training. So a training can be started by other means, on
other machines (docs/how-to/distil-on-many-gpus.md), and a checkpoint can be made a child of.
"""

import logging
import os
import shlex
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from blocks.child import assemble_layers, library_of
from blocks.compute import HOST, Compute
from blocks.errors import ChildError, PuzzleError, PuzzleFailure
from blocks.export_code.modeling_decilm import DeciLMForCausalLM
from blocks.library import digest_of, read_tensors, read_value, write_value
from blocks.records import BlockRecord, LayerChoice, Value
from blocks.resources import precision_name
from profiles.schema import GKD
from tasks.distill import gkd_checkpoint
from tasks.distill.gkd import RESULT, VERSION, GKDResult, Seen, Standing, Training, Watch, finished, no_watch
from tasks.distill.gkd_settings import LAUNCHER, asked
from tasks.distill.gkd_student import Student, load_trained
from tasks.distill.gkd_targets import Teacher, TeacherRecord
from tasks.distill.record import open_parent
from tasks.distill.sharding import ALONE, Group, shard

JOB = "job.json"
RESTARTS = 3  # of all processes from the last checkpoint, when one of them died
# else processes that were started again find the addresses of those that died, and connect to nobody
FRESH_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
FAILED, LAST_LINES = "GKD failed: ", 12
log = logging.getLogger("puzzle")


class Job(Value):
    """A child that is to be distilled globally: its layers with the trained blocks they are made of, the parent's
    targets, and the settings. dtype, attention and micro_batch_tokens: see `Compute`. until: steps after which the
    training is to wait.
    """

    layers: tuple[LayerChoice, ...]
    blocks: tuple[BlockRecord, ...]
    record: TeacherRecord
    settings: GKD
    device: str
    dtype: str
    attention: str
    micro_batch_tokens: int
    until: int | None = None

    @property
    def folder(self) -> str:
        """Of checkpoints and result, within the workspace: named by all that decides the result."""
        key = digest_of(
            layers=self.layers,
            blocks=[block.key for block in self.blocks],
            teacher=self.record.validation.sha256,
            settings=asked(self.settings),
            products=self.dtype,
            version=VERSION,
            **self.record.mixed.key,
        )
        return f"gkd/child-{key}"

    @property
    def compute(self) -> Compute:
        """How it is computed, on the device of one process."""
        return Compute(
            device=self.device,
            dtype=getattr(torch, self.dtype),
            attention=self.attention,
            micro_batch_tokens=self.micro_batch_tokens,
        )


def job_of(
    layers: Sequence[LayerChoice],
    blocks: Sequence[BlockRecord],
    record: TeacherRecord,
    settings: GKD,
    compute: Compute,
) -> Job:
    """The job of a child."""
    return Job(
        layers=tuple(layers),
        blocks=tuple(blocks),
        record=record,
        settings=settings,
        device=compute.device.partition(":")[0],
        dtype=precision_name(compute.dtype),
        attention=compute.attention,
        micro_batch_tokens=compute.micro_batch_tokens,
    )


def distill_globally(
    job: Job, workspace: Path, compute: Compute, devices: Sequence[str] = (), watch: Watch = no_watch
) -> GKDResult:
    """The result of a job: the stored one, or the end of a training that goes on from its last checkpoint.

    devices: of this machine, a process of torchrun for each where there are several. Else this process trains, on the
    device of `compute`.
    """
    found = finished(workspace, job.folder)
    if found is None:
        _carry_out(job, workspace, compute, devices, watch)
        found = finished(workspace, job.folder)
    if found is None:
        raise PuzzleFailure(f"GKD ended without {workspace / job.folder / RESULT}: run again")
    return found


def kl_after(
    steps: int, job: Job, workspace: Path, compute: Compute, devices: Sequence[str] = (), watch: Watch = no_watch
) -> float:
    """The best validation KL of a job in its first `steps`, after which its training waits in a checkpoint.

    `distill_globally` goes on from there. See there for the arguments.
    """
    ended = finished(workspace, job.folder)
    if ended is not None:
        return min(kl for step, kl in ended.curve if step <= steps)
    path = Standing.path(workspace / job.folder, steps)
    if not path.exists():
        _carry_out(job.model_copy(update={"until": steps}), workspace, compute, devices, watch)
    return read_value(path, Standing).kl


def model_after(
    steps: int, job: Job, workspace: Path, compute: Compute, devices: Sequence[str] = (), watch: Watch = no_watch
) -> tuple[DeciLMForCausalLM, int]:
    """The child with its best weights of the first `steps`, on the CPU in float32, and the step that they are of.

    A later step, where the training went on meanwhile and has left those weights behind.
    """
    if steps == 0:
        return built(job, workspace, HOST), 0
    kl_after(steps, job, workspace, compute, devices, watch)
    ended = finished(workspace, job.folder)
    if ended is not None:
        model = built(job, workspace, HOST)
        load_trained(model, read_tensors(workspace, ended.weights))
        return model, ended.best_step
    there = open_checkpoint(workspace / job.folder)
    if there is None:  # it was given up in an earlier race
        _carry_out(job.model_copy(update={"until": steps}), workspace, compute, devices, watch)
        there = open_checkpoint(workspace / job.folder)
    if there is None:
        raise PuzzleFailure(f"GKD left no checkpoint in {workspace / job.folder}: run again")
    return there.model(), there.course.best_step


def give_up(job: Job, workspace: Path) -> None:
    """Delete the checkpoints of a training that will not go on; what it came to is kept."""
    gkd_checkpoint.drop(workspace / job.folder)


def _carry_out(job: Job, workspace: Path, compute: Compute, devices: Sequence[str], watch: Watch) -> None:
    check_processes(job.settings, max(1, len(devices)))
    write_value(workspace / job.folder / JOB, job)
    launcher = shlex.split(os.environ.get(LAUNCHER, ""))
    if launcher or len(devices) > 1:
        _launched(launcher or _torchrun(len(devices)), workspace.resolve(), job.folder, _shown(devices), watch)
    else:
        train(job, training_of(job, workspace, compute, watch))


def train(job: Job, training: Training) -> None:
    """The part of this process in a job: to its end, or to where it is to wait."""
    if job.until is None:
        training.run()
    else:
        training.run_until(job.until)


def training_of(
    job: Job, workspace: Path, compute: Compute, watch: Watch = no_watch, group: Group = ALONE, sharded: bool = False
) -> Training:
    """The training of a job in this process. sharded: it holds slices of child and parent; while they are loaded, one
    layer alone is whole.
    """

    def sliced(module: nn.Module) -> None:
        if sharded:
            shard(module, compute)

    student = Student(built(job, workspace, compute, sliced), job.settings, compute, sharded)
    sliced(student)
    return Training(
        student=student,
        beside=beside_child(job.record, workspace, compute, sliced, sharded),
        record=job.record,
        settings=job.settings,
        workspace=workspace,
        folder=job.folder,
        compute=compute,
        group=group,
        watch=watch,
    )


def beside_child(
    record: TeacherRecord,
    workspace: Path,
    compute: Compute,
    each: Callable[[nn.Module], object] = lambda module: None,
    sharded: bool = False,
) -> Teacher | None:
    """The parent that runs beside a child; None where its targets are recorded. each, sharded: see `training_of`."""
    if record.steps:
        return None
    reader = open_parent(workspace / record.parent.folder, compute)
    beside = Teacher(assemble_layers(reader, {}, [LayerChoice()] * reader.depth, workspace, each), compute, sharded)
    each(beside)
    return beside


def check_processes(settings: GKD, processes: int) -> None:
    """Raise PuzzleError when so many processes cannot each have the same number of a step's sequences."""
    if settings.batch_sequences % processes or settings.validation_sequences < processes:
        raise PuzzleError(
            f"GKD on {processes} devices needs gkd.batch_sequences that {processes} divides (it is "
            f"{settings.batch_sequences}), and gkd.validation_sequences of at least {processes} (it is "
            f"{settings.validation_sequences}): each device takes as many sequences as the others"
        )


def built(
    job: Job, workspace: Path, compute: Compute, each: Callable[[nn.Module], object] = lambda layer: None
) -> DeciLMForCausalLM:
    """The child before its GKD, with float32 weights. each: see `assemble_layers`."""
    reader = open_parent(workspace / job.record.parent.folder, compute.with_weights(torch.float32))
    return assemble_layers(reader, library_of(list(job.blocks)), job.layers, workspace, each)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A training at work, as a child: its weights are the best until then. folder: of the checkpoint."""

    folder: Path
    workspace: Path
    job: Job
    course: gkd_checkpoint.Course

    def model(self) -> DeciLMForCausalLM:
        """The child on the CPU, in float32."""
        model = built(self.job, self.workspace, HOST)
        load_trained(model, gkd_checkpoint.best_weights(self.folder))
        return model


def open_checkpoint(path: Path) -> Checkpoint | None:
    """The checkpoint at a path, or the last one of a training's folder; None where the path is neither."""
    folder = path if (path / gkd_checkpoint.MANIFEST).is_file() else gkd_checkpoint.last(path)
    if folder is None or not (folder.parent / JOB).is_file():
        return None
    course = gkd_checkpoint.checked(folder, ALONE)
    if course is None:
        raise ChildError(f"{folder} is damaged: name another checkpoint, or wait for the next one.")
    job = read_value(folder.parent / JOB, Job)
    return Checkpoint(folder=folder, workspace=folder.parent.parents[1], job=job, course=course)


def _torchrun(processes: int) -> list[str]:
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*run, f"--nproc-per-node={processes}", f"--max-restarts={RESTARTS}"]


def _shown(devices: Sequence[str]) -> dict[str, str]:
    """The environment in which the processes see these GPUs alone, the first of them as number 0."""
    if not devices or not devices[0].startswith("cuda"):
        return {}
    numbers, seen = [int(device.partition(":")[2] or 0) for device in devices], os.environ.get("CUDA_VISIBLE_DEVICES")
    names = seen.split(",") if seen else [str(number) for number in range(max(numbers) + 1)]
    return {"CUDA_VISIBLE_DEVICES": ",".join(names[number] for number in numbers)}


def _launched(launcher: Sequence[str], workspace: Path, folder: str, environment: dict[str, str], watch: Watch) -> None:
    """Start the processes of a job, pass on what the first of them reports, and wait for their end.

    They end when this process is killed: nobody reads then what they report.
    """
    command = [*launcher, "-m", "tasks.distill.gkd_worker", str(workspace), folder]
    last: deque[str] = deque(maxlen=LAST_LINES)
    failures: list[str] = []
    own = os.environ | environment | FRESH_STORE
    with subprocess.Popen(command, env=own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                seen = _seen_in(line)
                if seen is not None:
                    failures.clear()  # of those that torchrun has started again since
                    watch(seen)
                    continue
                last.append(line.rstrip())
                log.info("GKD: %s", last[-1])
                failures += [line.partition(FAILED)[2].strip()] if FAILED in line else []
        finally:
            if process.poll() is None:
                process.terminate()
    if process.returncode:
        told = failures[0] if failures else "\n".join(last)
        raise PuzzleFailure(f"a process of GKD ended, and again after it was restarted: {told}")


def _seen_in(line: str) -> Seen | None:
    try:
        return Seen.model_validate_json(line[line.index("{") :])
    except ValueError:
        return None
