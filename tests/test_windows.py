"""Attention over a window and sink tokens: masks, caches, costs, limits, the kind and its labels."""

from typing import Any

import pytest
import torch

from blocks.export_code.modeling_decilm import CACHE
from blocks.export_code.windows_decilm import Padding, Window, windowed_attention
from tests.test_modeling import FAMILIES, attention, ffn, mixed_blocks, tiny_child, tiny_parent, token_ids


def windowed(kv_heads: int, size: int, sinks: int = 2) -> dict[str, Any]:
    return attention(kv_heads) | {"window_length": size, "num_sink_tokens": sinks}


def windows(size: int = 4) -> list[dict[str, Any]]:
    """Windows of two lengths, in the first layer and the last, beside whole, linear and absent attentions."""
    blocks = mixed_blocks()
    for layer, heads, window in ((0, 2, size), (3, 1, size + 1), (5, 2, size)):
        blocks[layer]["attention"] = windowed(heads, window)
    return blocks


def seen(query: int, key: int, first: int, size: int, sinks: int) -> bool:
    """The definition."""
    return first <= key <= query and (query - key < size or key < first + sinks)


@pytest.mark.parametrize(("size", "sinks"), [(1, 0), (1, 2), (4, 0), (4, 2), (7, 4), (300, 4)])
@pytest.mark.parametrize("steps", [[20], [5, 1, 1, 1, 7, 1, 1, 3], [1] * 12, [400, 1, 130], [3, 600]])
def test_cached_blocks_give_what_one_dense_mask_gives(size: int, sinks: int, steps: list[int]) -> None:
    from blocks.export_code.windows_decilm import WindowCacheLayer

    total, firsts = sum(steps), (0, 3, sum(steps) // 2)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(3, 2, total, 4, generator=generator) for _ in range(3))
    mask = torch.tensor(
        [[[seen(q, k, f, size, sinks) or q == k for k in range(total)] for q in range(total)] for f in firsts]
    )
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None])
    for padded in (True, False):
        batch = slice(None) if padded else slice(0, 1)
        layer, window, done = WindowCacheLayer(Window(size, sinks), size), Window(size, sinks), 0
        for step in steps:
            part = slice(done, done + step)
            valid = torch.arange(done + step) >= torch.tensor(firsts)[:, None]
            padding = Padding(first=torch.tensor(firsts)[:, None], valid=valid) if padded else None
            layer.padding = padding
            view = window.view(step, done, padding, torch.device("cpu"))
            keys, values = layer.update(key[batch, :, part], value[batch, :, part])
            out, _ = windowed_attention(torch.nn.Identity(), query[batch, :, part], keys, values, view)
            done += step
            found, wanted = out.transpose(1, 2), expected[batch, :, part]
            for row, first in enumerate(firsts[batch]):
                text = max(0, first - part.start)
                torch.testing.assert_close(found[row, :, text:], wanted[row, :, text:], rtol=1e-5, atol=1e-5)
            assert layer.keys.shape[2] <= size - 1 + sinks and layer.get_seq_length() == done


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_padded_row_generates_what_it_generates_alone_with_and_without_a_cache(family: str) -> None:
    child: Any = tiny_child(tiny_parent(family), windows())
    ids = token_ids(2, 12)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    settings: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": 64}
    cached, whole = (child.generate(ids, attention_mask=mask, use_cache=use, **settings) for use in (True, False))
    assert cached.shape == (2, 24) and torch.equal(cached, whole)
    alone = child.generate(ids[1:, 5:], **settings)
    assert torch.equal(alone[0], cached[1, 5:])


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_steps_of_any_length_give_the_logits_of_the_whole_forward(family: str) -> None:
    child, ids = tiny_child(tiny_parent(family), windows()), token_ids(2, 30)
    whole, cache, found = child(ids).logits, None, []
    for part in ids.split([9, 1, 1, 6, 1, 12], dim=1):
        out = child(part, use_cache=True, **({} if cache is None else {CACHE: cache}))
        cache = getattr(out, CACHE)
        found.append(out.logits)
    torch.testing.assert_close(torch.cat(found, 1), whole, rtol=1e-4, atol=1e-4)
    assert cache is not None and [cache.layers[layer].keys.shape[2] for layer in (0, 3, 5)] == [5, 6, 5]
    child.set_attn_implementation("eager")
    torch.testing.assert_close(child(ids).logits, whole, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_window_as_long_as_the_text_changes_nothing_and_a_shorter_one_does() -> None:
    parent, ids = tiny_parent("llama"), token_ids(1, 20)
    logits = []
    for size in (None, 20, 18, 8):
        blocks = [{"attention": attention(2) if size is None else windowed(2, size), "ffn": ffn(48)} for _ in range(6)]
        child = tiny_child(parent, blocks)
        child.load_state_dict(parent.state_dict())
        logits.append(child(ids).logits)
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])  # 18 and 2 sinks
    assert not torch.allclose(logits[0], logits[3], atol=1e-3)
