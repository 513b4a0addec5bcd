"""A device that is not there: its tensors compute on the CPU, and refuse to meet a tensor of the CPU.

So a stage is seen to compute where it was told to, without a GPU: every tensor that it makes, loads or forgets on the
host and then mixes with the others is an error, as it would be on a real device.
"""

from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

DEVICE = "npu:0"  # a name that safetensors knows
_setup_privateuseone_for_python_backend("npu")
# the other tests of this process are on a machine without it: checkpoints, and activations computed again, would ask it
fake: Any = torch.npu  # type: ignore[attr-defined]
fake.is_available = lambda: False
fake.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
aten: Any = torch.ops.aten
CROSSES = {aten._to_copy.default, aten.copy_.default, aten.index.Tensor}  # ops that may see both


class Elsewhere(torch.Tensor):
    """A tensor that says it is on DEVICE."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> "Elsewhere":
        made: Elsewhere = torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(DEVICE),
            requires_grad=False,
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return OnDevice.compute(func, args, kwargs or {})


class OnDevice(TorchDispatchMode):
    """While it is active, DEVICE is a device of this machine."""

    def __enter__(self) -> "OnDevice":
        self.patches = pytest.MonkeyPatch()
        self.patches.setattr(torch.__future__, "_overwrite_module_params_on_conversion", True)  # else it loses its type
        self.patches.setattr(torch, "inference_mode", torch.no_grad)  # wrapped tensors have no views in it
        self.patches.setattr("blocks.library.safe_open", opened)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.patches.undo()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.compute(func, args, kwargs or {})

    @staticmethod
    def compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        there = [one for one in tensors if isinstance(one, Elsewhere)]
        left = [one for one in tensors if not isinstance(one, Elsewhere) and one.dim()]
        if there and left and func not in CROSSES:
            raise RuntimeError(f"{func}: {[tuple(one.shape) for one in left]} on the CPU, the others on {DEVICE}")
        wanted = kwargs.get("device")
        if wanted is not None:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        goes = torch.device(wanted) == torch.device(DEVICE) if wanted is not None else bool(there)
        if func is aten.copy_.default:
            goes = isinstance(args[0], Elsewhere)
        made = func(*tree_map(_held, args), **tree_map(_held, kwargs))
        if func._schema.is_mutable and args and isinstance(args[0], torch.Tensor):
            return args[0] if isinstance(made, torch.Tensor) else made
        return tree_map(lambda one: Elsewhere(one) if goes and isinstance(one, torch.Tensor) else one, made)


class opened:  # noqa: N801
    """safetensors' own reading goes round the dispatcher."""

    def __init__(self, path: Any, framework: str, device: str) -> None:
        self.file, self.device = safe_open(path, framework=framework), device

    def __enter__(self) -> "opened":
        return self

    def __exit__(self, *error: Any) -> None:
        pass

    def keys(self) -> list[str]:
        return list(self.file.keys())

    def get_slice(self, name: str) -> Any:
        return self.file.get_slice(name)

    def get_tensor(self, name: str) -> torch.Tensor:
        return self.file.get_tensor(name).to(self.device)


def _held(value: Any) -> Any:
    return value.held if isinstance(value, Elsewhere) else value
