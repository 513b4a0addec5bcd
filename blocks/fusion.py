"""FFN fusion (arXiv 2503.18908): FFNs without an attention between them become one FFN, as wide as all of them.

Of FFNs one after the other, each sees what those before it have added. Fused, all see what enters the first of them,
and what they put out is added up. The wide FFN equals this parallel sum exactly. In the place of the sequence it is an
approximation, and tasks/evaluate/fusion.py measures what it costs. It saves steps: fewer products, and wider ones.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from blocks.engine_limits import is_whole
from blocks.errors import PuzzleError
from blocks.export_code.configuration_decilm import AttributeDict
from blocks.export_code.families_decilm import FAMILIES
from blocks.export_code.modeling_decilm import DeciLMDecoderLayer
from blocks.families import has_bias
from blocks.ffn.width import ffn_entry
from blocks.subblock import load_parts, load_subblock, parts_of, subblock_state

Run = tuple[int, ...]
NOTHING = {"no_op": True, "replace_with_linear": False}
PLUS_ONE = ("LayerNorm1P",)  # norms that multiply by 1 + weight


def runs_of(config: Any) -> list[Run]:
    """Layers of a child whose FFNs come right after each other, two or more in each run. The first layer of a run may
    have an attention, which comes before its FFN.
    """
    runs = [list[int]()]
    for layer, block in enumerate(getattr(config, "block_configs", ())):
        ffn = block["ffn"]
        if not block["attention"]["no_op"]:
            runs.append([])
        if is_whole(ffn):
            runs[-1].append(layer)
        elif not ffn["no_op"]:  # a linear one cannot be a part of a wider FFN
            runs.append([])
    return [tuple(run) for run in runs if len(run) > 1]


def parts_named(runs: Sequence[Run], spans: Sequence[str]) -> list[Run]:
    """The parts of runs that spans such as `5-7` name, each from its first layer to its last. Raises PuzzleError for a
    span that no run holds.
    """
    found = list[Run]()
    for span in spans:
        first, _, last = span.partition("-")
        ends = {int(end) for end in (first, last) if end.isdecimal()}
        part = next((run for run in runs if len(ends) == 2 and ends <= set(run)), ())
        found.append(tuple(layer for layer in part if min(ends) <= layer <= max(ends)))
    named = [layer for run in found for layer in run]
    if not all(found) or len(set(named)) < len(named):
        allowed = ", ".join(f"{run[0]}-{run[-1]}" for run in runs)
        raise PuzzleError(
            f"--layers {' --layers '.join(spans)}: each names two or more layers whose FFNs come right after each "
            f"other, none of them twice. These can be fused, or parts of them: {allowed}."
        )
    return found


def refuse_family(config: Any) -> None:
    """Raise PuzzleError where no wider FFN equals the sum of several of a child's FFNs."""
    name = config.base_model_type
    family = FAMILIES[name]
    why = None
    if family.experts:
        why = "they are mixtures of experts, and each has a router of its own"
    elif family.ffn_norms[1] is not None:
        why = "a norm stands behind each, and the norm of a sum is not the sum of the norms"
    elif family.norm_bias and not has_bias(family, "up", config):
        why = "their norms have biases, which would have to become biases of the FFN, and it has none"
    if why is not None:
        raise PuzzleError(f"FFNs of {name} cannot be fused: {why}. Serve the child as it is.")


def fuse(model: Any, runs: Sequence[Run]) -> None:
    """Fuse runs of FFNs in place. The first layer of a run gets the wide FFN. The others had no attention, so nothing
    is left in them. Raises PuzzleError for a family whose FFNs cannot be fused.
    """
    config, layers = model.config, model.model.layers
    refuse_family(config)
    for run in runs:
        parts = fused_parts([layers[layer] for layer in run])
        entry = ffn_entry(config, len(parts["up.weight"]))
        for layer in run:
            old, is_first = layers[layer], layer == run[0]
            block = AttributeDict(config.block_configs[layer] | {"ffn": entry if is_first else NOTHING})
            made = DeciLMDecoderLayer(model.model.base, config.base_model_type, block, layer)
            load_subblock(made.to(model.device, model.dtype), "attention", subblock_state(old, "attention"))
            if is_first:
                load_parts(made, "ffn", parts)
            config.block_configs[layer], layers[layer] = block, made.train(model.training)


@torch.no_grad()
def fused_parts(layers: Sequence[DeciLMDecoderLayer]) -> dict[str, Tensor]:
    """The weights of one FFN that puts out the sum of what those of `layers` put out, named as by `parts_of`; float64.

    The wide FFN has one norm. So the gain and the bias of each go into the matrices that read what it has normed.
    """
    family, norm = layers[0].family, layers[0].family.ffn_norms[0]
    read = [role for role in ("gate", "up") if role == "up" or family.gated]
    found: dict[str, list[Tensor]] = {}
    plus = 1 if family.norm in PLUS_ONE else 0
    for layer in layers:
        own = {name: tensor.double() for name, tensor in parts_of(layer, "ffn").items()}
        gain, shift = own[f"{norm}.weight"] + plus, own.get(f"{norm}.bias")
        for role in read:
            if shift is not None:
                own[f"{role}.bias"] = own[f"{role}.bias"] + own[f"{role}.weight"] @ shift
            own[f"{role}.weight"] = own[f"{role}.weight"] * gain
        own[f"{norm}.weight"] = torch.ones_like(gain) - plus
        if shift is not None:
            own[f"{norm}.bias"] = torch.zeros_like(shift)
        for name, tensor in own.items():
            found.setdefault(name, []).append(tensor)
    return {name: _joined(name, tensors) for name, tensors in found.items()}


def _joined(name: str, tensors: Sequence[Tensor]) -> Tensor:
    """A weight of the wide FFN, from those of its parts."""
    if name == "down.bias":
        return torch.stack(list(tensors)).sum(0)
    if name.startswith(("gate.", "up.", "down.")):
        return torch.cat(list(tensors), dim=1 if name == "down.weight" else 0)
    return tensors[0]  # the norm's, which are those of a norm that does nothing
