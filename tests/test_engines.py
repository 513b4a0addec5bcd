"""Engines: limits as data, llama.cpp's logits and text against torch's, exports and what they refuse."""

import ast
import copy
import ctypes
import json
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from blocks.engine_limits import (
    KNOWN_ENGINES,
    NO_CACHE,
    EngineLimit,
    UnknownEngine,
    check_parent,
    gaps,
    known_engine,
    runnable,
    width_of,
)
from blocks.export_code import AUTO_MAP, PLUGIN, families_decilm
from blocks.export_code.modeling_decilm import DeciLMForCausalLM
from blocks.export_code.vllm_plugin import puzzle_vllm
from blocks.export_code.vllm_plugin.puzzle_vllm import ARCHITECTURE
from blocks.parent import Parent
from blocks.records import LayerChoice
from flows import cli
from profiles.load import load_profile
from tasks.engines import llama_library
from tasks.engines.base import LoadOptions
from tasks.engines.errors import EngineFailed, EngineMissing
from tasks.engines.llama_cpp import LlamaCpp
from tasks.engines.llama_library import LIBRARY_VARIABLE
from tasks.engines.llama_structs import Blob, find_fields, keep_off_gpus, unmap
from tasks.engines.registry import ENGINES, engine_of, installed_engine
from tasks.engines.torch_engine import Torch
from tasks.export.folder import ExportError, export_folder
from tasks.export.formats import export_as, precision_of
from tasks.export.logits_check import (
    KL_TOLERANCE,
    LOGITS_TOLERANCE,
    Difference,
    check_logits,
    compare_logits,
    own_kl,
    verdict,
)
from tasks.gguf.layout import FILLER_WIDTH, packed
from tasks.gguf.reader import read_gguf
from tasks.gguf.tokenizer_writer import NO_TOKENIZER
from tasks.gguf.writer import UnknownPrecision, write_gguf
from tasks.inputs.children import in_precision
from tasks.inputs.space import refused_whole
from tests.test_export import PARENT, make_parent_folder
from tests.test_gguf import BYTES, DIGITS, bpe_folder, child_of, converted_tokenizer, logits, written
from tests.test_modeling import FAMILIES, NO_OP, attention, ffn, mixed_blocks, parent_blocks, token_ids
from tests.tiny import tiny_parent

pytestmark = pytest.mark.usefixtures("one_thread")
MISSING = LlamaCpp().missing()
needs_llama_cpp = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
ROPES: list[dict[str, Any]] = [
    {"rope_type": "linear", "rope_theta": 5e3, "factor": 4.0},
    {
        "rope_type": "llama3",
        "rope_theta": 1e3,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
]


def longrope(head_dim: int) -> dict[str, Any]:
    factors = {f"{name}_factor": [most] * (head_dim // 2) for name, most in (("short", 1.0), ("long", 4.0))}
    places = {"factor": 4.0, "original_max_position_embeddings": 32}
    return {"rope_type": "longrope", "rope_theta": 1e4} | places | factors


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A child of every kind of subblock and its parent, as exported folders."""
    workspace = tmp_path_factory.mktemp("serving")
    make_parent_folder(workspace)
    models = {"child": child_of(), "parent": child_of(blocks=parent_blocks())}
    return {
        name: export_folder(model, workspace / PARENT.folder, workspace / name, f"# {name}\n")
        for name, model in models.items()
    }


def config_of(family: str, **changes: Any) -> Any:
    from tests.test_modeling import tiny_parent

    return tiny_parent(family, **changes).config


@pytest.mark.parametrize(
    ("engine", "layer", "attention_label", "ffn_label", "reason"),
    [
        ("torch", 0, "no_op", "linear", None),
        ("llama.cpp", 0, "no_op", "linear", None),
        ("vllm", 1, "no_op", "no_op", None),
        ("vllm", 0, "no_op", "parent", "layer 0 without attention"),
        ("vllm", 1, "parent", "linear", "linear subblocks"),
        ("vllm", 1, "kv1", "ffn24", None),
        ("vllm-plugin", 0, "no_op", "linear", None),
        ("vllm-plugin", 1, "linear", "ffn24", None),
        ("vllm-plugin", 1, "window8", "ffn24", None),
        ("vllm-plugin", 1, "q2", "parent", None),
        ("vllm-plugin", 0, "ssd", "parent", None),
        ("vllm", 1, "ssd", "parent", "recurrent attention, a state in the place of a KV cache"),
        ("tensorrt-llm", 1, "linear", "ffn256", None),
        ("tensorrt-llm", 1, "parent", "ffn24", "FFN widths without ffn_mult"),
        ("sglang", 1, "kv1", "ffn256", "different numbers of KV heads"),
        ("sglang", 1, "no_op", "ffn256", None),
    ],
)
def test_what_an_engine_runs_in_a_layer(
    engine: str, layer: int, attention_label: str, ffn_label: str, reason: str | None
) -> None:
    config = config_of("llama", attention_bias=False, intermediate_size=512)
    found = runnable(engine, config, layer, attention_label, ffn_label)
    assert found == (reason and f"{known_engine(engine).title} cannot run {reason}")


@pytest.mark.parametrize(
    ("family", "changes", "runs"),
    [
        ("llama", {}, set(KNOWN_ENGINES)),
        ("qwen2", {}, {"torch", "llama.cpp", "vllm-plugin"}),
        ("mistral", {"sliding_window": None}, set(KNOWN_ENGINES)),
        ("mistral", {}, {"torch", "vllm", "vllm-plugin"}),
        ("qwen3", {}, {"torch", "vllm-plugin"}),
        ("gemma3_text", {}, {"torch"}),
        (
            "llama",
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
            set(KNOWN_ENGINES) - {"llama.cpp"},
        ),
        ("llama", {"rope_parameters": longrope(8)}, {"torch", "tensorrt-llm", "sglang"}),
    ],
)
def test_engines_that_run_a_parent(family: str, changes: dict[str, Any], runs: set[str]) -> None:
    config = config_of(family, intermediate_size=512, **changes)
    assert {engine for engine in KNOWN_ENGINES if runnable(engine, config, 1, "parent", "parent") is None} == runs
    for engine in KNOWN_ENGINES:
        if engine in runs:
            check_parent([engine], config)
        else:
            with pytest.raises(EngineLimit, match="of the parent"):
                check_parent([engine], config)


def test_a_layer_is_judged_as_the_whole_child_is() -> None:
    child = child_of().config
    parent = config_of("llama", attention_bias=False)
    labels = [("no_op", "parent"), ("linear", "ffn16"), ("kv1", "linear"), ("parent", "ffn24"), ("kv1", "parent")]
    labels.append(("parent", "no_op"))
    for engine in KNOWN_ENGINES:
        layers = [runnable(engine, parent, layer, *pair) for layer, pair in enumerate(labels)]
        assert any(layers) == bool(gaps(engine, child)), engine


def test_a_child_without_any_attention_is_refused_for_llama_cpp(tmp_path: Path) -> None:
    """llama.cpp makes no context without a KV cache. Layers are judged one by one, so the whole is judged too."""
    config = config_of("llama", attention_bias=False)
    reader = Parent(tiny_parent(tmp_path / "parent"))
    none = [LayerChoice(attention="no_op"), LayerChoice(attention="linear"), LayerChoice(attention="no_op")]
    assert runnable("llama.cpp", config, 1, "no_op", "parent") is None
    assert gaps("llama.cpp", reader.child_config(none)) == [NO_CACHE]
    assert gaps("torch", reader.child_config(none)) == [] and NO_CACHE not in gaps("vllm", reader.child_config(none))
    profile = load_profile("tiny", ["hardware={engine: llama.cpp}"])
    assert "llama.cpp cannot run a child without any attention" in str(refused_whole(profile, reader, none))
    assert refused_whole(profile, reader, [LayerChoice(attention="kv1"), *none[1:]]) is None
    assert refused_whole(load_profile("tiny"), reader, none) is None
    if LlamaCpp().missing() is None:
        model = DeciLMForCausalLM(reader.child_config(none))
        file = write_gguf(model, tmp_path / "none.gguf", "float32", NO_TOKENIZER, "none")
        with pytest.raises(EngineFailed, match="cannot make a context"):
            LlamaCpp().load(file, LoadOptions())


def test_ffn_mult_gives_every_multiple_of_256_back() -> None:
    for hidden in (576, 896, 960, 2048, 3072, 4096, 5120, 8192):
        for width in range(256, 4 * hidden + 1, 256):
            assert width_of(width * 3 / (2 * hidden), hidden) == width


def test_unknown_engines_and_those_that_are_not_driven_are_named() -> None:
    with pytest.raises(UnknownEngine, match=r"Did you mean llama\.cpp"):
        engine_of("llama-cpp")
    with pytest.raises(UnknownEngine, match="export to nemotron-nas"):
        engine_of("sglang")
    assert set(ENGINES) <= set(KNOWN_ENGINES)
    for name in ENGINES:
        assert (engine_of(name).name, engine_of(name).format) == (name, known_engine(name).format)


def test_without_llama_cpp_the_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(LIBRARY_VARIABLE, raising=False)
    monkeypatch.setattr(llama_library, "_PACKAGES", (("no_such_package", "none", "."),))
    with pytest.raises(EngineMissing, match="pip install xllamacpp"):
        installed_engine("llama.cpp")
    monkeypatch.setenv(LIBRARY_VARIABLE, str(tmp_path))
    with pytest.raises(EngineMissing, match="holds no libllama"):
        installed_engine("llama.cpp")


def test_fields_are_found_by_their_defaults_or_not_at_all() -> None:
    minus_one = -1082130432  # -1.0f
    tail = [0, 0, minus_one, minus_one, minus_one, minus_one, 0, minus_one]
    words = [512, 2048, 512, 1, 0, 7, 4, 4, 0, -1, -1, -1, -1, *tail, 0, 0, 0, 0, 0, 1, 1, *[0] * 30]
    fields = find_fields(words)
    assert (fields.n_threads, fields.flash_attention, fields.type_k) == (6, 12, 26)
    for broken in ([511, *words[1:]], [*words[:6], 3, *words[7:]], [*words[:26], 2, *words[27:]]):
        with pytest.raises(EngineFailed, match="unknown layout"):
            find_fields(broken)


def test_llama_cpp_stays_off_gpus_in_every_layout_that_is_known() -> None:
    """Its own default puts every layer on a GPU where the build has a backend for one."""
    for layers in (-1, 0, 999):
        blob = Blob()
        blob.words[4:6] = [layers, 1]
        assert keep_off_gpus(blob) and blob.words[4:6] == [0, 1]
        address = blob.words[0] % 2**32 + (blob.words[1] << 32)
        assert ctypes.c_void_p.from_address(address).value is None, "a list of devices that is empty, not the default"
    for words in ([0, 0, -1, 1, 0, 0], [1, 0, 0, 0, -1, 1]):
        blob = Blob()
        blob.words[: len(words)] = words
        assert not keep_off_gpus(blob) and blob.words[: len(words)] == words


def test_an_unknown_layout_that_may_use_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    library = llama_library.llama_library()
    library.model_parameters()
    monkeypatch.setattr(llama_library, "keep_off_gpus", lambda blob: False)
    library.model_parameters()
    monkeypatch.setattr(library.c, "llama_supports_gpu_offload", lambda: True)
    with pytest.raises(EngineFailed, match="it may use GPUs"):
        library.model_parameters()


def test_weights_are_read_not_mapped_in_every_layout_that_is_known() -> None:
    """Since b10107 an enum beside the split mode (automatic, mapped); before, a flag behind four pointers."""
    for third, after in ((-1, 0), (1, 0), (7, 7)):
        blob = Blob()
        blob.words[4:8] = [-1, 1, third, 1]
        unmap(blob)
        assert blob.words[4:8] == [-1, 1, after, 1]
    blob = Blob()
    blob.words[4:8] = [-1, 1, 0, 0]
    blob.words[16] = 0x01000100  # vocab_only, use_mmap, use_mlock, check_tensors
    unmap(blob)
    assert blob.words[16] == 0x01000000


@needs_llama_cpp
def test_an_open_model_holds_no_mapping_of_its_file(tmp_path: Path) -> None:
    path = written(child_of(), tmp_path)
    session = LlamaCpp().load(path, LoadOptions())
    maps = Path("/proc/self/maps")
    assert not maps.exists() or path.name not in maps.read_text()
    session.close()


@needs_llama_cpp
@pytest.mark.parametrize("precision", ("float32", "float16", "bfloat16", "q8_0"))
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"tie_word_embeddings": True, "head_dim": 16}),
        ("qwen2", {}),
        *[("llama", {"rope_parameters": rope, "attention_bias": False}) for rope in ROPES],
    ],
)
def test_llama_cpp_gives_torchs_logits_and_text(
    family: str, changes: dict[str, Any], precision: str, tmp_path: Path
) -> None:
    child = child_of(family, **changes)
    path = written(child, tmp_path, precision)
    model: Any = child if precision == "float32" else read_gguf(path)
    found = compare_logits(model, path)
    if precision != "float32":
        assert 0 < found.kl < KL_TOLERANCE[precision]
        return
    assert found.most < LOGITS_TOLERANCE / 100 and found.agreement == 1  # such small sums: 1e-6
    prompt = token_ids(1, 12)
    session = LlamaCpp().load(path, LoadOptions(exact=True, context_tokens=32))
    generated = session.generate(prompt[0].tolist(), 8)
    session.close()
    expected = model.generate(prompt, max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0)
    assert generated == expected[0, 12:].tolist()


@needs_llama_cpp
def test_a_batch_is_decoded_as_its_rows_are(tmp_path: Path) -> None:
    path = written(child_of(), tmp_path)
    session = LlamaCpp().load(path, LoadOptions(exact=True, batch_size=3, context_tokens=24))
    prompt = token_ids(3, 8)
    session._decode(prompt.tolist(), 0)
    rows = torch.stack([session._row(8 * place + 7) for place in range(3)])
    with torch.no_grad():
        expected = read_gguf(path)(prompt).logits[:, -1]
    torch.testing.assert_close(rows, expected, rtol=0, atol=LOGITS_TOLERANCE / 100)
    turn = session.request(prompt, 4, grow=5)
    assert min(turn.prefill, turn.step, turn.prefill_cpu, turn.step_cpu) > 0
    with pytest.raises(EngineFailed, match="failed with status"):  # the context is full
        session._decode([[1]], 1000)
    session.close()


@needs_llama_cpp
def test_a_wrong_packing_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stock layout, one layer for one, in which llama.cpp drops an attention that no FFN follows."""

    def stock(config: Any) -> list[Any]:
        return [
            replace(layer, feed_forward_length=0, entries=tuple(e for e in layer.entries if "ffn" not in e.name))
            if layer.feed_forward_length == FILLER_WIDTH
            else layer
            for layer in packed(config)
        ]

    monkeypatch.setattr("tasks.gguf.writer.packed", stock)
    child = child_of(blocks=[{"attention": attention(2), "ffn": NO_OP}] + parent_blocks()[1:])
    path = written(child, tmp_path)
    with pytest.raises(ExportError, match="does not give torch's logits"):
        check_logits(child, path, "float32")


@needs_llama_cpp
@pytest.mark.parametrize("pre", [BYTES, DIGITS])
def test_a_converted_tokenizer_splits_as_the_original(pre: Any, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    folder = bpe_folder(tmp_path / "t", pre)
    fields = converted_tokenizer(folder, 259)
    assert fields is not None
    path = write_gguf(child_of(vocab_size=259), tmp_path / "x.gguf", "float32", fields, "x")
    session = LlamaCpp().load(path, LoadOptions())
    original = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    for text in ("abc ab, 2024x", "\u00e9\u4f60 it's<|end|>ab", "  a\n\n b"):
        assert session.tokenize(text) == original(text)["input_ids"]
    session.close()


@needs_llama_cpp
def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_text("no model")
    with pytest.raises(EngineFailed, match="cannot load x.gguf"):
        LlamaCpp().load(tmp_path / "x.gguf", LoadOptions())


NONE = ("--tokenizer-from", "none")  # WordLevel


def run(*words: str) -> Any:
    return CliRunner().invoke(cli.app, list(words), catch_exceptions=True)


def test_a_child_is_exported_to_what_can_express_it_and_comes_back(folders: dict[str, Path], tmp_path: Path) -> None:
    model = child_of()
    exported = export_as(folders["child"], "gguf", "f32", tmp_path / "child.gguf", Path("none"))
    assert any("read back" in note for note in exported.notes)
    assert any(("against torch" if MISSING is None else "xllamacpp") in note for note in exported.notes)
    back = export_as(tmp_path / "child.gguf", "transformers", "f32", tmp_path / "back").path
    reloaded = Torch().load(back, LoadOptions())
    assert torch.equal(reloaded.logits(token_ids(1, 20)[0].tolist()), logits(model)[0])
    assert json.loads((back / "config.json").read_text())["block_configs"] == mixed_blocks()
    rounded = export_as(folders["child"], "transformers", "bf16", tmp_path / "bf16").path
    assert json.loads((rounded / "config.json").read_text())["dtype"] == "bfloat16"
    assert (rounded / "README.md").read_text() == "# child\n"


@pytest.mark.parametrize(
    ("form", "words"), [("nemotron-nas", "multiples of 256; layer 0 has 48"), ("native", "all alike")]
)
def test_what_a_format_cannot_express_it_refuses(
    form: str, words: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(EngineLimit, match=words):
        export_as(folders["child"], form, "f32", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in ("llama", "qwen2")])
def test_families_that_deci_lacks_are_refused(family: str, tmp_path: Path) -> None:
    folder = export_folder(child_of(family), tmp_path, tmp_path / "child", "# x\n")
    with pytest.raises(EngineLimit, match="cannot express"):
        export_as(folder, "gguf", "f32", tmp_path / "x.gguf", Path("none"))


def test_widths_of_256_go_to_nemotron_nas_and_alike_layers_to_both_schemas(tmp_path: Path) -> None:
    blocks = [{"attention": attention(2), "ffn": ffn(256)}] * 6
    folder = export_folder(child_of(blocks=blocks), tmp_path, tmp_path / "child", "# x\n")
    types = {}
    for form in ("native", "nemotron-nas", "transformers"):
        out = export_as(folder, form, "f16", tmp_path / form).path
        types[form] = json.loads((out / "config.json").read_text())["model_type"]
    assert types == {"native": "llama", "nemotron-nas": "nemotron-nas", "transformers": "llama"}
    first = json.loads((tmp_path / "nemotron-nas" / "config.json").read_text())["block_configs"][0]["ffn"]
    assert width_of(first["ffn_mult"], 32) == 256


def test_a_folder_for_vllm_brings_the_plugin_and_another_format_leaves_it(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.export.formats.check_in_vllm", lambda *what: what[-1].name)
    done = export_as(folders["child"], "vllm-plugin", "f32", tmp_path / "served")
    assert done.notes[-1] == "vllm-plugin"
    config = json.loads((done.path / "config.json").read_text())
    assert config["architectures"] == [ARCHITECTURE] and config["auto_map"] == AUTO_MAP
    package = tomllib.loads((done.path / PLUGIN / "pyproject.toml").read_text())
    (entry,) = package["project"]["entry-points"]["vllm.general_plugins"].values()
    module, function = entry.split(":")
    names = {path.stem for path in (done.path / PLUGIN / module).iterdir()}
    assert names == {"__init__", "model", "recurrent", "steps", "windows"} and callable(getattr(puzzle_vllm, function))
    assert "pip install ./vllm_plugin" in (done.path / "README.md").read_text()
    back = export_as(done.path, "transformers", "f32", tmp_path / "back")
    assert not (back.path / PLUGIN).exists() and (back.path / "README.md").read_text() == "# child\n"
    assert json.loads((back.path / "config.json").read_text())["architectures"] == ["DeciLMForCausalLM"]
    folder = export_folder(child_of("gemma3_text"), tmp_path, tmp_path / "gemma", "# x\n")
    with pytest.raises(EngineLimit, match="no engine that loads vllm-plugin runs biases, norms or scales"):
        export_as(folder, "vllm-plugin", "f32", tmp_path / "no")


def test_the_plugin_knows_the_families_that_the_table_says() -> None:
    """It imports vLLM, which is not here."""
    tree = ast.parse(Path(puzzle_vllm.__path__[0], "model.py").read_text())
    (table,) = [node.value for node in tree.body if isinstance(node, ast.AnnAssign) and node.value]
    biases = ast.literal_eval(table)
    assert frozenset(biases) == known_engine("vllm-plugin").families
    lists = {ast.unparse(one.targets[0]): one.value for one in tree.body if isinstance(one, ast.Assign)}
    normed, ropes = (ast.literal_eval(lists[name]) for name in ("HEAD_NORMS", "ROPE_TYPES"))
    assert frozenset(ropes) == known_engine("vllm-plugin").rope_types
    for name, bias in biases.items():
        family = families_decilm.FAMILIES[name]
        assert (family.input_bias, family.output_bias) == (("attention_bias",) * 2 if bias is None else (bias, False))
        assert family.head_norms == ("each" if name in normed else None)


def test_a_damaged_export_is_found(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.gguf.writer.interleaved", lambda rows, heads: rows)
    with pytest.raises(ExportError, match="read back, differs"):
        export_as(folders["child"], "gguf", "f32", tmp_path / "x.gguf", Path("none"))


def test_export_and_its_refusals_on_the_command_line(folders: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "c.gguf"
    done = run("export", str(folders["child"]), "--format", "gguf", "--precision", "q8_0", "--out", str(out), *NONE)
    assert done.exit_code == 0, done.output
    assert "tokenizer: none, as asked" in done.output and f"gguf: {out}" in done.output
    for words in (["--format", "guf"], ["--format", "gguf", "--precision", "q9"], ["--format", "native"]):
        refused = run("export", str(folders["child"]), *words, "--out", str(tmp_path / "no"))
        assert refused.exit_code != 0 and "Traceback" not in refused.output
    with pytest.raises(UnknownPrecision, match="float32, float16, bfloat16, q8_0"):
        precision_of("q9", "gguf")


def test_an_engine_may_lose_what_torch_itself_loses_twice_over_and_no_more() -> None:
    """SmolLM2 on random tokens in bfloat16: torch is 0.0056 nats from its own float32, above the fixed tolerance."""
    engine, found = engine_of("torch"), Difference(most=1.0, kl=0.0112, agreement=0.9, tokens=32)
    assert "KL, nats 0.011 (allowed 0.0112)" in verdict(found, engine, Path("child"), "bfloat16", 0.0056)
    for own in (0.0, 0.0055):
        with pytest.raises(ExportError, match=r"KL, nats 0\.0112, allowed"):
            verdict(found, engine, Path("child"), "bfloat16", own)
    with pytest.raises(ExportError, match="largest difference of logits 1"):
        verdict(found, engine, Path("child"), "float32", 1.0)  # sums in another order, nothing is rounded
    exact = child_of()
    rounded = in_precision(copy.deepcopy(exact), torch.bfloat16)
    again = in_precision(copy.deepcopy(rounded), torch.float32)
    ids = token_ids(1, 24)
    assert own_kl(exact, exact, ids) == 0 < own_kl(rounded, again, ids) < 1e-3
