"""A causal language model whose layers differ: each has its own attention and FFN subblock, a linear one, or none.

The parts (attention, MLP, norms, rotary, embedding) are those of the parent's family in transformers, so a child made
of the parent's own blocks gives the parent's logits bit for bit. Only the layer and the loop over layers are ours.
Linear subblocks bear the weight names that TensorRT-LLM reads: `self_attn.linear_attn`, `mlp.linear_mlp`.
"""

import copy
import importlib
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from .configuration_decilm import DeciLMConfig
from .families_decilm import FAMILIES
from .recurrent_decilm import RecurrentAttention, RecurrentCacheLayer
from .windows_decilm import PREFIX, WHO, Padding, WindowCacheLayer, padding_of, window_of

# sizes of experts in an entry of `block_configs`, in the order of `Experts.fields`
MOE = ("num_local_experts", "num_experts_per_tok", "expert_intermediate_dim")
# transformers 5.24 renamed `past_key_values` to `cache`; forward takes either, so a child runs on both sides of it
CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"


def family_class(base_model_type: str, suffix: str) -> Any:
    """Class `<Prefix><suffix>` of a family, e.g. ("llama", "DecoderLayer") -> LlamaDecoderLayer."""
    family = FAMILIES[base_model_type]
    module = importlib.import_module(f"transformers.models.{family.module}.modeling_{family.module}")
    return getattr(module, family.prefix + suffix)


class LinearAttention(nn.Module):
    """One matrix in the place of an attention: every token sees itself only."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear_attn = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, None]:
        return self.linear_attn(hidden_states), None


class LinearMLP(nn.Module):
    """One matrix in the place of an FFN."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear_mlp = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.linear_mlp(hidden_states)


class DeciLMDecoderLayer(GradientCheckpointingLayer):
    """One layer: `h + attention(h)`, then `h + ffn(h)`; a no-op subblock is absent, norms included.

    Norms before and after a subblock bear the parent's names. window: see windows_decilm.py; for recurrent attention
    recurrent_decilm.py.
    """

    def __init__(self, base_config: Any, base_model_type: str, block: Any, layer: int) -> None:
        super().__init__()
        attention, ffn = block["attention"], block["ffn"]
        self.family = FAMILIES[base_model_type]
        self.config = config = copy.copy(base_config)
        if attention.get("num_key_value_heads"):
            config.num_key_value_heads = attention["num_key_value_heads"]
        if attention.get("num_attention_heads"):
            config.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
            config.num_attention_heads = attention["num_attention_heads"]
        if ffn.get("intermediate_size"):
            config.intermediate_size = ffn["intermediate_size"]
        if ffn.get("moe") and self.family.experts:
            for field, size in zip(self.family.experts.fields, MOE, strict=True):
                setattr(config, field, ffn["moe"][size])
        self.window, self.index = window_of(attention), layer
        self.follow(config._attn_implementation)
        with torch.device("meta"):
            whole = family_class(base_model_type, "DecoderLayer")(config, layer)
        whole = whole.to_empty(device=torch.get_default_device())
        core = whole.self_attn
        if attention.get("recurrent"):
            core = RecurrentAttention(attention["recurrent"], core, config, self.family)
        self.self_attn = self._subblock(attention, core, LinearAttention, config.hidden_size)
        own = getattr(whole, self.family.ffn)
        setattr(self, self.family.ffn, self._subblock(ffn, own, LinearMLP, config.hidden_size))
        for part, names in self.family.norms.items():
            for name in names:
                if name is not None and self.core(part) is not None:
                    setattr(self, name, getattr(whole, name))

    @staticmethod
    def _subblock(entry: Any, parents: nn.Module, linear: type[nn.Module], hidden_size: int) -> nn.Module | None:
        if entry["no_op"]:
            return None
        return linear(hidden_size) if entry["replace_with_linear"] else parents

    def core(self, subblock: str) -> Any:
        """The attention or the FFN itself, without its norms; None for a no-op."""
        return getattr(self, self.family.cores[subblock])

    def follow(self, implementation: str | None) -> None:
        """Take an attention implementation; a window has its own on top of it."""
        if self.window:  # torch's code, which has no soft caps, or the eager one, whatever the rest runs on
            implementation = PREFIX + (self.family.attention_code(self.config, None) or implementation or "sdpa")
        if self.config._attn_implementation != implementation:
            self.config._attn_implementation = implementation

    def attention(
        self, hidden_states: torch.Tensor, padding: Padding | None = None, **kwargs: Any
    ) -> torch.Tensor | None:
        """Output of the attention subblock before the residual add, None for a no-op. (B, T, D) -> (B, T, D)

        padding: of the rows; windows and recurrent attention ask for it, all else is in `attention_mask`.
        """
        if self.self_attn is None:
            return None
        held: Any = None if kwargs.get(CACHE) is None else kwargs[CACHE].layers[self.index]
        if isinstance(self.self_attn, RecurrentAttention):
            kwargs |= {"padding": padding, "held": held}
        if self.window is not None:
            seen = 0
            if held is not None:
                held.padding, seen = padding, held.cumulative_length
            kwargs["attention_mask"] = self.window.view(hidden_states.shape[1], seen, padding, hidden_states.device)
        out, _ = self.self_attn(hidden_states=self.before("attention", hidden_states), **kwargs)
        return self.after("attention", out)

    def ffn(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Output of the FFN subblock before the residual add, None for a no-op. (B, T, D) -> (B, T, D)"""
        core = self.core("ffn")
        return None if core is None else self.after("ffn", core(self.before("ffn", hidden_states)))

    def before(self, subblock: str, hidden_states: torch.Tensor) -> torch.Tensor:
        """What enters the core of a subblock: the normed states."""
        name = self.family.norms[subblock][0]
        return hidden_states if name is None else getattr(self, name)(hidden_states)

    def after(self, subblock: str, out: torch.Tensor) -> torch.Tensor:
        """What a subblock adds to the states, from what its core puts out."""
        name = self.family.norms[subblock][1]
        normed = out if name is None else getattr(self, name)(out)
        return multiplied(normed, self.config, self.family.residual_multiplier)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        out = self.attention(hidden_states, **kwargs)
        hidden_states = hidden_states if out is None else hidden_states + out
        out = self.ffn(hidden_states)
        return hidden_states if out is None else hidden_states + out


class DeciLMPreTrainedModel(PreTrainedModel):
    config_class = DeciLMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DeciLMDecoderLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(self, config: DeciLMConfig) -> None:
        super().__init__(config)
        self._use_code_with_caps()

    def _use_code_with_caps(self) -> None:
        """Another attention implementation, where the one that was asked for cannot compute what the family needs."""
        code = FAMILIES[self.config.base_model_type].attention_code(self.config, self.config._attn_implementation)
        if code != self.config._attn_implementation:
            self.config._attn_implementation = code

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        # transformers looks for attention code in this very file; the family's, which follows the switch, is elsewhere
        return True

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True

    def _init_weights(self, module: Any) -> None:
        # from_pretrained builds on the meta device: buffers that no checkpoint holds are made again here.
        super()._init_weights(module)
        if type(module).__name__.endswith("RotaryEmbedding"):
            fresh = type(module)(config=module.config)
            for name, buffer in fresh.named_buffers():
                getattr(module, name).copy_(buffer)
        if hasattr(module, "embed_scale"):
            module.embed_scale.fill_(self.config.hidden_size**0.5)


class DeciLMModel(DeciLMPreTrainedModel):
    def __init__(self, config: DeciLMConfig) -> None:
        super().__init__(config)
        base, family = config.base_config(), config.base_model_type
        base._attn_implementation = config._attn_implementation
        base._experts_implementation = config._experts_implementation
        self.base = base
        self.embed_tokens = build_embedding(base, family)
        self.layers = nn.ModuleList(
            [DeciLMDecoderLayer(base, family, block, layer) for layer, block in enumerate(config.block_configs)]
        )
        self.norm = build_norm(base, family)
        self.rotary_emb = family_class(family, "RotaryEmbedding")(config=base)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        hidden = self.entering(input_ids, inputs_embeds)
        cache = self._cache(past_key_values if cache is None else cache, use_cache)
        if position_ids is None:
            seen = cache.get_seq_length() if cache is not None else 0
            position_ids = (torch.arange(hidden.shape[1], device=hidden.device) + seen).unsqueeze(0)
        self._follow_implementation()
        padding = self._padding(attention_mask, position_ids)
        contexts = layer_contexts(self.config, self.rotary_emb, hidden, position_ids, attention_mask, cache)
        states: list[torch.Tensor] | None = (
            [] if _asked(output_hidden_states, self.config.output_hidden_states) else None
        )
        with self._recorded(_asked(output_attentions, self.config.output_attentions)) as attentions:
            for layer, kind in zip(self.layers, self.config.parent_layer_types, strict=True):
                if states is not None:
                    states.append(hidden)
                places = {"position_ids": position_ids, "padding": padding, CACHE: cache}
                hidden = layer(hidden, **places, **contexts[kind], **kwargs)
        hidden = self.norm(hidden)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden,
            hidden_states=None if states is None else (*states, hidden),
            attentions=None if attentions is None else tuple(attentions),  # type: ignore[arg-type]
            **{CACHE: cache},
        )

    def entering(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None = None) -> torch.Tensor:
        """The states that enter the first layer. (B, T) or (B, T, D) -> (B, T, D)"""
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        family = FAMILIES[self.config.base_model_type]
        hidden = multiplied(hidden, self.config, family.embedding_multiplier)
        dropped = getattr(self.config, family.embedding_dropout) if family.embedding_dropout else 0.0
        return nn.functional.dropout(hidden, p=dropped, training=self.training)

    def _cache(self, cache: Cache | None, use_cache: bool | None) -> Cache | None:
        """The KV cache of a forward: the one given, a new one where it is wanted, else None."""
        if not self.config.has_attention:  # nothing to cache, and no position that anyone would see
            return None
        checkpointing = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        wanted = _asked(use_cache, self.config.use_cache) and not checkpointing
        if isinstance(cache, DynamicCache) and not cache.layers:
            # made without a config: its length would be read off layer 0, which may have no attention
            cache.layers = DynamicCache(config=self.config).layers
        return with_own_layers(DynamicCache(config=self.config) if wanted and cache is None else cache, self.config)

    def _padding(self, attention_mask: torch.Tensor | None, position_ids: torch.Tensor) -> Padding | None:
        """The padding of the rows, where a layer asks for it. ValueError for texts packed into one row."""
        if not any(has_own_layer(block["attention"]) for block in self.config.block_configs):
            return None
        if attention_mask is None and position_ids.shape[-1] > 1 and (position_ids.diff(dim=-1) != 1).any():
            raise ValueError(f"{WHO} takes one text in a row: position_ids must count without a break.")
        return padding_of(attention_mask)

    def _follow_implementation(self) -> None:
        """Implementations are switched on the outer config only; the layers have configs of their own."""
        self._use_code_with_caps()
        self.base._attn_implementation = self.config._attn_implementation
        for layer in self.layers:
            layer.follow(self.config._attn_implementation)  # type: ignore[operator]
            layer.config._experts_implementation = self.config._experts_implementation  # type: ignore[union-attr]

    @contextmanager
    def _recorded(self, wanted: bool) -> Iterator[list[torch.Tensor | None] | None]:
        """Attention weights by layer, as the layers run; a layer without attention has none."""
        if not wanted:
            yield None
            return
        if self.config._attn_implementation != "eager":
            raise ValueError(
                f"output_attentions needs attn_implementation='eager', this is {self.config._attn_implementation}: "
                "call set_attn_implementation('eager') first."
            )
        found: list[torch.Tensor | None] = [None] * len(self.layers)
        modules: list[Any] = [layer.self_attn for layer in self.layers]
        hooks = [
            module.register_forward_hook(lambda _m, _i, out, index=index: found.__setitem__(index, out[1]))
            for index, module in enumerate(modules)
            if module is not None
        ]
        try:
            yield found
        finally:
            for hook in hooks:
                hook.remove()


def has_own_layer(attention: Any) -> bool:
    """Whether an `attention` entry of `block_configs` remembers otherwise than transformers' layers do."""
    return bool(attention.get("recurrent") or attention.get("window_length"))


def with_own_layers(cache: Cache | None, config: Any) -> Cache | None:
    """A cache whose layers hold what those of `config` need. ValueError for one that cannot."""
    entries = enumerate(block["attention"] for block in config.block_configs)
    wanted = {layer: entry for layer, entry in entries if has_own_layer(entry)}
    if cache is None or not wanted:
        return cache
    if not isinstance(cache, DynamicCache):
        raise ValueError(f"{WHO} needs a DynamicCache, not a {type(cache).__name__}.")
    for layer, entry in wanted.items():
        window = window_of(entry)
        there: Any = cache.layers[layer]
        if isinstance(there, WindowCacheLayer if window else RecurrentCacheLayer):
            continue
        if there.get_seq_length():
            raise ValueError("the cache was filled by another model: give this child a new DynamicCache.")
        cache.layers[layer] = (
            WindowCacheLayer(window, getattr(config, "sliding_window", None) or window.size)
            if window
            else RecurrentCacheLayer()
        )
    return cache


def _asked(argument: bool | None, default: bool | None) -> bool:
    """An argument of forward; the config's where it is absent."""
    return bool(default if argument is None else argument)


def multiplied(states: torch.Tensor, config: Any, name: str | None) -> torch.Tensor:
    """States by the multiplier that the config has under a name; as they are where there is none."""
    return states if name is None else states * getattr(config, name)


def final_logits(config: Any, products: torch.Tensor) -> torch.Tensor:
    """The logits of a child or a parent, from the products of states and head."""
    family = FAMILIES[getattr(config, "base_model_type", config.model_type)]
    if family.logits_divisor:
        products = products / getattr(config, family.logits_divisor)
    cap = family.cap(config)
    return products if cap is None else torch.tanh(products / cap) * cap


def build_norm(base: Any, base_model_type: str) -> nn.Module:
    """The family's final norm."""
    family = FAMILIES[base_model_type]
    kind = family_class(base_model_type, family.norm) if family.norm else nn.LayerNorm
    return kind(base.hidden_size, eps=getattr(base, family.epsilon))


def build_embedding(base: Any, base_model_type: str) -> nn.Embedding:
    """The family's input embedding; Gemma's multiplies by sqrt(hidden_size)."""
    sizes = (base.vocab_size, base.hidden_size, base.pad_token_id)
    if FAMILIES[base_model_type].scaled_embedding:
        return family_class(base_model_type, "TextScaledWordEmbedding")(*sizes, embed_scale=base.hidden_size**0.5)
    return nn.Embedding(*sizes)


def layer_contexts(
    config: Any,
    rotary: nn.Module,
    hidden: torch.Tensor,
    position_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cache: Cache | None,
) -> dict[str, dict[str, Any]]:
    """Mask and rotary embeddings per attention type that occurs in the parent."""
    arguments = {
        "config": config,
        "inputs_embeds": hidden,
        "attention_mask": attention_mask,
        CACHE: cache,
        "position_ids": position_ids,
    }
    makers = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}
    per_type = FAMILIES[config.base_model_type].rotary_by_type
    contexts = {}
    blocks = zip(config.layer_types, config.block_configs, strict=True)
    whole = {kind for kind, block in blocks if not has_own_layer(block["attention"])}
    for kind in sorted(set(config.parent_layer_types)):
        # a type that no layer of the child still uses has no KV cache to size its mask by, and needs none
        used = cache is None or kind in whole
        contexts[kind] = {
            "attention_mask": makers[kind](**arguments) if used else None,
            "position_embeddings": rotary(hidden, position_ids, kind) if per_type else rotary(hidden, position_ids),
        }
    return contexts


class DeciLMForCausalLM(DeciLMPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: DeciLMConfig) -> None:
        super().__init__(config)
        self.model = DeciLMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """See GenerationMixin.generate; without any attention there is nothing to cache, whatever was asked."""
        return super().generate(*args, **kwargs if self.config.has_attention else kwargs | {"use_cache": False})

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, **kwargs: Any) -> dict[str, Any]:
        """See GenerationMixin; a cache whose keys the next token would have rotated otherwise is left behind."""
        field, cache = FAMILIES[self.config.base_model_type].restarts_at, kwargs.get(CACHE)
        if field and cache is not None:
            bound = getattr(self.config, field)
            if cache.get_seq_length() <= bound < input_ids.shape[1]:
                kwargs |= {CACHE: None, "next_sequence_length": None}
        return super().prepare_inputs_for_generation(input_ids, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=past_key_values if cache is None else cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = final_logits(self.config, self.lm_head(out.last_hidden_state[:, keep, :]))
        loss = None
        if labels is not None:
            # kwargs: Trainer divides by the tokens of all accumulated batches (num_items_in_batch) here, not itself
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
            **{CACHE: getattr(out, CACHE)},
        )
