"""The chain on a tiny parent: identities, laws and oracles of record, BLD, scoring, assembly and GKD."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from blocks.child import assemble, library_of
from blocks.compute import HOST
from blocks.kinds import kinds, parse_label, parse_labels
from blocks.library import read_tensors
from blocks.parent import Parent
from blocks.records import SUBBLOCKS, Architecture, LayerChoice, LayerRecord, Ref, Subblock
from blocks.resources import resources
from blocks.subblock import load_subblock
from profiles.schema import BLD, GKD
from tasks.distill import bld, gkd_targets, record
from tasks.distill.bld import Job, distill, layer_data
from tasks.distill.gkd_student import Student
from tasks.distill.record import record_layer
from tasks.score.scoring import load_variant, open_suffix, score_batch, score_sequences
from tests.chain import RECORD, SETTINGS, SPACE, Chain, prepare, recording

EVERY_KIND = SPACE.model_copy(update={"attention": (*SPACE.attention, "window8", "window8kv1")})
FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma3_text"]


def architecture(layers: list[LayerChoice]) -> Architecture:
    return Architecture(
        method="test",
        layers=tuple(layers),
        score=0,
        score_se=0,
        totals=(),
        parent_totals=(),
        status="optimal",
        bound=0,
        gap=0,
    )


def boundary_of(record: LayerRecord) -> Ref:
    assert record.boundary is not None
    return record.boundary


def tokens(chain: Chain, split: str = "validation") -> torch.Tensor:
    return read_tensors(chain.workspace, chain.corpus.tokens)[split].long()


# --- identities


@pytest.mark.parametrize("family", FAMILIES)
def test_child_of_the_parents_own_blocks_gives_its_logits_bit_for_bit(family: str, tmp_path: Path) -> None:
    parent, corpus = prepare(tmp_path, family, train_steps=2)
    reader = Parent(tmp_path / parent.folder, HOST)
    child = assemble(reader, {}, architecture([LayerChoice()] * reader.depth), tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / parent.folder).eval()
    ids = read_tensors(tmp_path, corpus.tokens)["test"][:2].long()
    with torch.no_grad():
        assert torch.equal(child(ids).logits, theirs(ids).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_variant_works_in_every_family_and_costs_what_was_said(family: str, tmp_path: Path) -> None:
    """record -> distil of every kind, and parameters, KV bytes and weight bytes against the real module."""
    parent, corpus = prepare(tmp_path, family, train_steps=2)
    reader = Parent(tmp_path / parent.folder, HOST)
    recorded = record_layer(0, recording(parent, corpus), tmp_path, HOST)
    for subblock in SUBBLOCKS:
        for variant in parse_labels(subblock, getattr(EVERY_KIND, subblock), reader.config):
            layer = reader.empty_layer(0, LayerChoice.only(subblock, variant.label))
            needs = resources(reader, variant, context_tokens=32, bytes_per_element=4)
            assert needs.parameters == sum(p.numel() for p in layer.parameters())
            assert needs.weight_bytes == sum(p.numel() * p.element_size() for p in layer.parameters())
            assert needs.kv_bytes_per_token == kv_bytes(layer)
            if variant.kind == "parent":
                continue
            job = Job(
                recording=recording(parent, corpus),
                record=recorded,
                layer=0,
                subblock=subblock,
                variant=variant.label,
                settings=SETTINGS,
                seed=0,
            )
            block = distill(job, tmp_path, HOST)
            assert block.status != "failed", block.reason
            if block.weights:
                assert block.nmse_after is not None and block.nmse_after < 1


def kv_bytes(layer: Any) -> int:
    """What one token leaves in a real cache."""
    attention = layer.self_attn
    if attention is None or not hasattr(attention, "k_proj"):
        return 0
    return int(sum(projection.weight.shape[0] * 4 for projection in (attention.k_proj, attention.v_proj)))


def test_flops_of_a_projection_follow_its_shape(chain: Chain) -> None:
    config = chain.reader.config
    ffn = resources(chain.reader, parse_label("ffn", "ffn32", config), 1, 4)
    assert ffn.flops_per_token == 2 * 3 * config.hidden_size * 32
    linear = resources(chain.reader, parse_label("attention", "linear", config), 1, 4)
    assert linear.flops_per_token == 2 * config.hidden_size**2


def test_every_registered_kind_has_a_row_in_the_test_space(chain: Chain) -> None:
    """A half-added kind fails here: each must parse its own examples back to the same label."""
    for subblock in SUBBLOCKS:
        for kind in kinds(subblock):
            configs = chain.reader.config, Qwen3MoeConfig()  # an FFN with experts has kinds of its own
            of_config = [(label, config) for config in configs for label in kind.examples(config)]
            assert of_config
            for label, config in of_config:
                variant = parse_label(subblock, label, config)
                assert (variant.kind, variant.label) == (kind.name, label)
                assert {"no_op", "replace_with_linear"} <= set(kind.block_entry(variant, config))


# --- record


def test_recorded_states_are_the_parents(chain: Chain) -> None:
    ids = tokens(chain, "train")[: RECORD.hidden_sequences]
    with torch.no_grad():
        states = chain.reader.model().model(ids, output_hidden_states=True).hidden_states
    for layer, recorded in enumerate(chain.records):
        train = read_tensors(chain.workspace, boundary_of(recorded))["train"]
        torch.testing.assert_close(train, states[layer], rtol=1e-4, atol=1e-5)


def test_statistics_against_a_loop(chain: Chain) -> None:
    module: Any = chain.reader.layer(0)
    ids = tokens(chain, "train")[: RECORD.statistics_sequences]
    with torch.no_grad():
        hidden = chain.reader.embedding()(ids)
        middle = hidden + module.attention(hidden, **chain.reader.contexts(hidden)[0])
        x = module.post_attention_layernorm(middle)
        channels = (F.silu(module.mlp.gate_proj(x)) * module.mlp.up_proj(x)).flatten(0, 1)
    stored = read_tensors(chain.workspace, chain.records[0].statistics)
    torch.testing.assert_close(stored["ffn_gram"], channels.T @ channels, rtol=1e-3, atol=1e-3)
    wanted = channels.abs().mean(0) * module.mlp.down_proj.weight.norm(dim=0)
    torch.testing.assert_close(stored["ffn_contribution"], wanted, rtol=1e-4, atol=1e-5)


def test_recording_goes_on_where_it_stopped(chain: Chain, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A recorded layer is not run again; a lost rolling file is replayed to the same bits."""
    parent, corpus = prepare(tmp_path)
    first = [record_layer(i, recording(parent, corpus), tmp_path, HOST) for i in range(2)]
    for rolling in (tmp_path / "record").glob("*/entering/*"):
        rolling.unlink()
    again = record_layer(2, recording(parent, corpus), tmp_path, HOST)
    assert again.boundary == chain.records[2].boundary
    monkeypatch.setattr(record, "_pass", lambda *_: pytest.fail("a finished layer was run again"))
    assert record_layer(1, recording(parent, corpus), tmp_path, HOST) == first[1]


# --- BLD


def test_closed_form_and_steps_lower_the_held_out_loss(chain: Chain) -> None:
    trained = [block for block in chain.blocks if block.status == "trained"]
    assert len(trained) == 4 * chain.reader.depth
    for block in trained:
        assert block.nmse_start is not None and block.nmse_closed_form is not None and block.nmse_after is not None
        assert block.nmse_after <= block.nmse_closed_form
    assert sum(b.nmse_closed_form < b.nmse_start for b in trained) >= len(trained) - 1  # type: ignore[operator]


def test_steps_alone_lower_the_held_out_loss(chain: Chain) -> None:
    for variant in ("ffn32", "linear"):
        block = distill(
            chain.job(1, "ffn", variant, SETTINGS.model_copy(update={"closed_form": False})), chain.workspace, HOST
        )
        assert block.nmse_start == block.nmse_closed_form
        assert block.nmse_after < 0.95 * block.nmse_start  # type: ignore[operator]


def test_a_finished_variant_is_not_trained_again(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bld, "_train", lambda *_: pytest.fail("trained twice"))
    assert distill(chain.job(0, "ffn", "ffn32"), chain.workspace, HOST) in chain.blocks


def test_a_damaged_block_is_trained_again_to_the_same_bits(chain: Chain) -> None:
    block = next(b for b in chain.blocks if b.layer == 1 and b.variant == "ffn32")
    assert block.weights is not None
    path = chain.workspace / block.weights.path
    path.write_bytes(path.read_bytes()[:-1] + b"\x00\x01")
    again = distill(chain.job(1, "ffn", "ffn32"), chain.workspace, HOST)
    assert again.weights == block.weights


def test_a_variant_that_never_converges_is_reported_not_raised(chain: Chain) -> None:
    wild = BLD(steps=6, batch_sequences=4, learning_rate=1e4, max_attempts=2, closed_form=False)
    block = distill(chain.job(0, "ffn", "ffn32", wild), chain.workspace, HOST)
    assert block.status == "failed" and block.weights is None
    assert "2 attempts" in block.reason


def test_a_closed_form_outlives_steps_that_only_harm(chain: Chain) -> None:
    wild = BLD(steps=6, batch_sequences=4, learning_rate=1e4, max_attempts=2)
    block = distill(chain.job(0, "ffn", "ffn32", wild), chain.workspace, HOST)
    assert block.status == "trained" and block.nmse_after == block.nmse_closed_form
    assert block.reason.startswith("closed form kept")


def test_a_rising_loss_is_tried_again_at_a_lower_rate(chain: Chain) -> None:
    rising = BLD(steps=6, batch_sequences=4, learning_rate=0.3, max_attempts=8)
    block = distill(chain.job(0, "ffn", "ffn32", rising), chain.workspace, HOST)
    assert block.status == "trained" and block.attempts > 1
    assert block.learning_rate == pytest.approx(0.3 / 3 ** (block.attempts - 1))


def test_coupled_distillation_starts_from_the_decoupled_blocks(chain: Chain) -> None:
    starts = tuple(b for b in chain.blocks if b.layer == 1 and b.variant in ("kv1", "ffn32"))
    job = chain.job(1, "attention", "kv1").model_copy(
        update={"subblock": "block", "variant": "kv1+ffn32", "warm_start": starts}
    )
    block = distill(job, chain.workspace, HOST)
    assert block.status == "trained" and block.nmse_after is not None and block.nmse_closed_form is not None
    assert block.nmse_after <= block.nmse_closed_form < 1
    choice = LayerChoice(attention="kv1", ffn="ffn32", coupled=True)
    child = assemble(
        chain.reader,
        library_of([block]),
        architecture([LayerChoice(), choice, LayerChoice()]),
        chain.workspace,
    )
    data = layer_data(job, job.recording.shards[0], chain.workspace, HOST)
    module = child.model.layers[1]
    assert bld.held_out_loss(job, data, module) == pytest.approx(block.nmse_after, rel=1e-5)


# --- scoring


def full_forward_score(chain: Chain, layer: int, subblock: Subblock, variant: str) -> tuple[float, float]:
    """KL and LM loss rise by two full forwards over the whole vocabulary."""
    parent, child = chain.reader.model(), chain.reader.model()
    block = next(b for b in chain.blocks if (b.layer, b.subblock, b.variant) == (layer, subblock, variant))
    stand_in = load_variant(chain.reader, block, chain.workspace)
    module = child.model.layers[layer]
    if variant == "no_op":
        setattr(module, "self_attn" if subblock == "attention" else "mlp", None)
    else:
        setattr(
            module,
            "self_attn" if subblock == "attention" else "mlp",
            stand_in.self_attn if subblock == "attention" else stand_in.mlp,
        )
        norm = "input_layernorm" if subblock == "attention" else "post_attention_layernorm"
        setattr(module, norm, getattr(stand_in, norm))
    ids = tokens(chain)[:6]
    with torch.no_grad():
        p, q = (F.log_softmax(model(ids).logits.double(), -1) for model in (parent, child))
    kl = (p.exp() * (p - q)).sum(-1).mean().item()
    rise = (p - q)[:, :-1].gather(-1, ids[:, 1:, None]).mean().item()
    return kl, rise


@pytest.mark.parametrize("subblock", SUBBLOCKS)
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_suffix_scores_equal_full_forwards(chain: Chain, layer: int, subblock: Subblock) -> None:
    for variant in getattr(SPACE, subblock):
        score = next(s for s in chain.scores if (s.layer, s.subblock, s.variant) == (layer, subblock, variant))
        kl, rise = full_forward_score(chain, layer, subblock, variant)
        assert score.kl == pytest.approx(kl, rel=1e-3, abs=1e-6)
        assert score.lm_loss == pytest.approx(rise, rel=1e-3, abs=1e-5)
        each = torch.tensor(score.kl_per_sequence)
        assert score.kl_se == pytest.approx((each.std() / math.sqrt(6)).item(), rel=1e-5)


def test_a_window_scores_what_the_assembled_child_is_off(chain: Chain) -> None:
    layer, label = 1, "window8kv1"
    block = distill(chain.job(layer, "attention", label), chain.workspace, HOST)
    assert block.nmse_start is not None and block.nmse_closed_form is not None and block.nmse_after is not None
    assert block.nmse_after < block.nmse_closed_form < block.nmse_start
    (score,) = score_sequences(
        [(block, tuple(range(6)))], chain.records[layer], chain.scored, chain.parent, chain.workspace, HOST
    )
    layers = [LayerChoice(attention=label if index == layer else "parent") for index in range(chain.reader.depth)]
    child = assemble(chain.reader, {(layer, "attention", label): block}, architecture(layers), chain.workspace)
    ids = tokens(chain)[:6]
    with torch.no_grad():
        p, q = (F.log_softmax(model(ids).logits.double(), -1) for model in (chain.reader.model(), child))
        again = child.generate(ids[:, :20], max_new_tokens=12, do_sample=False, eos_token_id=-1, pad_token_id=0)
        whole = child.generate(
            ids[:, :20], max_new_tokens=12, do_sample=False, eos_token_id=-1, pad_token_id=0, use_cache=False
        )
    assert score.kl == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-3, abs=1e-6)
    assert torch.equal(again, whole)


def test_the_parents_own_subblock_scores_exactly_zero(chain: Chain) -> None:
    suffix = open_suffix(chain.workspace / chain.parent.folder, chain.workspace, chain.scored, HOST)
    for layer in range(chain.reader.depth):
        for subblock in SUBBLOCKS:
            own = distill(chain.job(layer, subblock, "parent"), chain.workspace, HOST)
            hidden = read_tensors(chain.workspace, boundary_of(chain.records[layer]))["validation"][:6]
            (score,) = score_batch(suffix, [own], hidden, tuple(range(6)), chain.workspace)
            assert score is not None and (score.kl, score.lm_loss) == ((0.0,) * 6, (0.0,) * 6)


# --- assembly and GKD


def child_layers() -> list[LayerChoice]:
    return [
        LayerChoice(attention="linear", ffn="ffn32"),
        LayerChoice(attention="kv1", ffn="linear"),
        LayerChoice(attention="no_op", ffn="no_op"),
    ]


def test_assembled_child_holds_exactly_the_librarys_weights(chain: Chain) -> None:
    library = library_of(chain.blocks)
    child = assemble(chain.reader, library, architecture(child_layers()), chain.workspace)
    assert child.model.layers[2].self_attn is None and child.model.layers[2].mlp is None
    weights = library[0, "ffn", "ffn32"].weights
    assert weights is not None
    stored = read_tensors(chain.workspace, weights)
    assert torch.equal(child.model.layers[0].mlp.down_proj.weight, stored["mlp.down_proj.weight"])
    state = {name: tensor for name, tensor in stored.items() if "up_proj" not in name}
    with pytest.raises(ValueError, match="differ in names"):
        load_subblock(child.model.layers[0], "ffn", state)


def test_gkd_lowers_the_validation_kl_and_is_repeatable(chain: Chain) -> None:
    settings = GKD(
        steps=10, batch_sequences=4, learning_rate=3e-3, cosine_every=1, evaluate_every=5, validation_sequences=4
    )
    teacher = gkd_targets.record_teacher(chain.parent, chain.corpus, settings, chain.workspace, HOST)
    results = []
    for key in ("a", "b"):
        child = assemble(chain.reader, library_of(chain.blocks), architecture(child_layers()), chain.workspace)
        results.append(chain.training(child, teacher, settings, key).run())
    assert results[0].best_kl < 0.97 * results[0].curve[0][1]
    assert results[0].best_kl == min(kl for _, kl in results[0].curve)
    assert results[0].weights.sha256 == results[1].weights.sha256
    again = chain.training(child, teacher, settings.model_copy(update={"steps": 0}), "c").run()
    assert again.best_kl == pytest.approx(results[1].best_kl, rel=1e-6)


def test_gkd_that_harms_gives_back_the_child_it_was_given(chain: Chain) -> None:
    settings = GKD(steps=6, batch_sequences=4, learning_rate=10.0, evaluate_every=1, patience=1, validation_sequences=4)
    teacher = gkd_targets.record_teacher(chain.parent, chain.corpus, settings, chain.workspace, HOST)
    child = assemble(chain.reader, library_of(chain.blocks), architecture(child_layers()), chain.workspace)
    before = {name: tensor.clone() for name, tensor in child.state_dict().items()}
    result = chain.training(child, teacher, settings, "harm").run()
    assert result.best_step == 0 and len(result.curve) < 7
    assert all(torch.equal(before[name], tensor) for name, tensor in child.state_dict().items())


def test_gkd_loss_against_plain_formulas(chain: Chain) -> None:
    settings = GKD(steps=1, batch_sequences=2, cosine_every=2, validation_sequences=2)
    teacher = gkd_targets.record_teacher(chain.parent, chain.corpus, settings, chain.workspace, HOST)
    assert teacher.layers == (0, 2)
    batch = read_tensors(chain.workspace, teacher.steps[0])
    child = assemble(chain.reader, library_of(chain.blocks), architecture(child_layers()), chain.workspace)
    ids = batch["tokens"].long()
    with torch.no_grad():
        ours = Student(child, settings, HOST)(batch, teacher.layers)[0].item()
        outputs = [m.model(ids, output_hidden_states=True).hidden_states for m in (chain.reader.model(), child)]
        p, q = (F.log_softmax(states[-1] @ child.lm_head.weight.T, -1) for states in outputs)
        wanted = (p.exp() * (p - q)).sum(-1).mean()
        for layer in (0, 2):
            wanted += (1 - F.cosine_similarity(outputs[0][layer + 1], outputs[1][layer + 1], dim=-1)).mean()
    assert ours == pytest.approx(wanted.item(), rel=2e-3)  # states are kept in bfloat16
