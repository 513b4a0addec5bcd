"""GGUF without an engine: the packing against a model of llama.cpp's deci layer, round trips, tokenizers."""

import json
import random
from itertools import product
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from blocks.errors import PuzzleError
from blocks.export_code.modeling_decilm import DeciLMForCausalLM
from blocks.files import write_text
from tasks.export.child_tokenizer import open_tokenizer
from tasks.gguf.header import GgufError, read_header, without_vocabulary
from tasks.gguf.layout import FILLER_WIDTH, packed
from tasks.gguf.pre_tokenizers import split_of
from tasks.gguf.reader import GgufFile, read_gguf
from tasks.gguf.tokenizer_writer import NO_TOKENIZER, TokenizerLimit, copied_tokenizer, fields_of
from tasks.gguf.writer import PRECISIONS, UnknownPrecision, interleaved, rotate_half, write_gguf
from tests.test_modeling import LINEAR, NO_OP, attention, ffn, mixed_blocks, tiny_child, tiny_parent, token_ids


def child_of(family: str = "llama", blocks: list[dict[str, Any]] | None = None, **changes: Any) -> DeciLMForCausalLM:
    fields = {"attention_bias": False} if family == "llama" else {}
    return tiny_child(tiny_parent(family, **(fields | changes)), blocks or mixed_blocks())


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(token_ids(1, 20)).logits


def written(model: Any, folder: Path, precision: str = "float32", tokenizer: dict[str, Any] = NO_TOKENIZER) -> Path:
    return write_gguf(model, folder / "child.gguf", precision, tokenizer, "tiny")


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"tie_word_embeddings": True, "head_dim": 16}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e3, "factor": 4.0}}),
        ("qwen2", {}),
    ],
)
def test_round_trip(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    child = child_of(family, **changes)
    back = read_gguf(written(child, tmp_path))
    assert back.config.block_configs == child.config.block_configs
    assert back.config.base_model_type == family
    own = child.state_dict()
    assert set(back.state_dict()) == set(own)
    assert all(torch.equal(own[name], tensor) for name, tensor in back.state_dict().items())
    assert torch.equal(logits(back), logits(child))


@pytest.mark.parametrize(("precision", "allowed"), [("float16", 1e-3), ("bfloat16", 6e-3), ("q8_0", 2e-2)])
def test_rounded_weights_come_back_rounded(precision: str, allowed: float, tmp_path: Path) -> None:
    child = child_of()
    path = written(child, tmp_path, precision)
    back, own = read_gguf(path).state_dict(), child.state_dict()
    errors = {name: float((own[name] - tensor).norm() / own[name].norm()) for name, tensor in back.items()}
    assert all(error == 0 for name, error in errors.items() if "norm" in name)
    assert 0 < max(errors.values()) < allowed
    kinds = {name: tensor.type_id for name, tensor in GgufFile(path).tensors.items()}
    wanted = PRECISIONS[precision][0]
    assert kinds["blk.2.attn_q.weight"] == wanted
    # 48 columns hold no whole number of 32-blocks
    down = next(
        name for name in kinds if name.endswith("ffn_down.weight") and GgufFile(path).tensors[name].shape[0] == 48
    )
    assert kinds[down] == (gguf.GGMLQuantizationType.F16 if precision == "q8_0" else wanted)


def runs_as_deci(layers: list[Any]) -> list[tuple[str, str]]:
    """What llama.cpp's deci graph makes of GGUF layers: (kind, source) of every sub-layer that is computed."""
    done = []
    for layer in layers:
        sources = {entry.name: entry.source for entry in layer.entries}
        if layer.feed_forward_length == 0:
            continue  # the whole layer is dropped
        if layer.head_count and layer.head_count_kv:
            done.append(("attention", sources["attn_q.weight"]))
        elif layer.head_count and sources["attn_output.weight"]:
            done.append(("linear", sources["attn_output.weight"]))
        if sources["ffn_down.weight"]:
            done.append(("swiglu", sources["ffn_down.weight"]))
    return done


def expected_order(blocks: list[dict[str, Any]]) -> list[tuple[str, str]]:
    order = []
    for index, block in enumerate(blocks):
        at = f"model.layers.{index}."
        names = {
            "attention": ("attention", "self_attn.q_proj", "self_attn.linear_attn"),
            "ffn": ("swiglu", "mlp.down_proj", "mlp.linear_mlp"),
        }
        for subblock, (kind, whole, linear) in names.items():
            if not block[subblock]["no_op"]:
                is_linear = block[subblock]["replace_with_linear"]
                order.append(("linear" if is_linear else kind, f"{at}{linear if is_linear else whole}.weight"))
    return order


def test_any_order_of_sublayers_is_packed_so_that_deci_runs_all_in_order() -> None:
    kinds = list(product((attention(2), attention(1), LINEAR, NO_OP), (ffn(48), LINEAR, NO_OP)))
    config = child_of().config
    for first, second in product(kinds, kinds):
        config.block_configs = [{"attention": pair[0], "ffn": pair[1]} for pair in (first, second)]
        layers = packed(config)
        assert runs_as_deci(layers) == expected_order(config.block_configs)
        assert layers[0].head_count == config.num_attention_heads  # the head size is read off it
        assert all(layer.feed_forward_length >= FILLER_WIDTH for layer in layers)


def test_whole_layers_are_packed_one_to_one() -> None:
    layers = packed(child_of(blocks=[{"attention": attention(2), "ffn": ffn(48)}] * 6).config)
    assert [(layer.head_count, layer.head_count_kv, layer.feed_forward_length) for layer in layers] == [(4, 2, 48)] * 6


def test_rows_are_interleaved_per_head() -> None:
    rows = torch.arange(8).float()[:, None]  # 2 heads of 4: first half 0 1, second half 2 3
    assert interleaved(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert torch.equal(rotate_half(interleaved(rows, 2), 2), rows)


def test_a_file_without_puzzles_config_is_read_from_its_metadata(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = child_of()
    monkeypatch.setattr("tasks.gguf.writer.CONFIG_KEY", "somebody.elses")
    back = read_gguf(written(child, tmp_path))
    torch.testing.assert_close(logits(back), logits(child), rtol=0, atol=1e-5)  # linear FFNs are layers of their own
    assert len(back.config.block_configs) == len(packed(child.config))
    assert back.config.block_configs[1]["attention"]["replace_with_linear"]


def test_what_is_no_gguf_is_refused_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(GgufError, match=r"cannot be read as GGUF"):
        read_gguf(write_text(tmp_path / "x.gguf", "not a model"))
    writer = gguf.GGUFWriter(tmp_path / "y.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(GgufError, match="architecture mamba: only deci and llama"):
        read_gguf(tmp_path / "y.gguf")
    with pytest.raises(UnknownPrecision, match="q8_0"):
        written(child_of(), tmp_path, "q4_k")


def bpe_folder(folder: Path, pre: Any, special: str = "<|end|>") -> Path:
    letters = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=letters | {"ab": 256, "abc": 257}, merges=[("a", "b"), ("ab", "c")]))
    tokenizer.pre_tokenizer = pre
    tokenizer.add_special_tokens([special])
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    write_text(folder / "tokenizer_config.json", json.dumps({"eos_token": special, "chat_template": "{{ x }}"}))
    return folder


def converted_tokenizer(folder: Path, vocab_size: int) -> dict[str, Any]:
    """GGUF's fields for the tokenizer of a folder."""
    return fields_of(open_tokenizer(folder), vocab_size)


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
DIGITS = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTES])


@pytest.mark.parametrize("name", ["gpt-2", "smollm", "qwen2", "smaug-bpe"])
def test_a_split_is_what_its_name_says(tmp_path: Path, name: str) -> None:
    """From llama.cpp's name to a tokenizer.json and back."""
    fields = converted_tokenizer(bpe_folder(tmp_path, split_of(name)), 259)
    assert fields is not None and fields["tokenizer.ggml.pre"] == name
    with pytest.raises(ValueError, match="'bloom', which is not known here"):
        split_of("bloom")


def test_tokenizers_are_converted_where_their_split_is_known_and_copied_from_a_gguf(tmp_path: Path) -> None:
    fields = converted_tokenizer(bpe_folder(tmp_path / "a", BYTES), 260)
    assert fields is not None
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    assert fields["tokenizer.ggml.tokens"][256:] == ["ab", "abc", "<|end|>", "[PAD259]"]
    assert fields["tokenizer.ggml.token_type"][256:] == [1, 1, 3, 5]
    assert fields["tokenizer.ggml.merges"] == ["a b", "ab c"]
    assert (fields["tokenizer.ggml.eos_token_id"], fields["tokenizer.chat_template"]) == (258, "{{ x }}")
    digits = converted_tokenizer(bpe_folder(tmp_path / "b", DIGITS), 259)
    assert digits is not None and digits["tokenizer.ggml.pre"] == "smollm"
    no_regex = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for unknown in (no_regex, pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=True)):
        with pytest.raises(TokenizerLimit, match=r"splits text as none of those do .* --tokenizer-from none"):
            converted_tokenizer(bpe_folder(tmp_path / "c", unknown), 259)
    assert open_tokenizer(tmp_path) is None
    path = written(child_of(), tmp_path, tokenizer=fields)
    assert copied_tokenizer(path) == fields


def with_vocabulary(folder: Path, stated: bool = False) -> Path:
    """A file with a tokenizer, an array of every kind, and three tensors."""
    path = folder / "whole.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(64)
    if stated:
        writer.add_vocab_size(9)
    writer.add_token_list(["a", "ö", ""])
    writer.add_token_scores([0.5, -1.0, 2.0])
    writer.add_array("llama.rope.sections", [3, 4])
    writer.add_bos_token_id(1)
    writer.add_bool("llama.flag", True)
    for index in range(3):
        writer.add_tensor(f"t{index}", torch.arange(10.0 * index, 10.0 * index + 5).numpy())
    for step in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
        getattr(writer, step)()
    return path


def test_a_header_is_what_the_gguf_package_reads(tmp_path: Path) -> None:
    path = with_vocabulary(tmp_path)
    theirs, header = gguf.GGUFReader(path), read_header(path)
    assert header.fields == {k: f.contents() for k, f in theirs.fields.items() if not k.startswith("GGUF.")}
    for tensor in theirs.tensors:
        place = header.tensors[tensor.name]
        assert (list(place.shape), place.type_id) == (tensor.shape.tolist(), tensor.tensor_type)
        assert header.weights_at + place.offset == tensor.data_offset


@pytest.mark.parametrize("stated", [False, True])
@pytest.mark.parametrize("weights", [False, True])
def test_without_its_vocabulary_a_file_says_everything_else(stated: bool, weights: bool, tmp_path: Path) -> None:
    path = with_vocabulary(tmp_path, stated)
    whole = without_vocabulary(path, tmp_path / "short.gguf", weights)
    short = read_header(tmp_path / "short.gguf")
    lists = {"tokenizer.ggml.tokens", "tokenizer.ggml.scores"}
    kept = {key: value for key, value in whole.fields.items() if key not in lists}
    assert short.fields == kept | {"llama.vocab_size": 9 if stated else 3} and whole == read_header(path)
    assert short.tensors == whole.tensors
    for own, theirs in zip(
        gguf.GGUFReader(tmp_path / "short.gguf").tensors, gguf.GGUFReader(path).tensors, strict=True
    ):
        assert own.data.tolist() == (theirs.data.tolist() if weights else [0.0] * 5)


def test_a_cut_file_is_refused_wherever_it_is_cut(tmp_path: Path) -> None:
    path = with_vocabulary(tmp_path)
    whole, header = path.read_bytes(), read_header(path)
    for length in range(0, header.table[1], 7):
        path.write_bytes(whole[:length])
        with pytest.raises(GgufError, match="cannot be read as GGUF"):
            read_header(path)
    path.write_bytes(whole[: header.weights_at + 8])
    with pytest.raises(GgufError, match="the tensor t0 .* cannot be read"):
        GgufFile(path).tensor("t0")


def test_a_damaged_file_is_refused_or_read_but_never_a_traceback(tmp_path: Path) -> None:
    """Cut off anywhere (a broken download), and flipped bits in the header."""
    raw = written(child_of(), tmp_path, "q8_0").read_bytes()
    draw = random.Random(0)
    refused = 0
    for number in range(60):
        damaged = bytearray(raw)
        if number % 2:
            del damaged[draw.randrange(len(raw)) :]
        else:
            damaged[draw.randrange(6000)] ^= 1 << draw.randrange(8)
        path = tmp_path / "damaged.gguf"
        path.write_bytes(damaged)
        try:
            read_gguf(path)
        except PuzzleError as error:
            refused += 1
            assert "gguf" in str(error).lower()
    assert refused > 30
