"""The child's weights are of its parent's dtype, or of the one that the profile names; figures are told of those."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from blocks.compute import HOST
from blocks.parent import Parent
from blocks.records import Architecture, LayerChoice
from profiles.load import load_profile
from profiles.schema import Evaluate, Hardware, Profile
from tasks.distill.record import open_parent
from tasks.evaluate.compare import Contender, build, evaluate_contender, parent_contender
from tasks.evaluate.quality import parent_targets, quality_of, sequence_figures
from tasks.export.folder import export_folder
from tasks.export.formats import export_as
from tasks.gguf.header import read_header
from tasks.inputs.children import in_precision
from tasks.inputs.precision import RoundingError, as_written, child_dtype, served_precision, why
from tasks.measure import costs
from tasks.measure.costs import measure_costs
from tasks.measure.roofline import held, modelled_costs, setting_of
from tests.chain import SPACE, Chain, chosen
from tests.test_costs import SCENARIOS, asked_of
from tests.tiny import tiny_model, tiny_parent, tiny_tokens, word_tokenizer

LAYERS = (LayerChoice(attention="no_op"), LayerChoice(), LayerChoice(ffn="no_op"))
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def parent_of(folder: Path, dtype: torch.dtype, family: str = "llama") -> Parent:
    tiny_model(family).to(dtype).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return Parent(folder, HOST)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_child_has_its_parents_dtype_unless_the_profile_names_one(dtype: torch.dtype, tmp_path: Path) -> None:
    parent = parent_of(tmp_path, dtype)
    own = str(dtype).removeprefix("torch.")
    cases: list[tuple[dict[str, Any], torch.dtype, str]] = [
        ({}, dtype, own),
        ({"engine": "llama.cpp"}, dtype, own),
        ({"engine": "roofline", "name": "h100"}, dtype, own),
        ({"precision": "float32"}, torch.float32, "float32"),
        ({"precision": "float16"}, torch.float16, "float16"),
        ({"precision": "bfloat16", "engine": "vllm"}, torch.bfloat16, "bfloat16"),
        ({"precision": "q8_0", "engine": "llama.cpp"}, dtype, "q8_0"),  # an engine's format: made of the folder
        ({"precision": "float8", "engine": "roofline", "name": "h100"}, dtype, "float8"),
    ]
    for fields, wanted, served in cases:
        hardware = Hardware(**fields)
        assert child_dtype(hardware, parent) == wanted, fields
        assert served_precision(hardware, parent) == served, fields
        told = why(hardware, parent, "bfloat16")
        assert "products in bfloat16." in told
        assert told.startswith(f"The weights are {str(wanted).removeprefix('torch.')}, as the ")
        assert ("the profile names no" in told) == ("precision" not in fields)
        timed_otherwise = "precision" not in fields and "roofline" not in fields.values() and dtype != torch.float32
        assert ("Times were measured in float32" in told) == timed_otherwise


def test_a_parent_that_names_no_dtype_is_float32(tmp_path: Path) -> None:
    tiny_parent(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"dtype": "float32",', ""))
    assert Parent(tmp_path, HOST).dtype == torch.float32
    path.write_text(path.read_text().replace("{", '{"torch_dtype": "float16",', 1))  # as transformers 4 wrote it
    assert Parent(tmp_path, HOST).dtype == torch.float16


@pytest.mark.parametrize("named", ["float32", "bfloat16", None])
def test_what_nobody_named_stays_unnamed_when_a_profile_travels(named: str | None) -> None:
    changes = [f"hardware.precision={named}"] if named else []
    profile = load_profile(Path("profiles/tiny.yaml"), changes)
    for travelled in (
        Profile.model_validate(profile.model_dump(mode="json")),  # as a deployment's parameters
        Profile.model_validate_json(profile.model_dump_json()),
        profile.model_copy(update={"name": "other"}),
        profile.model_copy(update={"hardware": profile.hardware.model_copy(update={"threads": 1})}),
    ):
        assert ("precision" in travelled.hardware.model_fields_set) == (named is not None)
        assert travelled.hardware.precision == (named or "float32")


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text"])
@pytest.mark.parametrize("dtype", DTYPES[1:])
@torch.no_grad()
def test_rounded_weights_are_the_folders(dtype: torch.dtype, family: str, tmp_path: Path) -> None:
    parent = parent_of(tmp_path / "parent", torch.float32, family)
    rounded = as_written(parent.model(LAYERS), dtype)
    model = in_precision(parent.model(LAYERS), dtype)
    folder = export_folder(model, parent.folder, tmp_path / "child", "# x\n")
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {dtype}
    back: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert (back.dtype, back.config.dtype) == (dtype, dtype)
    wide: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    ids = tiny_tokens()
    assert rounded.dtype == torch.float32 and torch.equal(rounded(ids).logits, wide(ids).logits)
    assert not torch.equal(rounded(ids).logits, parent.model(LAYERS)(ids).logits)


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    model: Any = parent_of(tmp_path, torch.float32).model()
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = -70000.0
    with pytest.raises(RoundingError, match=r"layers.1.mlp.up_proj.weight .* beyond 6.55e\+04.*hardware.precision"):
        as_written(model, torch.float16)
    assert as_written(model, torch.bfloat16) is model


def test_quality_is_that_of_the_weights_as_written(chain: Chain, tmp_path: Path) -> None:
    layers = (LayerChoice(ffn="no_op"), LayerChoice(), LayerChoice())
    architecture: Architecture = chosen(layers)
    which = Contender(name="child", architecture=architecture, blocks=())
    settings = Evaluate(sequences=4, benchmarks=())
    arguments = ((chain.parent, chain.corpus), settings, chain.workspace, HOST)
    found = {dtype: evaluate_contender(which, *arguments, dtype).quality for dtype in DTYPES}
    tokens = load_file(chain.workspace / chain.corpus.tokens.path)["test"][:4]
    targets = parent_targets(chain.reader.model(), tokens, HOST)
    for dtype in DTYPES:
        model = in_precision(build(which, chain.parent, chain.workspace, HOST), dtype)
        folder = export_folder(model, chain.reader.folder, tmp_path / "child", "# x\n")
        wide: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
        assert found[dtype] == quality_of(sequence_figures(wide, targets, tokens, HOST))
    assert len({quality.kl.value for quality in found.values()}) == 3
    assert evaluate_contender(which, *arguments).quality == found[torch.float32]
    own = evaluate_contender(parent_contender(architecture), *arguments, torch.bfloat16)
    assert own.quality.kl.value == 0  # the parent is the measure: its own weights are never rounded


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_memory_is_that_of_the_childs_dtype(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from profiles.schema import FolderParent
    from tasks.inputs.parent import prepare_parent

    parent_of(tmp_path / "source", dtype)
    parent = prepare_parent(FolderParent(path=str(tmp_path / "source")), tmp_path, None)
    reader = open_parent(tmp_path / parent.folder, HOST)
    unnamed, named = Hardware(threads=1), Hardware(threads=1, precision="float32")
    table = measure_costs(asked_of(parent, unnamed), tmp_path)
    wide = measure_costs(asked_of(parent, named), tmp_path)
    assert table.hardware["precision"] == wide.hardware["precision"] == "float32"
    assert table.hardware["weights"] == str(dtype).removeprefix("torch.") and "weights" not in wide.hardware
    for halves, fulls in ((table.costs, wide.costs), (table.non_block, wide.non_block)):
        assert [2 * half.weight_bytes for half in halves] == [full.weight_bytes for full in fulls]
    assert all(2 * a.kv_bytes_per_token == b.kv_bytes_per_token for a, b in zip(table.costs, wide.costs, strict=True))
    folder = export_folder(in_precision(reader.model(), dtype), reader.folder, tmp_path / "child", "# x\n")
    inside = sum(tensor.nbytes for tensor in load_file(folder / "model.safetensors").values())
    own = [cost for cost in table.costs if cost.variant == "parent" and cost.batch_size == 1]
    assert 3 * sum(cost.weight_bytes for cost in own) + table.non_block[0].weight_bytes == inside
    monkeypatch.setattr(costs, "TorchTimer", lambda *_: pytest.fail("measured twice"))
    assert measure_costs(asked_of(parent, unnamed), tmp_path) == table

    target = setting_of(Hardware(name="h100", engine="roofline"), _target("h100"), reader)
    assert target.precision == target.kv_precision == table.hardware["weights"]  # what is modelled runs in it too
    planned = setting_of(unnamed, _target("cpu"), reader)
    assert (planned.precision, held(planned).precision) == ("float32", table.hardware["weights"])
    modelled = modelled_costs(reader, SPACE, SCENARIOS, planned)
    assert [cost.weight_bytes for cost in modelled.costs] == [cost.weight_bytes for cost in table.costs]
    assert [cost.kv_bytes_per_token for cost in modelled.costs] == [cost.kv_bytes_per_token for cost in table.costs]


def _target(name: str) -> Any:
    from profiles.hardware import load_target

    return load_target(name)


@pytest.mark.parametrize(("dtype", "kind"), [(torch.float32, 0), (torch.float16, 1), (torch.bfloat16, 30)])
def test_export_keeps_the_childs_dtype_unless_told(dtype: torch.dtype, kind: int, tmp_path: Path) -> None:
    parent = parent_of(tmp_path / "parent", dtype)
    layers = (LayerChoice(), LayerChoice(attention="no_op"), LayerChoice())
    child = export_folder(in_precision(parent.model(layers), dtype), parent.folder, tmp_path / "child", "# x\n")
    again = export_as(child, "transformers", None, tmp_path / "again").path
    assert {tensor.dtype for tensor in load_file(again / "model.safetensors").values()} == {dtype}
    other = export_as(child, "transformers", "f16", tmp_path / "other").path
    assert {tensor.dtype for tensor in load_file(other / "model.safetensors").values()} == {torch.float16}
    file = export_as(child, "gguf", None, tmp_path / "child.gguf", Path("none")).path
    assert {place.type_id for place in read_header(file).tensors.values() if len(place.shape) > 1} == {kind}
