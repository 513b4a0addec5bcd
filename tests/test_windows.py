"""Attention over a window and sink tokens: masks, caches, costs, limits, the kind and its labels."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import StaticCache

from blocks.compute import HOST
from blocks.engine_limits import EngineLimit, refused_label, runnable
from blocks.errors import UnknownVariant
from blocks.export_code.modeling_decilm import CACHE
from blocks.export_code.windows_decilm import Padding, Window, WindowCacheLayer, windowed_attention
from blocks.families import tokens_seen
from blocks.kinds import kind_of, parse_label
from blocks.parent import Parent
from blocks.records import LayerChoice
from blocks.resources import resources
from profiles.hardware import load_target
from profiles.load import load_profile
from profiles.schema import Budget, Hardware, Scenario, SearchSpace
from tasks.export.formats import refuse
from tasks.inputs.space import misfits
from tasks.measure.roofline import modelled_costs, setting_of
from tasks.search.totals import make_problem, totals_of
from tasks.search.view import library_of
from tests.test_choose import score
from tests.test_modeling import FAMILIES, attention, ffn, mixed_blocks, tiny_child, tiny_parent, token_ids
from tests.tiny import tiny_parent as tiny_folder


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
            for row in range(len(found)):
                text = max(0, firsts[row] - done + step)
                torch.testing.assert_close(found[row, :, text:], wanted[row, :, text:], rtol=1e-5, atol=1e-5)
            held: Any = layer.keys
            assert held.shape[2] <= size - 1 + sinks and layer.get_seq_length() == done


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


@torch.no_grad()
def test_what_a_window_cannot_do_is_refused_in_a_sentence() -> None:
    child, ids = tiny_child(tiny_parent("llama"), windows()), token_ids(1, 12)
    with pytest.raises(ValueError, match="needs a DynamicCache, not a StaticCache"):
        child(ids, use_cache=True, **{CACHE: StaticCache(config=child.config, max_cache_len=32)})
    for cached in (True, False):
        with pytest.raises(ValueError, match="one text in a row"):
            child(ids, position_ids=torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5]]), use_cache=cached)
    with pytest.raises(ValueError, match="shape \\(batch, tokens\\)"):
        child(ids, attention_mask=torch.ones(1, 1, 12, 12, dtype=torch.bool))
    with pytest.raises(ValueError, match="cannot take tokens back"):
        getattr(child(ids, use_cache=True), CACHE).crop(-1)
    for form in ("gguf", "nemotron-nas"):
        with pytest.raises(EngineLimit, match=r"window<N>"):
            refuse(tiny_child(tiny_parent("llama"), [{"attention": windowed(2, 4), "ffn": ffn(256)}] * 6).config, form)


def test_labels_and_engines(tmp_path: Path) -> None:
    config = Parent(tiny_folder(tmp_path, "llama", max_position_embeddings=64), HOST).config
    assert parse_label("attention", "window16kv2", config) == parse_label("attention", "window16", config)
    fewer = parse_label("attention", "window16kv1", config)
    assert (fewer.label, fewer.size) == ("window16kv1", 16)
    assert kind_of(fewer).block_entry(fewer, config)["num_key_value_heads"] == 1
    for label, told in (("window60", "1 to 59"), ("window0", "1 to 59"), ("window8kv3", "can have kv1")):
        with pytest.raises(UnknownVariant, match=told):
            parse_label("attention", label, config)
    assert runnable("torch", config, 0, "window16", "parent") is None
    for engine in ("llama.cpp", "vllm", "tensorrt-llm", "sglang"):
        assert "windows with sink tokens" in str(runnable(engine, config, 0, "window16", "parent"))
        assert "windows with sink tokens" in str(refused_label(engine, 1, ["attention=window16kv1"], 0, False))


def test_a_window_is_not_scored_where_it_hides_little() -> None:
    profile = load_profile("tiny", ["search_space.attention=[window8]", "scoring.tokens_per_sequence=15"])

    class Reader:
        config = tiny_parent("llama").config
        depth = 6

    found = misfits(profile, Reader())[0]  # type: ignore[arg-type]
    assert "search_space.attention: window8 would be scored on 15 tokens" in found and "at most 7" in found
    longer = load_profile("tiny", ["search_space.attention=[window8]", "scoring.tokens_per_sequence=16"])
    assert not any("window8" in sentence for sentence in misfits(longer, Reader()))  # type: ignore[arg-type]


SCENARIO = Scenario(name="long", batch_sizes=(1, 3), prompt_tokens=40, generated_tokens=10)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
@torch.no_grad()
def test_memory_counts_the_tokens_that_a_real_cache_holds(family: str, tmp_path: Path) -> None:
    """The law by hand, for parents that slide in all layers, in some and in none; the solver's sums are the same."""
    reader = Parent(tiny_folder(tmp_path, family, max_position_embeddings=64, sliding_window=6), HOST)
    space = SearchSpace(attention=("kv1", "window3", "window3kv1"), ffn=())
    hardware = Hardware(name="h100", engine="roofline", precision="float32")
    costs = modelled_costs(reader, space, [SCENARIO], setting_of(hardware, load_target("h100")))
    problem = make_problem([], costs, Budget(memory_fraction=0.99), [SCENARIO])
    slides = {"llama": (False,) * 3, "mistral": (True,) * 3, "gemma3_text": (True, False, True)}[family]
    assert [kind == "sliding_attention" for kind in reader.attention_types] == list(slides)
    layers = [LayerChoice(attention=label) for label in ("window3", "kv1", "parent")]
    weights = sum(
        resources(reader, parse_label("attention", one.attention, reader.config), 1, 4).weight_bytes for one in layers
    )
    weights += 3 * resources(reader, parse_label("ffn", "parent", reader.config), 1, 4).weight_bytes
    weights += costs.non_block[0].weight_bytes
    channels = 8 if family in ("llama", "mistral") else 16
    for batch in (1, 3):
        kept = [3 + 4, 6 if slides[1] else 50, 6 if slides[2] else 50]
        by_hand = sum(batch * tokens * 2 * heads * channels * 4 for tokens, heads in zip(kept, (2, 1, 2), strict=True))
        (total,) = totals_of(problem, layers, (batch,))
        assert total.memory_bytes == weights + by_hand
    model = reader.model(layers)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.1)
    cache = getattr(model(token_ids(1, 50), use_cache=True), CACHE)
    held = [layer.keys.shape[2] for layer in cache.layers]
    # a layer that slides, ours or the parent's, drops the token that the next one no longer sees
    assert held == [3 + 4 - 1, 5 if slides[1] else 50, 5 if slides[2] else 50]


def test_the_solver_and_its_check_sum_the_same_memory(tmp_path: Path) -> None:
    reader = Parent(tiny_folder(tmp_path, "gemma3_text", max_position_embeddings=64, sliding_window=6), HOST)
    space = SearchSpace(attention=("window3",), ffn=())
    at = setting_of(Hardware(name="h100", engine="roofline", precision="float32"), load_target("h100"))
    costs = modelled_costs(reader, space, [SCENARIO], at)
    scores = [score(layer, "attention", "window3", np.random.default_rng(0)) for layer in range(3)]
    problem = make_problem(scores, costs, Budget(memory_fraction=0.99), [SCENARIO])
    library = library_of(problem)
    for labels in (("parent",) * 3, ("window3", "parent", "parent"), ("parent", "window3", "window3")):
        wanted = set(enumerate(labels))
        chosen = [one for one in library.options if one.own and (one.own.layer, one.own.attention) in wanted]
        assert len(chosen) == 3
        for place, batch in enumerate((1, 3)):
            parts = [library.fixed, *(one.costs for one in chosen)]
            summed = sum(float(np.atleast_1d(part["memory_gib"])[place]) for part in parts)
            (total,) = totals_of(problem, [LayerChoice(attention=label) for label in labels], (batch,))
            assert summed * 2**30 == pytest.approx(total.memory_bytes)


def test_work_counts_what_is_seen() -> None:
    config = tiny_parent("gemma3_text").config  # windows of 8 in half of the layers
    assert (tokens_seen(config, 4), tokens_seen(config, 100), tokens_seen(config, 100, 3)) == (4, 54, 3)
    narrow, own = (parse_label("attention", label, config) for label in ("window2", "parent"))
    width = 4 * config.head_dim
    flops = [kind_of(one).flops_per_token(one, config, context) for one in (own, narrow) for context in (100, 0)]
    assert flops[0] - flops[1] == 4 * width * 54 and flops[2] - flops[3] == 4 * width * (2 + 4)
    assert flops[1] == flops[3]
