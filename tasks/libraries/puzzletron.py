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

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tasks.libraries import labels
from tasks.libraries.options import BETWEEN, BLOCK, OptionLibrary, OptionsDescription, Place, ScoredVariant, checked
from tasks.libraries.puzzletron_files import (
    Config,
    Found,
    Replacement,
    Statistics,
    canonical,
    depth_of,
    read_scores,
    read_statistics,
)
from tasks.libraries.reading import is_number, short
from tasks.search.joint import LibraryFileError

SOURCE = "Model-Optimizer puzzletron"
STATS = "subblock_stats.json"
BLOCK_SCORES = "single_sequence_replacement_solutions--validation"
SUBBLOCK_SCORES = "single_subblock_replacement_solutions--validation"
_SIZES = {
    "num_key_value_heads",
    "n_heads_in_group",
    "intermediate_size",
    "ffn_mult",
    "num_local_experts",
    "num_experts",
    "kind",
    "name",
}


def is_puzzletron(path: Path) -> bool:
    """True for a folder with subblock statistics, and for such a file."""
    if path.is_dir():
        return (path / STATS).is_file()
    return path.is_file() and path.suffix == ".json" and "subblock_stats" in path.name


def options_from_puzzletron(path: Path, scores: Path | None = None) -> OptionLibrary:
    """Read and check a puzzle_dir, or its statistics with the folder of solution_*.json files in `scores`.

    Raises LibraryFileError that names the file and the place in it.
    """
    file = path / STATS if path.is_dir() else path
    statistics = read_statistics(file)
    folders = [scores] if scores else [file.parent / name for name in (BLOCK_SCORES, SUBBLOCK_SCORES)]
    present = [folder for folder in folders if folder.is_dir()]
    if not present:
        raise LibraryFileError(
            f"{file} has costs but no scores: there is no folder {folders[0]} with solution_*.json files; "
            "fetch it, or name it with --scores."
        )
    found = Found()
    noted: Config = {}
    for folder in present:
        noted = read_scores(folder, found)
    depth = depth_of(found, present[0])
    variants = _variants(found, statistics, depth, str(file))
    args = statistics.args
    library = OptionLibrary(
        description=OptionsDescription(
            source=SOURCE,
            parent=str(noted.get("teacher_dir") or ""),
            hardware={name: str(args[name]) for name in ("gpu",) if args.get(name)},
            layers=tuple(f"layer_{layer}" for layer in range(depth)),
            places=statistics.places,
            measured={"args": {name: value for name, value in args.items() if isinstance(value, str | int | float)}},
        ),
        variants=tuple(variants),
        outside=statistics.outside,
    )
    return checked(library, str(file))


def _variants(found: Found, statistics: Statistics, depth: int, where: str) -> Iterator[ScoredVariant]:
    """The teacher's of every layer, then what was scored: whole blocks, or subblocks where these were scored."""
    named = _Labels(found, statistics.args)
    additive = any(replacement.one_subblock for replacement in found.replacements)
    for layer in range(depth):
        teacher = found.teachers[layer]
        blocks = [{part: config} for part, config in teacher.items()] if additive else [teacher]
        scored = [(replacement, _changed(replacement, teacher, where)) for replacement in found.replacements_of(layer)]
        for replacement, block in [*((found.unchanged, block) for block in blocks), *scored]:
            texts = {part: named.text(config, teacher.get(part, {})) for part, config in block.items()}
            whole = BETWEEN.join(f"{part} = {text}" for part, text in texts.items())
            single = len(block) == 1 and len(teacher) > 1
            yield ScoredVariant(
                layer=f"layer_{layer}",
                part=next(iter(block)) if single else BLOCK,
                label=next(iter(texts.values())) if single else whole,
                is_parent=all(_same(config, teacher.get(part)) for part, config in block.items()),
                metrics=replacement.metrics,
                samples=replacement.samples,
                costs={
                    place: _costs(statistics, layer, block, place, where) | named.sizes(block)
                    for place in statistics.places
                },
            )


def _changed(replacement: Replacement, teacher: dict[str, Config], where: str) -> dict[str, Config]:
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


def _same(config: Config, other: Config | None) -> bool:
    return canonical(config) == canonical(other)


def _costs(statistics: Statistics, layer: int, block: dict[str, Config], place: Place, where: str) -> dict[str, float]:
    """Summed over the subblocks; a cost that one of them lacks is not known of the block."""
    found = []
    for part, config in block.items():
        costs = statistics.of(part, config, layer, place)
        if costs is None:
            raise LibraryFileError(
                f"{where}: layer {layer} has no statistics of its {part} {short(config)} at {place}."
            )
        found.append(costs)
    return {name: sum(own[name] for own in found) for name in found[0] if all(name in own for own in found)}


class _Labels:
    """Names of subblock configs: size in NVlabs' manner, then whatever else sets one apart from the teacher's."""

    def __init__(self, found: Found, args: Mapping[str, Any]) -> None:
        self.args = args
        blocks = [*found.teachers.values(), *(replacement.block for replacement in found.replacements)]
        widths = [
            width for block in blocks for config in block.values() if (width := _whole(config, "intermediate_size"))
        ]
        self.exact = labels.needs_exact(widths)

    def text(self, config: Config, teacher: Config) -> str:
        """The label of one subblock; "(parent * 100%)" stands in the teacher's own and in no other."""
        if config.get("no_op"):
            return "no_op (parent * 0%)"
        config, teacher = _flat(config), _flat(teacher)
        sized = self._sized(config, teacher)
        if _same(config, teacher):
            return sized if "(parent" in sized else f"{sized} (parent * 100%)"
        if config.get("replace_with_linear"):
            return "linear"
        differing = {
            name: value
            for name, value in config.items()
            if name not in _SIZES and canonical(value) != canonical(teacher.get(name))
        }
        if not differing:
            return sized
        return f"{sized.partition(' (parent')[0]} {json.dumps(differing, sort_keys=True)}".replace("=", ":")

    def _sized(self, config: Config, teacher: Config) -> str:
        heads, width = self._heads(config), _whole(config, "intermediate_size")
        experts = _whole(config, "num_local_experts") or _whole(config, "num_experts")
        if heads:
            return labels.kv_heads(heads, self._heads(teacher))
        if width:
            return labels.intermediate_size(width, _whole(teacher, "intermediate_size"), self.exact)
        if experts:
            every = _whole(teacher, "num_local_experts") or _whole(teacher, "num_experts")
            return f"{experts} experts{labels.share(experts, every)}"
        multiple, own = config.get("ffn_mult"), teacher.get("ffn_mult")
        if is_number(multiple):
            return f"ffn_mult {multiple:g}{labels.share(multiple, float(own) if is_number(own) else 0.0)}"
        return str(config.get("kind") or "unnamed")

    def sizes(self, block: dict[str, Config]) -> dict[str, float]:
        """KV heads and intermediate size of a block, as NVlabs' statistics name them."""
        return {
            "num_kv_heads": float(sum(self._heads(config) for config in block.values())),
            "ffn_intermediate_size": float(sum(_whole(config, "intermediate_size") for config in block.values())),
        }

    def _heads(self, config: Config) -> int:
        """KV heads; older configs tell how many query heads share one."""
        group, every = _whole(config, "n_heads_in_group"), _whole(self.args, "n_head")
        return _whole(config, "num_key_value_heads") or (every // group if group else 0)


def _flat(config: Config) -> Config:
    """A config with the fields of its experts among its own."""
    experts = config.get("moe")
    return {**{k: v for k, v in config.items() if k != "moe"}, **experts} if isinstance(experts, dict) else config


def _whole(config: Mapping[str, Any], name: str) -> int:
    """A whole number of a config, 0 where it has none."""
    value = config.get(name)
    return int(value) if is_number(value) and value > 0 else 0
