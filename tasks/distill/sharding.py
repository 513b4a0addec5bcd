"""Several processes that hold one model: FSDP2 (`torch.distributed.fsdp.fully_shard`), and what they tell each other.

Every process holds a slice of each parameter, of its gradient and of its optimiser state. A layer is whole only while
it computes. Whoever trains alone is a group of one, and nothing here is sharded or sent then.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from blocks.compute import Compute


@dataclass(frozen=True, kw_only=True)
class Group:
    """This process, number `rank` of `size` that train one child."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes what is one for all."""
        return self.rank == 0

    def part(self, count: int) -> slice:
        """Which of `count` rows are this process's: neighbours, as many as the others have or one more."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def gather(self, value: Any) -> list[Any]:
        """What each process gave, in order. A small thing: a number, a list of digests."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found


ALONE = Group()


@contextmanager
def joined(device: str) -> Iterator[Group]:
    """The group that torchrun started this process in, for the length of the block."""
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield Group(rank=dist.get_rank(), size=dist.get_world_size())
    finally:
        dist.destroy_process_group()


def local_device(kind: str) -> str:
    """The device of this process of torchrun: the GPU of its number on this machine, or the CPU."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if kind == "cuda" else kind


def shard(module: nn.Module, compute: Compute) -> None:
    """Keep a slice of every parameter of `module` here that is not yet sliced; products in `compute.dtype`."""
    products = MixedPrecisionPolicy(param_dtype=compute.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    mesh = init_device_mesh(compute.device.partition(":")[0], (dist.get_world_size(),))  # not the first GPU there is
    fully_shard(module, mesh=mesh, mp_policy=products)


def whole(tensor: Tensor) -> Tensor:
    """A tensor from its slices; every process has to ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def held_bytes(tensors: list[Tensor]) -> int:
    """Bytes of these tensors in this process."""
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    return sum(tensor.numel() * tensor.element_size() for tensor in local)
