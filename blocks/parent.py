"""The parent on disk: its config, its tensors by name, and its layers, built one at a time.

A layer is built only when asked for, so recording a parent of any depth holds one layer in memory. The modelling
code of transformers takes seconds to import, so only the methods that build modules import it.
"""

import json
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig

from blocks.compute import HOST, Compute
from blocks.divergence import Head, head_of
from blocks.errors import ChildError, ParentError
from blocks.export_code.configuration_decilm import DeciLMConfig
from blocks.export_code.families_decilm import Family
from blocks.families import attention_types, family_of
from blocks.images import features_in, see, vision_of
from blocks.kinds import kind_of, parse_label
from blocks.records import SUBBLOCKS, LayerChoice
from blocks.subblock import load_subblock, subblock_state

if TYPE_CHECKING:
    from blocks.export_code.modeling_decilm import DeciLMDecoderLayer, DeciLMForCausalLM


class Parent:
    """A parent in a normalised Hugging Face folder, which tasks/inputs/parent.py writes."""

    def __init__(self, folder: Path, compute: Compute | None = None) -> None:
        self.folder, self._compute = folder, compute
        self.config: Any = AutoConfig.from_pretrained(folder)
        self.family: Family = family_of(self.config)
        self.vision = vision_of(folder)  # the whole model's config, of a parent that sees
        self.config._attn_implementation = self.attention_code
        self.config._experts_implementation = "grouped_mm"  # what transformers takes where nothing is asked for

    @property
    def compute(self) -> Compute:
        """Where and in what its tensors are loaded. A parent that was opened without it has a config alone."""
        if self._compute is None:
            raise ValueError(f"{self.folder} was opened for its config alone: open it with a Compute to load tensors")
        return self._compute

    @property
    def attention_code(self) -> str | None:
        """The attention implementation that it computes with."""
        return self.family.attention_code(self.config, (self._compute or HOST).attention)

    @property
    def depth(self) -> int:
        """Number of layers."""
        return self.config.num_hidden_layers

    @property
    def dtype(self) -> torch.dtype:
        """The precision that the parent was released in, by its config; what it computes in, `compute` says."""
        named = getattr(self.config, "dtype", None)
        dtype = getattr(torch, named, None) if isinstance(named, str) else named
        return dtype if dtype in (torch.float16, torch.bfloat16) else torch.float32

    @cached_property
    def attention_types(self) -> list[str]:
        """Attention type of each layer."""
        return attention_types(self.config)

    @cached_property
    def _files(self) -> dict[str, Path]:
        index = self.folder / "model.safetensors.index.json"
        if index.exists():
            return {name: self.folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
        whole = self.folder / "model.safetensors"
        with safe_open(whole, framework="pt") as file:
            return dict.fromkeys(file.keys(), whole)

    @cached_property
    def weight_bytes(self) -> int:
        """Bytes of all its weights in the dtype that it computes in."""
        there = sum(path.stat().st_size for path in set(self._files.values()))
        return there * self.compute.dtype.itemsize // self.dtype.itemsize

    @cached_property
    def _names(self) -> dict[str, list[str]]:
        """The names of tensors by what stands before any of their dots."""
        found: dict[str, list[str]] = {}
        for name in self._files:
            for prefix in accumulate(f"{part}." for part in name.split(".")[:-1]):
                found.setdefault(prefix, []).append(name)
        return found

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """Tensors whose name starts with `prefix`, which ends in a dot, named without it."""
        names = self._names.get(prefix)
        if not names:
            raise ParentError(f"{self.folder} has no tensor named {prefix}*: is it a whole {self.config.model_type}?")
        found = {}
        for path in dict.fromkeys(self._files[name] for name in names):
            with safe_open(path, framework="pt") as file:
                for name in names:
                    if self._files[name] == path:
                        found[name.removeprefix(prefix)] = file.get_tensor(name).to(
                            self.compute.device, self.compute.dtype
                        )
        return found

    def block_entry(self, choice: LayerChoice) -> dict[str, Any]:
        """The `block_configs` entry of a layer."""
        entry = {}
        for subblock in ("attention", "ffn"):
            variant = parse_label(subblock, getattr(choice, subblock), self.config)
            entry[subblock] = kind_of(variant).block_entry(variant, self.config)
        return entry

    def child_config(self, layers: Sequence[LayerChoice]) -> DeciLMConfig:
        """Config of a child with these choices, all other fields the parent's."""
        left_out = ("architectures", "model_type", "layer_types", "transformers_version", "_name_or_path")
        fields = {key: value for key, value in self.config.to_dict().items() if key not in left_out}
        return DeciLMConfig(
            block_configs=[self.block_entry(choice) for choice in layers],
            base_model_type=self.config.model_type,
            parent_layer_types=self.attention_types[: len(layers)],
            **fields,
        )

    def empty_layer(self, layer: int, choice: LayerChoice) -> "DeciLMDecoderLayer":
        """A layer with these variants; its weights are not set yet."""
        from blocks.export_code.modeling_decilm import DeciLMDecoderLayer

        module = DeciLMDecoderLayer(self.config, self.config.model_type, self.block_entry(choice), layer)
        return module.to(self.compute.device, self.compute.dtype)

    def layer(self, layer: int) -> "DeciLMDecoderLayer":
        """The parent's own layer with its weights, in evaluation mode, without gradients."""
        module = self.empty_layer(layer, LayerChoice())
        module.load_state_dict(self.tensors(f"model.layers.{layer}."))
        return module.eval().requires_grad_(False)

    @cached_property
    def images(self) -> Tensor | None:
        """Features (rows, D) of the images that its texts ask about; see blocks/images.py."""
        return features_in(self.folder)

    def embedding(self) -> Callable[[Tensor], Tensor]:
        """From tokens to the states that enter the first layer."""
        from blocks.export_code.modeling_decilm import build_embedding, multiplied

        module = build_embedding(self.config, self.config.model_type).to(self.compute.device, self.compute.dtype)
        module.load_state_dict(self.tensors("model.embed_tokens."), strict=False)
        module.requires_grad_(False)
        see(module, self.images)
        return lambda tokens: multiplied(module(tokens), self.config, self.family.embedding_multiplier)

    def norm(self) -> nn.Module:
        """The final norm."""
        from blocks.export_code.modeling_decilm import build_norm

        module = build_norm(self.config, self.config.model_type)
        module.load_state_dict(self.tensors("model.norm."))
        return module.to(self.compute.device, self.compute.dtype).requires_grad_(False)

    def head_weight(self) -> Tensor:
        """(vocab_size, D) weight of the head; the embedding when tied."""
        tied = self.config.tie_word_embeddings or "lm_head.weight" not in self._files
        return self.tensors("model.embed_tokens." if tied else "lm_head.")["weight"]

    def head(self) -> Head:
        """The head with what the family does to its logits."""
        return head_of(self.head_weight(), self.config, self.family)

    @cached_property
    def _rotary(self) -> nn.Module:
        from blocks.export_code.modeling_decilm import family_class

        return family_class(self.config.model_type, "RotaryEmbedding")(config=self.config).to(self.compute.device)

    @cached_property
    def _own_config(self) -> DeciLMConfig:
        """The parent in the child's schema; masks are made from it."""
        config = self.child_config([LayerChoice()] * self.depth)
        config._attn_implementation = self.attention_code
        return config

    def contexts(self, hidden: Tensor) -> list[dict[str, Any]]:
        """Per layer, the keyword arguments of its attention for whole sequences (B, T, D) without a cache."""
        from blocks.export_code.modeling_decilm import layer_contexts

        positions = torch.arange(hidden.shape[1], device=hidden.device).unsqueeze(0)
        per_type = layer_contexts(self._own_config, self._rotary, hidden, positions, None, None)
        return [per_type[kind] for kind in self.attention_types]

    def frame(self, layers: Sequence[LayerChoice]) -> "DeciLMForCausalLM":
        """A model with these choices without its layers: embedding, final norm and head are loaded. Layers are appended
        to `model.layers`, each when it is built: a model of any depth is sharded with one whole layer in memory.
        """
        from transformers.initialization import no_init_weights

        from blocks.export_code.modeling_decilm import DeciLMForCausalLM

        config = self.child_config(layers)
        config._attn_implementation = self.attention_code
        entries, config.block_configs = config.block_configs, []
        with no_init_weights():  # all weights are loaded
            model: Any = DeciLMForCausalLM(config)
        config.block_configs = entries
        model = in_dtype(model.to(self.compute.device), self.compute.dtype)
        model.tie_weights()  # no_init_weights skips it
        model.model.embed_tokens.load_state_dict(self.tensors("model.embed_tokens."), strict=False)
        see(model.model.embed_tokens, self.images)
        model.model.norm.load_state_dict(self.tensors("model.norm."))
        if not self.config.tie_word_embeddings:
            model.lm_head.weight.data.copy_(self.head_weight())
        framed: DeciLMForCausalLM = model.eval()
        return framed

    def model(self, layers: Sequence[LayerChoice] | None = None) -> "DeciLMForCausalLM":
        """A whole model with these choices. Non-block weights and the parent's own subblocks are loaded, no others."""
        choices = list(layers or [LayerChoice()] * self.depth)
        model = self.frame(choices)
        for layer, choice in enumerate(choices):
            model.model.layers.append(self.own_part(layer, choice))
        return model

    def own_part(self, layer: int, choice: LayerChoice) -> "DeciLMDecoderLayer":
        """A layer with these variants, of which the parent's own subblocks are loaded."""
        if choice == LayerChoice():
            return self.layer(layer)
        module = self.empty_layer(layer, choice).eval()
        kept = [subblock for subblock in SUBBLOCKS if getattr(choice, subblock) == "parent"]
        whole = self.layer(layer) if kept else module
        for subblock in kept:
            load_subblock(module, subblock, subblock_state(whole, subblock))
        return module


def in_dtype(model: Any, dtype: torch.dtype) -> Any:
    """Convert the weights in place. Rotary frequencies stay float32, as they do when a folder is loaded."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def config_of(folder: Path) -> Any:
    """Config of a child's or a parent's folder. Raises ChildError."""
    path = folder / "config.json"
    if not path.is_file():
        raise ChildError(f"{folder} is no child: name a folder with config.json and *.safetensors, or a .gguf file.")
    values = json.loads(path.read_text(encoding="utf-8"))
    is_child = values.get("model_type") == "nemotron-nas"
    if "text_config" in values:
        raise ChildError(
            f"{folder} is a whole model of text and images, and a text model is read here: name the child in its run's "
            "folder, or the prepared parent in the workspace."
        )
    return DeciLMConfig.from_pretrained(folder) if is_child else AutoConfig.from_pretrained(folder)
