"""The moment form of the KL against the plain softmax, its gradient against autograd, and zero at the parent."""

import torch
from torch.nn import functional as F

from blocks.divergence import CHUNK, SLICE, Head, kl_loss, kl_of_heads, kl_per_token, logsumexp, targets_of

N, D, V = CHUNK + 37, 16, SLICE + 101  # more than one chunk, more than one slice


def states(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    head = torch.randn(V, D, generator=generator)
    parent = torch.randn(N, D, generator=generator)
    return head, parent, parent + 0.3 * torch.randn(N, D, generator=generator)


def plain_kl(head: torch.Tensor, parent: torch.Tensor, child: torch.Tensor) -> torch.Tensor:
    p, q = F.log_softmax(parent @ head.T, -1), F.log_softmax(child @ head.T, -1)
    return (p.exp() * (p - q)).sum(-1)


def test_kl_equals_the_plain_softmax() -> None:
    head, parent, child = states(0)
    kl, _ = kl_per_token(child, targets_of(parent, Head(head)), Head(head))
    wanted = plain_kl(head.double(), parent.double(), child.double())
    assert wanted.mean() > 0.1
    torch.testing.assert_close(kl, wanted, rtol=1e-4, atol=2e-5)  # float32 logits of size ~10


def test_the_parent_scores_exactly_zero() -> None:
    head, parent, _ = states(1)
    kl, rise = kl_per_token(parent.clone(), targets_of(parent, Head(head)), Head(head))
    assert kl.abs().max().item() == 0.0
    assert rise.abs().max().item() == 0.0


def test_lm_loss_rise_follows_from_the_same_parts() -> None:
    head, parent, child = states(2)
    labels = torch.arange(N) % V
    _, rise = kl_per_token(child, targets_of(parent, Head(head)), Head(head))
    delta = rise + ((parent - child) * head[labels]).sum(-1).double()
    wanted = F.cross_entropy(child @ head.T, labels, reduction="none") - F.cross_entropy(
        parent @ head.T, labels, reduction="none"
    )
    torch.testing.assert_close(delta.float(), wanted, rtol=1e-3, atol=1e-4)


def test_gradient_equals_autograd_through_the_plain_softmax() -> None:
    head, parent, child = states(3)
    ours, theirs = child.clone().requires_grad_(), child.clone().requires_grad_()
    loss = 3 * kl_loss(ours, targets_of(parent, Head(head)), Head(head))
    loss.backward()
    (3 * plain_kl(head, parent, theirs).mean()).backward()
    assert ours.grad is not None and theirs.grad is not None
    torch.testing.assert_close(loss, 3 * plain_kl(head, parent, child).mean(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-6)


def test_logsumexp_survives_large_logits() -> None:
    hidden, head = torch.full((3, 1), 200.0), torch.tensor([[1.0], [0.5]])
    torch.testing.assert_close(logsumexp(hidden, Head(head)), torch.full((3,), 200.0))


def test_kl_of_two_heads_and_its_gradients_equal_the_plain_softmax() -> None:
    parents_head, parent, child = states(4)
    own_head = parents_head + 0.1 * torch.randn(V, D, generator=torch.Generator().manual_seed(5))
    targets = targets_of(parent, Head(parents_head))
    ours, theirs = [[one.clone().requires_grad_() for one in (child, own_head)] for _ in range(2)]
    found = kl_of_heads(ours[0], ours[1], targets, parents_head)
    p, q = F.log_softmax(parent @ parents_head.T, -1), F.log_softmax(theirs[0] @ theirs[1].T, -1)
    wanted = (p.exp() * (p - q)).sum(-1)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
    found.mean().backward()
    wanted.mean().backward()
    for one, other in zip(ours, theirs, strict=True):
        assert one.grad is not None and other.grad is not None
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-6)
