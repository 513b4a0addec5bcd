"""FFNs with experts: what is recorded of them, which are kept, what is fitted, how a parent with some is read."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import MixtralConfig

from blocks.compute import HOST
from blocks.engine_limits import refused_label
from blocks.errors import ParentError, UnknownVariant
from blocks.experts import ExpertsKind, expert_sums, keep_experts
from blocks.families import experts_of, family_of
from blocks.ffn.topk import TopK
from blocks.fit import FitContext
from blocks.kinds import kind_of, kinds, parse_label
from blocks.parent import Parent
from blocks.records import LayerChoice
from blocks.resources import resources
from blocks.subblock import parts_of
from profiles.hardware import load_target
from profiles.schema import Hardware, Measure, Scenario
from tasks.inputs.children import open_child
from tasks.inputs.parent_weights import check_finite, place_weights, weights_of
from tasks.measure.roofline import Pass, setting_of, subblock_seconds
from tasks.measure.torch_costs import TorchTimer
from tasks.measure.variant_timing import Load
from tests.families import SIZES, SPECIAL, made, parent_of, save, token_ids

pytestmark = pytest.mark.usefixtures("one_thread")
EXPERTS = ("qwen3_moe", "mixtral", "olmoe", "granitemoe")
every_family = pytest.mark.parametrize("family", EXPERTS)


def reader_of(family: str, folder: Path) -> Parent:
    save(parent_of(family), folder)
    return Parent(folder, HOST)


def states(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, SIZES["hidden_size"], generator=torch.Generator().manual_seed(seed))


def alone(layer: Any, expert: int, token: torch.Tensor) -> torch.Tensor:
    """What an expert puts out for a token, by its definition, without the gate."""
    parts = {name: tensor[expert] for name, tensor in parts_of(layer, "ffn").items() if tensor.dim() == 3}
    return parts["down.weight"] @ channels(layer, expert, token)


def channels(layer: Any, expert: int, token: torch.Tensor) -> torch.Tensor:
    parts = parts_of(layer, "ffn")
    return F.silu(parts["gate.weight"][expert] @ token) * (parts["up.weight"][expert] @ token)


def gates(family: str, layer: Any, token: torch.Tensor) -> dict[int, float]:
    """The experts of a token, and what their outputs are multiplied by. All four tiny parents make them add up to 1."""
    scores = parts_of(layer, "ffn")["router.weight"] @ token
    chosen = scores.argsort(descending=True)[: layer.config.num_experts_per_tok]
    return dict(zip(chosen.tolist(), scores[chosen].softmax(0).tolist(), strict=True))


@every_family
@pytest.mark.parametrize("weighted", [False, True])
@torch.no_grad()
def test_what_is_recorded_of_experts_is_what_it_says(family: str, weighted: bool, tmp_path: Path) -> None:
    layer, tokens = reader_of(family, tmp_path).layer(1), states(11)
    weights = torch.linspace(0, 2, 11) if weighted else torch.ones(11)
    found = expert_sums(layer, tokens, weights[:, None].sqrt() if weighted else None)
    wanted = {name: torch.zeros_like(value) for name, value in found.items()}
    for token, weight in zip(tokens, weights, strict=True):
        for expert, gate in gates(family, layer, token).items():
            wanted["expert_tokens"][expert] += weight
            wanted["expert_gates"][expert] += weight * gate
            wanted["expert_outputs"][expert] += weight * gate * alone(layer, expert, token).norm()
            wanted["expert_channels"][expert] += weight * gate * channels(layer, expert, token).abs()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def context_of(reader: Parent, count: int = 12) -> FitContext:
    """Random states that enter layer 1, and what is recorded of them."""
    hidden = states(count * 16).view(count, 16, -1)
    layer: Any = reader.layer(1)
    contexts = reader.contexts(hidden[:1])[1]
    with torch.no_grad():
        entering = layer.before("ffn", hidden + layer.attention(hidden, **contexts)).flatten(0, 1)
        statistics = expert_sums(layer, entering, None)
    return FitContext(
        config=reader.config,
        layer=1,
        parent_layer=layer,
        statistics=statistics,
        hidden=hidden,
        context=contexts,
        ridge=1e-3,
        batch_sequences=5,
    )


@torch.no_grad()
def error(reader: Parent, module: Any, context: FitContext) -> float:
    """Squared error of a variant on the states that it was fitted to."""
    layer: Any = context.parent_layer
    entering = context.hidden + layer.attention(context.hidden, **context.context)
    return float((module.ffn(entering) - layer.ffn(entering)).square().mean())


@every_family
@torch.no_grad()
def test_with_all_experts_kept_it_is_the_parent_bit_for_bit(family: str, tmp_path: Path) -> None:
    reader = reader_of(family, tmp_path)
    context, own = context_of(reader), experts_of(reader.config)
    for kind, size in zip([one for one in kinds("ffn") if isinstance(one, ExpertsKind)], own_sizes(own), strict=True):
        module = reader.empty_layer(1, LayerChoice.only("ffn", "parent")).eval()
        kind.initialise(kind.variant(f"{kind.name}{size}", size), module, context)
        assert error(reader, module, context) == 0.0, kind.name
        for name, tensor in parts_of(module, "ffn").items():
            assert torch.equal(tensor, parts_of(context.parent_layer, "ffn")[name])


def own_sizes(own: Any) -> tuple[int, int, int]:
    return own.count, own.per_token, own.width


@every_family
@pytest.mark.parametrize("label", ["experts4", "experts4topk2", "topk2", "ewidth8"])
@torch.no_grad()
def test_a_fit_is_no_worse_than_its_start_and_keeps_the_experts_that_add_most(
    family: str, label: str, tmp_path: Path
) -> None:
    reader = reader_of(family, tmp_path)
    context, variant = context_of(reader), parse_label("ffn", label, reader.config)
    module = reader.empty_layer(1, LayerChoice.only("ffn", label)).eval()
    kind_of(variant).initialise(variant, module, context)
    rows = parts_of(module, "ffn")["router.weight"].clone()
    if label.startswith("experts"):
        best = context.statistics["expert_outputs"].topk(4).indices.sort().values
        assert torch.equal(rows, parts_of(context.parent_layer, "ffn")["router.weight"][best])
    start = error(reader, module, context)
    kind_of(variant).closed_form(variant, module, context)
    fitted = error(reader, module, context)
    assert 0 < fitted < start
    assert torch.equal(rows, parts_of(module, "ffn")["router.weight"])


@torch.no_grad()
def test_the_fit_finds_the_best_factor_of_each_expert(tmp_path: Path) -> None:
    """Experts whose outputs were multiplied get their own sizes back: the ridge is small beside 192 tokens."""
    reader = reader_of("qwen3_moe", tmp_path)
    context, kind = replace(context_of(reader), ridge=1e-7), TopK()
    module = reader.empty_layer(1, LayerChoice.only("ffn", "parent")).eval()
    keep_experts(module, context, torch.arange(6))
    down = parts_of(module, "ffn")["down.weight"]
    down.mul_(torch.tensor([0.5, 2.0, 1.0, 3.0, 0.25, 1.5])[:, None, None])
    kind.closed_form(kind.variant("topk3", 3), module, context)
    torch.testing.assert_close(down, parts_of(context.parent_layer, "ffn")["down.weight"], rtol=1e-3, atol=1e-4)


@every_family
def test_labels_of_experts(family: str) -> None:
    config = parent_of(family).config
    width = experts_of(config).width
    for label in ("experts6", "topk3", f"ewidth{width}", "ewidth100pct", "parent"):
        assert parse_label("ffn", label, config).kind == "parent", label
    assert parse_label("ffn", "ewidth50pct", config).label == f"ewidth{width // 2}"
    assert parse_label("ffn", "experts4topk3", config).label == "experts4"
    for kind in kinds("ffn"):
        for label in kind.examples(config):
            assert parse_label("ffn", label, config).label == label
    for label, why in {
        "ffn24": "mixtures of experts, which have no one width.*experts<N>",
        "experts2": "3 to 5 experts for 3 of a token",
        "experts7": "3 to 5 experts",
        "experts1topk2": "2 to 5 experts for 2 of a token",
        "topk4": "1 to 2 experts of a token",
        "ewidth0": f"1 to {width - 1} channels of an expert",
        "experts": "unknown ffn variant",
    }.items():
        with pytest.raises(UnknownVariant, match=why):
            parse_label("ffn", label, config)
    with pytest.raises(UnknownVariant, match="have no experts; narrow them with ffn<N>"):
        parse_label("ffn", "experts4", parent_of("llama").config)


def test_what_is_counted_of_experts(tmp_path: Path) -> None:
    """Parameters of all and of those that a token is sent to, FLOPs, and the bytes that a pass reads."""
    reader = reader_of("mixtral", tmp_path)

    def counted(label: str) -> Any:
        return resources(reader, parse_label("ffn", label, reader.config), 0, 2.0)

    width, one = 32, 3 * 32 * 48  # an expert's matrices
    whole, fewer, less = counted("parent"), counted("experts4"), counted("topk1")
    assert whole.parameters == width + 6 * width + 6 * one
    assert whole.active_parameters == width + 6 * width + 3 * one
    assert (fewer.parameters, fewer.active_parameters) == (width + 4 * width + 4 * one, width + 4 * width + 3 * one)
    assert (less.parameters, less.active_parameters) == (whole.parameters, width + 6 * width + one)
    assert [each.flops_per_token for each in (whole, fewer, less)] == [
        2 * (6 * width + 3 * one),
        2 * (4 * width + 3 * one),
        2 * (6 * width + one),
    ]
    assert whole.bytes_read(1) == pytest.approx(2 * whole.active_parameters)
    assert whole.bytes_read(1000) == pytest.approx(whole.weight_bytes) == pytest.approx(2 * whole.parameters)
    assert less.bytes_read(2) == pytest.approx(2 * (7 * width + one * 6 * (1 - (5 / 6) ** 2)))


def test_a_modelled_decode_reads_the_experts_that_tokens_are_sent_to(tmp_path: Path) -> None:
    MixtralConfig(num_hidden_layers=2).save_pretrained(tmp_path)
    reader, at = Parent(tmp_path), setting_of(Hardware(name="h100", engine="roofline"), load_target("h100"))

    def seconds(label: str, count: int) -> float:
        variant, work = parse_label("ffn", label, reader.config), Pass(sequences=count, tokens=1, context=1)
        return subblock_seconds(reader, variant, work, at)

    assert seconds("topk1", 1) < 0.6 * seconds("parent", 1)  # a token alone: one expert for two
    assert seconds("experts4", 1) == pytest.approx(seconds("parent", 1), rel=0.01)
    assert seconds("experts4", 16) == pytest.approx(seconds("parent", 16) / 2, rel=0.05)  # a batch reads them all
    assert seconds("ewidth7168", 16) == pytest.approx(seconds("parent", 16) / 2, rel=0.05)


def test_timed_tokens_are_sent_to_different_experts(tmp_path: Path) -> None:
    reader = reader_of("mixtral", tmp_path)
    timer = TorchTimer(reader, [parse_label("ffn", "parent", reader.config)], Hardware(), Measure(stack=1))
    seen: list[torch.Tensor] = []
    for model in (*timer.stacks.values(), timer.parent.model):
        model.layers[0].mlp.gate.register_forward_hook(lambda _module, _inputs, out: seen.append(out[2]))
    scenario = Scenario(name="chat", batch_sizes=(2,), prompt_tokens=40, generated_tokens=8)
    for model in (*timer.stacks.values(), timer.parent):
        timer._time(model, Load(scenario=scenario, batch=2), 1)
    assert all(len(each.unique()) > 3 for each in seen if len(each) > 2) and len(seen) > 4
    steps = torch.cat([each for each in seen if len(each) == 2])  # the same experts at every step would stay in a cache
    assert len(steps.unique()) > 3


@every_family
def test_layers_without_experts_and_what_a_child_would_lose_are_refused(family: str) -> None:
    fields = {"output_router_logits": True}, {"mlp_only_layers": [1]}, {"decoder_sparse_step": 2}
    for more in fields[: 3 if family == "qwen3_moe" else 1]:
        config = made(family, SPECIAL[family] | {"num_hidden_layers": 1}).config
        for name, value in more.items():
            setattr(config, name, value)
        with pytest.raises(ParentError, match=f"{family} with {next(iter(more))}.* not supported"):
            family_of(config)


@every_family
def test_experts_that_are_stored_one_by_one_are_read_as_transformers_reads_them(family: str, tmp_path: Path) -> None:
    """In shards, so that a layer's experts lie in several files; then one of them is missing."""
    model, source, target = parent_of(family), tmp_path / "source", tmp_path / "target"
    model.save_pretrained(source, max_shard_size="40KB")
    names = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    apart = [name for name in names if "experts.3." in name]
    assert (family == "granitemoe") == (not apart)  # its checkpoints hold them together, under other names
    target.mkdir()
    found = weights_of(source)
    place_weights(source, target, found, lambda one, other: other.write_bytes(one.read_bytes()))
    model.config.save_pretrained(target)
    reader = Parent(target, HOST)
    for index, layer in enumerate(model.model.layers):
        state = reader.layer(index).state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in layer.state_dict().items())
    check_finite(target, weights_of(target))
    for name in apart[:1]:
        file = source / names[name]
        save_file({key: value for key, value in load_file(file).items() if key != name}, file, {"format": "pt"})
        with pytest.raises(ParentError, match="do not fit config.json: model.layers.0.mlp.experts"):
            weights_of(source)


@every_family
@torch.no_grad()
def test_a_plain_folder_of_a_family_with_experts_is_opened(family: str, tmp_path: Path) -> None:
    """save_pretrained writes experts one by one, or under other names; so is a child whose layers are all alike."""
    parent_of(family).save_pretrained(tmp_path)
    ids = token_ids(1, 9)
    torch.testing.assert_close(open_child(tmp_path)(ids).logits, parent_of(family)(ids).logits)


def test_experts_that_are_stored_whole_and_one_by_one_are_refused(tmp_path: Path) -> None:
    parent_of("qwen3_moe").save_pretrained(tmp_path)
    file, name = tmp_path / "model.safetensors", "model.layers.0.mlp.experts.down_proj"
    whole = parent_of("qwen3_moe").state_dict()[name].clone()
    save_file(load_file(file) | {name: whole}, file, {"format": "pt"})
    with pytest.raises(ParentError, match=f"the weights hold {name} twice"):
        weights_of(tmp_path)


def test_a_label_alone_tells_an_engine_that_there_are_experts() -> None:
    for label in ("experts4", "experts4topk1", "topk2", "ewidth16", "8 experts"):
        for engine in ("llama.cpp", "vllm", "tensorrt-llm", "sglang"):
            assert "an FFN with experts" in str(refused_label(engine, 1, [f"ffn={label}"], 0, False))
        assert refused_label("torch", 1, [f"ffn={label}"], 0, False) is None
