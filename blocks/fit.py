"""The inputs of initialisation and closed-form fits, and the ridge regression that the fits share.

Legend: S = sequences, N = tokens, D = hidden_size, F = intermediate_size, K = input width of the fitted matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from blocks.export_code.modeling_decilm import DeciLMDecoderLayer


@dataclass(frozen=True, kw_only=True)
class FitContext:
    """One layer of the parent and what was recorded of it.

    statistics: Gram matrices over calibration tokens, float32 (tasks/distill/record.py):
      ffn_gram (F, F) of the inputs of down_proj, ffn_order (F,) channels by importance, first = keep; or, of an FFN
      with experts, what blocks/experts.py says: expert_tokens, expert_gates (of a token on average) ...,
      ffn_in_gram (D, D) of the normed FFN input, ffn_in_cross (D, D) = inputs^T outputs of the FFN core,
      attention_in_gram, attention_in_cross (D, D): the same of the attention core.
    hidden: states (S, T, D) that enter the layer, on the host. weights: of their tokens (S, T), where they have some;
      the statistics are weighted already. context: keyword arguments of the layer's attention.
    ridge: strength of the regularisation, see `ridge_solve`.
    """

    config: Any
    layer: int
    parent_layer: DeciLMDecoderLayer
    statistics: dict[str, Tensor]
    hidden: Tensor
    context: dict[str, Any]
    ridge: float
    batch_sequences: int = 8
    weights: Tensor | None = None

    def hidden_batches(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """The hidden states that enter the layer, in batches (B, T, D), and the weights of their tokens (B x T, 1)."""
        like = next(self.parent_layer.parameters())
        for first in range(0, len(self.hidden), self.batch_sequences):
            rows = slice(first, first + self.batch_sequences)
            weights = None if self.weights is None else self.weights[rows].flatten()[:, None].to(like)
            yield self.hidden[rows].to(like.device, like.dtype), weights


def ridge_solve(gram_KK: Tensor, cross_KD: Tensor, prior_KD: Tensor, ridge: float) -> Tensor:
    """argmin_W ||X W - Y||^2 + lam ||W - prior||^2 from X^T X and X^T Y, in float64. Returns (K, D) float32.

    lam = ridge * mean diagonal of the Gram. The solution is shrunk towards the pruned start rather than to zero, so
    channels that no calibration token excited stay as the parent had them.
    """
    gram = gram_KK.double()
    lam = ridge * gram.diagonal().mean().clamp_min(1e-30)
    left = gram + lam * torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve(left, cross_KD.double() + lam * prior_KD.double()).float()


def solve_flops(width: int, columns: int) -> int:
    """FLOPs of `ridge_solve` for a (width, width) Gram and so many columns: LU, two triangular solves."""
    return 2 * width**3 // 3 + 2 * width**2 * columns


def elimination_flops(count: int, columns: int, chunk: int) -> int:
    """FLOPs of `elimination_order` over `count` channels: the inverse, then a rank-`chunk` update per round."""
    rounds = count // chunk
    return 2 * count**3 + 2 * chunk * rounds * (count**2 // 3 + columns * count // 2)


def elimination_order(gram_FF: Tensor, down_DF: Tensor, ridge: float, chunk: int = 16) -> Tensor:
    """Channels of an FFN from the most to the least useful, by backward elimination with refit.

    Removing channel j and refitting the others costs ||B_j||^2 / [H^-1]_jj (optimal brain surgeon, on the Gram
    H = X^T X + lam I, lam = `ridge` x the mean diagonal of X^T X, B = current coefficients). Each round removes the
    `chunk` cheapest channels and updates inverse and coefficients exactly; the last channels are ordered by the same
    cost. Returns (F,) int64.
    """
    count = gram_FF.shape[0]
    gram = gram_FF.double()
    damping = ridge * gram.diagonal().mean().clamp_min(1e-30)
    inverse = torch.linalg.inv(gram + damping * torch.eye(count, dtype=gram.dtype, device=gram.device))
    coefficients = down_DF.double().T.clone()
    kept = torch.arange(count, device=gram.device)
    removed: list[Tensor] = []
    while len(kept) > chunk:
        cost = coefficients.square().sum(1) / inverse.diagonal()
        ranks = cost.argsort()
        out, stay = ranks[:chunk], ranks[chunk:].sort().values
        update = torch.linalg.solve(inverse[out][:, out], inverse[out])
        coefficients = (coefficients - update.T @ coefficients[out])[stay]
        inverse = (inverse - inverse[:, out] @ update)[stay][:, stay]
        removed.append(kept[out])
        kept = kept[stay]
    cost = coefficients.square().sum(1) / inverse.diagonal()
    return torch.cat([*removed, kept[cost.argsort()]]).flip(0)


def contribution_order(contribution_F: Tensor) -> Tensor:
    """Channels by C_i = mean |X_i| * ||W_down[:, i]||, the highest first (Puzzle, section 3). Returns (F,) int64."""
    return contribution_F.argsort(descending=True, stable=True)
