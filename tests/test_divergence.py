"""The moment form of the KL against the plain softmax, its gradient against autograd, and zero at the parent."""

import pytest
import torch
from torch.nn import functional as F

from blocks.divergence import CHUNK, SLICE, Head, kl_loss, kl_of_heads, kl_per_token, logsumexp, targets_of

N, D, V = CHUNK + 37, 16, SLICE + 101  # more than one chunk, more than one slice


def states(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    head = torch.randn(V, D, generator=generator)
    parent = torch.randn(N, D, generator=generator)
    return head, parent, parent + 0.3 * torch.randn(N, D, generator=generator)


capped = pytest.mark.parametrize("cap", [None, 3.0])  # soft caps of the logits: Gemma 2


def logits(states: torch.Tensor, head: torch.Tensor, cap: float | None) -> torch.Tensor:
    products = states @ head.T
    return products if cap is None else torch.tanh(products / cap) * cap


def plain_kl(head: torch.Tensor, parent: torch.Tensor, child: torch.Tensor, cap: float | None) -> torch.Tensor:
    p, q = (F.log_softmax(logits(one, head, cap), -1) for one in (parent, child))
    return (p.exp() * (p - q)).sum(-1)


@capped
def test_kl_equals_the_plain_softmax(cap: float | None) -> None:
    head, parent, child = states(0)
    kl, _ = kl_per_token(child, targets_of(parent, Head(head, cap)), Head(head, cap))
    wanted = plain_kl(head.double(), parent.double(), child.double(), cap)
    assert wanted.mean() > 0.1
    torch.testing.assert_close(kl, wanted, rtol=1e-4, atol=2e-5)  # float32 logits of size ~10


@capped
def test_the_parent_scores_exactly_zero(cap: float | None) -> None:
    head, parent, _ = states(1)
    kl, rise = kl_per_token(parent.clone(), targets_of(parent, Head(head, cap)), Head(head, cap))
    assert kl.abs().max().item() == 0.0
    assert rise.abs().max().item() == 0.0


@capped
def test_lm_loss_rise_follows_from_the_same_parts(cap: float | None) -> None:
    weight, parent, child = states(2)
    labels, head = torch.arange(N) % V, Head(weight, cap)
    _, rise = kl_per_token(child, targets_of(parent, head), head)
    delta = rise + head.label_shift(parent, child, labels)
    losses = [F.cross_entropy(logits(one, weight, cap), labels, reduction="none") for one in (child, parent)]
    wanted = losses[0] - losses[1]
    torch.testing.assert_close(delta.float(), wanted, rtol=1e-3, atol=1e-4)


@capped
def test_gradient_equals_autograd_through_the_plain_softmax(cap: float | None) -> None:
    head, parent, child = states(3)
    ours, theirs = child.clone().requires_grad_(), child.clone().requires_grad_()
    loss = 3 * kl_loss(ours, targets_of(parent, Head(head, cap)), Head(head, cap))
    loss.backward()
    (3 * plain_kl(head, parent, theirs, cap).mean()).backward()
    assert ours.grad is not None and theirs.grad is not None
    torch.testing.assert_close(loss, 3 * plain_kl(head, parent, child, cap).mean(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-6)


def test_logsumexp_survives_large_logits() -> None:
    hidden, head = torch.full((3, 1), 200.0), torch.tensor([[1.0], [0.5]])
    torch.testing.assert_close(logsumexp(hidden, Head(head)), torch.full((3,), 200.0))


@capped
def test_kl_of_two_heads_and_its_gradients_equal_the_plain_softmax(cap: float | None) -> None:
    parents_head, parent, child = states(4)
    own_head = parents_head + 0.1 * torch.randn(V, D, generator=torch.Generator().manual_seed(5))
    targets = targets_of(parent, Head(parents_head, cap))
    ours, theirs = [[one.clone().requires_grad_() for one in (child, own_head)] for _ in range(2)]
    found = kl_of_heads(ours[0], ours[1], targets, parents_head, cap)
    pairs = ((parent, parents_head), (theirs[0], theirs[1]))
    p, q = (F.log_softmax(logits(hidden, head, cap), -1) for hidden, head in pairs)
    wanted = (p.exp() * (p - q)).sum(-1)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
    found.mean().backward()
    wanted.mean().backward()
    for one, other in zip(ours, theirs, strict=True):
        assert one.grad is not None and other.grad is not None
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-6)
