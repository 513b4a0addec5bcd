"""A tiny parent of every family, as transformers itself builds it: random, its biases, gains and multipliers drawn away
from what they are by default. So a term that a child forgets changes its logits.
"""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from blocks.child import assemble_layers, library_of
from blocks.compute import HOST
from blocks.experts import experts_entry
from blocks.export_code.configuration_decilm import DeciLMConfig
from blocks.export_code.families_decilm import FAMILIES
from blocks.export_code.modeling_decilm import DeciLMForCausalLM
from blocks.families import ExpertSizes, attention_types, experts_of, has_experts
from blocks.library import write_tensors
from blocks.parent import Parent
from blocks.records import BlockRecord, CorpusInfo, LayerChoice, LayerRecord, ParentInfo, Score, Subblock
from profiles.schema import BLD, Record
from tasks.distill.bld import Job, distill
from tasks.distill.record import Recording
from tasks.score.scoring import ScoringSet, score_sequences

LAYERS = 4
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "head_dim": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
SLIDES: dict[str, Any] = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"] * 2}
BIASES = {"attention_bias": True}
CAP = {"final_logit_softcapping": 2.0}


def part(share: float) -> dict[str, Any]:
    """A rotary embedding of a share of a head's channels."""
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": share}}


def by_type() -> dict[str, Any]:
    """A rotary embedding for each type of attention."""
    thetas = {"full_attention": 100.0, "sliding_attention": 20.0}
    return {"rope_parameters": {kind: {"rope_type": "default", "rope_theta": theta} for kind, theta in thetas.items()}}


# family -> fields of its config that are not the default
SPECIAL: dict[str, dict[str, Any]] = {
    "llama": BIASES | {"mlp_bias": True},
    "mistral": {"sliding_window": 6},
    "qwen2": SLIDES | {"use_sliding_window": True},
    "qwen3": BIASES | SLIDES | {"use_sliding_window": True},
    "gemma3_text": BIASES | SLIDES | CAP | by_type() | {"query_pre_attn_scalar": 12},
    "smollm3": BIASES | SLIDES | {"mlp_bias": True, "use_sliding_window": True, "no_rope_layers": [1, 0, 1, 1]},
    "seed_oss": {"attention_out_bias": True, "mlp_bias": True},
    "ministral": SLIDES,
    "gemma2": BIASES | SLIDES | CAP | {"query_pre_attn_scalar": 12, "attn_logit_softcapping": 1.5},
    "olmo2": BIASES,
    "olmo3": BIASES | SLIDES | by_type(),
    "exaone4": SLIDES,
    "granite": BIASES
    | {
        "mlp_bias": True,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.4,
        "attention_multiplier": 0.9,
        "logits_scaling": 0.7,
    },
    "phi3": part(0.5) | {"sliding_window": 6},
    "glm4": part(0.25),
    "starcoder2": {"sliding_window": 6},
    "nemotron": BIASES | part(0.25) | {"mlp_bias": True},
    "qwen3_moe": BIASES
    | {"sliding_window": 6, "use_sliding_window": True, "num_experts": 6, "num_experts_per_tok": 3}
    | {"moe_intermediate_size": 16, "norm_topk_prob": True},
    "mixtral": {"sliding_window": 6, "num_local_experts": 6, "num_experts_per_tok": 3},
    "olmoe": BIASES | {"num_experts": 6, "num_experts_per_tok": 3, "norm_topk_prob": True, "clip_qkv": 0.7},
    "granitemoe": BIASES
    | {
        "num_local_experts": 6,
        "num_experts_per_tok": 3,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.4,
        "attention_multiplier": 0.9,
        "logits_scaling": 0.7,
    },
}


@cache
def parent_of(family: str) -> Any:
    """transformers' own model; shared, not to be changed."""
    return made(family, SPECIAL[family])


def made(family: str, special: dict[str, Any]) -> Any:
    """The same of a config with these fields."""
    row = FAMILIES[family]
    fields = special | {row.epsilon: 0.03}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**SIZES | fields), dtype=torch.float32)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.data += 0.3 * torch.randn_like(parameter)
            else:
                parameter.data.normal_(0, 0.25)
    model.set_attn_implementation(row.attention_code(model.config, model.config._attn_implementation))
    return model.eval()


def whole(config: Any) -> list[dict[str, Any]]:
    """The parent's own blocks."""
    attention = {"n_heads_in_group": 2, "num_key_value_heads": config.num_key_value_heads}
    kept = {"no_op": False, "replace_with_linear": False}
    return [{"attention": kept | attention, "ffn": own_ffn(config)} for _ in range(LAYERS)]


def own_ffn(config: Any) -> dict[str, Any]:
    """The entry of the parent's own FFN."""
    if has_experts(config):
        return experts_entry(experts_of(config))
    return {"no_op": False, "replace_with_linear": False, "intermediate_size": config.intermediate_size}


def smaller_ffn(config: Any) -> dict[str, Any]:
    """The entry of an FFN with less of everything that the parent's has."""
    if has_experts(config):
        return experts_entry(ExpertSizes(count=4, per_token=2, width=8))
    return {"no_op": False, "replace_with_linear": False, "intermediate_size": 24}


def child_of(parent: Any, blocks: list[dict[str, Any]] | None = None, without: str = "") -> DeciLMForCausalLM:
    """A child of the parent's own blocks, with its weights, or one of other blocks. without: a field of the config that
    is put back to its default.
    """
    config = parent.config
    left_out = ("architectures", "model_type", "layer_types", "transformers_version")
    fields = {key: value for key, value in config.to_dict().items() if key not in left_out}
    usual = type(config)().to_dict() | {"sliding_window": SIZES["max_position_embeddings"]}
    fields |= {key: value for key, value in usual.items() if key == without}
    types = attention_types(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        child = DeciLMForCausalLM(
            DeciLMConfig(
                block_configs=blocks or whole(config),
                base_model_type=config.model_type,
                parent_layer_types=types,
                **fields,
            )
        )
        for name, parameter in child.named_parameters() if blocks else ():
            torch.nn.init.normal_(parameter, float("norm" in name), 0.25)
    if blocks is None:
        child.load_state_dict(parent.state_dict(), strict=not without)
    child.set_attn_implementation(config._attn_implementation)
    return child.eval()


def save(parent: Any, folder: Path) -> None:
    """Write a parent's folder as it is prepared: the experts of a layer in one tensor, as transformers holds them."""
    parent.save_pretrained(folder, save_original_format=False)


def token_ids(batch: int, length: int, seed: int = 2) -> torch.Tensor:
    """Random tokens."""
    return torch.randint(3, SIZES["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(seed))


SETTINGS = BLD(steps=8, batch_sequences=4, learning_rate=2e-3)


def recording_of(workspace: Path, family: str) -> Recording:
    """What is recorded of a family's tiny parent, on random tokens."""
    save(parent_of(family), workspace / "parent")
    splits = {"train": 24, "validation": 8, "test": 4}
    tokens = {split: token_ids(count, 16, seed).to(torch.int32) for seed, (split, count) in enumerate(splits.items())}
    corpus = CorpusInfo(
        tokens=write_tensors(workspace, "corpus/tokens.safetensors", tokens),
        fingerprint="random",
        sequence_length=16,
        documents=sum(splits.values()),
        train_sequences=splits["train"],
        validation_sequences=splits["validation"],
        test_sequences=splits["test"],
    )
    parent = ParentInfo(name=family, folder="parent", fingerprint=family, source="a test")
    settings = Record(statistics_sequences=24, hidden_sequences=24, validation_sequences=8)
    return Recording(parent=parent, corpus=corpus, settings=settings, ridge=SETTINGS.ridge, trained=24)


def learned(
    recording: Recording, records: list[LayerRecord], subblock: Subblock, label: str, workspace: Path
) -> tuple[BlockRecord, Score | None]:
    """A variant of layer 1, distilled and scored on four sequences."""
    job = Job(
        recording=recording, record=records[1], layer=1, subblock=subblock, variant=label, settings=SETTINGS, seed=0
    )
    block, scored = distill(job, workspace, HOST), scored_of(recording, records)
    found = score_sequences([(block, scored.sequences)], records[1], scored, recording.parent, workspace, HOST)
    return block, next(iter(found), None)


def scored_of(recording: Recording, records: list[LayerRecord]) -> ScoringSet:
    """The tokens that variants are scored on."""
    return ScoringSet(corpus=recording.corpus, last=records[-1], count=4, length=16)


@torch.no_grad()
def by_whole_models(
    recording: Recording, records: list[LayerRecord], block: BlockRecord, workspace: Path
) -> tuple[float, float]:
    """KL and rise of the LM loss by the logits of transformers' own parent and of the assembled child."""
    replaced = LayerChoice().model_copy(update={block.subblock: block.variant})
    layers = [LayerChoice(), replaced, *[LayerChoice()] * (LAYERS - 2)]
    child = assemble_layers(Parent(workspace / "parent", HOST), library_of([block]), layers, workspace)
    ids = scored_of(recording, records).validation(recording.corpus.tokens, workspace).long()
    logits = (model(ids).logits.double().log_softmax(-1) for model in (parent_of(recording.parent.name), child))
    parents, children = logits
    kl = (parents.exp() * (parents - children)).sum(-1).mean()
    rise = (parents - children)[:, :-1].gather(-1, ids[:, 1:, None]).mean()
    return float(kl), float(rise)
