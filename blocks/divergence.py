"""KL divergence and LM loss from hidden states, exact over the whole vocabulary, with one vector per token.

With parent probabilities p = softmax(W h_p) and a child that shares the parent's head W, child hidden state h_c:

    KL(p || q) = sum_v p_v (z_p,v - z_c,v) + lse(z_c) - lse(z_p)
               = (h_p - h_c) . m + lse(W h_c) - lse(W h_p),    m = W^T p

so the parent's whole distribution enters as its moment m, D numbers a token in the place of V, computed once for all
variants and steps. Of the child only logsumexp is needed, chunk by chunk; its gradient in h_c is W^T q - m.

N = tokens, D = hidden_size, V = vocab_size.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CHUNK = 256


@dataclass(frozen=True, kw_only=True)
class Targets:
    """What must be known of the parent. hidden (N, D) after the final norm, moment (N, D), lse (N,)."""

    hidden: Tensor
    moment: Tensor
    lse: Tensor

    def __getitem__(self, rows: Any) -> "Targets":
        return Targets(hidden=self.hidden[rows], moment=self.moment[rows], lse=self.lse[rows])


def _exponentials(hidden_ND: Tensor, head_VD: Tensor, buffer: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """exp(logits - top) of one chunk, their sums (n, 1), and top (n, 1). The one way logits are made here.

    Parent and child take the same steps, so equal states give equal bits and a divergence of exactly 0.
    """
    logits = torch.mm(hidden_ND, head_VD.T, out=buffer[: len(hidden_ND)])
    top = logits.amax(1, keepdim=True)
    weights = logits.sub_(top).exp_()
    return weights, weights.sum(1, keepdim=True), top


@torch.no_grad()
def logsumexp(hidden_ND: Tensor, head_VD: Tensor) -> Tensor:
    """logsumexp over the vocabulary of head @ hidden, chunk by chunk. (N, D), (V, D) -> (N,)"""
    buffer = hidden_ND.new_empty(min(CHUNK, len(hidden_ND)), len(head_VD))
    parts = (_exponentials(chunk, head_VD, buffer) for chunk in hidden_ND.split(CHUNK))
    return torch.cat([(sums.log() + top).squeeze(1) for _, sums, top in parts])


@torch.no_grad()
def targets_of(hidden_ND: Tensor, head_VD: Tensor) -> Targets:
    """The parent's targets from its hidden states after the final norm."""
    buffer = hidden_ND.new_empty(min(CHUNK, len(hidden_ND)), len(head_VD))
    moments, sums_of = [], []
    for chunk in hidden_ND.split(CHUNK):
        weights, sums, top = _exponentials(chunk, head_VD, buffer)
        moments.append((weights @ head_VD).div_(sums))
        sums_of.append((sums.log() + top).squeeze(1))
    return Targets(hidden=hidden_ND, moment=torch.cat(moments), lse=torch.cat(sums_of))


@torch.no_grad()
def kl_per_token(hidden_ND: Tensor, targets: Targets, head_VD: Tensor) -> tuple[Tensor, Tensor]:
    """KL(parent || child) of every token, and the rise of logsumexp that the LM loss needs too. Both (N,), float64.

    The parent's own hidden states give exactly 0.
    """
    rise = logsumexp(hidden_ND, head_VD).double() - targets.lse.double()
    shift = ((targets.hidden - hidden_ND).double() * targets.moment.double()).sum(1)
    return shift + rise, rise


class _KL(torch.autograd.Function):
    """Mean KL over tokens; the gradient is made in the forward pass, one chunk of logits alive at a time."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, parent_ND: Tensor, moment_ND: Tensor, lse_N: Tensor, head: Tensor) -> Any:
        gradients, total = [], hidden_ND.new_zeros(())
        buffer = hidden_ND.new_empty(min(CHUNK, len(hidden_ND)), len(head))
        parts = zip(*(tensor.split(CHUNK) for tensor in (hidden_ND, parent_ND, moment_ND, lse_N)), strict=True)
        for hidden, parent, moment, lse in parts:
            weights, sums, top = _exponentials(hidden, head, buffer)
            total += ((parent - hidden) * moment).sum() + (sums.log() + top).sum() - lse.sum()
            gradients.append((weights @ head).div_(sums).sub_(moment))
        ctx.save_for_backward(torch.cat(gradients).div_(len(hidden_ND)))
        return total / len(hidden_ND)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0], None, None, None, None


def kl_loss(hidden_ND: Tensor, targets: Targets, head_VD: Tensor) -> Tensor:
    """Differentiable mean KL(parent || child) in nats per token; the head is frozen."""
    loss: Tensor = _KL.apply(hidden_ND, targets.hidden, targets.moment, targets.lse, head_VD)
    return loss
