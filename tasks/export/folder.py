"""Write a child as a Hugging Face folder. Whoever loads it needs transformers or a serving engine, but not puzzle.

A child whose layers differ is written in the nemotron-nas schema: `block_configs`, `DeciLMForCausalLM`, and the
files of blocks/export_code beside the weights. A child whose layers are all alike is written as a plain model of its
parent's family. Both have the same names of weights.
"""

import importlib
import json
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

import torch
import yaml
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, PreTrainedConfig

from blocks import export_code
from blocks.engine_limits import gaps, is_whole, known_engine
from blocks.errors import PuzzleFailure
from blocks.export_code import AUTO_MAP, CODE_FILES, PLUGIN
from blocks.export_code.configuration_decilm import DeciLMConfig
from blocks.export_code.families_decilm import FAMILIES
from blocks.export_code.modeling_decilm import MOE, DeciLMForCausalLM, family_class, has_own_layer
from blocks.export_code.vllm_plugin.puzzle_vllm import ARCHITECTURE
from blocks.families import beyond_llama
from blocks.images import VISION
from blocks.records import CorpusInfo, ParentInfo
from tasks.inputs.companions import copy_companions

if TYPE_CHECKING:
    from tasks.export.compressed import Compressed

# serving engines that the card lists, and how each takes a child
CARD_ENGINES = {
    "vllm": "as DeciLMForCausalLM",
    "vllm-plugin": "exported with --format vllm-plugin",
    "tensorrt-llm": "as DeciLMForCausalLM",
    "sglang": "as DeciLMForCausalLM",
}


class ExportError(PuzzleFailure):
    """The written folder does not give the logits of the model in memory."""


def export_child(model: DeciLMForCausalLM, parent: ParentInfo, workspace: Path, target: Path, card: str) -> Path:
    """Write a child of a workspace's parent to the folder `target` and return it; `card` becomes its README.md."""
    return export_folder(model, workspace / parent.folder, target, card)


def export_folder(
    model: DeciLMForCausalLM,
    files_from: Path,
    target: Path,
    card: str,
    form: str = "transformers",
    compressed: "Compressed | None" = None,
) -> Path:
    """Write `model` to the folder `target`, with the tokenizer, chat templates and licence files of another folder.

    form: `nemotron-nas` and `vllm-plugin` use the nemotron-nas schema even when all layers are alike; `vllm-plugin`
    names the plugin's architecture and brings the plugin. compressed: what the folder holds in the
    place of rounded weights, which `model` has. The folder is written and verified under
    another name beside `target` and then renamed, so an export that fails or is killed does not change `target`.
    Raises ExportError when the logits of the reloaded folder are not exactly the model's.
    """

    def write(folder: Path) -> None:
        write_checkpoint(model, folder, form, compressed)
        if (files_from / VISION).is_dir():  # `puzzle export` makes a whole model of it again
            shutil.copytree(files_from / VISION, folder / VISION)

    return write_folder(files_from, target, card, write, partial(verify_checkpoint, model))


def write_folder(
    files_from: Path, target: Path, card: str, write: Callable[[Path], None], verify: Callable[[Path], None]
) -> Path:
    """Have a folder written and verified beside `target`, then renamed; with what lies beside the weights in another
    folder, and a card. See `export_folder`.
    """
    target = target.absolute()
    part, old = target.with_name(f".{target.name}.part"), target.with_name(f".{target.name}.old")
    if old.exists() and not target.exists():  # killed between the two moves below
        old.rename(target)
    for leftover in (part, old):
        shutil.rmtree(leftover, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        write(part)
        copy_companions(files_from, part)
        (part / "README.md").write_text(card, encoding="utf-8")
        for file in (path for path in part.rglob("*") if path.is_file()):
            file.chmod(0o644)  # safetensors writes for its owner alone; an engine runs as somebody else
        verify(part)
        _sync(part)
        if target.exists():
            target.rename(old)
        part.rename(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    return target


def _sync(folder: Path) -> None:
    """Make sure that every file of a folder is on the disk, before the folder gets its final name."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def native_config(config: DeciLMConfig) -> PreTrainedConfig | None:
    """A config of the parent's own architecture, if all layers are alike and have attention and FFN; else None."""
    sizes = {layer_sizes(config, layer) for layer in range(len(config.block_configs))}
    kv_heads, ffn = next(iter(sizes))
    fewer = any(block.attention.get("num_attention_heads") for block in config.block_configs)
    if len(sizes) != 1 or kv_heads is None or ffn is None or longest_window(config) or fewer:
        return None
    native, experts = config.base_config(), FAMILIES[config.base_model_type].experts
    native.num_key_value_heads = kv_heads
    for name, size in zip(experts.fields if experts else ("intermediate_size",), ffn, strict=True):
        setattr(native, name, size)
    native.architectures = [_native_name(config)]
    if "layer_types" not in type(native)().to_dict() and hasattr(native, "layer_types"):
        del native.layer_types  # Mistral would be taken for Ministral
    return native


def longest_window(config: DeciLMConfig) -> int:
    """Tokens of the longest window that a layer of the child has of its own; 0 where none has one."""
    return max(block.attention.get("window_length") or 0 for block in config.block_configs)


def _native_name(config: DeciLMConfig) -> str:
    """Name of the parent's own model class, e.g. LlamaForCausalLM."""
    return str(family_class(config.base_model_type, "ForCausalLM").__name__)


def layer_sizes(config: DeciLMConfig, layer: int) -> tuple[int | None, tuple[int, ...] | None]:
    """KV heads of a layer, and the width of its FFN, or the three sizes of its experts. None stands for a subblock that
    is linear or absent.
    """
    block = config.block_configs[layer]
    kv_heads = block["attention"].get("num_key_value_heads") or config.num_key_value_heads
    moe = block["ffn"].get("moe")
    ffn = (
        tuple(moe[name] for name in MOE)
        if moe
        else (block["ffn"].get("intermediate_size") or config.intermediate_size,)
    )
    return (
        kv_heads if is_whole(block["attention"]) else None,
        ffn if is_whole(block["ffn"]) else None,
    )


def write_checkpoint(
    model: DeciLMForCausalLM, folder: Path, form: str = "transformers", compressed: "Compressed | None" = None
) -> None:
    """Write weights (tied ones once), config and generation config of a child; its code if the schema needs that."""
    native = native_config(cast(DeciLMConfig, model.config)) if form in ("transformers", "native") else None
    if compressed is None:
        _saved(model, native).save_pretrained(folder)
    else:
        dense = {name.rpartition(".")[0] + ".weight" for name in compressed.tensors}
        state = {name: tensor for name, tensor in model.state_dict().items() if name not in dense}
        model.save_pretrained(folder, state_dict=state | dict(compressed.tensors))
    if native is not None:
        native.dtype = model.dtype
        native.save_pretrained(folder)
    else:
        # an engine that has DeciLMForCausalLM would load the folder and leave out what Llama lacks, without a word
        config, family = cast(DeciLMConfig, model.config), FAMILIES[model.config.base_model_type]
        entries = [block.attention for block in config.block_configs]
        own = {"Recurrent" if entry.get("recurrent") else "Windowed" for entry in entries if has_own_layer(entry)}
        more = [*sorted(own), family.prefix if beyond_llama(family) else ""]
        more += ["Narrowed"] if any(entry.get("num_attention_heads") for entry in entries) else []
        names = ["".join([*more, name]) for name in config.architectures or ()]
        if form == "vllm-plugin":
            names = [ARCHITECTURE]
            hidden = shutil.ignore_patterns("__pycache__")
            shutil.copytree(Path(export_code.__path__[0]) / PLUGIN, folder / PLUGIN, ignore=hidden)
        add_to_config(folder, auto_map=AUTO_MAP, architectures=names)
        for name in CODE_FILES:
            shutil.copyfile(Path(export_code.__path__[0]) / name, folder / name)
    if compressed is not None:
        add_to_config(folder, quantization_config=compressed.config)


def _saved(model: DeciLMForCausalLM, native: PreTrainedConfig | None) -> Any:
    """What writes the weights: transformers' own model where the layers are alike and have experts. It writes them one
    by one, as engines that run the family read them.
    """
    if native is None or not FAMILIES[str(native.model_type)].experts:
        return model
    with torch.device("meta"):
        plain: Any = AutoModelForCausalLM.from_config(native, dtype=model.dtype)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.generation_config = model.generation_config
    return plain


def add_to_config(folder: Path, **more: Any) -> None:
    """Set fields of a folder's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | more, indent=2) + "\n")


def verify_checkpoint(model: DeciLMForCausalLM, folder: Path, tokens: int = 32) -> None:
    """Raise ExportError unless the folder, loaded as anyone would load it, gives exactly the model's logits."""
    verify_logits(model, _reload(folder, model), tokens)


def verify_logits(model: DeciLMForCausalLM, reloaded: Any, tokens: int = 32) -> None:
    """Raise ExportError unless a model that was loaded again gives exactly the model's logits."""
    config = cast(DeciLMConfig, model.config)
    length = min(max(tokens, 2 * longest_window(config)), config.max_position_embeddings)  # beyond the windows
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (1, length), generator=generator).to(model.device)
    expected, found = _logits(model, ids), _logits(reloaded, ids)
    if not torch.equal(expected, found):
        difference = (expected - found).abs().max().item()
        raise ExportError(
            f"the exported folder differs from the model in memory by up to {difference:.3g} in its logits; they must "
            "be equal. Nothing was replaced: check the disk and the memory, then run again."
        )


@torch.no_grad()
def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """(1, T) ids -> (1, T, vocabulary) logits in evaluation mode. The model's mode is restored afterwards."""
    training = model.training
    try:
        return model.eval()(input_ids=ids, use_cache=False).logits
    finally:
        model.train(training)


def _reload(folder: Path, model: DeciLMForCausalLM) -> Any:
    how: dict[str, Any] = {"dtype": model.dtype, "attn_implementation": model.config._attn_implementation}
    if "quantization_config" in json.loads((folder / "config.json").read_text()):
        how["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    with private_code_cache(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You passed `quantization_config`", UserWarning)  # `dequantize` is taken
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **how)
    return loaded.to(model.device)


@contextmanager
def private_code_cache() -> Iterator[None]:
    """Have remote code loaded through a temporary folder: none of it stays on disk, in sys.path or in sys.modules."""
    dynamic_modules: Any = importlib.import_module("transformers.dynamic_module_utils")

    def loaded() -> list[str]:
        return [name for name in sys.modules if name.split(".")[0] == "transformers_modules"]

    others = {name: sys.modules.pop(name) for name in loaded()}
    cache, path = dynamic_modules.HF_MODULES_CACHE, list(sys.path)
    with tempfile.TemporaryDirectory() as folder:
        dynamic_modules.HF_MODULES_CACHE = folder
        sys.path.insert(0, folder)
        try:
            yield
        finally:
            dynamic_modules.HF_MODULES_CACHE = cache
            sys.path[:] = path
            for name in loaded():
                del sys.modules[name]
            sys.modules.update(others)


def model_card(
    parent: ParentInfo,
    corpus: CorpusInfo,
    config: DeciLMConfig,
    figures: str,
    command: str,
    weights: str = "",
    terms: Mapping[str, Any] = MappingProxyType({}),
) -> str:
    """README.md of an exported child (markdown).

    figures: a markdown block of measured figures. weights: a sentence on their number format. terms: licence, language
    and base model, as the parent's card names them.
    """
    revision = f", revision `{parent.revision}`" if parent.revision else ""
    return "\n".join(
        [
            _front_matter(parent, terms),
            f"# A faster child of {parent.name}\n",
            "Made with puzzle: in each layer attention and FFN were replaced, where it pays, by cheaper variants, then",
            "the whole was distilled from its parent.\n",
            f"* Parent: {parent.name} from `{parent.source}`{revision}, fingerprint `{parent.fingerprint}`",
            *(f"* Parent: {note}" for note in parent.notes),
            f"* Command: `{command}`\n",
            "## Architecture\n",
            *_layer_table(config),
            *([f"\n{weights}"] if weights else []),
            "\n## Figures\n",
            figures.strip(),
            "\n## Corpus\n",
            f"{corpus.description or 'Text'}: {corpus.documents} documents, of them {_sequences(corpus)}.",
            f"Fingerprint `{corpus.fingerprint}`. Distilled on this text alone: try the child on yours.",
            "\n## Loading\n",
            *_loading(config),
            "\n## Licence\n",
            "The weights are derived from the parent's, so the parent's licence and terms of use hold for them too.",
            f"Its card names {_licence(terms)}. Licence files that lay beside the parent were copied here.\n",
        ]
    )


def _front_matter(parent: ParentInfo, terms: Mapping[str, Any]) -> str:
    """The card's metadata. A parent from the hub is the child's base model."""
    known = {"base_model": parent.name} if parent.source.startswith("hub ") else {}
    fields = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["puzzle"], **terms, **known}
    return f"---\n{yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)}---"


def _licence(terms: Mapping[str, Any]) -> str:
    names = [str(terms[key]) for key in ("license", "license_name") if key in terms]
    return f"the licence {', '.join(names)}" if names else "no licence"


def _sequences(corpus: CorpusInfo) -> str:
    counts = (
        f"{corpus.train_sequences} train, {corpus.validation_sequences} validation and {corpus.test_sequences} test"
    )
    return f"{counts} sequences of {corpus.sequence_length} tokens"


def _layer_table(config: DeciLMConfig) -> Sequence[str]:
    """A Markdown table of the layers; equal neighbours share a line."""
    rows = ["| layers | attention | FFN |", "|---|---|---|"]
    for cells, group in groupby(range(len(config.block_configs)), key=lambda layer: _cells(config, layer)):
        layers = list(group)
        span = str(layers[0]) if len(layers) == 1 else f"{layers[0]}-{layers[-1]}"
        rows.append(f"| {span} | {cells[0]} | {cells[1]} |")
    return rows


def _cells(config: DeciLMConfig, layer: int) -> tuple[str, str]:
    """A layer's attention and FFN in words."""
    block, (kv_heads, sizes) = config.block_configs[layer], layer_sizes(config, layer)
    own = block["attention"].get("window_length")
    window = f", window {config.sliding_window}" if config.layer_types[layer] == "sliding_attention" else ""
    window = f", window {own} and the first {block['attention']['num_sink_tokens']}" if own else window
    heads = block["attention"].get("num_attention_heads")
    queries = f"{heads} query heads, " if heads else ""
    attention = f"{queries}{kv_heads} KV heads{window}" if kv_heads else _missing(block["attention"])
    if sizes is None:
        return attention, _missing(block["ffn"])
    words = "width {}" if len(sizes) == 1 else "{} experts, {} of a token, width {}"
    return attention, words.format(*sizes)


def _missing(entry: dict[str, Any]) -> str:
    if entry.get("recurrent"):
        return f"recurrent ({entry['recurrent']['rule']})"
    return "no-op" if entry["no_op"] else "linear"


def _loading(config: DeciLMConfig) -> list[str]:
    """How to load the child, and what runs it."""
    native = native_config(config)
    trust = "" if native is not None else ", trust_remote_code=True"
    snippet = [
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n",
        'folder = "path/to/this/folder"',
        f"model = AutoModelForCausalLM.from_pretrained(folder{trust})",
        f"tokenizer = AutoTokenizer.from_pretrained(folder{trust})",
        "```\n",
    ]
    if native is not None:
        return [*snippet, f"All layers are alike: a plain `{_native_name(config)}`, for any engine that runs one."]
    engines = ["| engine | runs it |", "|---|---|", "| transformers >= 5 | yes |"]
    for name, how in CARD_ENGINES.items():
        missing = gaps(name, config)
        engines.append(f"| {known_engine(name).title} | {'no: ' + '; '.join(missing) if missing else f'yes, {how}'} |")
    return [*snippet, *engines]
