"""Packed linear layers: the same function, and a row's bits do not depend on what is computed beside it."""

import torch
from torch import nn
from torch.nn import functional as F

from blocks.packed import PackedLinear, pack_linears


def test_packed_linears_are_the_same_function() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(48, 80), nn.Sequential(nn.Linear(80, 33, bias=False)))
    x = torch.randn(3, 7, 48)
    with torch.no_grad():
        wanted = plain(x)
        pack_linears(plain)
        assert isinstance(plain[0], PackedLinear)
        torch.testing.assert_close(plain(x), wanted, rtol=1e-5, atol=1e-5)


def test_a_row_does_not_depend_on_its_batch() -> None:
    """A block's score is exactly 0 only if the recorded states and the scored ones repeat each other's bits."""
    torch.manual_seed(1)
    linear = nn.Linear(576, 192)
    packed = PackedLinear(linear)
    x = torch.randn(2048, 576)
    whole = packed(x)
    for rows in (1, 128, 1024):
        assert torch.equal(packed(x[:rows]), whole[:rows])
    torch.testing.assert_close(whole, F.linear(x, linear.weight, linear.bias).detach(), rtol=1e-4, atol=1e-5)
