"""Odd folders and GGUF files as parents: what transformers loads is the parent, or a sentence says why it is none."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from blocks.compute import HOST
from blocks.errors import ParentError
from blocks.parent import Parent
from blocks.records import LayerChoice, ParentInfo
from profiles.schema import FolderParent, GgufParent, PackageParent, ParentSource
from tasks.export.folder import export_folder
from tasks.inputs.parent import prepare_parent, write_config
from tasks.operating.admission import Refused, Roots, admitted
from tasks.operating.served_profile import ServedProfile
from tests.tiny import FAMILIES, tiny_model, tiny_parent, tiny_tokens

State = dict[str, Tensor]


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value != "absent"}))


def rewrite(folder: Path, change: Callable[[State], State]) -> None:
    state = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file({k: t.contiguous() for k, t in change(state).items()}, folder / "model.safetensors", {"format": "pt"})


def shards(folder: Path, parts: dict[str, State], weight_map: dict[str, str] | None = None) -> None:
    (folder / "model.safetensors").unlink(missing_ok=True)
    for name, state in parts.items():
        save_file(state, folder / name, {"format": "pt"})
    own = {key: name for name, state in parts.items() for key in state}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map or own}))


def prepared(source: Path, workspace: Path, **options: Any) -> ParentInfo:
    return prepare_parent(FolderParent(path=str(source), **options), workspace, None)


def refused(source: ParentSource, workspace: Path) -> str:
    with pytest.raises(ParentError) as caught:
        prepare_parent(source, workspace, None)
    assert not list((workspace / "parent").glob("*")), "a refused parent leaves nothing behind"
    return str(caught.value)


def assert_as_transformers(folder: Path, workspace: Path, file: str | None = None, **options: Any) -> Parent:
    """The prepared parent gives what transformers' own load gives."""
    source = GgufParent(path=str(folder / file)) if file else FolderParent(path=str(folder), **options)
    info = prepare_parent(source, workspace, None)
    parent = Parent(workspace / info.folder, HOST)
    tokens = tiny_tokens()
    theirs: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, gguf_file=file).eval()
    with torch.no_grad():
        expected = theirs(tokens).logits
        assert torch.allclose(parent.model()(tokens).logits, expected, atol=2e-5)
        again: Any = AutoModelForCausalLM.from_pretrained(workspace / info.folder, dtype=torch.float32)
        assert torch.allclose(again(tokens).logits, expected, atol=2e-5)
        assert torch.equal(parent.head_weight(), theirs.lm_head.weight)
    assert set(parent._files) <= set(theirs.state_dict())
    alone = workspace / "alone"
    alone.mkdir()
    write_config(source, alone)
    assert Parent(alone, HOST).config.tie_word_embeddings == parent.config.tie_word_embeddings
    assert Parent(alone, HOST).dtype == parent.dtype
    return parent


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tiny_parent(tmp_path / "source", layers=2)


def own_head(state: State) -> State:
    return state | {"lm_head.weight": torch.randn(state["model.embed_tokens.weight"].shape)}


def only_head(state: State) -> State:
    return state | {"lm_head.weight": state.pop("model.embed_tokens.weight")}


def inv_freq(state: State) -> State:
    return state | {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(4) for layer in range(2)}


def masks(state: State) -> State:
    mask = torch.ones(8, 8).tril()[None, None]
    attention = {"attn.masked_bias": torch.tensor(-1e4), "attn.bias": mask, "self_attn.bias": mask.bool()}
    more = {"self_attn.rotary_emb.freqs_cis": torch.ones(8, 4), "rotary_emb.original_inv_freq": torch.ones(4)}
    return state | {f"model.layers.1.{name}": tensor for name, tensor in {**attention, **more}.items()}


def vision(state: State) -> State:
    more = {"vision_tower.layers.0.self_attn.q_proj.weight": torch.ones(3, 3), "mm_projector.0.bias": torch.ones(2)}
    return state | more | {"model.layers.7.mlp.up_proj.weight": torch.ones(2, 2)}


def prefixed(state: State) -> State:
    return {name.removeprefix("model."): tensor for name, tensor in state.items()}


def doubly_prefixed(state: State) -> State:
    return {f"model.{name}": tensor for name, tensor in state.items()}


def halves(state: State) -> State:
    return {name: tensor.half() for name, tensor in state.items()}


def mixed(state: State) -> State:
    return {name: tensor.bfloat16() if tensor.dim() > 1 else tensor for name, tensor in state.items()}


ODD: dict[str, tuple[Callable[[State], State], dict[str, Any]]] = {
    "tied, own head": (own_head, {"tie_word_embeddings": True}),
    "tied, head alone": (only_head, {"tie_word_embeddings": True}),
    "left-over buffers": (inv_freq, {}),
    "masks and caches": (masks, {}),
    "vision tower": (vision, {}),
    "asks for attentions": (lambda state: state, {"output_attentions": True, "output_hidden_states": True}),
    "layer types that Llama does not read": (
        lambda state: state,
        {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4},
    ),
    "chunks that Llama does not read": (
        lambda state: state,
        {"layer_types": ["chunked_attention"] * 2, "attention_chunk_size": 4},
    ),
    "no prefix": (prefixed, {}),
    "two prefixes": (doubly_prefixed, {}),
    "float16, not said": (halves, {"dtype": "absent"}),
    "mixed": (mixed, {"dtype": "bfloat16"}),
    "mixed, not said": (mixed, {"dtype": "absent"}),
    "quantised by nothing": (lambda state: state, {"quantization_config": "absent"}),
}


@pytest.mark.parametrize("odd", ODD)
def test_odd_folders_are_what_transformers_loads(tmp_path: Path, source: Path, odd: str) -> None:
    change, settings = ODD[odd]
    rewrite(source, change)
    edit(source, **settings)
    assert_as_transformers(source, tmp_path / "work")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_heads_of_all_families(tmp_path: Path, family: str, tied: bool) -> None:
    folder = tiny_parent(tmp_path / "source", family, layers=2, tie_word_embeddings=tied)
    edit(folder, tie_word_embeddings=True)
    parent = assert_as_transformers(folder, tmp_path / "work")
    assert parent.config.tie_word_embeddings is tied
    rewrite(folder, own_head)
    edit(folder, tie_word_embeddings=tied)
    parent = assert_as_transformers(folder, tmp_path / "again")
    assert not parent.config.tie_word_embeddings


def test_the_dtype_of_the_parent(tmp_path: Path, source: Path) -> None:
    expected = {
        "float16": torch.float16,
        "bfloat16": torch.bfloat16,
        "float32": torch.float32,
        "float64": torch.float32,
    }
    for name, dtype in expected.items():
        edit(source, dtype=name)
        assert Parent(tmp_path / "work" / prepared(source, tmp_path / "work").folder).dtype == dtype
    edit(source, dtype="absent", torch_dtype="bfloat16")
    assert Parent(tmp_path / "work" / prepared(source, tmp_path / "work").folder).dtype == torch.bfloat16
    rewrite(source, halves)
    edit(source, torch_dtype="absent")
    assert Parent(tmp_path / "work" / prepared(source, tmp_path / "work").folder).dtype == torch.float16


def test_notes_say_what_was_left_out(tmp_path: Path, source: Path) -> None:
    rewrite(source, lambda state: vision(inv_freq(mixed(state))))
    notes = prepared(source, tmp_path / "work").notes
    assert (
        "ignored, as transformers ignores them: mm_projector.0.bias, model.layers.7.mlp.up_proj.weight and 1"
        in notes[0]
    )
    assert "several dtypes (bfloat16, float32)" in notes[1]
    again = prepared(source, tmp_path / "work")
    assert again.notes == notes


LAYER = "model.layers.1."


def drop(name: str) -> Callable[[State], State]:
    return lambda state: {key: tensor for key, tensor in state.items() if key != name}


def put(name: str, tensor: Tensor) -> Callable[[State], State]:
    return lambda state: state | {name: tensor}


def broken(name: str, value: float) -> Callable[[State], State]:
    return lambda state: state | {name: state[name].index_fill(0, torch.tensor([1]), value)}


WRONG: dict[str, tuple[Callable[[State], State], dict[str, Any], str]] = {
    "no head": (drop("lm_head.weight"), {}, "lm_head.weight is missing. Set tie_word_embeddings: true"),
    "no norm": (drop("model.norm.weight"), {}, "model.norm.weight is missing"),
    "no middle": (drop(f"{LAYER}self_attn.o_proj.weight"), {}, f"{LAYER}self_attn.o_proj.weight is missing"),
    "narrow": (put(f"{LAYER}mlp.up_proj.weight", torch.ones(40, 32)), {}, "has shape [40, 32], expected [48, 32]"),
    "long vocabulary": (put("lm_head.weight", torch.ones(70, 32)), {}, "lm_head.weight has shape [70, 32]"),
    "tied, longer head": (put("lm_head.weight", torch.ones(70, 32)), {"tie_word_embeddings": True}, "shape [70, 32]"),
    "bias": (put(f"{LAYER}self_attn.q_proj.bias", torch.ones(32)), {}, "q_proj.bias, for which"),
    "no bias": (lambda state: state, {"attention_bias": True}, "q_proj.bias, model.layers.0.self_attn.k_proj.bias"),
    "head's bias": (put("lm_head.bias", torch.ones(64)), {}, "lm_head.bias, for which"),
    "norm of heads": (put(f"{LAYER}self_attn.q_norm.weight", torch.ones(8)), {}, "q_norm.weight, for which"),
    "adapter": (put("layers.0.mlp.up_proj.lora_A.weight", torch.ones(2, 32)), {}, "merge adapters"),
    "scales": (put(f"{LAYER}mlp.up_proj.weight_scale", torch.ones(1)), {}, "weight_scale, for which"),
    "twice": (put("layers.0.mlp.up_proj.weight", torch.ones(48, 32)), {}, "up_proj.weight twice"),
    "float8": (put("model.norm.weight", torch.ones(32).to(torch.float8_e4m3fn)), {}, "stored as F8_E4M3"),
    "integers": (put("model.norm.weight", torch.ones(32, dtype=torch.int8)), {}, "stored as I8"),
    "NaN": (
        broken(f"{LAYER}mlp.down_proj.weight", float("nan")),
        {},
        "down_proj.weight in model.safetensors holds NaN",
    ),
    "infinite": (broken("lm_head.weight", float("inf")), {}, "lm_head.weight in model.safetensors holds NaN or inf"),
    "quantised": (lambda state: state, {"quantization_config": {"quant_method": "awq"}}, "is quantised"),
    "impossible": (lambda state: state, {"num_attention_heads": 5}, "can"),
    "other model": (lambda state: {f"transformer.{k}": t for k, t in state.items()}, {}, "The files have transformer."),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_folders_are_refused(tmp_path: Path, source: Path, wrong: str) -> None:
    change, settings, sentence = WRONG[wrong]
    rewrite(source, change)
    edit(source, **settings)
    assert sentence in refused(FolderParent(path=str(source)), tmp_path / "work")


def test_shards(tmp_path: Path, source: Path) -> None:
    state = load_file(source / "model.safetensors")
    names = sorted(state)
    first, second = ({name: state[name] for name in names[start::2]} for start in (0, 1))
    files = {"model-00001-of-00002.safetensors": first, "model-00002-of-00002.safetensors": second}
    swapped = dict(zip(names, [*list(files)[::-1] * len(names)][: len(names)], strict=True))
    shards(source, files, swapped)  # which shard a tensor lies in is read from the shards
    parent = assert_as_transformers(source, tmp_path / "work")
    assert len(set(parent._files.values())) == 2
    folder = FolderParent(path=str(source))
    shards(source, files, {**swapped, "model.norm.weight": "model-00003-of-00003.safetensors"})
    assert "lacks model-00003-of-00003.safetensors" in refused(folder, tmp_path / "refused")
    shards(source, files, dict.fromkeys(first, "model-00001-of-00002.safetensors"))
    message = refused(folder, tmp_path / "refused")
    assert "are missing. model-00002-of-00002.safetensors holds it" in message
    (source / "model.safetensors.index.json").write_text("[]")
    assert "is not an index of weights" in refused(folder, tmp_path / "refused")
    shards(source, {**files, "model-00002-of-00002.safetensors": {**second, names[0]: state[names[0]]}})
    assert f"hold {names[0]} twice" in refused(folder, tmp_path / "refused")
    shards(source, files)
    (source / "model-00002-of-00002.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert "Git LFS pointer" in refused(folder, tmp_path / "refused")


def test_the_whole_file_goes_before_the_index(tmp_path: Path, source: Path) -> None:
    other = tiny_model(layers=2, seed=9).state_dict()
    whole = (source / "model.safetensors").read_bytes()
    shards(source, {"model-00001-of-00001.safetensors": {name: tensor.clone() for name, tensor in other.items()}})
    (source / "model.safetensors").write_bytes(whole)
    assert_as_transformers(source, tmp_path / "work")


def test_folders_with_code_adapters_or_a_child_in_them(tmp_path: Path, source: Path) -> None:
    edit(source, auto_map={"AutoModelForCausalLM": "own.Model", "AutoConfig": "own.Config"})
    (source / "own.py").write_text("raise RuntimeError('not run here')\n")
    assert "trust_remote_code: true" in refused(FolderParent(path=str(source)), tmp_path / "refused")
    parent = assert_as_transformers(source, tmp_path / "work", trust_remote_code=True)
    assert "auto_map" not in (parent.folder / "config.json").read_text()
    edit(source, auto_map="absent")
    (source / "adapter_config.json").write_text("{}")
    assert "holds an adapter" in refused(FolderParent(path=str(source)), tmp_path / "refused")
    (source / "adapter_config.json").unlink()
    model = Parent(source, HOST).model([LayerChoice(), LayerChoice(ffn="no_op")])
    export_folder(model, source, tmp_path / "child", "# card")
    for trust in (True, False):
        message = refused(FolderParent(path=str(tmp_path / "child"), trust_remote_code=trust), tmp_path / "refused")
        assert "this is a child that puzzle wrote" in message


@pytest.mark.parametrize("name", ["a [1] b", "what? 100%20", "größe ✓ {x}", "*", "-m", "a.gguf"])
def test_names_of_folders_are_letters(tmp_path: Path, source: Path, name: str) -> None:
    source.rename(tmp_path / name)
    info = prepared(tmp_path / name, tmp_path / "work")
    assert info.name == name
    assert_as_transformers(tmp_path / name, tmp_path / "again")


def write_gguf(
    path: Path,
    family: Any = "llama",
    quantise: Any = None,
    extra: State | None = None,
    sizes: dict[str, int] | None = None,
    **options: Any,
) -> Any:
    """A model of three layers as GGUF, as a converter would name things; options: of gguf.GGUFWriter."""
    # transformers reads no key_length of a qwen3, and takes 256 for the scale of any gemma3
    sizes = sizes or {"qwen3": {"head_dim": 128}, "gemma3_text": {"head_dim": 256, "query_pre_attn_scalar": 256}}.get(
        family, {}
    )
    model = tiny_model(family, tie_word_embeddings=True, **sizes)
    config = model.config
    title = {"gemma3_text": "gemma3", "mistral": "llama"}.get(family, family)
    writer: Any = gguf.GGUFWriter(path, title, **options)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_key_length(getattr(config, "head_dim", 8))
    writer.add_rope_dimension_count(getattr(config, "head_dim", 8))
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    letters = [chr(33 + index) for index in range(59)]
    writer.add_token_list([*letters, letters[0] + letters[1], "<unk>", "<bos>", "<eos>", "<pad>"])
    writer.add_token_types([1] * 60 + [3] * 4)
    writer.add_token_merges([f"{letters[0]} {letters[1]}"])
    writer.add_bos_token_id(61)
    writer.add_eos_token_id(62)
    architecture = {title: key for key, title in gguf.MODEL_ARCH_NAMES.items()}[title]
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    for name, tensor in {**model.state_dict(), **(extra or {})}.items():
        stem, _, suffix = name.rpartition(".")
        if name == "lm_head.weight":
            continue
        whole_blocks = tensor.dim() > 1 and tensor.shape[-1] % 32 == 0
        kind = quantise if quantise is not None and whole_blocks else gguf.GGMLQuantizationType.F32
        data = gguf.quants.quantize(tensor.float().numpy(), kind)
        writer.add_tensor(f"{names.get_name(stem) or stem}.{suffix}", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3_text"])
def test_gguf_by_its_path_whole_and_split(tmp_path: Path, family: str) -> None:
    write_gguf(tmp_path / "whole [1]%.gguf", family)
    parent = assert_as_transformers(tmp_path, tmp_path / "work", "whole [1]%.gguf")
    assert parent.dtype == torch.float32
    write_gguf(tmp_path / "many.gguf", family, split_max_tensors=9)
    first = min(tmp_path.glob("many-00001-*.gguf"))
    info = prepare_parent(GgufParent(path=str(first)), tmp_path / "split", None)
    assert (info.name, info.source) == ("many", f"gguf {first.name}")
    whole = prepare_parent(GgufParent(path=str(tmp_path / "whole [1]%.gguf")), tmp_path / "split", None)
    assert info.fingerprint == whole.fingerprint
    write_config(GgufParent(path=str(first)), tmp_path / "split")
    assert Parent(tmp_path / "split", HOST).depth == 3


def test_a_gemma3_of_another_head_size_has_llama_cpps_scale(tmp_path: Path) -> None:
    """transformers' own load of such a file divides by sqrt(256) and gives other logits without a word."""
    write_gguf(tmp_path / "g.gguf", "gemma3_text", sizes={"head_dim": 16})
    theirs: Any = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="g.gguf", dtype=torch.float32).eval()
    for layer in theirs.model.layers:
        assert layer.self_attn.scaling == 1 / 16
        layer.self_attn.scaling = 1 / 4
    info = prepare_parent(GgufParent(path=str(tmp_path / "g.gguf")), tmp_path / "work", None)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        ours = Parent(tmp_path / "work" / info.folder, HOST).model()(ids).logits
        torch.testing.assert_close(ours, theirs(ids).logits)


PRECISIONS = {"F16": torch.float16, "BF16": torch.bfloat16, "Q8_0": torch.bfloat16, "Q4_0": torch.bfloat16}


@pytest.mark.parametrize("kind", PRECISIONS)
def test_gguf_precisions(tmp_path: Path, kind: str) -> None:
    write_gguf(tmp_path / "some.gguf", quantise=gguf.GGMLQuantizationType[kind])
    parent = assert_as_transformers(tmp_path, tmp_path / "work", "some.gguf")
    assert parent.dtype == PRECISIONS[kind]


def test_gguf_refusals(tmp_path: Path) -> None:
    write_gguf(tmp_path / "many.gguf", split_max_tensors=9)
    parts = sorted(tmp_path.glob("many-*.gguf"))
    count = len(parts)
    work = tmp_path / "work"

    def said(path: Path) -> str:
        message = refused(GgufParent(path=str(path)), work)
        with pytest.raises(ParentError):
            write_config(GgufParent(path=str(path)), tmp_path)
        return message

    assert f"is part 2 of {count} of a split model: name many-00001-of-" in said(parts[1])
    alone = tmp_path / "alone.gguf"
    shutil.copyfile(parts[0], alone)
    assert "its name does not say where the others are" in said(alone)
    shutil.copyfile(parts[1], alone)
    assert f"is part 2 of {count}" in said(alone)
    kept = parts[-1].read_bytes()
    parts[-1].unlink()
    assert f"{parts[-1].name} must lie beside it" in said(parts[0])
    shutil.copyfile(parts[1], parts[-1])
    assert f"does not say that it is part {count} of {count}" in said(parts[0])
    for length in (len(kept) - 40, 60):
        parts[-1].write_bytes(kept[:length])
        assert "etch it again" in said(parts[0])
    parts[-1].write_bytes(kept)
    assert prepare_parent(GgufParent(path=str(parts[0])), tmp_path / "good", None).name == "many"
    assert "does not exist" in said(tmp_path / "nowhere.gguf")
    assert "is a folder: name the .gguf file" in said(tmp_path)


def test_gguf_that_transformers_would_read_as_another_model(tmp_path: Path) -> None:
    path = tmp_path / "some.gguf"
    for extra, sentence in (
        ({"rope_freqs.weight": torch.ones(4)}, "scales its rotary frequencies"),
        ({"blk.0.attn_q.bias": torch.ones(32)}, "holds blk.0.attn_q.bias, for which llama has no place"),
        ({"blk.3.attn_q.weight": torch.ones(32, 32)}, "holds blk.3.attn_q.weight"),
    ):
        write_gguf(path, extra=extra)
        assert sentence in refused(GgufParent(path=str(path)), tmp_path / "work")


@pytest.mark.parametrize(
    "key", ["rope.scaling.factor", "rope.scaling.attn_factor", "rope.scale_linear", "attention.layer_norm_rms_epsilon"]
)
def test_gguf_metadata_that_transformers_passes_over(tmp_path: Path, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if key.startswith("rope"):
        end = gguf.GGUFWriter.write_header_to_file
        monkeypatch.setattr(
            gguf.GGUFWriter,
            "write_header_to_file",
            lambda self: (self.add_float32(f"llama.{key}", 4.0), end(self)),
        )
    else:
        monkeypatch.setattr(gguf.GGUFWriter, "add_layer_norm_rms_eps", lambda self, value: None)
    write_gguf(tmp_path / "some.gguf")
    sentence = "scales its rotary frequencies" if key.startswith("rope") else f"lacks {key}"
    assert sentence in refused(GgufParent(path=str(tmp_path / "some.gguf")), tmp_path / "work")


def test_gguf_as_a_folder_is_told_what_to_write(tmp_path: Path) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    write_gguf(folder / "some.gguf")
    expected = f'write `parent: {{kind: gguf, path: "{folder / "some.gguf"}"}}`'
    for path in (folder, folder / "some.gguf"):
        assert expected in refused(FolderParent(path=str(path)), tmp_path / "work")
    (folder / "notes.txt").write_text("x")
    assert "is a file: name the folder" in refused(FolderParent(path=str(folder / "notes.txt")), tmp_path / "work")


def test_gguf_split_in_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "packages" / "splitgguf"
    package.mkdir(parents=True)
    monkeypatch.syspath_prepend(str(package.parent))
    write_gguf(package / "many.gguf", split_max_tensors=12)
    first = min(package.glob("*.gguf"))
    info = prepare_parent(PackageParent(package="splitgguf", file=first.name), tmp_path / "work", None)
    assert (info.name, info.source) == ("many", f"package splitgguf, {first.name}")
    assert "its own dtype, which a child follows, is taken to be float32" in info.notes[0]


def test_served_gguf_lies_below_a_root(tmp_path: Path) -> None:
    data, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    data.mkdir()
    elsewhere.mkdir()
    roots = Roots(workspaces=tmp_path, data={"own": data})
    corpus = {"sources": [{"kind": "python_stdlib"}]}

    def admit(name: str) -> None:
        profile = {
            "name": "t",
            "parent": {"kind": "gguf", "path": f"own/{name}"},
            "corpus": corpus,
            "budget": {"speedup": 2},
        }
        admitted(ServedProfile.model_validate(profile), roots)

    for name in ("m.gguf", "m-00001-of-00002.gguf", "m-00002-of-00002.gguf"):
        (elsewhere / name).write_text("")
    (data / "m-00001-of-00002.gguf").write_text("")
    admit("m-00001-of-00002.gguf")
    (data / "m-00002-of-00002.gguf").symlink_to(elsewhere / "m-00002-of-00002.gguf")
    (data / "[m].gguf").symlink_to(elsewhere / "m.gguf")
    for name in ("m-00001-of-00002.gguf", "[m].gguf"):
        with pytest.raises(Refused, match="leads out"):
            admit(name)
