"""Recurrent attention: the chunks against the definition, states in a cache, the start, costs, limits and labels."""

from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, shape_wrapper
from transformers import StaticCache

from blocks.attention.ssd import fitted_gates
from blocks.compute import HOST
from blocks.engine_limits import EngineLimit, refused_label, runnable
from blocks.export_code.modeling_decilm import CACHE
from blocks.export_code.recurrent_decilm import RecurrentAttention, RecurrentCacheLayer
from blocks.export_code.windows_decilm import Padding
from blocks.fit import FitContext
from blocks.kinds import kind_of, parse_label
from blocks.parent import Parent
from blocks.records import LayerChoice
from blocks.resources import resources
from profiles.errors import ProfileError
from profiles.hardware import load_target
from profiles.load import load_profile
from profiles.schema import Budget, Hardware, Scenario, SearchSpace
from tasks.distill.bld import Job, distill, layer_data
from tasks.distill.jobs import jobs_of
from tasks.distill.record import record_layer
from tasks.export.formats import refuse
from tasks.inputs.space import misfits
from tasks.measure.roofline import decode_of, modelled_costs, setting_of, subblock_seconds
from tasks.planning import effort
from tasks.planning.effort import shape_of, variant_work
from tasks.search.totals import make_problem, totals_of
from tasks.search.view import library_of
from tests.chain import SETTINGS, Chain, prepare, recording
from tests.test_choose import score
from tests.test_device_plan import EAGER, counted
from tests.test_modeling import FAMILIES, ffn, mixed_blocks, tiny_child, tiny_parent, token_ids
from tests.test_plan import chain_profile
from tests.test_windows import windows
from tests.tiny import tiny_parent as tiny_folder


def ssd(state: Tensor, query: Tensor, key: Tensor, value: Tensor, rate: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """One token of one head, by the definition: the state fades, then the token is written, then it is read."""
    state = state * torch.exp(-rate * softplus(step)) + softplus(step) * torch.outer(key, value)
    return state, query @ state


def gdn(
    state: Tensor, query: Tensor, key: Tensor, value: Tensor, rate: Tensor, step: Tensor, write: Tensor
) -> tuple[Tensor, Tensor]:
    """One token: the state fades, what it then says at the key gives way to the value in part, then it is read."""
    state = state * torch.exp(-rate * softplus(step))
    state = state + torch.outer(key, value - key @ state) / (1 + torch.exp(-write))
    return state, query @ state


# a row for each kind: what it does with a token and what is left of its gates after the output's
DEFINITIONS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {"ssd": ssd, "gdn": gdn}
each_kind = pytest.mark.parametrize("label", DEFINITIONS)


def softplus(x: Tensor) -> Tensor:
    return torch.log1p(torch.exp(x))


def recurrent(label: str, family: str = "llama") -> dict[str, Any]:
    """The entry of a layer in a child of the tiny parent."""
    config = tiny_parent(family).config
    variant = parse_label("attention", label, config)
    return kind_of(variant).block_entry(variant, config)


def recurrents() -> list[dict[str, Any]]:
    """All kinds, in the first layer and the last too, beside whole, linear and absent attentions."""
    blocks = mixed_blocks()
    for layer, label in zip((0, 3, 5), cycle(DEFINITIONS)):
        blocks[layer]["attention"] = recurrent(label)
    return blocks


def module_of(label: str) -> RecurrentAttention:
    child = tiny_child(tiny_parent("llama"), [{"attention": recurrent(label), "ffn": ffn(48)}] * 6)
    module: Any = child.model.layers[0].self_attn
    module.log_rate.data = torch.tensor([-4.0, -3.0, -1.0, 0.5])
    return module.double()


def by_definition(module: Any, label: str, hidden: Tensor) -> Tensor:
    """One row (T, D) -> (T, D), token by token and head by head."""
    channels, heads = module.head_dim, module.heads
    projected = torch.cat([one(hidden) for one in (module.q_proj, module.k_proj, module.v_proj)], -1)
    state, out = (
        torch.zeros(heads, channels, channels, dtype=hidden.dtype),
        torch.zeros(len(hidden), heads * channels).to(hidden),
    )
    for t in range(len(hidden)):
        mixed = sum(projected[t - back] * module.conv[:, 3 - back] for back in range(4) if t >= back)
        gates = module.gates(hidden[t]).view(-1, heads)
        for head in range(heads):
            q, k, v = (
                part.view(-1, channels)[head * len(part) // (heads * channels)] for part in mixed.split(module.widths)
            )
            q, k = q / (q.square().sum() + 1e-6).sqrt(), k / (k.square().sum() + 1e-6).sqrt()
            step, output, *more = gates[:, head]
            state[head], y = DEFINITIONS[label](state[head], q, k, v, module.log_rate[head].exp(), step, *more)
            y = y + module.skip[head] * v
            y = y / (y.square().mean() + module.eps).sqrt() / (1 + torch.exp(-output))
            out[t, head * channels : (head + 1) * channels] = y
    return module.o_proj(out)


@each_kind
@pytest.mark.parametrize("steps", [[150], [64, 1, 1, 84], [1] * 7, [3, 70]])
@torch.no_grad()
def test_chunks_and_cached_steps_give_what_the_definition_gives(label: str, steps: list[int]) -> None:
    """Also behind padding, whatever stands there."""
    module, total, first = module_of(label), sum(steps), sum(steps) // 3
    hidden = torch.randn(2, total, 32, generator=torch.Generator().manual_seed(0)).double()
    valid = torch.ones(2, total, dtype=torch.bool)
    valid[1, :first] = False
    held, found, done = RecurrentCacheLayer(), [], 0
    for step in steps:
        done += step
        padding = Padding(first=valid[:, :done].int().argmax(1, keepdim=True), valid=valid[:, :done])
        found.append(module(hidden[:, done - step : done], padding=padding, held=held)[0])
    whole = torch.cat(found, 1)
    torch.testing.assert_close(whole[0], by_definition(module, label, hidden[0]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(whole[1, first:], by_definition(module, label, hidden[1, first:]), rtol=1e-5, atol=1e-5)
    assert held.get_seq_length() == total and held.keys is not None and held.keys.shape == (2, 4, 8, 8)


@torch.no_grad()
def test_nothing_of_a_text_is_kept_but_what_is_counted() -> None:
    """A view of the last tokens would keep the memory of all."""
    held: Any = RecurrentCacheLayer()
    module_of("ssd")(torch.randn(2, 300, 32).double(), held=held)
    for tensor in (held.keys, held.values):
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_cached_generation_is_the_whole_forward_and_padding_changes_nothing(family: str) -> None:
    child: Any = tiny_child(tiny_parent(family), recurrents())
    ids = token_ids(2, 90)
    whole, cache, found = child(ids).logits, None, []
    for part in ids.split([70, 1, 1, 6, 1, 11], dim=1):
        out = child(part, use_cache=True, **({} if cache is None else {CACHE: cache}))
        cache = getattr(out, CACHE)
        found.append(out.logits)
    assert (torch.cat(found, 1) - whole).abs().max() < 1e-5 * whole.abs().max()
    ids = token_ids(2, 12)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    settings: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": 64}
    cached, uncached = (child.generate(ids, attention_mask=mask, use_cache=use, **settings) for use in (True, False))
    assert cached.shape == (2, 24) and torch.equal(cached, uncached)
    assert torch.equal(child.generate(ids[1:, 5:], **settings)[0], cached[1, 5:])
    beams = child.generate(ids, attention_mask=mask, num_beams=3, **settings)
    assert torch.equal(beams, child.generate(ids, attention_mask=mask, num_beams=3, use_cache=False, **settings))


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_trained_in_every_family_and_costs_what_was_said(family: str, tmp_path: Path) -> None:
    parent, corpus = prepare(tmp_path, family, train_steps=2)
    reader, asked = Parent(tmp_path / parent.folder, HOST), recording(parent, corpus)
    record = record_layer(0, asked, tmp_path, HOST)
    settings = SETTINGS.model_copy(update={"steps": 12})  # more steps than batches: several passes over the rows
    shared: dict[str, Any] = {
        "recording": asked,
        "record": record,
        "layer": 0,
        "subblock": "attention",
        "settings": settings,
        "seed": 0,
    }
    for label in DEFINITIONS:
        block = distill(Job(variant=label, **shared), tmp_path, HOST)
        assert block.status == "trained" and block.attempts == 1, block.reason
        assert block.nmse_start and block.nmse_closed_form and block.nmse_after
        assert block.nmse_after < block.nmse_closed_form < min(1, block.nmse_start)
        variant, module = parse_label("attention", label, reader.config), reader.model([LayerChoice(attention=label)])
        needs = resources(reader, variant, context_tokens=32, bytes_per_element=4)
        alone = reader.empty_layer(0, LayerChoice.only("attention", label))
        assert needs.parameters * 4 == needs.weight_bytes == sum(p.numel() * 4 for p in alone.parameters())
        for length in (1, 40):
            cache = getattr(module(token_ids(1, length), use_cache=True), CACHE)
            assert needs.kv_bytes_per_token == 0 and needs.state_bytes == bytes_of(cache.layers[0])


def bytes_of(layer: Any) -> int:
    return int(layer.keys.nbytes + layer.values.nbytes)


@torch.no_grad()
def test_a_gate_tells_how_much_of_the_attention_is_not_on_the_first_token(chain: Chain) -> None:
    job = chain.job(1, "attention", "ssd")
    data = layer_data(job, job.recording.shards[0], chain.workspace, HOST)
    hidden, module = data.states["train", "hidden"], data.module
    fit = FitContext(
        config=chain.reader.config,
        layer=1,
        parent_layer=module,
        statistics=data.statistics,
        hidden=hidden,
        context=data.context,
        ridge=1e-4,
    )
    rows, sizes = fitted_gates(fit)
    normed: Any = module.input_layernorm(hidden)  # type: ignore[operator]
    told = torch.sigmoid(torch.cat([normed, torch.ones_like(normed[..., :1])], -1) @ rows.T)
    causal = torch.full((32, 32), -torch.inf).triu(1)[None, None]
    module.follow("eager")
    weights = module.self_attn(hidden_states=normed, **data.context | {"attention_mask": causal})[1]  # type: ignore[misc]
    module.follow(HOST.attention)
    true = 1 - weights[..., 0].mT
    assert told.shape == true.shape == (16, 32, 4)
    error, spread = (told - true).square().mean((0, 1)), true.var((0, 1))
    assert (error < 0.9 * spread).all(), error / spread
    values = module.self_attn.v_proj(normed).unflatten(-1, (-1, 8)).repeat_interleave(2, 2)  # type: ignore[union-attr,operator]
    given = (weights @ values.transpose(1, 2))[..., 1:].square().mean((0, 2, 3))
    expected = (given / true.square().mean((0, 1))).sqrt().repeat_interleave(8)
    torch.testing.assert_close(sizes, expected, rtol=2e-2, atol=1e-3)


def solved(system: Any, right: Any, **_: Any) -> int:
    """FLOPs of triangular systems."""
    return int(np.prod(system) * right[-1])


@each_kind
def test_work_is_what_is_computed(label: str) -> None:
    child = tiny_child(tiny_parent("qwen2"), [{"attention": recurrent(label, "qwen2"), "ffn": ffn(48)}] * 6)
    variant, layer = parse_label("attention", label, child.config), child.model.layers[0]
    kind: Any = kind_of(variant)
    for length in (1, 2, 40, 192):
        with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.linalg_solve_triangular: solved}) as counter:
            layer.attention(torch.randn(1, length, 32))
        own = kind.flops_per_token(variant, child.config, length)
        if length == 1:  # alone a token reads the state once, by `gdn` twice, and makes no chunk
            own += 2 * 32 * 8 * (2 if label == "gdn" else 1) - kind.state_flops(32, 8, 1)
        assert counter.get_total_flops() == length * own


@each_kind
def test_a_plan_knows_the_work_of_training_it(label: str, chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(effort, "ATTEMPTS", 1)
    settings = SETTINGS.model_copy(update={"learning_rate": 1e-5})
    job = chain.job(1, "attention", label, settings)
    layer_data(job, job.recording.shards[0], chain.workspace, EAGER)  # once for all variants
    with counted() as counter:
        counter.flop_registry[torch.ops.aten.linalg_solve_triangular] = shape_wrapper(solved)
        assert distill(job, chain.workspace, EAGER).attempts == 1
    planned = variant_work(
        shape_of(chain_profile(bld=settings), chain.reader), parse_label("attention", label, chain.reader.config)
    )
    # the first state has no gradient, and of the last nothing is asked
    assert counter.get_total_flops() == pytest.approx(planned.product, rel=0.03)


@each_kind
def test_decoding_costs_the_same_after_any_text_and_memory_does_not_grow(label: str, tmp_path: Path) -> None:
    """In a model of a GPU: time, and the sums of the solver and of its check, by hand."""
    reader = Parent(tiny_folder(tmp_path, "gemma3_text", max_position_embeddings=64, sliding_window=6), HOST)
    at = setting_of(Hardware(name="h100", engine="roofline", precision="bfloat16"), load_target("h100"))
    variant = parse_label("attention", label, reader.config)
    short, long = (
        Scenario(name=f"after{tokens}", batch_sizes=(3,), prompt_tokens=tokens, generated_tokens=8)
        for tokens in (8, 48)
    )
    seconds = [subblock_seconds(reader, variant, decode_of(one, 3), at) for one in (short, long)]
    assert seconds[0] == seconds[1]
    costs = modelled_costs(reader, SearchSpace(attention=(label,), ffn=()), [short, long], at)
    state = 4 * 4 * 16 * 16 + 2 * 3 * (4 + 2 * 2) * 16  # float32; q, k and v of three tokens in 16 bits
    assert {cost.state_bytes for cost in costs.costs if cost.variant == label} == {state}
    problem = make_problem(
        [score(0, "attention", label, np.random.default_rng(0))], costs, Budget(memory_fraction=0.99), [short, long]
    )
    layers = [LayerChoice(attention=label), LayerChoice(), LayerChoice()]
    own = next(one for one in library_of(problem).options if one.own and one.own.attention == label)
    weights = resources(reader, variant, 1, 2).weight_bytes
    weights += resources(reader, parse_label("ffn", "parent", reader.config), 1, 2).weight_bytes
    assert [share * 2**30 for share in np.atleast_1d(own.costs["memory_gib"])] == [weights + 3 * state] * 2
    totals = totals_of(problem, layers, (3, 3))
    (parent,) = {
        cost.kv_bytes_per_token for cost in costs.costs if cost.variant == "parent" and cost.subblock == "attention"
    }
    more = totals[1].memory_bytes - totals[0].memory_bytes  # the other layers: one slides, one does not
    assert more == 3 * parent * (56 - 16)


@each_kind
def test_labels_and_engines(label: str) -> None:
    config = tiny_parent("llama").config
    assert parse_label("attention", label, config).label == label
    for engine in ("torch", "vllm-plugin"):
        assert runnable(engine, config, 0, label, "parent") is None
        assert refused_label(engine, 1, [f"attention={label}"], 0, False) is None
    for engine in ("llama.cpp", "vllm", "tensorrt-llm", "sglang"):
        assert "recurrent attention" in str(runnable(engine, config, 0, label, "parent"))
        assert "recurrent attention" in str(refused_label(engine, 1, [f"attention={label}"], 0, False))
    for form, told in (("gguf", "recurrent attention"), ("nemotron-nas", "recurrent attention"), ("native", "whole")):
        with pytest.raises(EngineLimit, match=told):
            refuse(
                tiny_child(tiny_parent("llama"), [{"attention": recurrent(label), "ffn": ffn(256)}] * 6).config, form
            )


def test_some_variants_are_trained_longer_than_the_rest(chain: Chain) -> None:
    longer = "bld.otherwise=[{variants: [ssd, gdn], steps: 99, learning_rate: 0.5}]"
    space = ["search_space.layers=[1]", "search_space.attention=[kv1, ssd]", "search_space.ffn=[]", "bld.steps=5"]
    profile = load_profile("tiny", [*space, longer])
    wanted = recording(chain.parent, chain.corpus)
    plain, changed = (
        {job.variant: job for job in jobs_of(one, wanted, chain.records, chain.reader)}
        for one in (load_profile("tiny", space), profile)
    )
    assert plain["kv1"].key == changed["kv1"].key and plain["ssd"].key != changed["ssd"].key
    assert [(job.settings.steps, job.settings.learning_rate) for job in changed.values()][1] == (99, 0.5)
    assert misfits(profile, chain.reader) == [
        "bld.otherwise: gdn is none of the search space's variants, which are kv1, ssd"
    ]
    work = [
        variant_work(shape_of(one, chain.reader), parse_label("attention", "ssd", chain.reader.config))
        for one in (profile, load_profile("tiny", space))
    ]
    assert work[0].product > 5 * work[1].product
    with pytest.raises(ProfileError, match="names ssd twice"):
        load_profile("tiny", ["bld.otherwise=[{variants: [ssd]}, {variants: [kv1, ssd]}]"])


@torch.no_grad()
def test_what_a_state_cannot_do_is_refused_in_a_sentence() -> None:
    child, ids = tiny_child(tiny_parent("llama"), recurrents()), token_ids(1, 12)
    with pytest.raises(ValueError, match="needs a DynamicCache, not a StaticCache"):
        child(ids, use_cache=True, **{CACHE: StaticCache(config=child.config, max_cache_len=32)})
    for cached in (True, False):
        with pytest.raises(ValueError, match="one text in a row"):
            child(ids, position_ids=torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5]]), use_cache=cached)
    with pytest.raises(ValueError, match="cannot take tokens back"):
        getattr(child(ids, use_cache=True), CACHE).crop(-1)
    mask = [0] * 2 + [1] * 7 + [0] * 3
    cache = getattr(child(ids, attention_mask=torch.tensor([mask]), use_cache=True), CACHE)
    with pytest.raises(ValueError, match="not between its tokens"):
        child(ids[:, :1], attention_mask=torch.tensor([[*mask, 1]]), **{CACHE: cache})
    windowed_child = tiny_child(tiny_parent("llama"), windows())
    with pytest.raises(ValueError, match="filled by another model"):
        child(ids[:, :1], **{CACHE: getattr(windowed_child(ids, use_cache=True), CACHE)})
