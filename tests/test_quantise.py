"""Types of 4 and 5 bits: ggml rounds, the correction lowers the output's error, the file holds what was fitted."""

import gzip
import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from safetensors.torch import load_file
from torch import Tensor

from blocks.error_correction import InputGrams, correct
from blocks.errors import CorpusError, PuzzleError
from blocks.library import read_tensors
from tasks.engines.ggml import GgmlRounding
from tasks.engines.iq4_nl import round_iq4_nl
from tasks.engines.llama_cpp import LlamaCpp
from tasks.export.child_tokenizer import open_tokenizer
from tasks.export.compressed import INTEGERS, compress, scales_of
from tasks.export.folder import export_folder
from tasks.export.formats import export_as
from tasks.gguf.grids import Grid
from tasks.gguf.writer import CORRECTED, PRECISIONS
from tasks.inputs.corpus import tokens_of_file
from tests.chain import Chain
from tests.test_gguf import child_of
from tests.test_modeling import FULL, attention, ffn, token_ids
from tests.test_recurrent import recurrent

needs_llama_cpp = pytest.mark.skipif(LlamaCpp().missing() is not None, reason="llama.cpp is not installed")


def to_grid(columns: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds to multiples of 1/4."""
    values = (columns * 4).round() / 4
    return values, values


@pytest.fixture
def matrix() -> tuple[Tensor, Tensor]:
    """A weight (24, 96) and inputs (512, 96) that lie near 24 dimensions."""
    draw = torch.Generator().manual_seed(0)
    mixed = torch.randn(512, 24, generator=draw) @ torch.randn(24, 96, generator=draw)
    return torch.randn(24, 96, generator=draw), mixed + torch.randn(512, 96, generator=draw)


def test_with_independent_inputs_the_correction_changes_nothing(matrix: tuple[Tensor, Tensor]) -> None:
    weight, _ = matrix
    parts, rounded, before = correct(weight, torch.eye(96), to_grid, block=32, damping=0.01)
    assert torch.equal(rounded, to_grid(weight, weight[0])[1])
    assert torch.equal(torch.cat(parts, dim=1), rounded) and torch.equal(before, weight)


def test_a_block_is_made_up_for_by_the_best_that_the_rest_can_do(matrix: tuple[Tensor, Tensor]) -> None:
    """Two blocks, the second not rounded: its columns are the least-squares answer to what the first lost."""
    weight, inputs = matrix
    gram = inputs.T @ inputs

    def first_only(columns: Tensor, importance: Tensor) -> tuple[None, Tensor]:
        seen.append(len(columns.T))
        return None, to_grid(columns, importance)[1] if len(seen) == 1 else columns

    seen: list[int] = []
    _, rounded, _ = correct(weight, gram, first_only, block=48, damping=1e-9)
    lost = (weight - rounded)[:, :48].double()
    best = torch.linalg.lstsq(inputs[:, 48:].double(), inputs[:, :48].double() @ lost.T).solution.T
    torch.testing.assert_close(rounded[:, 48:], (weight[:, 48:].double() + best).float(), rtol=1e-4, atol=1e-4)


def output_error(weight_DK: Tensor, rounded_DK: Tensor, gram_KK: Tensor) -> float:
    """||X W^T - X Q^T||^2 / ||X W^T||^2 over the calibration tokens, from X^T X."""
    gram, difference = gram_KK.double(), (weight_DK - rounded_DK).double()
    size = (weight_DK.double() @ gram * weight_DK.double()).sum()
    return float((difference @ gram * difference).sum() / size)


@needs_llama_cpp
@pytest.mark.parametrize("precision", CORRECTED)
def test_corrected_rounding_of_ggml_loses_less_than_half(precision: str, matrix: tuple[Tensor, Tensor]) -> None:
    weight, inputs = matrix
    gram, rounding = inputs.T @ inputs, GgmlRounding(kind=PRECISIONS[precision][0])
    plain = output_error(weight, rounding(weight, None)[1], gram)
    parts, rounded, _ = correct(weight, gram, rounding, block=32, damping=0.01)
    assert output_error(weight, rounded, gram) < plain / 2
    assert torch.cat([torch.from_numpy(part) for part in parts], dim=1).shape == (24, rounding.row_bytes(96))


@needs_llama_cpp
def test_what_lies_on_the_grid_stays() -> None:
    rounding = GgmlRounding(kind=Type.Q4_0)
    once = rounding(torch.randn(4, 64, generator=torch.Generator().manual_seed(1)), None)
    again = rounding(once[1], None)
    torch.testing.assert_close(again[1], once[1], rtol=1e-3, atol=1e-3)


def test_grams_are_of_what_enters_each_linear_layer() -> None:
    draw = torch.Generator().manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 2))
    x = torch.randn(2, 5, 4, generator=draw)
    with InputGrams(model) as grams:
        model(x[:1]), model(x[1:])
    middle = model[1](model[0](x)).detach().flatten(0, 1)
    torch.testing.assert_close(grams.sums["0"], x.flatten(0, 1).T @ x.flatten(0, 1))
    torch.testing.assert_close(grams.sums["2"], middle.T @ middle)
    assert not model[0]._forward_pre_hooks


@needs_llama_cpp
def test_a_child_in_four_bits_is_what_llama_cpp_runs(chain: Chain, tmp_path: Path) -> None:
    child, out = chain.workspace / chain.parent.folder, tmp_path / "child.gguf"
    tokens = read_tensors(chain.workspace, chain.corpus.tokens, ["train"])["train"].long()
    text = " ".join(export_as(child, "gguf", "iq4_nl", out, calibration=lambda: tokens).notes)
    assert "iq4_nl fitted to 1,344 tokens: KL 0.0" in text and "on 192 others" in text
    assert "weights within" in text and "checked: llama.cpp" in text
    kinds = {info.name: info.tensor_type for info in gguf.GGUFReader(out).tensors if info.data.ndim > 1}
    inner = {kind for name, kind in kinds.items() if name.startswith("blk.")}
    assert inner == {Type.IQ4_NL} and {kinds[name] for name in kinds if not name.startswith("blk.")} == {Type.Q8_0}


@pytest.mark.parametrize("precision", INTEGERS)
def test_gates_of_recurrent_attention_stay_as_they_are(precision: str) -> None:
    pairs = [(recurrent("gdn"), ffn(64)), (attention(2), ffn(32))] * 3
    model: Any = child_of(blocks=[{"attention": first, "ffn": second} for first, second in pairs])
    state = model.model.layers[2].self_attn
    gates, queries = state.gates.weight.clone(), state.q_proj.weight.clone()
    found = compress(model, token_ids(8, 16), precision, torch.bfloat16)
    assert torch.equal(state.gates.weight, gates) and not torch.equal(state.q_proj.weight, queries)
    assert not [name for name in found.tensors if "gates" in name]
    assert found.config["ignore"] == ["lm_head", *(f"model.layers.{layer}.self_attn.gates" for layer in (0, 2, 4))]


def test_without_text_it_is_refused_before_anything_is_computed(chain: Chain, tmp_path: Path) -> None:
    with pytest.raises(PuzzleError, match="--calibrate"):
        export_as(chain.workspace / chain.parent.folder, "gguf", "iq4_nl", tmp_path / "child.gguf")
    assert not list(tmp_path.iterdir())


def test_a_text_file_becomes_sequences_of_the_childs_tokens(chain: Chain, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(
        "\n\n\n".join(f"document {number} says {number**3}" * 20 for number in range(50))
    )
    tokenizer = open_tokenizer(chain.workspace / chain.parent.folder)
    assert tokens_of_file(tmp_path / "text.txt", tokenizer, 8, 16).shape == (8, 16)
    rows = "".join(json.dumps({"id": number, "text": f"row {number} " * 20}) + "\n" for number in range(50))
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
    read = tokens_of_file(tmp_path / "rows.jsonl.gz", tokenizer, 8, 16)
    assert '"id"' not in tokenizer.decode(read.flatten())  # the rows' text, not their JSON
    with pytest.raises(CorpusError, match="text.txt is too short"):
        tokens_of_file(tmp_path / "text.txt", tokenizer, 10**6, 16)


# --- integers of compressed-tensors, which vLLM reads


def test_a_scale_loses_no_more_than_the_one_that_just_holds_the_largest_value(matrix: tuple[Tensor, Tensor]) -> None:
    columns, importance = matrix[0][:, :32], torch.rand(32, generator=torch.Generator().manual_seed(2))

    def lost(scale: Tensor) -> Tensor:
        values = (columns / scale).round().clamp(-8, 7) * scale
        return ((values - columns).square() * importance).sum(1)

    plain = columns.abs().amax(1, keepdim=True) / 7
    found = scales_of(columns, importance, 4, torch.float32)
    assert (lost(found) <= lost(plain) * (1 + 1e-5)).all() and lost(found).sum() < 0.95 * lost(plain).sum()


@pytest.mark.parametrize("precision", INTEGERS)
def test_integers_are_read_back_as_what_was_rounded(precision: str, chain: Chain, tmp_path: Path) -> None:
    """`export_as` loads the folder again and compares logits; here, that it holds integers and stays near its child."""
    widths = [{"attention": dict(FULL), "ffn": FULL | {"intermediate_size": width}} for width in (64, 32, 96) * 2]
    mixed = export_folder(child_of(blocks=widths), tmp_path, tmp_path / "mixed", "# x\n")
    tokens = torch.randint(64, (16, 32), generator=torch.Generator().manual_seed(0))
    for child, bound in ((chain.workspace / chain.parent.folder, 0.02), (mixed, 0.1)):
        out = tmp_path / f"{child.name}-out"
        notes = export_as(child, "transformers", precision, out, calibration=lambda: tokens).notes
        assert any("loaded again with transformers" in note for note in notes)
        config = json.loads((out / "config.json").read_text())
        assert config["quantization_config"]["quant_method"] == "compressed-tensors"
        held = load_file(out / "model.safetensors")
        key, dtype = {"w4a16": ("weight_packed", torch.int32), "w8a8": ("weight", torch.int8)}[precision]
        assert {one.dtype for name, one in held.items() if "mlp" in name and name.endswith("." + key)} == {dtype}
        (kl,) = [float(note.split("KL ")[1].split(" ±")[0]) for note in notes if "fitted to" in note]
        assert 0 < kl < bound * {"w4a16": 1, "w8a8": 0.1}[precision]
    with pytest.raises(PuzzleError, match="rows of layer"):
        blocks = [{"attention": dict(FULL), "ffn": FULL | {"intermediate_size": 40}}] * 6
        odd = export_folder(child_of(blocks=blocks), tmp_path, tmp_path / "odd", "# x\n")
        export_as(odd, "transformers", precision, tmp_path / "no", calibration=lambda: tokens)


@needs_llama_cpp
@pytest.mark.parametrize("weighted", [True, False])
def test_iq4_nl_is_ggmls(weighted: bool) -> None:
    """Bytes as its library writes them; the few blocks in which two scales fit equally well are as near."""
    draw = torch.Generator().manual_seed(0)
    matrix = torch.randn(400, 96, generator=draw) * torch.logspace(-4, 2, 400)[:, None]
    matrix[0] = 0.0
    matrix[1, 32:64] = 0.0
    importance = torch.rand(96, generator=draw) + 0.01 if weighted else None
    rounding = GgmlRounding(kind=Type.IQ4_NL)
    rows, values = rounding(matrix, importance)
    wanted, theirs = rounding.by_library(matrix, importance)
    assert torch.equal(values, torch.from_numpy(gguf.quants.dequantize(rows, Type.IQ4_NL)))
    assert not values[0].any() and not values[1, 32:64].any() and rows.shape == wanted.shape
    alike = (rows == wanted).reshape(-1, 18).all(1)
    assert alike.mean() > 0.99
    blocks, weights = matrix.reshape(-1, 32), matrix.reshape(-1, 32).square()
    if importance is not None:
        own = importance.reshape(1, 3, 32).expand(400, -1, -1).reshape(-1, 32)
        weights = own * (weights + 2 * weights.mean(1, keepdim=True)).sqrt()
    ours, ggmls = (((one.reshape(-1, 32) - blocks).square() * weights).sum(1) for one in (values, theirs))
    assert torch.allclose(ours, ggmls, rtol=0.02, atol=0)


def test_iq4_nl_takes_what_is_no_number() -> None:
    """A training that has gone astray ends by its loss, not in here; numbers of no weight are zeros."""
    grid = Grid.of(Type.IQ4_NL, torch.zeros(1, 18, dtype=torch.uint8))
    matrix = torch.tensor([[float("nan"), float("inf"), -float("inf")] + [0.0] * 29])
    assert int(grid.nearest(matrix).max()) < 16
    round_iq4_nl(matrix, None)
    assert not round_iq4_nl(torch.ones(2, 32), torch.zeros(32))[1].any()
    torch.testing.assert_close(round_iq4_nl(torch.ones(1, 32), None)[1], torch.ones(1, 32), rtol=1e-3, atol=0)
