"""Exported folders: loaded by a stranger (a fresh interpreter without puzzle), replaced whole or not at all."""

import json
import os
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from blocks.engine_limits import gaps, known_engine, width_of
from blocks.export_code.modeling_decilm import DeciLMForCausalLM
from blocks.records import CorpusInfo, ParentInfo, Ref
from blocks.runtime import products_as_served
from flows.serving import _calibration
from tasks.export.folder import (
    CARD_ENGINES,
    ExportError,
    export_child,
    model_card,
    native_config,
    verify_checkpoint,
    write_checkpoint,
)
from tests.test_modeling import FAMILIES, LINEAR, NO_OP, attention, ffn, mixed_blocks, tiny_child, tiny_parent
from tests.test_recurrent import recurrents
from tests.test_windows import windowed, windows

PLUGIN = "vLLM with puzzle's plugin"
PARENT = ParentInfo(name="tiny", folder="parent", fingerprint="f" * 8, source="made in a test", revision="r1")
CORPUS = CorpusInfo(
    tokens=Ref(path="corpus.safetensors", sha256="0"),
    fingerprint="c" * 8,
    sequence_length=16,
    train_sequences=5,
    validation_sequences=2,
    test_sequences=1,
    documents=7,
    description="seven letters",
)
GENERATION = json.dumps({"eos_token_id": 64, "pad_token_id": 0, "max_new_tokens": 10, "do_sample": False})

# Runs without site (-S), so without the editable install of puzzle: only what a user of the folder has.
STRANGER = """
import importlib.util, json, sys
sys.path.append(sys.argv[1])
assert not any(importlib.util.find_spec(name) for name in ("blocks", "tasks", "flows", "profiles")), sys.path
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

torch.set_num_threads(1)
seen, outputs = {}, {}
ids = torch.arange(3, 17).unsqueeze(0)
for case, (folder, trust) in json.loads(sys.argv[2]).items():
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust)
    tokens = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)("c d").input_ids
    seen[case] = {"class": type(model).__name__, "tokens": tokens}
    with torch.no_grad():
        outputs[case + ".logits"] = model(ids).logits
        outputs[case + ".cached"] = model.generate(ids, use_cache=True)
        outputs[case + ".whole"] = model.generate(ids, use_cache=False)
save_file(outputs, sys.argv[3])
print(json.dumps(seen))
"""


@dataclass(frozen=True)
class Case:
    """One exported child."""

    model: DeciLMForCausalLM
    folder: Path
    native: bool


@dataclass(frozen=True, repr=False)
class Loaded:
    """What a stranger saw of the exported folders."""

    cases: dict[str, Case]
    seen: dict[str, Any]
    outputs: dict[str, torch.Tensor]
    left: set[str]  # modules of children that the exports left in this process


def uniform_blocks() -> list[dict[str, Any]]:
    return [{"attention": attention(1), "ffn": ffn(24)} for _ in range(6)]


def make_parent_folder(workspace: Path) -> None:
    """What tasks/inputs/parent.py leaves beside the weights."""
    folder = workspace / PARENT.folder
    vocabulary = {"[UNK]": 0, **{chr(ord("a") + index): index + 1 for index in range(26)}}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(folder)
    (folder / "generation_config.json").write_text(GENERATION)
    (folder / "LICENSE").write_text("yours")
    (folder / "config.json").write_text("the parent's, not to be copied")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("workspace")
    make_parent_folder(folder)
    return folder


@pytest.fixture(scope="module")
def loaded(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """Children of all families, mixed and uniform, exported here and loaded by one stranger."""
    cases, before = {}, modules_of_children()
    for family in FAMILIES:
        parent = tiny_parent(family, tie_word_embeddings=family in ("gemma3_text", "qwen2"))
        for shape, blocks in (
            ("mixed", mixed_blocks()),
            ("uniform", uniform_blocks()),
            ("windows", windows()),
            ("recurrent", recurrents()),
        ):
            child = tiny_child(parent, blocks)
            folder = export_child(child, PARENT, workspace, workspace / "children" / f"{family}.{shape}", "# card\n")
            cases[f"{family}.{shape}"] = Case(child, folder, native=shape == "uniform")
    left, elsewhere = modules_of_children() - before, tmp_path_factory.mktemp("elsewhere")
    folders = {name: (str(case.folder), not case.native) for name, case in cases.items()}
    arguments = [sysconfig.get_path("purelib"), json.dumps(folders), str(elsewhere / "outputs.safetensors")]
    run = subprocess.run(
        [sys.executable, "-I", "-S", "-c", STRANGER, *arguments],
        cwd=elsewhere,
        env=os.environ | {"HF_MODULES_CACHE": str(elsewhere / "modules"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return Loaded(cases, json.loads(run.stdout), load_file(arguments[2]), left)


def modules_of_children() -> set[str]:
    return {name for name in sys.modules if name.startswith("transformers_modules")}


@pytest.mark.parametrize("shape", ["mixed", "uniform", "windows", "recurrent"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_stranger_gets_the_same_model(loaded: Loaded, family: str, shape: str) -> None:
    case, name = loaded.cases[f"{family}.{shape}"], f"{family}.{shape}"
    with torch.no_grad(), products_as_served():  # the stranger's products are torch's default
        expected = case.model(torch.arange(3, 17).unsqueeze(0)).logits
    assert torch.equal(loaded.outputs[f"{name}.logits"], expected)
    assert loaded.outputs[f"{name}.cached"].shape == (1, 24)  # 10 new tokens: the parent's generation config counts
    assert torch.equal(loaded.outputs[f"{name}.cached"], loaded.outputs[f"{name}.whole"])
    native_class = FAMILIES[family][1].__name__
    assert loaded.seen[name] == {"class": native_class if case.native else "DeciLMForCausalLM", "tokens": [3, 4]}


def test_calibration_text_is_read_without_the_childs_code(loaded: Loaded, tmp_path: Path) -> None:
    """transformers would ask at the console whether to run it."""
    (tmp_path / "text.txt").write_text("\n\n\n".join(f"w{3 + start % 5} " * (3_000 + start) for start in range(12)))
    tokens = _calibration(loaded.cases["llama.mixed"].folder, tmp_path / "text.txt")
    assert tokens.shape == (128, 256)


def test_the_folder_holds_code_and_auto_map_only_where_needed(loaded: Loaded) -> None:
    mixed, uniform = loaded.cases["llama.mixed"].folder, loaded.cases["llama.uniform"].folder
    common = {"README.md", "LICENSE", "config.json", "generation_config.json", "model.safetensors"}
    common |= {"tokenizer.json", "tokenizer_config.json"}
    code = {f"{name}_decilm.py" for name in ("configuration", "families", "modeling", "recurrent", "windows")}
    assert {path.name for path in mixed.iterdir()} == common | code
    assert {path.name for path in uniform.iterdir()} == common
    config = json.loads((mixed / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("nemotron-nas", ["DeciLMForCausalLM"])
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_decilm.DeciLMForCausalLM"
    assert config["block_configs"] == mixed_blocks()
    for shape, prefix in (("windows", "Windowed"), ("recurrent", "Recurrent")):
        own = json.loads((loaded.cases[f"llama.{shape}"].folder / "config.json").read_text())
        assert own["architectures"] == [f"{prefix}DeciLMForCausalLM"]  # no stock engine takes it for one it knows
    native = json.loads((uniform / "config.json").read_text())
    assert (native["model_type"], native["num_key_value_heads"], native["intermediate_size"]) == ("llama", 1, 24)
    assert not {"auto_map", "block_configs", "base_model_type"} & set(native)
    assert (mixed / "generation_config.json").read_text() == GENERATION


@pytest.mark.parametrize("family", FAMILIES)
def test_tied_weights_are_stored_once(loaded: Loaded, family: str) -> None:
    for shape in ("mixed", "uniform"):
        case = loaded.cases[f"{family}.{shape}"]
        with safe_open(case.folder / "model.safetensors", framework="pt") as file:
            assert ("lm_head.weight" in file.keys()) == (not case.model.config.tie_word_embeddings)  # noqa: SIM118


def test_verification_leaves_no_trace_in_the_process(loaded: Loaded) -> None:
    assert not loaded.left
    assert not [path for path in sys.path if path and not Path(path).exists() and "tmp" in path]


def test_a_failed_export_leaves_the_old_child(workspace: Path, tmp_path: Path) -> None:
    child, target = tiny_child(tiny_parent("llama"), mixed_blocks()), tmp_path / "child"
    export_child(child, PARENT, workspace, target, "first")
    child.lm_head.weight.data[0, 0] = float("nan")
    with pytest.raises(ExportError, match="Nothing was replaced"):
        export_child(child, PARENT, workspace, target, "second")
    assert (target / "README.md").read_text() == "first"
    target.rename(tmp_path / ".child.old")  # as a kill between the two moves leaves it
    with pytest.raises(ExportError):
        export_child(child, PARENT, workspace, target, "third")
    assert [path.name for path in tmp_path.iterdir()] == ["child"]
    child.lm_head.weight.data[0, 0] = 0.0
    assert export_child(child, PARENT, workspace, target, "fourth") == target
    assert (target / "README.md").read_text() == "fourth"
    assert [path.name for path in tmp_path.iterdir()] == ["child"]


def test_a_changed_weight_is_found(tmp_path: Path) -> None:
    child = tiny_child(tiny_parent("qwen3"), mixed_blocks()).train()
    write_checkpoint(child, tmp_path)
    verify_checkpoint(child, tmp_path)
    assert child.training
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.layers.2.mlp.linear_mlp.weight"][0, 0] += 0.5
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ExportError, match="differs"):
        verify_checkpoint(child, tmp_path)


@pytest.mark.parametrize(
    ("changed", "native"),
    [({}, True), ({"attention": NO_OP}, False), ({"ffn": LINEAR}, False), ({"ffn": ffn(16)}, False)],
)
def test_only_a_child_with_all_layers_alike_is_native(changed: dict[str, Any], native: bool) -> None:
    blocks = uniform_blocks()
    blocks[3] |= changed
    assert (native_config(child_config(blocks)) is not None) == native


@pytest.mark.parametrize(
    "block", [{"attention": attention(2), "ffn": LINEAR}, {"attention": windowed(2, 4), "ffn": ffn(48)}]
)
def test_a_child_of_linear_subblocks_or_windows_alone_is_not_native(block: dict[str, Any]) -> None:
    assert native_config(child_config([block] * 6)) is None


def child_config(blocks: list[dict[str, Any]], family: str = "llama") -> Any:
    return tiny_child(tiny_parent(family), blocks).config


def wide(width: int, **changes: Any) -> dict[str, Any]:
    return ffn(width) | changes


@pytest.mark.parametrize(
    ("family", "first", "second", "runs"),
    [
        ("llama", (attention(2), wide(256)), (NO_OP, wide(512)), {"vLLM", PLUGIN, "TensorRT-LLM", "SGLang"}),
        ("llama", (attention(2), wide(256)), (attention(1), NO_OP), {"vLLM", PLUGIN, "TensorRT-LLM"}),
        ("llama", (attention(2), wide(256)), (LINEAR, wide(256)), {PLUGIN, "TensorRT-LLM"}),
        ("llama", (attention(2), wide(256)), (attention(2), LINEAR), {PLUGIN, "TensorRT-LLM"}),
        ("llama", (NO_OP, wide(256)), (attention(2), wide(256)), {PLUGIN, "TensorRT-LLM"}),
        ("llama", (attention(2), wide(256)), (attention(2), wide(24)), {PLUGIN}),
        ("llama", (attention(2), wide(256)), (windowed(2, 4), wide(256)), {PLUGIN}),
        ("llama", (attention(2), wide(256)), (attention(2), wide(24, ffn_mult=None)), {"vLLM", PLUGIN}),
        ("mistral", (attention(2), wide(256)), (NO_OP, wide(256)), {"vLLM", PLUGIN}),
        ("qwen2", (attention(2), wide(256)), (NO_OP, wide(256)), {PLUGIN}),
        ("gemma3_text", (attention(2), wide(256)), (NO_OP, wide(256)), set()),
    ],
)
def test_engines_that_run_a_child(family: str, first: Any, second: Any, runs: set[str]) -> None:
    blocks = [{"attention": first[0], "ffn": first[1]}] + [{"attention": second[0], "ffn": second[1]}] * 5
    config = child_config(blocks, family)
    assert {known_engine(engine).title for engine in CARD_ENGINES if not gaps(engine, config)} == runs


def test_ffn_mult_gives_the_width_that_engines_round_up() -> None:
    assert width_of(4.0, 576) == 1536  # SmolLM2-135M
    assert width_of(1536 * 3 / (2 * 576), 576) == 1536
    assert width_of(5.25, 8192) == 28672  # Llama-3-70B
    assert width_of(0.1, 576) == 256


def test_the_card_says_where_the_child_comes_from_and_what_runs_it() -> None:
    card = model_card(PARENT, CORPUS, child_config(mixed_blocks()), "FIGURES", "puzzle optimize x.yaml")
    for text in (
        "tiny",
        "made in a test",
        "r1",
        "f" * 8,
        "c" * 8,
        "seven letters",
        "FIGURES",
        "puzzle optimize x.yaml",
    ):
        assert text in card
    assert "| 0 | no-op | width 48 |\n| 1 | linear | width 16 |\n| 2 | 1 KV heads | linear |" in card
    assert "trust_remote_code=True" in card
    assert "| vLLM | no: linear subblocks; layer 0 without attention;" in card


def test_the_card_of_a_uniform_child_asks_for_no_remote_code() -> None:
    card = model_card(PARENT, CORPUS, child_config(uniform_blocks(), "mistral"), "", "x")
    assert "| 0-5 | 1 KV heads, window 8 | width 24 |" in card
    assert "MistralForCausalLM" in card
    assert "trust_remote_code" not in card
