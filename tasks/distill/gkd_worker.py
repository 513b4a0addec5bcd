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

from blocks.library import read_value  # noqa: E402
from blocks.runtime import configure_torch  # noqa: E402
from tasks.distill.gkd import Seen, Watch  # noqa: E402
from tasks.distill.gkd_job import FAILED, JOB, Job, check_processes, train, training_of  # noqa: E402
from tasks.distill.sharding import Group, joined, local_device  # noqa: E402
from tasks.running.progress import say  # noqa: E402
from tasks.running.sharing import TaskKey, exclusive  # noqa: E402


def main() -> None:
    """Train this process's part of the job of the command line."""
    configure_torch(torch.get_num_threads())  # as many as torchrun gave
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
        train(job, training_of(job, workspace, job.compute.on(device), _reporting(group), group, sharded=True))


def _reporting(group: Group) -> Watch:
    """What is called after each step in this process."""
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

    return report


if __name__ == "__main__":
    main()
