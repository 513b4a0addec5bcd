"""One process of a GKD on several devices. torchrun starts as many as there are devices, on one machine or on many:

    torchrun --nproc-per-node 8 -m tasks.distill.gkd_worker WORKSPACE gkd/child-KEY

The job lies in the folder as `job.json`. Every step is printed by the first process as a line of JSON.
"""

import os
import signal
import sys
from contextlib import nullcontext
from pathlib import Path

from blocks.runtime import configure

configure()

import torch  # noqa: E402

from blocks.child import assembled_layer, library_of  # noqa: E402
from blocks.compute import Compute  # noqa: E402
from blocks.export_code.modeling_decilm import DeciLMForCausalLM  # noqa: E402
from blocks.library import read_value  # noqa: E402
from blocks.records import LayerChoice  # noqa: E402
from tasks.distill.gkd import GKDResult, Seen, Training  # noqa: E402
from tasks.distill.gkd_job import FAILED, JOB, Job, check_processes  # noqa: E402
from tasks.distill.gkd_student import Student  # noqa: E402
from tasks.distill.gkd_targets import Teacher  # noqa: E402
from tasks.distill.record import open_parent  # noqa: E402
from tasks.distill.sharding import Group, joined, local_device, shard  # noqa: E402
from tasks.running.progress import say  # noqa: E402
from tasks.running.sharing import TaskKey, exclusive  # noqa: E402


def main() -> None:
    """Train this process's part of the job of the command line."""
    workspace, folder = Path(sys.argv[1]), sys.argv[2]
    device = local_device(read_value(workspace / folder / JOB, Job).device)
    try:
        with joined(device) as group:
            take_part(workspace, folder, device, group)
    except Exception as error:
        say(f"{FAILED}{type(error).__name__}: {error}")
        raise


def take_part(workspace: Path, folder: str, device: str, group: Group) -> None:
    """This process's part in the job of a folder. Processes of a killed run that still end are waited for."""
    job = read_value(workspace / folder / JOB, Job)
    check_processes(job.settings, group.size)
    task = TaskKey(key=f"workers-{Path(folder).name}", what="the processes of this GKD")
    with exclusive(workspace, task) if group.first else nullcontext():
        train(job, workspace, job.compute.on(device), group)


def train(job: Job, workspace: Path, compute: Compute, group: Group) -> GKDResult:
    """The part of this process in a job."""
    starter = os.getppid()

    def report(seen: Seen) -> None:
        """To whoever started the processes. When that one was killed, they end: the next run goes on from here."""
        if os.getppid() != starter:
            raise SystemExit("torchrun was killed")
        try:
            if group.first:
                sys.stdout.write(seen.model_dump_json() + "\n")
                sys.stdout.flush()
        except BrokenPipeError:
            os.kill(starter, signal.SIGTERM)

    student = Student(_sharded_child(job, workspace, compute), job.settings, compute, sharded=True)
    shard(student, compute)
    beside = None
    if not job.record.steps:
        beside = Teacher(_sharded_parent(job, workspace, compute), compute, sharded=True)
        shard(beside, compute)
    return Training(
        student=student,
        beside=beside,
        record=job.record,
        settings=job.settings,
        workspace=workspace,
        folder=job.folder,
        compute=compute,
        group=group,
        watch=report,
    ).run()


def _sharded_child(job: Job, workspace: Path, compute: Compute) -> DeciLMForCausalLM:
    """The child before its GKD: float32 slices of every layer, of which only one is whole at a time."""
    reader = open_parent(workspace / job.record.parent.folder, compute.with_weights(torch.float32))
    model, library = reader.frame(job.layers), library_of(list(job.blocks))
    for layer, choice in enumerate(job.layers):
        module = assembled_layer(reader, library, choice, layer, workspace)
        shard(module, compute)
        model.model.layers.append(module)
    return model


def _sharded_parent(job: Job, workspace: Path, compute: Compute) -> DeciLMForCausalLM:
    reader = open_parent(workspace / job.record.parent.folder, compute)
    model = reader.frame([LayerChoice()] * reader.depth)
    for layer in range(reader.depth):
        module = reader.layer(layer)
        shard(module, compute)
        model.model.layers.append(module)
    return model


if __name__ == "__main__":
    main()
