"""Reads what Model-Optimizer's puzzletron leaves in its puzzle_dir: subblock statistics and replace-1-block scores.

Read off the code that writes and uses them (NVIDIA/Model-Optimizer, modelopt/torch/puzzletron; none of it is here):

* subblock_stats/calc_subblock_stats.py writes `subblock_stats.json`, a list with an entry per batch size and precision:
  {"args": {batch_size, prefill_seq_len, generation_seq_len, weights_dtype, kv_cache_dtype, gpu, n_head, ...},
  "non_block": {memory_mib, runtime_ms, num_params, ...}, "subblocks": [{"subblock_config": {...},
  "subblock_config_class": ..., "parent_layer_index": 3, "memory_mib": ..., "runtime_ms": number or null,
  "prefill_runtime_ms", "decode_runtime_ms", "num_params", "active_params", "kv_cache_memory_mib"}, ...]}.
* tools/validate_puzzle_with_multi_replacements.py and tools/validation_utils.py write `teacher.json` and
  `solution_<i>.json` into `single_sequence_replacement_solutions--validation/`: {"kl_div": {"avg", "per_sample"}, ...,
  "puzzle_solution": {"single_sequence_replacement": {"parent_layer_indices": [3], "child_block_configs": [config]},
  "chosen_replacements": [one per layer]}, "args"}. replacement_library/subblock_scoring.py adds
  `single_subblock_replacement_solutions--validation/`, the same with one subblock changed at a time.
* mip/run_puzzle.py (_get_block_stats) sums the statistics of a block's subblocks by config and layer, takes non_block
  off the budget, and turns what is better when larger into one_minus_<name>; replacement_library/score_composition.py
  adds the rises of subblocks over the teacher and prefers a block that was scored as such. So does this.
* block_config.py: a block is {"attention": {...}, "ffn": {...}}, in later versions {"subblock_configs": [{"kind",
  "name", ...}]}; older ones count n_heads_in_group and ffn_mult.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.libraries.labels import Config, Labels, canonical
from tasks.libraries.options import (
    BETWEEN,
    BLOCK,
    OptionLibrary,
    OptionsDescription,
    ScoredVariant,
    checked,
)
from tasks.libraries.reading import cost, is_number, mapping, number, read_json, sequence, short, whole
from tasks.search.joint import LibraryFileError, MeasuredAt

STATS = "subblock_stats.json"
BLOCK_SCORES = "single_sequence_replacement_solutions--validation"
SUBBLOCK_SCORES = "single_subblock_replacement_solutions--validation"
# statistic there -> cost here
_COSTS = {
    "memory_mib": "memory_mib",
    "runtime_ms": "runtime_ms",
    "prefill_runtime_ms": "ttft_ms",
    "num_params": "num_params",
    "kv_cache_memory_mib": "kv_cache_memory_mib",
}
_LARGER_IS_BETTER = ("token_accuracy", "greedy_teacher_prediction")
_KINDS = {"AttentionConfig": "attention", "FFNConfig": "ffn"}
Block = dict[str, Config]  # configs by subblock
Key = tuple[str, str, int | None]  # kind of subblock, its config as text, layer (None: any)
Metrics = tuple[dict[str, float], dict[str, tuple[float, ...]]]  # averages, and values per sample, by name


@dataclass(frozen=True, kw_only=True)
class Replacement:
    """One scored solution: the block that stands in a layer, and how much worse than the teacher it scores.

    one_subblock: the block differs from the teacher's in one subblock, and the score is that subblock's.
    """

    layer: int
    block: Block
    one_subblock: bool
    metrics: dict[str, float]
    samples: dict[str, tuple[float, ...]]


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Costs by scenario and batch size, then by subblock; costs of what lies outside the blocks."""

    costs: dict[MeasuredAt, dict[Key, dict[str, float]]]
    outside: dict[MeasuredAt, dict[str, float]]
    args: Config

    def of(self, block: Block, layer: int, place: MeasuredAt, where: str) -> dict[str, float]:
        """Summed over the subblocks of a block; a cost that one of them lacks is not known of the block."""
        found, table = [], self.costs[place]
        for part, config in block.items():
            kind, text = str(config.get("kind") or part), canonical(config)
            costs = table.get((kind, text, layer), table.get((kind, text, None)))
            if costs is None:
                raise LibraryFileError(
                    f"{where}: layer {layer} has no statistics of its {part} {short(config)} at {place}."
                )
            found.append(costs)
        return {name: sum(own[name] for own in found) for name in found[0] if all(name in own for own in found)}


def is_puzzletron(path: Path) -> bool:
    """True for a folder with subblock statistics, and for such a file."""
    if path.is_dir():
        return (path / STATS).is_file()
    return path.is_file() and path.suffix == ".json" and "subblock_stats" in path.name


def options_from_puzzletron(path: Path) -> OptionLibrary:
    """Read and check a puzzle_dir, or its statistics beside the folders of solution_*.json files.

    Raises LibraryFileError that names the file and the place in it.
    """
    file = path / STATS if path.is_dir() else path
    statistics = _statistics(file)
    folders = [file.parent / name for name in (BLOCK_SCORES, SUBBLOCK_SCORES)]
    present = [folder for folder in folders if folder.is_dir()]
    if not present:
        raise LibraryFileError(
            f"{file} has costs but no scores: there is no folder {folders[0]} with solution_*.json files; "
            "fetch it there."
        )
    teachers: dict[int, Block] = {}
    replacements: list[Replacement] = []
    noted: Config = {}
    for folder in present:
        noted = _read_scores(folder, teachers, replacements)
    layers = range(max({*teachers, *(one.layer for one in replacements)}) + 1)
    lacking = next((layer for layer in layers if layer not in teachers), None)
    if lacking is not None:
        raise LibraryFileError(
            f"{present[0]}: no solution shows the teacher's block of layer {lacking}: chosen_replacements must name "
            "every layer."
        )
    args = statistics.args
    library = OptionLibrary(
        description=OptionsDescription(
            source="Model-Optimizer puzzletron",
            parent=str(noted.get("teacher_dir") or ""),
            hardware={name: str(args[name]) for name in ("gpu",) if args.get(name)},
            layers=tuple(f"layer_{layer}" for layer in layers),
            places=tuple(statistics.costs),
        ),
        variants=tuple(
            variant for layer in layers for variant in _variants(layer, teachers, replacements, statistics, str(file))
        ),
        outside=statistics.outside,
    )
    return checked(library, str(file))


def _variants(
    layer: int, teachers: dict[int, Block], replacements: list[Replacement], statistics: Statistics, where: str
) -> Iterator[ScoredVariant]:
    """The teacher's of one layer, which scores 0, then what was scored: whole blocks, or subblocks."""
    teacher, like = teachers[layer], replacements[0]
    labels = Labels(statistics.args)
    zeros = {name: (0.0,) * len(values) for name, values in like.samples.items()}, dict.fromkeys(like.metrics, 0.0)
    additive = any(one.one_subblock for one in replacements)
    own: list[Block] = [{part: config} for part, config in teacher.items()] if additive else [teacher]
    scored = [(_changed(one, teacher, where), one.samples, one.metrics) for one in replacements if one.layer == layer]
    for block, samples, metrics in [*((block, *zeros) for block in own), *scored]:
        texts = {part: labels.text(config, teacher.get(part, {})) for part, config in block.items()}
        single = len(block) == 1 and len(teacher) > 1
        yield ScoredVariant(
            layer=f"layer_{layer}",
            part=next(iter(block)) if single else BLOCK,
            label=next(iter(texts.values())) if single else BETWEEN.join(f"{p} = {text}" for p, text in texts.items()),
            is_parent=all(_same(config, teacher.get(part)) for part, config in block.items()),
            metrics=metrics,
            samples=samples,
            costs={
                place: statistics.of(block, layer, place, where) | labels.sizes(block) for place in statistics.costs
            },
        )


def _changed(replacement: Replacement, teacher: Block, where: str) -> Block:
    """The block, or the one subblock of it that differs from the teacher's where one was changed."""
    if not replacement.one_subblock:
        return replacement.block
    changed = {part: own for part, own in replacement.block.items() if not _same(own, teacher.get(part))}
    if len(changed) != 1:
        raise LibraryFileError(
            f"{where}: a solution of layer {replacement.layer} is marked as a change of one subblock, but "
            f"{len(changed)} of them differ from the teacher's."
        )
    return changed


def _same(config: Any, other: Any) -> bool:
    return canonical(config) == canonical(other)


# --- subblock_stats.json


def _statistics(file: Path) -> Statistics:
    """Every entry of the file; LibraryFileError where it is not what calc_subblock_stats.py writes."""
    entries = [mapping(entry, f"{file}: entry {i}") for i, entry in enumerate(sequence(read_json(file), str(file)))]
    arguments = [mapping(entry.get("args"), f"{file}: entry {i}: args") for i, entry in enumerate(entries)]
    several_widths = len({str(args.get("n_embd")) for args in arguments}) > 1
    found = Statistics(costs={}, outside={}, args=arguments[0])
    for i, (entry, args) in enumerate(zip(entries, arguments, strict=True)):
        where = f"{file}: entry {i}"
        place = _place(args, where, several_widths)
        if place in found.costs:
            raise LibraryFileError(f"{where}: there are two entries for {place}.")
        found.costs[place] = _subblock_costs(entry, where)
        found.outside[place] = _costs(mapping(entry.get("non_block"), f"{where}: non_block"), f"{where}: non_block")
    return found


def _place(args: Config, where: str, several_widths: bool) -> MeasuredAt:
    size = whole(args, "batch_size", where)
    prefill, generation = whole(args, "prefill_seq_len", where), whole(args, "generation_seq_len", where)
    weights, cache = (str(args.get(f"{name}_dtype")).removeprefix("torch.") for name in ("weights", "kv_cache"))
    precision = weights if weights == cache else f"{weights} with KV in {cache}"
    width = f", width {args.get('n_embd')}" if several_widths else ""
    if size < 1:
        raise LibraryFileError(f"{where}: batch_size must be at least 1.")
    return MeasuredAt(
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
        costs, named = _costs(stats, here), str(stats.get("subblock_config_class"))
        key = (str(config.get("kind") or _KINDS.get(named, named)), canonical(config), layer)
        if found.setdefault(key, costs) != costs:
            raise LibraryFileError(f"{here}: layer {layer} has {short(config)} twice, at different costs.")
    return found


def _costs(stats: Config, where: str) -> dict[str, float]:
    """Those that were taken; null stands for what was not."""
    return {ours: cost(stats, theirs, where) for theirs, ours in _COSTS.items() if stats.get(theirs) is not None}


# --- solution_*.json


def _read_scores(folder: Path, teachers: dict[int, Block], replacements: list[Replacement]) -> Config:
    """Add a folder's solutions, and the teacher's blocks that they show; the arguments they were scored with."""
    files = sorted(folder.glob("*solution*.json"))
    if not files:
        raise LibraryFileError(f"{folder} has no solution_*.json: fetch the scores of the replacements.")
    teacher = mapping(read_json(folder / "teacher.json"), f"{folder}/teacher.json")
    baseline = _metrics(teacher, f"{folder}/teacher.json")
    for file in files:
        replacement, others = _replacement(mapping(read_json(file), str(file)), str(file), baseline)
        for layer, block in others.items():
            if not _same(teachers.setdefault(layer, block), block):
                raise LibraryFileError(f"{file}: layer {layer} of the teacher is another than in the other solutions.")
        replacements.append(replacement)
    args = teacher.get("args")
    return args if isinstance(args, dict) else {}


def _replacement(solution: Config, where: str, baseline: Metrics) -> tuple[Replacement, dict[int, Block]]:
    """One solution and the teacher's other layers in it. Scores are rises over the teacher's, which is 0 in what it was
    not scored on.
    """
    puzzle = mapping(solution.get("puzzle_solution"), f"{where}: puzzle_solution")
    layer, block = _one_layer(puzzle.get("single_sequence_replacement"), f"{where}: single_sequence_replacement")
    chosen = sequence(puzzle.get("chosen_replacements"), f"{where}: chosen_replacements")
    layers = dict(_one_layer(item, f"{where}: chosen_replacements {i}") for i, item in enumerate(chosen))
    metrics, samples = _metrics(solution, where)
    replacement = Replacement(
        layer=layer,
        block=block,
        one_subblock="subblock_replacement" in puzzle,
        metrics={name: value - baseline[0].get(name, 0.0) for name, value in metrics.items()},
        samples={name: _rise(values, baseline[1].get(name), where) for name, values in samples.items()},
    )
    return replacement, {index: own for index, own in layers.items() if index != layer}


def _rise(values: tuple[float, ...], baseline: tuple[float, ...] | None, where: str) -> tuple[float, ...]:
    if baseline is None:
        return values
    if len(baseline) != len(values):
        raise LibraryFileError(f"{where}: scored on {len(values)} samples, but the teacher on {len(baseline)}.")
    return tuple(value - own for value, own in zip(values, baseline, strict=True))


def _metrics(solution: Config, where: str) -> Metrics:
    """Everything that has an average; less is better for all of them."""
    metrics: dict[str, float] = {}
    samples: dict[str, tuple[float, ...]] = {}
    for name, value in solution.items():
        if not isinstance(value, dict) or "avg" not in value:
            continue
        average, each = number(value, "avg", f"{where}: {name}"), value.get("per_sample")
        if each is not None and not (isinstance(each, list) and all(is_number(one) for one in each)):
            raise LibraryFileError(f"{where}: {name}: per_sample must be a list of numbers, not {short(each)}.")
        turned = name.startswith(_LARGER_IS_BETTER)
        less_is_better: Callable[[float], float] = (lambda v: 1 - float(v)) if turned else float
        ours = f"one_minus_{name}" if turned else name
        metrics[ours] = less_is_better(average)
        if each:
            samples[ours] = tuple(map(less_is_better, each))
    if not metrics:
        raise LibraryFileError(f'{where}: there is no score in it, no entry such as "kl_div": {{"avg": 0.1}}.')
    return metrics, samples


def _one_layer(value: Any, where: str) -> tuple[int, Block]:
    """Layer and subblocks of a replacement of one layer by one block."""
    replacement = mapping(value, where)
    layers = sequence(replacement.get("parent_layer_indices"), f"{where}: parent_layer_indices")
    blocks = sequence(replacement.get("child_block_configs"), f"{where}: child_block_configs")
    if len(layers) != 1 or len(blocks) != 1:
        raise LibraryFileError(f"{where}: replaces {len(layers)} layers by {len(blocks)}; one by one can be read.")
    return whole({"layer": layers[0]}, "layer", where), _subblocks(mapping(blocks[0], where), where)


def _subblocks(block: Config, where: str) -> Block:
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
