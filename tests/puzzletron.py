"""Files as Model-Optimizer's puzzletron writes them, made up: statistics per subblock, scores per replacement."""

import itertools
import json
import random
from pathlib import Path
from typing import Any

from tasks.libraries.puzzletron import BLOCK_SCORES, STATS, SUBBLOCK_SCORES

LAYERS, SAMPLES = 3, 4
COMMON = {"no_op": False, "replace_with_linear": False, "sparsify": None, "weights_precision": "bf16"}
ATTENTION: dict[str, Any] = {
    "8 kv heads": {**COMMON, "num_key_value_heads": 8, "llama4": None, "mamba": None},
    "2 kv heads": {**COMMON, "num_key_value_heads": 2, "llama4": None, "mamba": None},
    "no_op": {**COMMON, "no_op": True, "num_key_value_heads": None, "llama4": None, "mamba": None},
}
FFN: dict[str, Any] = {
    "intermediate size 14336": {**COMMON, "moe": None, "intermediate_size": 14336},
    "intermediate size 7168": {**COMMON, "moe": None, "intermediate_size": 7168},
    "no_op": {**COMMON, "no_op": True, "moe": None, "intermediate_size": None},
}
PARENT = ("8 kv heads", "intermediate size 14336")
Block = tuple[str, str]


def config(block: Block) -> dict[str, Any]:
    return {"attention": ATTENTION[block[0]], "ffn": FFN[block[1]], "parallel_blocks": None}


def statistics(seed: int = 0, layers: int = LAYERS) -> list[dict[str, Any]]:
    """Two entries: bfloat16 at batch size 1 without runtimes, at batch size 16 with."""
    draw = random.Random(seed)
    sizes = {name: draw.uniform(20, 200) * ("no_op" not in name) for name in (*ATTENTION, *FFN)}
    entries = []
    for batch_size in (1, 16):
        subblocks = []
        for layer in range(layers):
            for kind, table in (("AttentionConfig", ATTENTION), ("FFNConfig", FFN)):
                for name, own in table.items():
                    size = sizes[name] if "no_op" not in name else 0.0
                    timed = batch_size > 1
                    subblocks.append(
                        {
                            "subblock_config": own,
                            "subblock_config_class": kind,
                            "runtime_ms": size * 2 + layer if timed else None,
                            "prefill_runtime_ms": size if timed else None,
                            "decode_runtime_ms": size + layer if timed else None,
                            "num_params": round(size * 1e6),
                            "active_params": round(size * 1e6),
                            "parent_layer_index": layer,
                            "memory_mib": size * 2 + (size * batch_size / 10 if kind == "AttentionConfig" else 0),
                            "kv_cache_memory_mib": size * batch_size / 10 if kind == "AttentionConfig" else 0.0,
                        }
                    )
        entries.append(
            {
                "args": {
                    "is_calc_runtime": batch_size > 1,
                    "gpu": "NVIDIA H100 80GB HBM3",
                    "batch_size": batch_size,
                    "prefill_seq_len": 2048,
                    "generation_seq_len": 512,
                    "prefill_queue_size": 0,
                    "n_embd": 4096,
                    "n_head": 32,
                    "vocab_size": 1000,
                    "weights_dtype": "torch.bfloat16",
                    "activations_dtype": "torch.bfloat16",
                    "kv_cache_dtype": "torch.bfloat16",
                },
                "non_block": {
                    "runtime_ms": 10.0 if batch_size > 1 else None,
                    "prefill_runtime_ms": None,
                    "decode_runtime_ms": None,
                    "memory_mib": 50.0,
                    "num_params": 8_196_096,
                },
                "subblocks": subblocks,
            }
        )
    return entries


def losses(draw: random.Random, hurt: float) -> dict[str, Any]:
    """Metrics as `validate_model` writes them; lm_loss is the model's own, 2 of it the teacher's."""
    each = [hurt * draw.uniform(0.5, 1.5) for _ in range(SAMPLES)]
    per_sample = {
        "lm_loss": [2 + own for own in each],
        "kl_div": each,
        "token_accuracy_top_1": [0.6 - own / 100 for own in each],
    }
    return {name: {"avg": sum(own) / SAMPLES, "per_sample": own} for name, own in per_sample.items()}


def replacement(layer: int, block: Block) -> dict[str, Any]:
    return {"parent_layer_indices": [layer], "child_block_configs": [config(block)], "weight_paths": []}


def solution(layer: int, block: Block, scores: dict[str, Any], layers: int = LAYERS) -> dict[str, Any]:
    chosen = [replacement(i, block if i == layer else PARENT) for i in range(layers)]
    return {
        **scores,
        "puzzle_solution": {"single_sequence_replacement": chosen[layer], "chosen_replacements": chosen},
        "args": {"eval_samples": SAMPLES},
    }


def solutions(seed: int = 0, layers: int = LAYERS, one_subblock: bool = False) -> dict[str, dict[str, Any]]:
    """teacher.json and every replacement by file name."""
    draw = random.Random(seed)
    teacher = {name: own for name, own in losses(random.Random(1), 0.0).items() if name != "kl_div"}
    found = {"teacher.json": {**teacher, "args": {"teacher_dir": "/models/teacher", "eval_samples": SAMPLES}}}
    blocks = [block for block in itertools.product(ATTENTION, FFN) if block != PARENT]
    if one_subblock:
        blocks = [block for block in blocks if sum(a != b for a, b in zip(block, PARENT, strict=True)) == 1]
    for i, (layer, block) in enumerate(itertools.product(range(layers), blocks)):
        hurt = sum(draw.uniform(0.1, 1) for own, teacher_s in zip(block, PARENT, strict=True) if own != teacher_s)
        made = solution(layer, block, losses(draw, hurt), layers)
        if one_subblock:
            kind = "attention" if block[0] != PARENT[0] else "ffn"
            made["puzzle_solution"]["subblock_replacement"] = {"layer_idx": layer, "kind": kind, "name": kind}
        found[f"solution_{i}.json"] = made
    return found


def write(folder: Path, stats: Any, scores: dict[str, Any], one_subblock: bool = False) -> Path:
    """A puzzle_dir."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / STATS).write_text(json.dumps(stats, indent=2))
    below = folder / (SUBBLOCK_SCORES if one_subblock else BLOCK_SCORES)
    below.mkdir(exist_ok=True)
    for name, content in scores.items():
        (below / name).write_text(json.dumps(content))
    return folder
