"""The processes of a GKD on a Ray cluster: Ray Train places them, one on each GPU, in the place of torchrun.

export PUZZLE_GKD_LAUNCHER=".venv/bin/python -m tasks.distill.gkd_ray 16"
"""

import importlib
import os
import sys
from pathlib import Path
from typing import Any

from blocks.library import read_value
from tasks.distill.gkd_job import JOB, RESTARTS, Job

STORAGE = "ray"  # Ray Train's own notes, in the folder of the training; checkpoints are ours


def main() -> None:
    """Arguments: the number of processes, and then those that torchrun would get."""
    processes, (workspace, folder) = int(sys.argv[1]), sys.argv[-2:]
    ray, train = importlib.import_module("ray"), importlib.import_module("ray.train")
    torch = importlib.import_module("ray.train.torch")
    ray.init(address=os.environ.get("RAY_ADDRESS", "auto"), log_to_driver=True)
    job = read_value(Path(workspace) / folder / JOB, Job)
    torch.TorchTrainer(
        part_of_worker,
        train_loop_config={"workspace": workspace, "folder": folder},
        scaling_config=train.ScalingConfig(num_workers=processes, use_gpu=job.device == "cuda"),
        run_config=train.RunConfig(
            storage_path=str(Path(workspace) / folder / STORAGE),
            failure_config=train.FailureConfig(max_failures=RESTARTS),
        ),
    ).fit()


def part_of_worker(asked: dict[str, Any]) -> None:
    """What each process of Ray Train does, in the group that Ray has joined it to."""
    import torch.distributed as dist

    from tasks.distill.gkd_worker import take_part
    from tasks.distill.sharding import Group

    device = importlib.import_module("ray.train.torch").get_device()
    group = Group(rank=dist.get_rank(), size=dist.get_world_size())
    take_part(Path(asked["workspace"]), asked["folder"], str(device), group)


if __name__ == "__main__":
    main()
