"""Reads puzzletron's files: subblock_stats.json, teacher.json, solution_*.json (see tasks/libraries/puzzletron.py)."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tasks.libraries.options import Place
from tasks.libraries.reading import cost, is_number, mapping, number, read_json, sequence, short, whole
from tasks.search.joint import LibraryFileError

# statistic there -> cost here
COSTS = {
    "memory_mib": "memory_mib",
    "runtime_ms": "runtime_ms",
    "prefill_runtime_ms": "ttft_ms",
    "num_params": "num_params",
    "active_params": "active_params",
    "kv_cache_memory_mib": "kv_cache_memory_mib",
}
_LARGER_IS_BETTER = ("token_accuracy", "greedy_teacher_prediction")
Config = dict[str, Any]
Key = tuple[str, str, int | None]  # kind of subblock, its config as text, layer
_KINDS = {"AttentionConfig": "attention", "FFNConfig": "ffn"}


@dataclass(frozen=True, kw_only=True)
class Replacement:
    """One scored solution: subblock configs of the changed layer and of the teacher's other layers, and the scores."""

    layer: int
    block: dict[str, Config]
    teachers: dict[int, dict[str, Config]]
    one_subblock: bool
    metrics: dict[str, float]
    samples: dict[str, tuple[float, ...]]


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Costs by place, then by subblock kind, config and layer (None: any layer); what lies outside the blocks."""

    places: tuple[Place, ...]
    costs: dict[Place, dict[Key, dict[str, float]]]
    outside: dict[Place, dict[str, float]]
    args: Mapping[str, Any]

    def of(self, part: str, config: Config, layer: int, place: Place) -> dict[str, float] | None:
        """Costs of a subblock in a layer, None where there are none."""
        table, kind, text = self.costs[place], str(config.get("kind") or part), canonical(config)
        return table.get((kind, text, layer), table.get((kind, text, None)))


@dataclass
class Found:
    """What was read so far: configs of the teacher by layer, and every scored replacement."""

    teachers: dict[int, dict[str, Config]] = field(default_factory=dict)
    replacements: list[Replacement] = field(default_factory=list)

    def replacements_of(self, layer: int) -> list[Replacement]:
        """Those of one layer, in the order of their files."""
        return [replacement for replacement in self.replacements if replacement.layer == layer]

    @property
    def unchanged(self) -> Replacement:
        """The teacher's own blocks: 0 on whatever the others were scored on."""
        like = self.replacements[0]
        zeros = {name: (0.0,) * len(values) for name, values in like.samples.items()}
        return replace(like, block={}, metrics=dict.fromkeys(like.metrics, 0.0), samples=zeros)


# --- subblock_stats.json


def read_statistics(file: Path) -> Statistics:
    """Every entry of the file as a place; LibraryFileError where it is not what calc_subblock_stats.py writes."""
    entries = [mapping(entry, f"{file}: entry {i}") for i, entry in enumerate(sequence(read_json(file), str(file)))]
    arguments = [mapping(entry.get("args"), f"{file}: entry {i}: args") for i, entry in enumerate(entries)]
    widths = {str(args.get("n_embd")) for args in arguments}
    costs: dict[Place, dict[Key, dict[str, float]]] = {}
    outside: dict[Place, dict[str, float]] = {}
    for i, (entry, args) in enumerate(zip(entries, arguments, strict=True)):
        where = f"{file}: entry {i}"
        place = _place(args, where, several_widths=len(widths) > 1)
        if place in costs:
            raise LibraryFileError(f"{where}: there are two entries for {place}.")
        costs[place] = _subblock_costs(entry, where)
        outside[place] = _costs(mapping(entry.get("non_block"), f"{where}: non_block"), f"{where}: non_block")
    return Statistics(places=tuple(costs), costs=costs, outside=outside, args=arguments[0])


def _place(args: Config, where: str, several_widths: bool) -> Place:
    size = whole(args, "batch_size", where)
    prefill, generation = whole(args, "prefill_seq_len", where), whole(args, "generation_seq_len", where)
    weights, cache = (str(args.get(f"{name}_dtype")).removeprefix("torch.") for name in ("weights", "kv_cache"))
    precision = weights if weights == cache else f"{weights} with KV in {cache}"
    width = f", width {args.get('n_embd')}" if several_widths else ""
    if size < 1:
        raise LibraryFileError(f"{where}: batch_size must be at least 1.")
    return Place(
        scenario=f"{prefill}+{generation} tokens, {precision}{width}",
        batch_size=size,
        prompt_tokens=prefill,
        generated_tokens=generation,
    )


def _subblock_costs(entry: Config, where: str) -> dict[Key, dict[str, float]]:
    found: dict[Key, dict[str, float]] = {}
    for i, item in enumerate(sequence(entry.get("subblocks"), f"{where}: subblocks")):
        here = f"{where}: subblock {i}"
        stats = mapping(item, here)
        config = mapping(stats.get("subblock_config"), f"{here}: subblock_config")
        given = stats.get("parent_layer_index")
        layer = None if given is None else int(number(stats, "parent_layer_index", here))
        costs = _costs(stats, here)
        named = str(stats.get("subblock_config_class"))
        key = (str(config.get("kind") or _KINDS.get(named, named)), canonical(config), layer)
        if found.setdefault(key, costs) != costs:
            raise LibraryFileError(f"{here}: layer {layer} has {short(config)} twice, at different costs.")
    return found


def _costs(stats: Config, where: str) -> dict[str, float]:
    """Those that were taken; null stands for what was not."""
    return {ours: cost(stats, theirs, where) for theirs, ours in COSTS.items() if stats.get(theirs) is not None}


def canonical(config: Any) -> str:
    """A config as text, without what is unset: versions differ in the fields that they write."""
    if isinstance(config, dict):
        kept = {name: canonical(value) for name, value in config.items() if value is not None and value is not False}
        return json.dumps(kept, sort_keys=True)
    return json.dumps(config)


# --- solution_*.json


def read_scores(folder: Path, found: Found) -> Config:
    """Add a folder's solutions to what was found; the arguments they were scored with."""
    files = sorted(folder.glob("*solution*.json"))
    if not files:
        raise LibraryFileError(f"{folder} has no solution_*.json: fetch the scores of the replacements.")
    teacher = mapping(read_json(folder / "teacher.json"), f"{folder}/teacher.json")
    baseline, baseline_samples = _metrics(teacher, f"{folder}/teacher.json")
    for file in files:
        solution = mapping(read_json(file), str(file))
        replacement = _replacement(solution, str(file), baseline, baseline_samples)
        for layer, block in replacement.teachers.items():
            if canonical(found.teachers.setdefault(layer, block)) != canonical(block):
                raise LibraryFileError(f"{file}: layer {layer} of the teacher is another than in the other solutions.")
        found.replacements.append(replacement)
    args = teacher.get("args")
    return args if isinstance(args, dict) else {}


def _replacement(
    solution: Config, where: str, baseline: dict[str, float], baseline_samples: dict[str, tuple[float, ...]]
) -> Replacement:
    """One solution, its scores as rises over the teacher's (0 for what the teacher was not scored on)."""
    puzzle = mapping(solution.get("puzzle_solution"), f"{where}: puzzle_solution")
    layer, block = _one_layer(puzzle.get("single_sequence_replacement"), f"{where}: single_sequence_replacement")
    chosen = sequence(puzzle.get("chosen_replacements"), f"{where}: chosen_replacements")
    layers = dict(_one_layer(item, f"{where}: chosen_replacements {i}") for i, item in enumerate(chosen))
    metrics, samples = _metrics(solution, where)
    return Replacement(
        layer=layer,
        block=block,
        teachers={index: own for index, own in layers.items() if index != layer},
        one_subblock="subblock_replacement" in puzzle,
        metrics={name: value - baseline.get(name, 0.0) for name, value in metrics.items()},
        samples={name: _rise(values, baseline_samples.get(name), where) for name, values in samples.items()},
    )


def _rise(values: tuple[float, ...], baseline: tuple[float, ...] | None, where: str) -> tuple[float, ...]:
    if baseline is None:
        return values
    if len(baseline) != len(values):
        raise LibraryFileError(f"{where}: scored on {len(values)} samples, but the teacher on {len(baseline)}.")
    return tuple(value - own for value, own in zip(values, baseline, strict=True))


def _metrics(solution: Config, where: str) -> tuple[dict[str, float], dict[str, tuple[float, ...]]]:
    """Averages and values per sample, of everything that has an average; less is better for all of them."""
    metrics: dict[str, float] = {}
    samples: dict[str, tuple[float, ...]] = {}
    for name, value in solution.items():
        if not isinstance(value, dict) or "avg" not in value:
            continue
        average = number(value, "avg", f"{where}: {name}")
        each = value.get("per_sample")
        if each is not None and not (isinstance(each, list) and all(is_number(one) for one in each)):
            raise LibraryFileError(f"{where}: {name}: per_sample must be a list of numbers, not {short(each)}.")
        turned = name.startswith(_LARGER_IS_BETTER)
        ours = f"one_minus_{name}" if turned else name
        metrics[ours] = 1 - average if turned else average
        if each:
            samples[ours] = tuple(1 - float(one) if turned else float(one) for one in each)
    if not metrics:
        raise LibraryFileError(f'{where}: there is no score in it, no entry such as "kl_div": {{"avg": 0.1}}.')
    return metrics, samples


def _one_layer(value: Any, where: str) -> tuple[int, dict[str, Config]]:
    """Layer and subblocks of a replacement of one layer by one block."""
    replacement = mapping(value, where)
    layers = sequence(replacement.get("parent_layer_indices"), f"{where}: parent_layer_indices")
    blocks = sequence(replacement.get("child_block_configs"), f"{where}: child_block_configs")
    if len(layers) != 1 or len(blocks) != 1:
        raise LibraryFileError(f"{where}: replaces {len(layers)} layers by {len(blocks)}; one by one can be read.")
    return whole({"layer": layers[0]}, "layer", where), _subblocks(mapping(blocks[0], where), where)


def _subblocks(block: Config, where: str) -> dict[str, Config]:
    """Configs by subblock: attention and ffn, or by kind (by name where a kind stands there twice)."""
    if block.get("parallel_blocks"):
        raise LibraryFileError(f"{where}: parallel blocks cannot be read.")
    if "subblock_configs" not in block:
        return {name: mapping(block.get(name), f"{where}: {name}") for name in ("attention", "ffn")}
    listed = sequence(block["subblock_configs"], f"{where}: subblock_configs")
    configs = [mapping(one, f"{where}: subblock_configs") for one in listed]
    kinds = [str(config.get("kind")) for config in configs]
    names = [
        kind if kinds.count(kind) == 1 else str(config.get("name")) for kind, config in zip(kinds, configs, strict=True)
    ]
    if len(set(names)) < len(names):
        raise LibraryFileError(f"{where}: two subblocks are called {max(names, key=names.count)!r}.")
    return dict(zip(names, configs, strict=True))


def depth_of(found: Found, folder: Path) -> int:
    """Number of layers; LibraryFileError when the solutions do not show the teacher's block of every one."""
    layers = set(found.teachers) | {replacement.layer for replacement in found.replacements}
    lacking = sorted(set(range(max(layers) + 1)) - set(found.teachers))
    if lacking:
        raise LibraryFileError(
            f"{folder}: no solution shows the teacher's block of layer {lacking[0]}: chosen_replacements must name "
            "every layer."
        )
    return len(found.teachers)
