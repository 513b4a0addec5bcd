"""Model families: what puzzle must know of a parent beyond its config. It is read off the table of families, a row for
each, in blocks/export_code/families_decilm.py. To add one see docs/how-to/add-a-family.md.
"""

from dataclasses import dataclass
from typing import Any

from blocks.errors import ParentError
from blocks.export_code.families_decilm import FAMILIES, Experts, Family
from blocks.records import Subblock

Shape = tuple[int, ...]


def family_of(config: Any) -> Family:
    """The family of a parent's config; ParentError for one that is unknown or has a feature that a child would lose."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise ParentError(
            f"model_type {config.model_type!r} is not known here; allowed: {', '.join(FAMILIES)}. "
            "To add a family see docs/how-to/add-a-family.md."
        )
    unknown = set(attention_types(config)) - {"full_attention", "sliding_attention"}
    if unknown:
        raise ParentError(f"{config.model_type} with {', '.join(sorted(unknown))} layers is not supported")
    for name in family.refused if family.soft_caps else (*family.refused, "final_logit_softcapping"):
        if getattr(config, name, None):
            raise ParentError(f"{config.model_type} with {name} is not supported: set it to null")
    step = getattr(config, "decoder_sparse_step", 1)
    if family.experts and (step != 1 or not experts_of(config).count):
        raise ParentError(
            f"{config.model_type} with decoder_sparse_step {step} and {experts_of(config).count} experts is not "
            "supported: all layers of a parent are alike, so each of its FFNs must have experts (a step of 1)"
        )
    return family


def beyond_llama(family: Family) -> list[str]:
    """What a family has that Llama lacks, in words. An engine that takes a child for a Llama would leave it out."""
    befores, afters = zip(*family.norms.values(), strict=True)
    words = {
        "norms after attention and FFN": any(afters),
        "no norms before them": None in befores,
        "a mixture of experts": family.experts is not None,
        "norms of queries and keys": family.head_norms is not None,
        "LayerNorm": family.norm_bias,
        "an FFN without a gate": not family.gated,
        "a scaled embedding": family.scaled_embedding or family.embedding_multiplier is not None,
        "a multiplier of what attention and FFN add": family.residual_multiplier is not None,
        "divided logits": family.logits_divisor is not None,
        "soft caps": family.soft_caps,
        "a rotary embedding for each type of attention": family.rotary_by_type,
    }
    return [*family.own, *(word for word, there in words.items() if there)]


def head_dim(config: Any) -> int:
    """Channels of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def attention_types(config: Any) -> list[str]:
    """`full_attention` or `sliding_attention` for each layer of a parent, as its family's code reads the config."""
    slides, types = FAMILIES[config.model_type].slides, getattr(config, "layer_types", None)
    if slides == "types" and types:
        return list(types)
    sliding = slides == "all" and config.sliding_window is not None
    return ["sliding_attention" if sliding else "full_attention"] * config.num_hidden_layers


def windows_of(config: Any) -> tuple[int | None, ...]:
    """How many tokens a token sees in each layer of a parent; None for all before it. Empty where no layer slides."""
    family_of(config)
    types = attention_types(config)
    windows = [config.sliding_window if kind == "sliding_attention" else None for kind in types]
    return tuple(windows) if any(windows) else ()


def tokens_seen(config: Any, context_tokens: int, most: int | None = None) -> int:
    """How many of `context_tokens` a token sees: `most`, or the mean of what the parent's layers see."""
    seen = [min(context_tokens, most or window or context_tokens) for window in windows_of(config) or (None,)]
    return round(sum(seen) / len(seen))


@dataclass(frozen=True, kw_only=True)
class ExpertSizes:
    """count: experts of an FFN. per_token: how many of them each token is sent to. width: channels of each.

    A dense FFN is one expert that all tokens are sent to.
    """

    count: int = 1
    per_token: int = 1
    width: int


def has_experts(config: Any) -> bool:
    """Whether the FFNs of a parent, or of a child's parent, are mixtures of experts."""
    return _experts_fields(config) is not None


def _experts_fields(config: Any) -> Experts | None:
    return FAMILIES[getattr(config, "base_model_type", config.model_type)].experts


def experts_of(config: Any) -> ExpertSizes:
    """The experts of a parent's FFN, or of a layer's own config."""
    experts = _experts_fields(config)
    if experts is None:
        return ExpertSizes(width=config.intermediate_size)
    count, per_token, width = (getattr(config, name) for name in experts.fields)
    return ExpertSizes(count=count, per_token=per_token, width=width)


def inner_channels(entry: dict[str, Any]) -> int:
    """Channels that a token has between the matrices of an FFN with this entry of `block_configs`, those of its experts
    together; 0 where there are none.
    """
    moe = entry.get("moe")
    found = moe["num_experts_per_tok"] * moe["expert_intermediate_dim"] if moe else entry.get("intermediate_size", 0)
    return int(found)


def ffn_matrices(config: Any) -> int:
    """How many matrices an FFN has: two, and a third where it has a gate."""
    return 3 if FAMILIES[config.model_type].gated else 2


def weights(config: Any, subblock: Subblock, entry: dict[str, Any]) -> list[list[Shape]]:
    """Shapes of all weights of a subblock with this entry of `block_configs`, module by module.

    A plan counts weights with it and needs no modelling code; a test compares it with the layers themselves.
    """
    if entry["no_op"]:
        return []
    family, width = FAMILIES[config.model_type], config.hidden_size
    norm: list[Shape] = [(width,)] * (2 if family.norm_bias else 1)
    modules = [norm for name in family.norms[subblock] if name is not None]
    if entry["replace_with_linear"]:
        return [*modules, [(width, width)]]
    moe = entry.get("moe", {})
    inner = moe.get("expert_intermediate_dim") or entry.get("intermediate_size", 0)
    sizes = part_sizes(config, entry.get("num_key_value_heads", 0), inner, moe.get("num_local_experts", 0))
    if entry.get("num_attention_heads"):
        sizes["query"] = entry["num_attention_heads"] * head_dim(config)
    columns, recurrent = {"output": sizes["query"], "down": sizes["up"], "key_norm": 0}, entry.get("recurrent")
    apart = [(role,) for role in ("query", "key", "value", "output")]
    for roles in apart if recurrent else family.parts(subblock).values():
        rows, inputs = sum(sizes[role] for role in roles), columns.get(roles[0], width)
        bias = [(rows,)] if inputs and has_bias(family, roles[0], config) else []
        experts = (sizes["router"],) if moe and roles != ("router",) else ()
        modules.append([(*experts, rows, inputs) if inputs else (rows,), *bias])
    if recurrent:
        heads, mixed = config.num_attention_heads, sizes["query"] + sizes["key"] + sizes["value"]
        gates = recurrent["gates"] * heads
        return [*modules, [(gates, width), (gates,)], [(mixed, recurrent["conv_kernel"]), (heads,), (heads,)]]
    if subblock == "attention" and family.head_norms:
        modules += [[(sizes["query"],)]] if family.head_norms == "all" else [[(head_dim(config),)]] * 2
    return modules


def has_bias(family: Family, role: str, config: Any) -> bool:
    """Whether a matrix has a bias beside it."""
    said = {"output": family.output_bias, "gate": family.ffn_bias, "up": family.ffn_bias, "down": family.ffn_bias}
    bias = False if role == "router" else said.get(role, family.input_bias)
    return bool(getattr(config, bias)) if isinstance(bias, str) else bias


def part_sizes(config: Any, kv_heads: int, inner: int, experts: int = 0) -> dict[str, int]:
    """Rows of each matrix of a layer with so many KV heads, channels of FFN or expert, and experts, by what it is."""
    channels, width = head_dim(config), config.hidden_size
    queries, states = config.num_attention_heads * channels, kv_heads * channels
    attention = {"query": queries, "key": states, "value": states, "key_norm": states, "output": width}
    return attention | {"gate": inner, "up": inner, "down": width, "router": experts}


def own_sizes(config: Any) -> dict[str, int]:
    """The same of a layer with this config of its own."""
    experts = experts_of(config)
    return part_sizes(config, config.num_key_value_heads, experts.width, experts.count)
