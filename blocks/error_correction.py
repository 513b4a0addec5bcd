"""Quantise a matrix so that its output, not its entries, stays close: block-wise error correction on a Gram matrix.

The columns are quantised a block after the other. What a block loses is made up for by the columns that are still to
come, as the least-squares fit over the calibration inputs says (GPTQ, arXiv 2210.17323, algorithm 1; here a block is
rounded as a whole, by any rounding that takes an importance for each column).

Legend: D = outputs (rows), K = inputs (columns), N = calibration tokens, s = columns of a block.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

# (columns (D, s), importance (s,)) -> (what the file holds of them, the values (D, s) that it stands for)
Rounding = Callable[[Tensor, Tensor], tuple[Any, Tensor]]


def correct(
    weight_DK: Tensor, gram_KK: Tensor, rounding: Rounding, block: int, damping: float
) -> tuple[list[Any], Tensor, Tensor]:
    """Round a matrix (D, K), of which X (N, K) are the inputs and `gram_KK` is X^T X.

    damping: share of the Gram's mean diagonal that is added to its diagonal; without it, columns that no token excited
    have no inverse. Returns what the file holds of each block in order, the rounded matrix (D, K) float32, and
    the matrix that was rounded, which makes up for what earlier columns lost. The arithmetic is float64.
    """
    gram = gram_KK.double()
    damped = gram + damping * gram.diagonal().mean().clamp_min(1e-30) * torch.eye(len(gram), dtype=gram.dtype)
    upper = _root_of_inverse(damped)
    left, rounded, parts = weight_DK.double().clone(), torch.empty(weight_DK.shape), []
    for start in range(0, left.shape[1], block):
        here, after = slice(start, start + block), slice(start + block, None)
        own = upper[here, here]
        inverse = torch.linalg.solve_triangular(own, torch.eye(len(own), dtype=own.dtype), upper=True)
        importance = inverse.square().sum(1)  # of (U^T U)^-1 the diagonal: the loss's curvature as later columns adapt
        part, values = rounding(left[:, here].float(), importance.float())
        parts.append(part)
        rounded[:, here] = values
        lost = left[:, here] - values.double()
        left[:, after] -= lost @ inverse @ upper[here, after]
    return parts, rounded, left.float()


def _root_of_inverse(matrix_KK: Tensor) -> Tensor:
    """The upper triangular U (K, K) with U^T U = M^-1: of M = R R^T, with R upper triangular, it is R^-1."""
    turned = torch.linalg.cholesky(matrix_KK.flip(0, 1)).flip(0, 1)
    return torch.linalg.solve_triangular(turned, torch.eye(len(turned), dtype=turned.dtype), upper=True)


def linears_of(module: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of a module, by name."""
    return {name: one for name, one in module.named_modules() if isinstance(one, nn.Linear)}


class InputGrams:
    """Sums X^T X of what enters each linear layer of a module, float32, while it runs inside a `with` block."""

    def __init__(self, module: nn.Module) -> None:
        self.linears = linears_of(module)
        self.sums: dict[str, Tensor] = {}
        self._hooks: list[Any] = []
        self._last: tuple[Tensor, Tensor] | None = None

    def __enter__(self) -> "InputGrams":
        for name, linear in self.linears.items():
            self._hooks.append(
                linear.register_forward_pre_hook(lambda _, values, name=name: self._add(name, values[0]))
            )
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._last = None

    def _add(self, name: str, inputs: Tensor) -> None:
        if self._last is None or self._last[0] is not inputs:  # gate and up read the same states; so do q, k and v
            x = inputs.detach().flatten(0, -2).float()
            self._last = inputs, x.T @ x
        gram = self._last[1]
        self.sums[name] = self.sums[name] + gram if name in self.sums else gram
