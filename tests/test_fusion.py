"""Fused FFNs: the wide one is the sum of its parts, whatever gains, biases and multipliers they have. The fused child
is the parallel child, in every format. What is printed of it is what whole logits say.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from blocks.compute import HOST
from blocks.engine_limits import EngineLimit
from blocks.errors import PuzzleError
from blocks.estimates import mean, rounded
from blocks.export_code.configuration_decilm import DeciLMConfig
from blocks.export_code.modeling_decilm import DeciLMDecoderLayer, DeciLMForCausalLM
from blocks.fusion import fuse, fused_parts, parts_named, refuse_family, runs_of
from blocks.library import read_tensors, write_value
from blocks.records import LayerChoice
from blocks.subblock import load_parts
from tasks.evaluate.compare import LINEAGE, Lineage, contender
from tasks.evaluate.fusion import fuse_child, fusible, fusion_text
from tasks.export.folder import export_folder
from tasks.export.formats import export_as
from tasks.gguf.reader import read_gguf
from tasks.inputs.children import in_precision
from tests import families
from tests.chain import Chain, chosen
from tests.test_modeling import LINEAR, NO_OP
from tests.test_nvlabs import puzzle

FUSIBLE = ("llama", "qwen2", "granite", "phi3", "starcoder2", "nemotron")
GONE = {"A": None, ".": NO_OP, "L": LINEAR}


def blocks(pattern: str, config: Any) -> list[dict[str, Any]]:
    """`AF .F A.`: attention and FFN of every layer, whole, linear or absent."""
    whole = families.whole(config)[0]
    pairs = [(GONE[pair[0]], None if pair[1] == "F" else GONE[pair[1]]) for pair in pattern.split()]
    return [{"attention": first or whole["attention"], "ffn": second or whole["ffn"]} for first, second in pairs]


def child_of(family: str, pattern: str = "AF .F .F A.") -> DeciLMForCausalLM:
    """A random child: no gain is 1, and no bias is 0."""
    parent = families.parent_of(family)
    child = families.child_of(parent, blocks(pattern, parent.config))
    draw = torch.Generator().manual_seed(5)
    for parameter in child.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=draw)
    return child


@torch.no_grad()
def parallel(child: Any, ids: Tensor, run: tuple[int, ...]) -> Tensor:
    """Logits of the child with the FFNs of a run beside each other: all see what enters the first."""
    layers = child.model.layers
    own = [layers[one].ffn for one in run]
    with pytest.MonkeyPatch.context() as patch:
        for one in run[1:]:
            patch.setattr(layers[one], "ffn", lambda hidden: None)
        patch.setattr(layers[run[0]], "ffn", lambda hidden: torch.stack([ffn(hidden) for ffn in own]).sum(0))
        logits: Tensor = child(ids).logits
    return logits


@pytest.mark.parametrize("family", FUSIBLE)
@torch.no_grad()
def test_a_wide_ffn_is_the_sum_of_its_parts(family: str) -> None:
    child: Any = child_of(family).double()
    layers = list(child.model.layers[:3])
    parts = fused_parts(layers)
    entry = {"no_op": False, "replace_with_linear": False, "intermediate_size": 3 * 48}
    block = {"attention": NO_OP, "ffn": entry}
    wide = DeciLMDecoderLayer(child.model.base, family, block, 0).double()
    load_parts(wide, "ffn", parts)
    hidden = 2 * torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    wanted = torch.stack([layer.ffn(hidden) for layer in layers]).sum(0)
    found = wide.ffn(hidden)
    assert found is not None
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("pattern", "runs"),
    [
        ("AF .F .F A.", [(0, 1, 2)]),
        ("AF .. .F AF", [(0, 2)]),
        (".F .F AF .F", [(0, 1), (2, 3)]),
        ("AF .L .F .F", [(2, 3)]),
        ("A. .F LF .F", [(2, 3)]),
        ("AF LF A. .F", []),
    ],
)
def test_ffns_between_which_nothing_stands(pattern: str, runs: list[tuple[int, ...]]) -> None:
    config = families.parent_of("llama").config
    assert runs_of(DeciLMConfig(block_configs=blocks(pattern, config))) == runs
    assert runs_of(config) == []


def test_a_part_of_a_run_is_named_by_its_ends() -> None:
    runs = [(1, 2, 4, 5), (7, 8)]
    assert parts_named(runs, ["1-4"]) == [(1, 2, 4)]
    assert parts_named(runs, ["1-2", "4-5", "8-7"]) == [(1, 2), (4, 5), (7, 8)]
    for wrong in (["2-7"], ["2-2"], ["1-3"], ["x"], ["2"], ["1-4", "2-5"]):
        with pytest.raises(PuzzleError, match="or parts of them: 1-5, 7-8"):
            parts_named(runs, wrong)


@pytest.mark.parametrize(
    ("family", "why"),
    [("gemma2", "a norm stands behind"), ("olmo2", "a norm stands behind"), ("mixtral", "router of its own")],
)
def test_families_are_refused_whose_sum_is_no_wider_ffn(family: str, why: str) -> None:
    with pytest.raises(PuzzleError, match=f"FFNs of {family} cannot be fused.*{why}"):
        refuse_family(child_of(family, "AF AF AF AF").config)
    nemotron = child_of("nemotron").config
    refuse_family(nemotron)
    nemotron.mlp_bias = False
    with pytest.raises(PuzzleError, match="it has none"):
        refuse_family(nemotron)


@pytest.mark.parametrize("family", ["llama", "phi3", "starcoder2"])
@torch.no_grad()
def test_a_fused_child_loads_anywhere_as_the_parallel_child(family: str, tmp_path: Path) -> None:
    child, ids = child_of(family), families.token_ids(2, 12)
    sequential, wanted = child(ids).logits, parallel(child, ids, (0, 1, 2))
    assert torch.equal(child(ids).logits, sequential)  # the oracle has left it as it was
    fuse(child, [(0, 1, 2)])
    assert (wanted - sequential).abs().max() > 0.1
    torch.testing.assert_close(child(ids).logits, wanted, rtol=1e-4, atol=1e-4)
    (tmp_path / "none").mkdir()
    folder = export_folder(child, tmp_path / "none", tmp_path / "fused", "# fused\n")
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    torch.testing.assert_close(loaded(ids).logits, wanted, rtol=1e-4, atol=1e-4)
    assert [layer.ffn(torch.zeros(1, 1, 32)) is None for layer in loaded.model.layers] == [False, True, True, True]
    how = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(loaded.generate(ids, use_cache=True, **how), loaded.generate(ids, use_cache=False, **how))


def test_a_gguf_file_holds_the_fused_child_and_others_refuse_it(tmp_path: Path) -> None:
    child = families.child_of(families.made("llama", {}), blocks("AF .F .F A.", families.parent_of("llama").config))
    fuse(child, [(0, 1, 2)])
    (tmp_path / "none").mkdir()
    folder = export_folder(child, tmp_path / "none", tmp_path / "fused", "# fused\n")
    notes = " ".join(export_as(folder, "gguf", "f32", tmp_path / "fused.gguf", Path("none")).notes)
    assert "the same architecture" in notes and ("checked: llama.cpp" in notes or "not compared" in notes)
    ids = families.token_ids(2, 12)
    with torch.no_grad():
        logits: Tensor = read_gguf(tmp_path / "fused.gguf")(ids).logits
        torch.testing.assert_close(logits, child(ids).logits, rtol=1e-5, atol=1e-5)
    for form, why in (("nemotron-nas", "layer 0 has 144"), ("native", "all alike")):
        with pytest.raises(EngineLimit, match=why):
            export_as(folder, form, "f32", tmp_path / form)


# --- the command


def finished(chain: Chain, layers: tuple[LayerChoice, ...]) -> Path:
    """The child of a run of the tiny chain, as a run leaves it."""
    folder = chain.workspace / "runs" / "fused"
    folder.mkdir(parents=True, exist_ok=True)
    child = contender("child", chosen(layers), chain.blocks)
    write_value(folder / LINEAGE, Lineage(parent=chain.parent, corpus=chain.corpus, child=child))
    model = in_precision(chain.reader.model(layers), torch.bfloat16)
    return export_folder(model, chain.workspace / chain.parent.folder, folder / "child", "# A child\n")


def test_what_is_printed_of_a_fused_child_is_what_logits_say(chain: Chain) -> None:
    child = finished(chain, (LayerChoice(), LayerChoice(attention="no_op"), LayerChoice(attention="no_op")))
    code, out, err = puzzle("fuse", child, "--sequences", 6)
    assert code == 0, err
    target = child.with_name("child-fused")
    assert out.splitlines()[-1] == f"child: {target}"
    assert "one FFN of width 192 in layer 0 for those of layers 0, 1, 2" in out
    assert "layers that compute anything: 1 instead of 3" in out
    tokens = read_tensors(chain.workspace, chain.corpus.tokens, ["test"])["test"][:6].long()
    loss, logs = [], []
    for path in (child, target):
        model: Any = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, dtype=torch.float32)
        with torch.no_grad():
            logs.append(model(tokens).logits.double().log_softmax(-1))
        loss.append(-logs[-1][:, :-1].gather(-1, tokens[:, 1:, None]).mean((1, 2)))
    kl = (logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean(1)
    text = fusion_text(child, 6)
    assert len(text.documents) == 6
    done = fuse_child(child, fusible(child, target), target, text, HOST)  # again, in its own place
    assert done.kl.value == pytest.approx(float(kl.mean()), rel=1e-4) and done.kl.value > 1e-3
    rise = mean((loss[1] - loss[0]).numpy(), text.documents)
    assert (done.rise.value, done.rise.se) == pytest.approx((rise.value, rise.error), rel=1e-3)
    assert (
        f"KL {rounded(done.kl)} nats" in out and f"LM loss {loss[1].mean():.4f} instead of {loss[0].mean():.4f}" in out
    )
    card = (target / "README.md").read_text()
    assert card.startswith("# A child\n") and "child before its FFNs were fused" in card and done.notes[0] in card


def test_a_child_without_such_a_run_is_refused(chain: Chain, tmp_path: Path) -> None:
    child = finished(chain, (LayerChoice(attention="no_op"), LayerChoice(), LayerChoice()))
    code, _, err = puzzle("fuse", child)
    assert code == 2 and "no FFN of" in err and "comes right after another" in err
    assert puzzle("fuse", chain.workspace / chain.parent.folder)[0] == 2
    (tmp_path / "child.gguf").touch()
    assert "write it as a folder first" in puzzle("fuse", tmp_path / "child.gguf")[2]
    with pytest.raises(PuzzleError, match="--text FILE"):
        fusion_text(tmp_path / "child", 6)
    (tmp_path / "text.txt").write_text("All that a child reads, and no run of its own has read before. " * 20)
    assert fusion_text(child, 3, tmp_path / "text.txt").tokens.shape == (3, 256)
