"""Ridge regression and channel elimination against direct computation."""

import itertools

import torch

from blocks.attention.kv_heads import mean_pool_heads
from blocks.fit import contribution_order, elimination_order, ridge_solve


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_ridge_is_the_stationary_point() -> None:
    x, y, prior = random(50, 6), random(50, 4, seed=1), random(6, 4, seed=2)
    found = ridge_solve(x.T @ x, x.T @ y, prior, 0.1).double().requires_grad_()
    lam = 0.1 * (x.T @ x).diagonal().mean().double()
    loss = ((x.double() @ found - y.double()) ** 2).sum() + lam * ((found - prior.double()) ** 2).sum()
    (gradient,) = torch.autograd.grad(loss, found)
    assert gradient.abs().max() < 1e-3 * loss.item()


def test_ridge_keeps_the_prior_where_nothing_was_seen() -> None:
    x = random(40, 5)
    x[:, 3] = 0
    prior = random(5, 2, seed=3)
    found = ridge_solve(x.T @ x, x.T @ random(40, 2, seed=4), prior, 1e-3)
    torch.testing.assert_close(found[3], prior[3], rtol=1e-4, atol=1e-5)


def refit_loss(x: torch.Tensor, down: torch.Tensor, channels: list[int]) -> float:
    kept = x[:, channels]
    y = x @ down.T
    solution = torch.linalg.lstsq(kept, y).solution
    return float(((kept @ solution - y) ** 2).sum())


def test_first_eliminated_channel_is_the_best_single_removal() -> None:
    mixing = random(8, 8, seed=5)
    x, down = (random(300, 8) @ mixing).double(), random(4, 8, seed=6).double()
    order = elimination_order(x.T @ x, down, ridge=1e-9, chunk=1).tolist()
    assert sorted(order) == list(range(8))
    losses = [refit_loss(x, down, [c for c in range(8) if c != out]) for out in range(8)]
    assert order[-1] == min(range(8), key=losses.__getitem__)


def test_elimination_beats_contribution_when_channels_repeat() -> None:
    base = random(400, 4)
    x = torch.cat([base, base[:, :2] * 1.01, random(400, 2, seed=7) * 0.8], 1).double()  # 4 and 5 repeat 0 and 1
    down = random(6, 8, seed=8).double()
    scale = x.abs().mean(0) * down.norm(dim=0)
    by_contribution = contribution_order(scale)[:6].tolist()
    by_elimination = elimination_order(x.T @ x, down, ridge=1e-9, chunk=1)[:6].tolist()
    best = min(refit_loss(x, down, list(c)) for c in itertools.combinations(range(8), 6))
    assert refit_loss(x, down, by_elimination) <= best * 1.01 + 1e-9
    assert refit_loss(x, down, by_contribution) > refit_loss(x, down, by_elimination) + 1.0


def test_mean_pooling_against_a_loop() -> None:
    weight = random(4 * 3, 5)  # 4 heads of 3 channels
    pooled = mean_pool_heads(weight, heads=4, kept=2)
    for group in range(2):
        for channel in range(3):
            rows = [weight[(2 * group + member) * 3 + channel] for member in range(2)]
            torch.testing.assert_close(pooled[group * 3 + channel], sum(rows) / 2)
