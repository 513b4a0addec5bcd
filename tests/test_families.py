"""Every family against transformers' own model. Families x kinds x exports, all of them: benchmarks/families.py."""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, LlamaConfig

from blocks.attention.kv_heads import attention_flops
from blocks.attention.linear import LinearAttentionKind
from blocks.attention.query_heads import QueryHeads
from blocks.compute import HOST
from blocks.engine_limits import KNOWN_ENGINES, EngineLimit, check_parent, foreign, refused_label, runnable
from blocks.errors import ParentError, UnknownVariant
from blocks.export_code.families_decilm import FAMILIES, Family
from blocks.export_code.modeling_decilm import CACHE, DeciLMDecoderLayer
from blocks.families import experts_of, family_of, has_experts
from blocks.fit import FitContext
from blocks.kinds import kind_of, kinds, parse_label
from blocks.parent import Parent
from blocks.records import SUBBLOCKS, LayerChoice, Subblock
from blocks.resources import non_block_parameters, parameters_of
from blocks.subblock import parts_of, run_subblock
from profiles.schema import GKD, TinyFamily
from tasks.distill.gkd_student import Student
from tasks.distill.gkd_targets import Teacher
from tasks.distill.record import record_layer
from tasks.export.folder import export_folder, native_config
from tasks.export.formats import refuse
from tasks.gguf.header import GgufError, Header
from tasks.gguf.parent_file import check_model
from tasks.planning.effort import shape_of
from tasks.planning.memory import activation_bytes, passing
from tests.families import (
    LAYERS,
    SPECIAL,
    by_whole_models,
    child_of,
    learned,
    made,
    own_ffn,
    parent_of,
    part,
    recording_of,
    save,
    smaller_ffn,
    token_ids,
    whole,
)
from tests.test_modeling import LINEAR, NO_OP, attention, ffn
from tests.test_plan import assert_same_weights, chain_profile

pytestmark = pytest.mark.usefixtures("one_thread")
every_family = pytest.mark.parametrize("family", FAMILIES)


def test_every_family_is_tested_and_can_be_a_tiny_parent() -> None:
    assert set(SPECIAL) == set(FAMILIES) == set(get_args(TinyFamily))


@every_family
@torch.no_grad()
def test_a_child_of_the_parents_own_blocks_is_the_parent_bit_for_bit(family: str) -> None:
    parent, ids = parent_of(family), token_ids(2, 20)
    child, mask = child_of(parent), torch.ones_like(ids)
    mask[1, :5] = 0  # left padding
    assert torch.equal(child(ids, attention_mask=mask).logits, parent(ids, attention_mask=mask).logits)
    found, expected = (model(ids, output_hidden_states=True) for model in (child, parent))
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(child.model.entering(ids), expected.hidden_states[0])
    assert all(torch.equal(*pair) for pair in zip(found.hidden_states, expected.hidden_states, strict=True))
    embedded = parent.get_input_embeddings()(ids)
    assert torch.equal(child(inputs_embeds=embedded).logits, parent(inputs_embeds=embedded).logits)


@torch.no_grad()
def test_soft_caps_are_not_lost_when_another_attention_is_asked_for() -> None:
    parent, ids = parent_of("gemma2"), token_ids(1, 9)
    child = child_of(parent)
    child.set_attn_implementation("sdpa")  # which has no soft caps
    assert torch.equal(child(ids).logits, parent(ids).logits)


@torch.no_grad()
def test_soft_caps_are_not_lost_in_windows_beside_flash_attention() -> None:
    window = {"attention": attention(2) | {"window_length": 3, "num_sink_tokens": 2}, "ffn": ffn(48)}
    child, ids = child_of(parent_of("gemma2"), [window] * LAYERS), token_ids(1, 9)
    expected = child(ids).logits
    child.config._attn_implementation = "flash_attention_2"  # no layer runs it: all have windows
    assert torch.equal(child(ids).logits, expected)


def crippled(family: Family) -> Iterator[Family]:
    """The row of a family without one of its terms, for every term."""
    less: list[dict[str, Any]] = [{"slides": "no"}, {"scaled_embedding": False}, {"soft_caps": False}]
    for field in ("attention_norms", "ffn_norms"):
        before, after = getattr(family, field)
        less += [{field: (None, after)}, {field: (before, None)}]
    less += [{field: None} for field in ("embedding_multiplier", "residual_multiplier", "logits_divisor")]
    yield from (replace(family, **one) for one in less)


@every_family
@torch.no_grad()
def test_whatever_is_left_out_is_seen(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parent, ids = parent_of(family), token_ids(1, 20)
    expected = parent(ids).logits
    own = FAMILIES[family].experts  # what experts there are, each layer's own entry says
    fields = {*SPECIAL[family], FAMILIES[family].epsilon} - {"layer_types", "use_sliding_window"}
    fields -= set(own.fields if own else ())
    for field in fields:
        assert (child_of(parent, without=field)(ids).logits - expected).abs().max() > 1e-3, field
    row = FAMILIES[family]
    for other in (one for one in crippled(row) if one != row):
        monkeypatch.setitem(FAMILIES, family, other)
        found = child_of(parent, without="nothing")(ids).logits
        assert (found - expected).abs().max() > 1e-3, {k: v for k, v in vars(other).items() if v != vars(row)[k]}


def mixed(config: Any) -> list[dict[str, Any]]:
    """Every kind of subblock; no attention in layer 0."""
    less, fewer = smaller_ffn(config), attention(1)
    if QueryHeads().examples(config):
        fewer |= {"num_attention_heads": 2, "n_heads_in_group": 2}
    window = attention(2) | {"window_length": 3, "num_sink_tokens": 2}
    gdn = {"rule": "gdn", "gates": 3, "conv_kernel": 3, "chunk_size": 4}
    recurrent = attention(2) | {"recurrent": gdn}
    pairs = [(NO_OP, less), (window, LINEAR), (fewer, own_ffn(config)), (recurrent, less)]
    return [{"attention": dict(first), "ffn": dict(second)} for first, second in pairs]


@every_family
def test_a_mixed_child_generates_alike_with_a_cache_and_every_weight_counts(family: str) -> None:
    child: Any = child_of(parent_of(family), mixed(parent_of(family).config))
    ids = token_ids(2, 9)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    settings: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "eos_token_id": 64}
    cached, plain = (child.generate(ids, use_cache=use, **settings) for use in (True, False))
    assert cached.shape == (2, 15) and torch.equal(cached, plain)
    with torch.no_grad():
        first = child(ids[:, :8], use_cache=True)
        step = child(ids[:, 8:], use_cache=True, **{CACHE: getattr(first, CACHE)}).logits[:, -1]
        torch.testing.assert_close(step, child(ids).logits[:, -1], rtol=1e-4, atol=1e-4)
    child(ids, labels=ids).loss.backward()
    weights = [name for name, weight in child.named_parameters() if weight.grad is None or not weight.grad.any()]
    # a key bias adds the same to all scores of a query
    assert [name for name in weights if not name.endswith("k_proj.bias")] == []


def test_a_text_that_grows_beyond_phi3s_short_rotation_goes_on_as_in_transformers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rope = part(0.5)["rope_parameters"] | {
        "rope_type": "longrope",
        "short_factor": [1.0, 1.5],
        "long_factor": [3.0, 7.0],
    }
    parent = made("phi3", {"original_max_position_embeddings": 12, "rope_parameters": rope})
    how: dict[str, Any] = {"max_new_tokens": 9, "do_sample": False, "output_logits": True}
    how |= {"return_dict_in_generate": True, "eos_token_id": 64}

    def written(model: Any) -> torch.Tensor:
        return torch.stack(model.generate(token_ids(2, 9), **how).logits)

    assert torch.equal(written(child_of(parent)), written(parent))
    monkeypatch.setitem(FAMILIES, "phi3", replace(FAMILIES["phi3"], restarts_at=None))
    assert not torch.allclose(written(child_of(parent)), written(parent), atol=1e-3)


@every_family
def test_shapes_that_a_plan_counts_are_those_of_the_layers(family: str, tmp_path: Path) -> None:
    model = parent_of(family)
    model.config.save_pretrained(tmp_path)
    beside = sum(weight.numel() for name, weight in model.named_parameters() if "layers." not in name)
    assert non_block_parameters(model.config) == beside
    core, experts = getattr(model.model.layers[0], FAMILIES[family].ffn), experts_of(model.config)
    dense = sum(weight.numel() for weight in core.parameters() if weight.dim() == 2)
    of_experts = sum(weight.numel() for weight in core.parameters() if weight.dim() == 3)
    own = parse_label("ffn", "parent", model.config)
    used = dense + of_experts * experts.per_token // experts.count
    assert kind_of(own).flops_per_token(own, model.config, 0) == 2 * used
    for labels in (("parent", "parent"), ("gdn", "parent"), ("linear", "linear"), ("no_op", "no_op")):
        assert_same_weights(Parent(tmp_path, HOST), LayerChoice(attention=labels[0], ffn=labels[1]))
    for kind in kinds("ffn"):
        for label in kind.examples(model.config):
            assert_same_weights(Parent(tmp_path, HOST), LayerChoice(attention="kv1", ffn=label))
    for label in QueryHeads().examples(model.config):
        assert_same_weights(Parent(tmp_path, HOST), LayerChoice(attention=label))


def test_a_plan_counts_the_scores_that_soft_caps_need_whole(tmp_path: Path) -> None:
    found = []
    for cap in (1.5, None):
        made("gemma2", SPECIAL["gemma2"] | {"attn_logit_softcapping": cap}).config.save_pretrained(tmp_path)
        shape = shape_of(chain_profile(), Parent(tmp_path))
        kinds = [
            activation_bytes(shape, parse_label("attention", each, shape.parent.config)) for each in ("kv1", "linear")
        ]
        found.append((passing(shape) / shape.at_once, *kinds))
    scores = 4 * shape.length * 3 * 4  # query heads x tokens, three times in float32
    assert [one - other for one, other in zip(*found, strict=True)] == [scores, scores, 0]


@every_family
def test_a_parent_of_the_familys_usual_sizes_is_taken_and_counted(family: str, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"num_hidden_layers": 2, "num_key_value_heads": 4}
    fields |= {"head_dim": 128} if family == "ministral" else {}  # transformers' own default does not work
    config = CONFIG_MAPPING[family](**fields)
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    reader = Parent(tmp_path)
    own = (parameters_of(reader, parse_label(subblock, "parent", reader.config)) for subblock in SUBBLOCKS)
    assert non_block_parameters(reader.config) + 2 * sum(own) == model.num_parameters()


@every_family
@torch.no_grad()
def test_starts_are_the_parents_where_nothing_is_lost(family: str, tmp_path: Path) -> None:
    """Equal KV heads pooled, dead channels left out, and attention to a single token as a matrix."""
    save(parent_of(family), tmp_path)
    reader = Parent(tmp_path, HOST)
    layer, hidden = reader.layer(1), torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))
    parts = parts_of(layer, "attention")
    for name in (name for name in parts if name.startswith(("key.", "value.", "key_norm."))):
        parts[name][8:].copy_(parts[name][:8])
    experts = experts_of(reader.config)
    dead, label = torch.arange(1, experts.width, 2), f"{'ffn' if experts.count == 1 else 'ewidth'}{experts.width // 2}"
    parts_of(layer, "ffn")["down.weight"][..., dead] = 0
    alive = torch.ones(experts.width)
    alive[dead] = 0
    of_experts = {"expert_tokens": torch.ones(experts.count), "expert_channels": alive.repeat(experts.count, 1)}
    context = FitContext(
        config=reader.config,
        layer=1,
        parent_layer=layer,
        statistics={"ffn_contribution": alive} | of_experts,
        hidden=hidden,
        context=reader.contexts(hidden)[1],
        ridge=1e-3,
    )
    cases: list[tuple[Subblock, str]] = [("attention", "kv1"), ("ffn", label)]
    for subblock, label in cases:
        variant = parse_label(subblock, label, reader.config)
        module = reader.empty_layer(1, LayerChoice.only(subblock, label)).eval()
        kind_of(variant).initialise(variant, module, context)
        found, expected = (run_subblock(one, subblock, hidden, context.context) for one in (module, layer))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    if FAMILIES[family].gated:  # an FFN is linear in what is not its gate
        before, ffn_parts = run_core(layer, hidden), parts_of(layer, "ffn")
        for name, weight in ffn_parts.items():
            weight.mul_(2 if name in ("up.weight", "up.bias", "down.bias") else 1)
        torch.testing.assert_close(run_core(layer, hidden), 2 * before)
    if QueryHeads().examples(reader.config):  # a group of query heads that adds nothing is the one that is left out
        parts["output.weight"][:, :16] = 0
        expected = run_subblock(layer, "attention", hidden, context.context)
        module = reader.empty_layer(1, LayerChoice.only("attention", "q2")).eval()
        QueryHeads().initialise(parse_label("attention", "q2", reader.config), module, context)
        torch.testing.assert_close(run_subblock(module, "attention", hidden, context.context), expected)
    one = hidden[:, :1]
    for name, bias in parts.items():
        if name.endswith(".bias") and "norm" not in name:
            bias.zero_()
    normed = layer.before("attention", one)
    core: Any = layer.self_attn
    core.config.clip_qkv = None  # clipped values are no product
    expected = core(hidden_states=normed, **reader.contexts(one)[1])[0]
    found = normed @ LinearAttentionKind().product(context).T
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_query_heads_go_in_groups_and_engines_that_have_one_number_of_them_say_so() -> None:
    config = parent_of("llama").config
    kind, variant = QueryHeads(), parse_label("attention", "q2", config)
    assert kind.block_entry(variant, config)["num_key_value_heads"] == 1
    assert kind.flops_per_token(variant, config, 10) * 2 == attention_flops(config, 2, 10)
    assert kind.kv_elements_per_token(variant, config) == 2 * 8
    for family, label, why in (("llama", "q3", "in 2 groups can have q2$"), ("olmo2", "q2", "norm of its queries")):
        with pytest.raises(UnknownVariant, match=why):
            parse_label("attention", label, parent_of(family).config)
    for engine in ("llama.cpp", "vllm", "tensorrt-llm", "sglang"):
        assert "fewer query heads" in str(
            runnable(engine, config, 1, "q2", "linear" if engine == "llama.cpp" else "no_op")
        )
        assert "fewer query heads" in str(refused_label(engine, 1, ["attention=q2"], 0, False))
    child = child_of(
        parent_of("llama"), [{"attention": kind.block_entry(variant, config), "ffn": own_ffn(config)}] * LAYERS
    )
    assert native_config(child.config) is None  # type: ignore[arg-type]
    usual = LlamaConfig(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48)
    usual.head_dim = None
    block = {"attention": kind.block_entry(variant, usual), "ffn": own_ffn(usual)}
    layer: Any = DeciLMDecoderLayer(usual, "llama", block, 0)
    assert layer.self_attn.q_proj.weight.shape == (16, 32)


def run_core(layer: Any, hidden: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = layer.core("ffn")(layer.before("ffn", hidden))
    return out


# what is special about a family beside a kind that has to know it
DIAGONAL: dict[str, tuple[Subblock, str]] = {
    "smollm3": ("attention", "window4kv1"),
    "seed_oss": ("attention", "q2"),
    "ministral": ("attention", "linear"),
    "gemma2": ("attention", "window4kv1"),
    "olmo2": ("attention", "kv1"),
    "olmo3": ("ffn", "linear"),
    "exaone4": ("attention", "linear"),
    "granite": ("ffn", "ffn24"),
    "phi3": ("attention", "kv1"),
    "glm4": ("ffn", "ffn24"),
    "starcoder2": ("ffn", "ffn24"),
    "nemotron": ("ffn", "linear"),
    "qwen3_moe": ("ffn", "experts4"),
    "mixtral": ("ffn", "topk2"),
    "olmoe": ("ffn", "ewidth24"),
    "granitemoe": ("ffn", "linear"),
}


@pytest.mark.parametrize("family", DIAGONAL)
def test_a_variant_is_recorded_trained_and_scored(family: str, tmp_path: Path) -> None:
    recording = recording_of(tmp_path, family)
    records = [record_layer(layer, recording, tmp_path, HOST) for layer in range(LAYERS)]
    block, score = learned(recording, records, *DIAGONAL[family], tmp_path)
    assert block.status == "trained" and block.nmse_start and block.nmse_after
    assert block.nmse_after < min(1, block.nmse_start)
    kl, rise = by_whole_models(recording, records, block, tmp_path)
    assert score is not None and score.kl > 1e-5
    assert score.kl == pytest.approx(kl, rel=1e-3)
    assert score.lm_loss == pytest.approx(rise, rel=1e-2, abs=1e-5)


@pytest.mark.parametrize("also", [(), ("head",)])
@pytest.mark.parametrize("family", ["granite", "gemma2"])  # divided logits, capped logits
@torch.no_grad()
def test_gkd_learns_the_distribution_of_the_logits(family: str, also: tuple[Any, ...]) -> None:
    parent, ids = child_of(parent_of(family)), token_ids(2, 12)
    child = child_of(parent_of(family), whole(parent_of(family).config))
    child.lm_head.weight.copy_(parent.lm_head.weight)
    batch = Teacher(parent, HOST)(ids, ())
    student = Student(child, GKD(also_train=also), HOST)
    if also:
        child.lm_head.weight.add_(0.1 * torch.randn_like(child.lm_head.weight))
    p, q = (model(ids).logits.log_softmax(-1) for model in (parent, child))
    kl, _ = student(batch, (), watched=True)
    torch.testing.assert_close(kl.float(), (p.exp() * (p - q)).sum(-1).flatten(), rtol=1e-3, atol=1e-5)


@every_family
@torch.no_grad()
def test_an_exported_child_is_the_same_for_a_stranger(family: str, tmp_path: Path) -> None:
    (tmp_path / "from").mkdir()
    for name, blocks in (("mixed", mixed(parent_of(family).config)), ("alike", whole(parent_of(family).config))):
        child = child_of(parent_of(family), blocks)
        folder = export_folder(child, tmp_path / "from", tmp_path / name, "# x\n")
        assert (folder / "families_decilm.py").exists() == (name == "mixed")
        again = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        assert torch.equal(again(token_ids(2, 20)).logits, child(token_ids(2, 20)).logits)


@every_family
def test_what_an_engine_would_leave_out_is_said_before_training(family: str) -> None:
    config = parent_of(family).config
    wide = whole(config) if has_experts(config) else [block | {"ffn": ffn(256)} for block in whole(config)]
    child = child_of(parent_of(family), wide).config
    assert runnable("torch", config, 1, "kv1", "linear") is None
    for engine, form in (("llama.cpp", "gguf"), ("vllm", "nemotron-nas")):
        if family in (KNOWN_ENGINES[engine].families or ()):
            continue
        with pytest.raises(EngineLimit, match=re.escape(foreign(family))):
            refuse(child, form)
        with pytest.raises(EngineLimit, match="cannot run .* of the parent has"):
            check_parent([engine], config)


def test_what_a_child_would_lose_is_refused() -> None:
    for family, field in (("phi3", "resid_pdrop"), ("gemma3_text", "attn_logit_softcapping"), ("llama", CAP)):
        config = type(parent_of(family).config)(**{field: 0.5})
        with pytest.raises(ParentError, match=f"{family} with {field} is not supported"):
            family_of(config)
    with pytest.raises(GgufError, match="is a gemma2, and only llama, mistral"):
        check_model(
            Header(fields={}, spans={}, tensors={}, table=(0, 0), weights_at=0), parent_of("gemma2").config, "x.gguf"
        )


CAP = "final_logit_softcapping"
