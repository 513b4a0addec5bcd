"""How float32 products are made on the CPU: exact to float32, a row's bits its own, and as a server makes them where
speeds are measured.
"""

from collections.abc import Iterator

import pytest
import torch
from torch.nn import functional as F

from blocks import runtime
from blocks.runtime import configure_torch, products_as_served


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    yield
    runtime._onednn_keeps_float32.cache_clear()
    configure_torch(1)


def test_a_row_does_not_depend_on_its_batch() -> None:
    """A block's score is exactly 0 only if the recorded states and the scored ones repeat each other's bits.

    Fewer than a dozen rows have bits of their own on processors without AVX-512; a stage computes whole sequences.
    """
    if torch.get_float32_matmul_precision() == "highest":
        pytest.skip("this processor's oneDNN would round to bfloat16")
    torch.manual_seed(1)
    for inner, columns in ((576, 192), (192, 576), (64, 192)):
        x, weight = torch.randn(2048, inner), torch.randn(columns, inner)
        whole = F.linear(x, weight)
        for rows in (16, 23, 128, 1024):
            assert torch.equal(F.linear(x[:rows], weight), whole[:rows])


def test_products_are_float32_and_a_gpu_may_not_round() -> None:
    torch.manual_seed(2)
    x, weight = torch.randn(300, 700), torch.randn(500, 700)
    exact = x.double() @ weight.double().T
    for product in (F.linear(x, weight), x @ weight.T, torch.einsum("ni,oi->no", x, weight)):
        assert (product - exact).norm() < 1e-6 * exact.norm()
    assert torch.backends.cuda.matmul.fp32_precision == "ieee"


def test_where_onednn_would_round_mkl_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor with bfloat16 tiles, played by products that are rounded."""
    plain = F.linear
    monkeypatch.setattr(F, "linear", lambda x, weight: plain(x.bfloat16(), weight.bfloat16()).float())
    runtime._onednn_keeps_float32.cache_clear()
    configure_torch(1)
    assert torch.get_float32_matmul_precision() == "highest"


def test_speeds_are_measured_as_served() -> None:
    before = torch.get_float32_matmul_precision()
    with products_as_served():
        assert torch.get_float32_matmul_precision() == "highest"
    assert torch.get_float32_matmul_precision() == before
