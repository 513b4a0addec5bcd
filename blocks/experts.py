"""What the kinds of FFNs with experts share: their sizes, what each expert does with the tokens that it is sent, and
the fit of how much each of them counts.

N = tokens, E = experts, K = experts of a token, F = channels of an expert, D = hidden_size.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blocks.errors import UnknownVariant
from blocks.families import ExpertSizes, experts_of, has_experts
from blocks.fit import FitContext, contribution_order, ridge_solve, solve_flops
from blocks.records import Subblock
from blocks.subblock import load_parts, parts_of
from blocks.variant import Variant, VariantKind


def experts_entry(sizes: ExpertSizes) -> dict[str, Any]:
    """`block_configs` entry of an FFN with these experts, as NVIDIA's schema names them."""
    moe = {
        "num_local_experts": sizes.count,
        "num_experts_per_tok": sizes.per_token,
        "expert_intermediate_dim": sizes.width,
    }
    return {"no_op": False, "replace_with_linear": False, "moe": moe}


def experts_flops(config: Any, sizes: ExpertSizes) -> int:
    """FLOPs of one token: the router, and the experts that it is sent to."""
    return 2 * config.hidden_size * (sizes.count + 3 * sizes.per_token * sizes.width)


def sent(layer: Any, states: Tensor) -> tuple[Tensor, Tensor]:
    """Which experts of a layer each token is sent to, and what their outputs are multiplied by: (N, K) both."""
    router = next(name for name, roles in layer.family.parts("ffn").items() if roles == ("router",))
    _, gates, experts = layer.get_submodule(router)(states)
    return experts, gates


def outputs(layer: Any, states: Tensor) -> tuple[Tensor, Tensor]:
    """What each expert adds to each token that it is sent, gate included: experts (N, K), outputs (N, K, D)."""
    experts, gates = sent(layer, states)
    # each pair of token and expert as a token of its own: transformers' own experts compute it
    each = states.repeat_interleave(experts.shape[1], dim=0)
    added: Tensor = layer.core("ffn").experts(each, experts.reshape(-1, 1), gates.reshape(-1, 1))
    return experts, added.unflatten(0, experts.shape)


def channels_of(layer: Any, states: Tensor) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """Expert by expert: its number, the tokens that it is sent (n,), their gates (n,), its channels for them (n, F)."""
    experts, gates = sent(layer, states)
    parts, activation = parts_of(layer, "ffn"), layer.core("ffn").experts.act_fn
    for expert in experts.unique().tolist():
        token, place = torch.where(experts == expert)
        gate, up = (F.linear(states[token], parts[f"{name}.weight"][expert]) for name in ("gate", "up"))
        yield expert, token, gates[token, place], activation(gate) * up


@torch.no_grad()
def expert_sums(layer: Any, states: Tensor, root: Tensor | None) -> dict[str, Tensor]:
    """Sums over tokens (N, D) of what the choice of experts and channels rests on; root: of their weights (N, 1).

    expert_tokens (E,) that an expert is sent; expert_gates (E,); expert_outputs (E,): norms of its outputs, gates
    included; expert_channels (E, F): sizes of its channels, gates included.
    """
    weigh = torch.ones(len(states), device=states.device) if root is None else root.square().flatten()
    down = parts_of(layer, "ffn")["down.weight"]  # (E, D, F)
    sizes = {"tokens": (), "gates": (), "outputs": (), "channels": (down.shape[2],)}
    found = {f"expert_{name}": torch.zeros(len(down), *size, device=states.device) for name, size in sizes.items()}
    for expert, token, gate, channels in channels_of(layer, states):
        counted = gate.float() * weigh[token]
        found["expert_tokens"][expert] = weigh[token].sum()
        found["expert_gates"][expert] = counted.sum()
        found["expert_outputs"][expert] = counted @ F.linear(channels, down[expert]).float().norm(dim=1)
        found["expert_channels"][expert] = counted @ channels.float().abs()
    return found


def one_hot(experts: Tensor, count: int) -> Tensor:
    """(N, K) -> (N K, E): sums by expert as a product, since a sum that scatters has no fixed order on a GPU."""
    return F.one_hot(experts.flatten(), count).float()


class ExpertsKind(VariantKind):
    """Some of the parent's experts, for some of the tokens that they were sent."""

    subblock: ClassVar[Subblock] = "ffn"

    @abstractmethod
    def sizes(self, variant: Variant, config: Any) -> ExpertSizes:
        """The experts of a variant."""

    def block_entry(self, variant: Variant, config: Any) -> dict[str, Any]:
        return experts_entry(self.sizes(variant, config))

    def flops_per_token(self, variant: Variant, config: Any, context_tokens: int) -> int:
        return experts_flops(config, self.sizes(variant, config))

    def kept(self, variant: Variant, context: FitContext) -> Tensor:
        """Which of the parent's experts a variant keeps, in their order: those that add most to all tokens together,
        gate included.

        REAP (arXiv 2510.13999) divides that by the number of tokens that an expert is sent. Where a router sends few
        tokens to some experts, children of REAP's choice were farther from their parent (benchmarks/experts.md).
        """
        count = self.sizes(variant, context.config).count
        return contribution_order(context.statistics["expert_outputs"])[:count].sort().values

    def initialise(self, variant: Variant, module: nn.Module, context: FitContext) -> None:
        keep_experts(module, context, self.kept(variant, context))

    def closed_form(self, variant: Variant, module: nn.Module, context: FitContext) -> None:
        """How much each expert counts, by ridge regression to what the parent's experts put out together."""
        layer: Any = module
        down, parent = parts_of(layer, "ffn")["down.weight"], context.parent_layer.core("ffn")
        gram, cross = down.new_zeros(len(down), len(down)), down.new_zeros(len(down), 1)
        with torch.no_grad():
            for states, weights in ffn_batches(context):
                wanted = parent(states[None])[0]
                experts, added = outputs(layer, states)
                weighed = added if weights is None else added * weights[:, None]
                ours = one_hot(experts, len(down))  # (N K, E)
                gram += ours.T @ (weighed @ added.mT @ ours.unflatten(0, experts.shape)).flatten(0, 1)
                cross += ours.T @ (weighed @ wanted[:, :, None]).flatten(0, 1)
            down.mul_(ridge_solve(gram, cross, torch.ones_like(cross), context.ridge)[:, :, None])

    def fit_flops(self, variant: Variant, config: Any, tokens: int, length: int) -> tuple[int, int]:
        sizes, whole = self.sizes(variant, config), experts_of(config)
        products = experts_flops(config, sizes) + experts_flops(config, whole)
        return tokens * (products + 2 * config.hidden_size * sizes.per_token**2), solve_flops(sizes.count, 1)


def keep_experts(module: nn.Module, context: FitContext, kept: Tensor, channels: Tensor | None = None) -> None:
    """Copy the parent's FFN with these experts (E,) only, and of each these channels (E, F)."""
    parts = parts_of(context.parent_layer, "ffn")
    for name in ("router.weight", "gate.weight", "up.weight", "down.weight"):
        parts[name] = parts[name][kept]
    if channels is not None:
        rows = channels[:, :, None].expand(-1, -1, context.config.hidden_size)
        parts |= {name: parts[name].gather(1, rows) for name in ("gate.weight", "up.weight")}
        parts["down.weight"] = parts["down.weight"].gather(2, rows.mT)
    load_parts(module, "ffn", parts)  # type: ignore[arg-type]


def ffn_batches(context: FitContext) -> Iterator[tuple[Tensor, Tensor | None]]:
    """What enters the core of the parent's FFN (N, D), and the weights of tokens (N, 1)."""
    layer: Any = context.parent_layer
    for hidden, weights in context.hidden_batches():
        states = layer.before("ffn", hidden + layer.attention(hidden, **context.context))
        yield states.flatten(0, -2), weights


def check_size(config: Any, label: str, size: int, least: int, most: int, what: str) -> None:
    """Raise UnknownVariant for a size in a label that this parent's experts cannot have."""
    if not has_experts(config):
        raise UnknownVariant(f"{label}: the FFNs of this parent have no experts; narrow them with ffn<N>")
    if not least <= size <= most:
        raise UnknownVariant(f"{label}: this parent can have {least} to {most} {what}")
