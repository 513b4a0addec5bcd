"""KL divergence and LM loss from hidden states, exact over the whole vocabulary, with one vector per token.

With parent probabilities p = softmax(W h_p) and a child that shares the parent's head W, child hidden state h_c:

    KL(p || q) = sum_v p_v (z_p,v - z_c,v) + lse(z_c) - lse(z_p)
               = (h_p - h_c) . m + lse(W h_c) - lse(W h_p),    m = W^T p

so the parent's whole distribution enters as its moment m: D numbers a token instead of V, computed once for all
variants and steps. Of the child only logsumexp is needed; its gradient in h_c is W^T q - m. Both are summed over slices
of the vocabulary, one after the other (online softmax: Milakov and Gimelshein, arXiv 1805.02867), so that a slice of
logits stays in the cache.

Logits with a soft cap (z = cap tanh(W h / cap), Gemma 2) are not linear in h: there the parent's logits are computed
again beside the child's.

N = tokens, D = hidden_size, V = vocab_size.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from blocks.export_code.families_decilm import Family
from blocks.images import as_words

CHUNK = 1024  # tokens
SLICE = 4096  # vocabulary entries: CHUNK x SLICE logits are 16 MB


class Head:
    """A frozen head: its weight (V, D) in float32. cap: of its logits."""

    def __init__(self, weight_VD: Tensor, cap: float | None = None) -> None:
        self.weight, self.cap = weight_VD.detach().float(), cap

    def label_shift(self, parent_ND: Tensor, hidden_ND: Tensor, labels: Tensor) -> Tensor:
        """The parent's logit of every token's label less the child's, float64. (..., D), (..., D), (...) -> (...)"""
        weight = self.weight[as_words(labels, len(self.weight))].double()
        if self.cap is None:
            return ((parent_ND - hidden_ND).double() * weight).sum(-1)
        parent, child = ((states.double() * weight).sum(-1) for states in (parent_ND, hidden_ND))
        return _capped(parent, self.cap) - _capped(child, self.cap)


def head_of(weight_VD: Tensor, config: Any, family: Family) -> Head:
    """A head with what its family does to the logits. config: the parent's or the child's."""
    return Head(scaled_head(weight_VD, config, family), family.cap(config))


def scaled_head(weight_VD: Tensor, config: Any, family: Family) -> Tensor:
    """A head's weight, divided as its family divides the logits."""
    weight = weight_VD.float()
    return weight if family.logits_divisor is None else weight / getattr(config, family.logits_divisor)


def _capped(logits: Tensor, cap: float | None) -> Tensor:
    return logits if cap is None else torch.tanh(logits / cap) * cap


@dataclass(frozen=True, kw_only=True)
class Targets:
    """What the divergence needs of the parent: hidden (N, D) after the final norm, moment (N, D), lse (N,)."""

    hidden: Tensor
    moment: Tensor
    lse: Tensor

    def __getitem__(self, rows: Any) -> "Targets":
        return Targets(hidden=self.hidden[rows], moment=self.moment[rows], lse=self.lse[rows])


def _sweep(hidden_ND: Tensor, head: Head, want_moment: bool) -> tuple[Tensor, Tensor | None]:
    """logsumexp (N,) over the vocabulary and, if wanted, head.T @ softmax (N, D).

    Logits of parent and child are both computed here, in the same steps: equal states give a divergence of exactly 0.
    """
    parts = [_sweep_chunk(chunk, head, want_moment) for chunk in hidden_ND.split(CHUNK)]
    moment = torch.cat([moment for _, moment in parts]) if want_moment else None
    return torch.cat([lse for lse, _ in parts]), moment


def _sweep_chunk(hidden_ND: Tensor, head: Head, want_moment: bool) -> tuple[Tensor, Tensor]:
    top = hidden_ND.new_full((len(hidden_ND), 1), -torch.inf)
    total = torch.zeros_like(top)
    moment = torch.zeros_like(hidden_ND if want_moment else top)
    for weight in head.weight.split(SLICE):
        logits = _capped(F.linear(hidden_ND, weight), head.cap)
        higher = torch.maximum(top, logits.amax(1, keepdim=True))
        weights, kept = logits.sub_(higher).exp_(), (top - higher).exp_()
        total = total.mul_(kept).add_(weights.sum(1, keepdim=True))
        if want_moment:
            moment.mul_(kept).addmm_(weights, weight)
        top = higher
    return (total.log() + top).squeeze(1), moment.div_(total)


@torch.no_grad()
def logsumexp(hidden_ND: Tensor, head: Head) -> Tensor:
    """logsumexp over the vocabulary of the head's logits. (N, D) -> (N,)"""
    return _sweep(hidden_ND, head, want_moment=False)[0]


@torch.no_grad()
def targets_of(hidden_ND: Tensor, head: Head) -> Targets:
    """The parent's targets from its hidden states after the final norm."""
    lse, moment = _sweep(hidden_ND, head, want_moment=True)
    assert moment is not None
    return Targets(hidden=hidden_ND, moment=moment, lse=lse)


@torch.no_grad()
def kl_per_token(hidden_ND: Tensor, targets: Targets, head: Head) -> tuple[Tensor, Tensor]:
    """KL(parent || child) of every token, and the rise of logsumexp that the LM loss needs too. Both (N,), float64.

    The parent's own hidden states give exactly 0.
    """
    rise = logsumexp(hidden_ND, head).double() - targets.lse.double()
    if head.cap is not None:
        found, _ = _shift_and_lse(hidden_ND, head.weight, targets.hidden, head.weight, targets.lse, head.cap)
        return found.double() + rise, rise
    shift = ((targets.hidden - hidden_ND).double() * targets.moment.double()).sum(1)
    return shift + rise, rise


class _KL(torch.autograd.Function):
    """Mean KL over tokens; the gradient is made in the forward pass, one slice of logits alive at a time."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, targets: Targets, head: Head, weights_N: Tensor | None) -> Any:
        lse, moment = _sweep(hidden_ND, head, want_moment=True)
        assert moment is not None
        shift, rise = (targets.hidden - hidden_ND) * targets.moment, lse - targets.lse
        moment.sub_(targets.moment).div_(len(hidden_ND))
        if weights_N is not None:
            shift, rise = shift * weights_N[:, None], rise * weights_N
            moment.mul_(weights_N[:, None])
        ctx.save_for_backward(moment)
        return (shift.sum() + rise.sum()) / len(hidden_ND)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0], None, None, None


def kl_loss(hidden_ND: Tensor, targets: Targets, head: Head, weights_N: Tensor | None = None) -> Tensor:
    """Differentiable mean of (weight x) KL(parent || child) in nats per token; the head is frozen."""
    if head.cap is not None:
        kl = kl_of_heads(hidden_ND, head.weight, targets, head.weight, head.cap)
        return (kl if weights_N is None else kl * weights_N).mean()
    loss: Tensor = _KL.apply(hidden_ND, targets, head, weights_N)
    return loss


@torch.no_grad()
def _shift_and_lse(
    hidden_ND: Tensor, head_VD: Tensor, parent_ND: Tensor, parent_VD: Tensor, lse_N: Tensor, cap: float | None
) -> tuple[Tensor, Tensor]:
    """sum_v p_v (z_p,v - z_c,v), and logsumexp(z_c), (N,) each, from the logits of both heads."""
    lse = hidden_ND.new_full((len(hidden_ND),), -torch.inf)
    shift = torch.zeros_like(lse)
    for rows in torch.arange(len(hidden_ND)).split(CHUNK):
        for own, parents in zip(head_VD.split(SLICE), parent_VD.split(SLICE), strict=True):
            child, parent = _capped(hidden_ND[rows] @ own.T, cap), _capped(parent_ND[rows] @ parents.T, cap)
            shift[rows] += ((parent - lse_N[rows, None]).exp() * (parent - child)).sum(1)
            lse[rows] = torch.logaddexp(lse[rows], child.logsumexp(1))
    return shift, lse


class _KLOfHeads(torch.autograd.Function):
    """KL of every token where parent and child have a head each; both passes go over slices of the vocabulary."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        head_VD: Tensor,
        parent_ND: Tensor,
        parent_VD: Tensor,
        lse_N: Tensor,
        cap: float | None,
    ) -> Any:
        shift, lse = _shift_and_lse(hidden_ND, head_VD, parent_ND, parent_VD, lse_N, cap)
        ctx.save_for_backward(hidden_ND, head_VD, parent_ND, parent_VD, lse_N, lse)
        ctx.cap = cap
        return shift + lse - lse_N

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        hidden_ND, head_VD, parent_ND, parent_VD, lse_N, lse = ctx.saved_tensors
        of_hidden, of_head = torch.zeros_like(hidden_ND), torch.zeros_like(head_VD)
        for rows in torch.arange(len(hidden_ND)).split(CHUNK):
            parts = zip(head_VD.split(SLICE), parent_VD.split(SLICE), of_head.split(SLICE), strict=True)
            for own, parents, of_own in parts:
                child = _capped(hidden_ND[rows] @ own.T, ctx.cap)
                rise = (child - lse[rows, None]).exp()
                rise -= (_capped(parent_ND[rows] @ parents.T, ctx.cap) - lse_N[rows, None]).exp()
                rise *= gradients[0][rows, None]
                if ctx.cap is not None:
                    rise *= 1 - (child / ctx.cap).square()  # the slope of the cap
                of_hidden[rows] += rise @ own
                if ctx.needs_input_grad[1]:
                    of_own.addmm_(rise.T, hidden_ND[rows])
        return of_hidden, of_head, None, None, None, None


def kl_of_heads(
    hidden_ND: Tensor, head_VD: Tensor, targets: Targets, parent_VD: Tensor, cap: float | None = None
) -> Tensor:
    """Differentiable KL(parent || child) of every token (N,), in hidden states and head, where the child's head is
    trained and the parent's is another one. Twice the work of `kl_loss`: the moment says nothing about another head.
    """
    found: Tensor = _KLOfHeads.apply(hidden_ND, head_VD, targets.hidden, parent_VD, targets.lse, cap)
    return found
