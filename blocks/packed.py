"""Frozen linear layers whose weight is arranged for the CPU's matrix kernels once, not at every product.

torch arranges a weight anew in each call. Arranged once by oneDNN, it gives the same sums 1.1 times (a layer) to 1.4
times (a head) as fast on the machine of docs/log.md. On other devices, and where torch was built without oneDNN, the
plain product is used.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ROWS = 1024  # tokens of a product that the layout is best for; other numbers give right results too


def packed_product(weight: Tensor, bias: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    """x (..., in) -> x @ weight.T + bias (..., out), no gradients. weight (out, in), float32, must not change."""
    can_pack = weight.device.type == "cpu" and weight.dtype == torch.float32 and torch.backends.mkldnn.is_available()
    if not can_pack:
        return lambda x: F.linear(x, weight, bias)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), ROWS)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


class PackedLinear(nn.Module):
    """A frozen `nn.Linear`; holds the packed weight only."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.product = packed_product(linear.weight.data, None if linear.bias is None else linear.bias.data)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)"""
        return self.product(x)


def pack_linears(module: nn.Module) -> None:
    """Replace every `nn.Linear` below `module`, for forward passes without gradients only."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, PackedLinear(child))
        else:
            pack_linears(child)
