"""The child as GKD trains it: its loss against the parent's targets, and the names of what is trained."""

from contextlib import nullcontext

from torch import Tensor, nn
from torch.nn import functional as F

from blocks.compute import Compute
from blocks.divergence import kl_loss, kl_of_heads, kl_per_token, scaled_head
from blocks.export_code.families_decilm import FAMILIES
from blocks.export_code.modeling_decilm import DeciLMForCausalLM
from profiles.schema import GKD
from tasks.distill.gkd_targets import head_products, model_head, targets_in


class Student(nn.Module):
    """The child with its loss. sharded: its parameters are slices, which are whole only within `forward`."""

    def __init__(self, model: DeciLMForCausalLM, settings: GKD, compute: Compute, sharded: bool = False) -> None:
        super().__init__()
        self.model, self.compute, self.sharded = model, compute, sharded
        own_head = "head" in settings.also_train
        self.parent_head = nn.Parameter(model.lm_head.weight.detach().clone()) if own_head else None
        self.requires_grad_(False)
        for _, module in trained_modules(model, settings):
            module.requires_grad_(True)
        self.head = None if sharded or own_head else model_head(model)
        if settings.gradient_checkpointing:
            # transformers 5.24 renamed it
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
            for layer in model.model.layers:
                layer.training = True  # the layer alone: what is in it keeps its evaluation mode, without dropout

    def forward(
        self, batch: dict[str, Tensor], layers: tuple[int, ...], watched: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Loss and, of it, the KL, means over tokens. watched: the KL of every token (N,) instead, twice.

        Where the batch has `weights` (N,), what a token adds is multiplied by its own.
        """
        with nullcontext() if self.sharded else self.compute.products():
            states = self.model.model(batch["tokens"].long(), output_hidden_states=bool(layers), use_cache=False)
        with head_products(self.compute):
            kl = self._kl(states.last_hidden_state.flatten(0, 1).float(), batch, watched)
        total, weights = kl, batch.get("weights")
        for layer in () if watched else layers:
            child, parent = states.hidden_states[layer + 1].flatten(0, 1).float(), batch[f"layer_{layer}"].float()
            apart = 1 - F.cosine_similarity(child, parent, dim=-1)
            total = total + (apart if weights is None else apart * weights).mean()
        return total, kl.detach()

    def _kl(self, last: Tensor, batch: dict[str, Tensor], watched: bool) -> Tensor:
        targets, weights = targets_in(batch), batch.get("weights")
        head = self.head or model_head(self.model) if self.parent_head is None else None
        if head is not None and not watched:
            return kl_loss(last, targets, head, weights)
        if head is not None:
            kl = kl_per_token(last, targets, head)[0]
        else:
            assert self.parent_head is not None
            family, config = FAMILIES[self.model.config.base_model_type], self.model.config
            own, parents = (scaled_head(one, config, family) for one in (self.model.lm_head.weight, self.parent_head))
            kl = kl_of_heads(last, own, targets, parents, family.cap(config))
        kl = kl if weights is None else kl * weights
        return kl.double() if watched else kl.mean()


def trained_modules(model: DeciLMForCausalLM, settings: GKD) -> list[tuple[str, nn.Module]]:
    """What GKD trains, with the prefix of its weights' names in GKD's files."""
    beside = _beside_layers(model)
    return [("", model.model.layers), *((f"{name}.", beside[name]) for name in settings.also_train)]


def _beside_layers(model: DeciLMForCausalLM) -> dict[str, nn.Module]:
    """What can be trained beside the layers, by the names of `gkd.also_train`."""
    return {"norm": model.model.norm, "head": model.lm_head}


def load_trained(model: DeciLMForCausalLM, weights: dict[str, Tensor]) -> None:
    """Put the weights of GKD's files into a child."""
    for name, module in _beside_layers(model).items():
        own = {key.removeprefix(f"{name}."): weights.pop(key) for key in list(weights) if key.startswith(f"{name}.")}
        if own:
            module.load_state_dict(own)
    model.model.layers.load_state_dict(weights)
