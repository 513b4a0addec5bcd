"""The numbers that a block of a stored matrix can hold: 32 codes of 4 or 5 bits on a scale, and how they are packed.

    q4_0, q5_0    scale x (code - 8), scale x (code - 16)
    q4_1, q5_1    scale x code + least
    iq4_nl        scale x one of 16 values, closer to each other near 0

A training that knows the rounding keeps the scales and moves codes (tasks/distill/rounded.py).
Legend: D = rows, K = columns, B = blocks of a row.
"""

from dataclasses import dataclass

import gguf
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from blocks.resources import BLOCK

BITS = {Type.Q4_0: 4, Type.Q4_1: 4, Type.Q5_0: 5, Type.Q5_1: 5, Type.IQ4_NL: 4}
_OFFSET = {Type.Q4_0: 8, Type.Q5_0: 16}  # the code of 0 where a block stores no least value
_NEAR_ZERO = torch.tensor(gguf.quants.IQ4_NL.kvalues, dtype=torch.float32)
_REACH = 256
# iq4_nl: by `place` of a number, the code of the value that is nearest to it, and that value
CODES = torch.bucketize(torch.arange(-_REACH, _REACH) / 2, (_NEAR_ZERO[1:] + _NEAR_ZERO[:-1]) / 2, right=True).byte()
LEVELS = _NEAR_ZERO[CODES.long()]


def place(number: Tensor) -> Tensor:
    """Where CODES and LEVELS have the value of iq4_nl that is nearest to a number, of the larger of two equally near.

    The middle between two values is a whole number or a half, so what counts is the whole part of twice the number.
    """
    return (2 * number).add_(_REACH).int().clamp_(0, 2 * _REACH - 1)  # so what is no number has a place too


def read(table: Tensor, places: Tensor) -> Tensor:
    """The entries of a table (N,) at places of any shape; several times as fast as `table[places]` on a CPU."""
    return table.index_select(0, places.flatten()).view(places.shape)


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What every block of a matrix (D, K) can hold. scale, least: (D, B, 1) float32, those that the blocks store."""

    kind: Type
    scale: Tensor
    least: Tensor

    @classmethod
    def of(cls, kind: Type, rows: Tensor) -> "Grid":
        """The grid of a stored matrix: (D, bytes of a row) uint8, as the file holds it."""
        blocks = rows.view(len(rows), -1, gguf.GGML_QUANT_SIZES[kind][1])
        stored = blocks[..., :4].contiguous().view(torch.float16).float()
        scale = stored[..., :1]
        least = stored[..., 1:] if kind in (Type.Q4_1, Type.Q5_1) else -_OFFSET.get(kind, 0) * scale
        return cls(kind=kind, scale=scale, least=least)

    def nearest(self, matrix_DK: Tensor) -> Tensor:
        """(D, B, 32) uint8: the codes of the nearest numbers."""
        blocks = matrix_DK.reshape(*self.scale.shape[:2], BLOCK)
        share = torch.where(self.scale == 0, 0.0, (blocks - self.least) / self.scale)
        if self.kind == Type.IQ4_NL:
            return read(CODES, place(share))
        return share.round().clamp(0, 2 ** BITS[self.kind] - 1).to(torch.uint8)

    def values(self, codes: Tensor) -> Tensor:
        """(D, K) float32: the numbers that codes stand for."""
        levels = read(_NEAR_ZERO, codes.int()) if self.kind == Type.IQ4_NL else codes.float()
        return (levels * self.scale + self.least).flatten(1)

    def packed(self, codes: Tensor) -> Tensor:
        """(D, bytes of a row) uint8: what the file holds of these codes."""
        head = [self.scale, self.least] if self.kind in (Type.Q4_1, Type.Q5_1) else [self.scale]
        parts = [torch.cat(head, dim=-1).to(torch.float16).view(torch.uint8)]
        if BITS[self.kind] == 5:
            bits = (codes >> 4).reshape(*codes.shape[:2], 4, 8)
            parts.append((bits << torch.arange(8, dtype=torch.uint8)).sum(-1, dtype=torch.uint8))
        low = codes & 15
        parts.append(low[..., : BLOCK // 2] | low[..., BLOCK // 2 :] << 4)
        return torch.cat(parts, dim=-1).flatten(1)
