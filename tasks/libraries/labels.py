"""Labels of puzzletron's subblocks in NVlabs' manner: what stands there, its size, and its share of the parent's.

    attention = 2 kv heads (parent * 25%) && ffn = intermediate size 14336 (parent * 50%)

"(parent * 100%)" in every part marks the parent's own block; nothing else may round to it.
"""

import json
from collections.abc import Mapping
from typing import Any

from tasks.libraries.reading import is_number

Config = dict[str, Any]
# fields that the sized part of a label already tells, and names that tell nothing
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


def canonical(config: Any) -> str:
    """A config as text, without what is unset: versions differ in the fields that they write."""
    if isinstance(config, dict):
        kept = {name: canonical(value) for name, value in config.items() if value is not None and value is not False}
        return json.dumps(kept, sort_keys=True)
    return json.dumps(config)


def share(size: float, parent_size: float) -> str:
    """` (parent * 50%)`; only the parent's own size is 100 %. Nothing where the parent's is not known."""
    if not parent_size:
        return ""
    percent = round(100 * size / parent_size)
    if percent == 100 and size != parent_size:
        percent = 99 if size < parent_size else 101
    return f" (parent * {percent}%)"


class Labels:
    """Labels of one library's subblock configs: the size, then whatever else sets one apart from the teacher's."""

    def __init__(self, args: Mapping[str, Any]) -> None:
        self.args = args

    def text(self, config: Config, teacher: Config) -> str:
        """The label of one subblock; "(parent * 100%)" stands in the teacher's own and in no other."""
        if config.get("no_op"):
            return "no_op (parent * 0%)"
        config, teacher = _flat(config), _flat(teacher)
        sized = self._sized(config, teacher)
        if canonical(config) == canonical(teacher):
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
        heads, width, multiple = self._heads(config), _whole(config, "intermediate_size"), config.get("ffn_mult")
        if heads:
            return f"{heads} kv heads{share(heads, self._heads(teacher))}"
        if width:
            return f"intermediate size {width}{share(width, _whole(teacher, 'intermediate_size'))}"
        if experts := _experts(config):
            return f"{experts} experts{share(experts, _experts(teacher))}"
        if is_number(multiple):
            own = teacher.get("ffn_mult")
            return f"ffn_mult {multiple:g}{share(multiple, float(own) if is_number(own) else 0.0)}"
        return str(config.get("kind") or "unnamed")

    def sizes(self, block: Mapping[str, Config]) -> dict[str, float]:
        """KV heads and intermediate size of a block, as NVlabs' statistics name them."""
        return {
            "num_kv_heads": float(sum(self._heads(config) for config in block.values())),
            "ffn_intermediate_size": float(sum(_whole(config, "intermediate_size") for config in block.values())),
        }

    def _heads(self, config: Config) -> int:
        """KV heads; older configs say how many query heads share one."""
        group, every = _whole(config, "n_heads_in_group"), _whole(self.args, "n_head")
        return _whole(config, "num_key_value_heads") or (every // group if group else 0)


def _flat(config: Config) -> Config:
    """A config with the fields of its experts among its own."""
    experts = config.get("moe")
    return {**{k: v for k, v in config.items() if k != "moe"}, **experts} if isinstance(experts, dict) else config


def _experts(config: Config) -> int:
    return _whole(config, "num_local_experts") or _whole(config, "num_experts")


def _whole(config: Mapping[str, Any], name: str) -> int:
    """A whole number of a config, 0 where it has none."""
    value = config.get(name)
    return int(value) if is_number(value) and value > 0 else 0
