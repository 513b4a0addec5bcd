"""Model families: how the parts of each are put together, a row for each. Data alone, nothing heavy is imported.

The parts themselves (attention, FFN, norms, rotary embedding) are transformers' own. A row says what cannot be read off
them: the names of norms and matrices, and what stands between the parts, such as multipliers.
"""

from dataclasses import dataclass, field
from typing import Any

# module of a layer -> what its weight holds, one below the other
Matrices = dict[str, tuple[str, ...]]
ATTENTION: Matrices = {f"self_attn.{role[0]}_proj": (role,) for role in ("query", "key", "value", "output")}
GATED: Matrices = {f"mlp.{role}_proj": (role,) for role in ("gate", "up", "down")}
FUSED_GATE: Matrices = {"mlp.gate_up_proj": ("gate", "up"), "mlp.down_proj": ("down",)}


def experts_of(core: str = "mlp", router: str = "gate") -> Matrices:
    """The matrices of an FFN with experts: the router's, and those of all experts in a tensor each."""
    experts = {f"{core}.experts.gate_up_proj": ("gate", "up"), f"{core}.experts.down_proj": ("down",)}
    return {f"{core}.{router}": ("router",)} | experts


@dataclass(frozen=True, kw_only=True)
class Experts:
    """How a family's config says what experts an FFN has. Fields: how many there are, how many each token is sent to,
    and how many channels each has.
    """

    count: str
    per_token: str = "num_experts_per_tok"
    width: str = "intermediate_size"

    @property
    def fields(self) -> tuple[str, str, str]:
        """The three fields, in this order."""
        return self.count, self.per_token, self.width


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family of decoder-only models whose layer is attention, then FFN, each added to its input:

        h = h + residual_multiplier * after(attention(before(h)));  h = h + residual_multiplier * after(ffn(before(h)))

    module: under transformers.models. prefix: of its classes. attention_norms, ffn_norms: names of the norms before and
    after a subblock; None where there is none. norm: the class of norms behind the prefix; None stands for torch's
    LayerNorm. epsilon: its field of the config. norm_bias: norms have biases. head_norms: queries and keys have a norm,
    of each head ("each") or of all heads together ("all").
    ffn: the name of the FFN in a layer. experts: fields of its config, where an FFN is a mixture of experts.
    matrices: see above. input_bias, output_bias, ffn_bias: whether queries, keys and values, the attention's output,
    and the FFN have biases; a text names the field of the config that says so.
    scaled_embedding: the embedding's class multiplies by sqrt(hidden_size).
    embedding_multiplier, residual_multiplier, logits_divisor, embedding_dropout: fields of the config, None where the
    family has none.
    soft_caps: `attn_logit_softcapping` and `final_logit_softcapping` of the config count.
    rotary_by_type: attention types have a rotary embedding each.
    slides: which layers have `sliding_window`: "no" layer, "all" where it is set, or "types" as `layer_types` says.
    restarts_at: a text longer than this field says has all its keys rotated otherwise: its cache is made anew.
    refused: fields of the config that a child would lose where they are set.
    own: what the family's own classes have that Llama's lack, in words.
    """

    module: str
    prefix: str
    attention_norms: tuple[str | None, str | None] = ("input_layernorm", None)
    ffn_norms: tuple[str | None, str | None] = ("post_attention_layernorm", None)
    norm: str | None = "RMSNorm"
    epsilon: str = "rms_norm_eps"
    norm_bias: bool = False
    head_norms: str | None = None
    ffn: str = "mlp"
    experts: Experts | None = None
    matrices: Matrices = field(default_factory=lambda: ATTENTION | GATED)
    input_bias: bool | str = False
    output_bias: bool | str = False
    ffn_bias: bool | str = False
    scaled_embedding: bool = False
    embedding_multiplier: str | None = None
    residual_multiplier: str | None = None
    logits_divisor: str | None = None
    embedding_dropout: str | None = None
    soft_caps: bool = False
    rotary_by_type: bool = False
    slides: str = "no"
    restarts_at: str | None = None
    refused: tuple[str, ...] = ()
    own: tuple[str, ...] = ()

    @property
    def norms(self) -> dict[str, tuple[str | None, str | None]]:
        """Names of the norms before and after each subblock."""
        return {"attention": self.attention_norms, "ffn": self.ffn_norms}

    @property
    def cores(self) -> dict[str, str]:
        """The name of the attention and of the FFN in a layer."""
        return {"attention": "self_attn", "ffn": self.ffn}

    @property
    def gated(self) -> bool:
        """Whether the FFN is activation(gate) * up, not activation(up)."""
        return any("gate" in roles for roles in self.matrices.values())

    def parts(self, subblock: str) -> Matrices:
        """The modules whose weights get smaller with a subblock: its matrices, and a norm of all keys together."""
        core = f"{self.cores[subblock]}."
        whole = self.matrices | ({"self_attn.k_norm": ("key_norm",)} if self.head_norms == "all" else {})
        return {name: roles for name, roles in whole.items() if name.startswith(core)}

    def cap(self, config: Any) -> float | None:
        """The soft cap of the logits."""
        return getattr(config, "final_logit_softcapping", None) if self.soft_caps else None

    def attention_code(self, config: Any, wanted: str | None) -> str | None:
        """The attention implementation that is used where `wanted` is asked for: torch's has no soft caps."""
        capped = self.soft_caps and getattr(config, "attn_logit_softcapping", None)
        return "eager" if capped and wanted in (None, "sdpa") else wanted


_BOTH: dict[str, Any] = {"input_bias": "attention_bias", "output_bias": "attention_bias"}
_SANDWICH: dict[str, Any] = {
    "attention_norms": ("input_layernorm", "post_attention_layernorm"),
    "ffn_norms": ("pre_feedforward_layernorm", "post_feedforward_layernorm"),
}
_AFTER: dict[str, Any] = {
    "attention_norms": (None, "post_attention_layernorm"),
    "ffn_norms": (None, "post_feedforward_layernorm"),
}
_NO_ROPE = "layers without a rotary embedding"
_PART = "a rotary embedding of some channels of a head"

FAMILIES: dict[str, Family] = {
    # Llama 2 and 3, SmolLM2. Its code reads neither `layer_types` nor `sliding_window`
    "llama": Family(module="llama", prefix="Llama", **_BOTH, ffn_bias="mlp_bias"),
    "mistral": Family(module="mistral", prefix="Mistral", slides="all"),
    "qwen2": Family(module="qwen2", prefix="Qwen2", input_bias=True, slides="types", own=("biases",)),
    "qwen3": Family(module="qwen3", prefix="Qwen3", **_BOTH, head_norms="each", slides="types"),
    "gemma3_text": Family(
        module="gemma3",
        prefix="Gemma3",
        **_BOTH,
        **_SANDWICH,
        head_norms="each",
        scaled_embedding=True,
        soft_caps=True,
        rotary_by_type=True,
        slides="types",
        refused=("use_bidirectional_attention", "attn_logit_softcapping"),
    ),
    "smollm3": Family(
        module="smollm3", prefix="SmolLM3", **_BOTH, ffn_bias="mlp_bias", slides="types", own=(_NO_ROPE,)
    ),
    "seed_oss": Family(
        module="seed_oss",
        prefix="SeedOss",
        input_bias="attention_bias",
        output_bias="attention_out_bias",
        ffn_bias="mlp_bias",
        own=("biases of queries, keys and values alone",),
    ),
    "ministral": Family(module="ministral", prefix="Ministral", slides="types"),
    "gemma2": Family(
        module="gemma2",
        prefix="Gemma2",
        **_BOTH,
        **_SANDWICH,
        scaled_embedding=True,
        soft_caps=True,
        slides="types",
        refused=("use_bidirectional_attention",),
    ),
    "olmo2": Family(module="olmo2", prefix="Olmo2", **_BOTH, **_AFTER, head_norms="all"),
    "olmo3": Family(
        module="olmo3", prefix="Olmo3", **_BOTH, **_AFTER, head_norms="all", rotary_by_type=True, slides="types"
    ),
    "exaone4": Family(module="exaone4", prefix="Exaone4", **_AFTER, head_norms="each", slides="types", own=(_NO_ROPE,)),
    "granite": Family(
        module="granite",
        prefix="Granite",
        **_BOTH,
        ffn_bias="mlp_bias",
        embedding_multiplier="embedding_multiplier",
        residual_multiplier="residual_multiplier",
        logits_divisor="logits_scaling",
        own=("a multiplier of the attention's scores",),
    ),
    "phi3": Family(
        module="phi3",
        prefix="Phi3",
        matrices={"self_attn.qkv_proj": ("query", "key", "value"), "self_attn.o_proj": ("output",)} | FUSED_GATE,
        slides="all",
        restarts_at="original_max_position_embeddings",
        refused=("resid_pdrop", "embd_pdrop"),
        own=(_PART,),
    ),
    "glm4": Family(
        module="glm4",
        prefix="Glm4",
        attention_norms=("input_layernorm", "post_self_attn_layernorm"),
        ffn_norms=("post_attention_layernorm", "post_mlp_layernorm"),
        matrices=ATTENTION | FUSED_GATE,
        input_bias="attention_bias",
        own=(_PART,),
    ),
    "starcoder2": Family(
        module="starcoder2",
        prefix="Starcoder2",
        norm=None,
        epsilon="norm_epsilon",
        norm_bias=True,
        matrices=ATTENTION | {"mlp.c_fc": ("up",), "mlp.c_proj": ("down",)},
        input_bias="use_bias",
        output_bias="use_bias",
        ffn_bias="use_bias",
        embedding_dropout="embedding_dropout",
        slides="all",
    ),
    "nemotron": Family(
        module="nemotron",
        prefix="Nemotron",
        norm="LayerNorm1P",
        epsilon="norm_eps",
        norm_bias=True,
        matrices=ATTENTION | {"mlp.up_proj": ("up",), "mlp.down_proj": ("down",)},
        **_BOTH,
        ffn_bias="mlp_bias",
        own=(_PART,),
    ),
    "qwen3_moe": Family(
        module="qwen3_moe",
        prefix="Qwen3Moe",
        **_BOTH,
        head_norms="each",
        experts=Experts(count="num_experts", width="moe_intermediate_size"),
        matrices=ATTENTION | experts_of(),
        slides="all",
        refused=("mlp_only_layers", "output_router_logits"),
    ),
    "mixtral": Family(
        module="mixtral",
        prefix="Mixtral",
        experts=Experts(count="num_local_experts"),
        matrices=ATTENTION | experts_of(),
        slides="all",
        refused=("output_router_logits",),
    ),
    "olmoe": Family(
        module="olmoe",
        prefix="Olmoe",
        **_BOTH,
        head_norms="all",
        experts=Experts(count="num_experts"),
        matrices=ATTENTION | experts_of(),
        refused=("output_router_logits",),
        own=("clipped queries, keys and values",),
    ),
    "granitemoe": Family(
        module="granitemoe",
        prefix="GraniteMoe",
        **_BOTH,
        ffn="block_sparse_moe",
        experts=Experts(count="num_local_experts"),
        matrices=ATTENTION | experts_of("block_sparse_moe", "router"),
        embedding_multiplier="embedding_multiplier",
        residual_multiplier="residual_multiplier",
        logits_divisor="logits_scaling",
        refused=("output_router_logits",),
        own=("a multiplier of the attention's scores",),
    ),
}
