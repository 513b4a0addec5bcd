"""ggml's rounding to iq4_nl, for many blocks at once: its library takes four to six times as long.

A block of 32 numbers has a scale and, for each, one of 16 values. ggml tries 16 scales, takes for each the nearest
values, and keeps the scale that fits best (`quantize_row_iq4_nl_impl` of ggml-quants.c). Here all scales of a thousand
blocks are tried together. What comes out is the same but for blocks in which two scales fit equally well, and for
blocks whose numbers have no weight at all: zeros here, and no numbers there.

Legend: N = blocks, S = scales that are tried.
"""

import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from blocks.resources import BLOCK
from tasks.gguf.grids import CODES, LEVELS, Grid, place, read

TRIES = 7  # scales on each side of the one that gives the largest number the first value
AT_ONCE = 1024  # blocks: what is computed of them stays in a processor's cache
LEAST = 1e-15  # of a block's largest number; below, all are zero


def round_iq4_nl(columns: Tensor, importance: Tensor | None) -> tuple[np.ndarray, Tensor]:
    """Columns (D, s) float32, s a multiple of 32, importance (s,) or None -> bytes (D, 18 s / 32), values (D, s)."""
    blocks = columns.reshape(-1, BLOCK)
    weights = blocks.square()
    if importance is not None:
        spread = weights.mean(1, keepdim=True) * 2
        own = importance.reshape(1, -1, BLOCK).expand(len(columns), -1, -1).reshape(-1, BLOCK)
        weights = weights.add_(spread).sqrt_().mul_(own)
    parts = zip(blocks.split(AT_ONCE), weights.split(AT_ONCE), strict=True)
    scales = torch.cat([_best_scales(part, own) for part, own in parts])
    codes = read(CODES, place(torch.where(scales == 0, 0.0, blocks / scales))).reshape(len(columns), -1, BLOCK)
    stored = scales.half().float().reshape(len(columns), -1, 1)  # codes are those of the scale before it is stored
    grid = Grid(kind=Type.IQ4_NL, scale=stored, least=torch.zeros_like(stored))
    return grid.packed(codes).numpy(), grid.values(codes)


def _best_scales(blocks: Tensor, weights: Tensor) -> Tensor:
    """(N, 1): the scale of each block (N, 32) whose nearest values have the least weighted squared error."""
    largest = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))
    empty = largest.abs() < LEAST
    first = float(LEVELS[0])
    of_largest = torch.cat([torch.tensor([-first]), torch.arange(-TRIES, TRIES + 1) + first])
    tried = of_largest / largest.masked_fill(empty, 1.0)  # (N, S): inverse scales
    values = read(LEVELS, place(blocks[:, None, :] * tried[:, :, None]))  # (N, S, 32)
    along = torch.bmm(values, (weights * blocks)[:, :, None])
    length = torch.bmm(values.square_(), weights[:, :, None]).clamp_min_(torch.finfo(torch.float32).tiny)
    best = (along.square() / length).argmax(1, keepdim=True)
    scales = (along.gather(1, best) / length.gather(1, best)).squeeze(2)
    return scales.masked_fill(empty, 0.0)
