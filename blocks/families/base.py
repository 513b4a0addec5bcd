"""What puzzle asks of a model family: attention types per layer, shapes of weights, and what a child cannot carry."""

from abc import ABC
from typing import Any, ClassVar

from blocks.errors import ParentError
from blocks.records import Subblock

Shape = tuple[int, ...]


def head_dim(config: Any) -> int:
    """Channels of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _matrix(rows: int, columns: int, bias: bool) -> list[Shape]:
    return [(rows, columns), (rows,)] if bias else [(rows, columns)]


class Family(ABC):
    """One family of decoder-only models whose layer is attention, then FFN, each with residual add.

    Where subblocks and norms lie is read off the family's own decoder layer by
    blocks/export_code/modeling_decilm.py; a family class says only what cannot be read off. It also says which norms
    and biases the layer has beside the matrices, so that a plan needs no modelling code; a test compares this with the
    layer itself. norms: how many a subblock has, before and after it. head_norms: whether queries and keys have some.
    """

    model_type: ClassVar[str]
    norms: ClassVar[int] = 1
    head_norms: ClassVar[bool] = False

    def biases(self, config: Any) -> tuple[bool, bool, bool]:
        """Whether q, k and v, the attention's output, and the FFN's three matrices have biases."""
        return False, False, False

    def weights(self, config: Any, subblock: Subblock, entry: dict[str, Any]) -> list[list[Shape]]:
        """Shapes of all weights of a subblock with this entry of `block_configs`, module by module."""
        if entry["no_op"]:
            return []
        width = config.hidden_size
        norms: list[list[Shape]] = [[(width,)]] * self.norms
        if entry["replace_with_linear"]:
            return [*norms, [(width, width)]]
        inputs, output, ffn = self.biases(config)
        if subblock == "ffn":
            inner = entry["intermediate_size"]
            return [*norms, *(_matrix(a, b, ffn) for a, b in ((inner, width), (inner, width), (width, inner)))]
        channels = head_dim(config)
        queries, states = config.num_attention_heads * channels, entry["num_key_value_heads"] * channels
        matrices = [_matrix(rows, width, inputs) for rows in (queries, states, states)]
        recurrent = entry.get("recurrent")
        if recurrent:
            gates = _matrix(recurrent["gates"] * config.num_attention_heads, width, True)
            own: list[list[Shape]] = [
                [(queries + 2 * states, recurrent["conv_kernel"]), *2 * [(config.num_attention_heads,)]]
            ]
            return [*norms, *matrices, _matrix(width, queries, output), gates, *own]
        heads: list[list[Shape]] = [[(channels,)]] * (2 if self.head_norms else 0)
        return [*norms, *matrices, _matrix(width, queries, output), *heads]

    def attention_types(self, config: Any) -> list[str]:
        """`full_attention` or `sliding_attention` for each layer of the parent."""
        types = getattr(config, "layer_types", None)
        return list(types) if types else ["full_attention"] * config.num_hidden_layers

    def windows(self, config: Any) -> list[int | None]:
        """How many tokens a token sees in each layer of the parent, itself included; None for all before it."""
        types = self.attention_types(config)
        return [config.sliding_window if kind == "sliding_attention" else None for kind in types]

    def check(self, config: Any) -> None:
        """ParentError when the config asks for something that a child would silently lose."""
        unknown = set(self.attention_types(config)) - {"full_attention", "sliding_attention"}
        if unknown:
            raise ParentError(f"{self.model_type} with {', '.join(sorted(unknown))} layers is not supported")
        if getattr(config, "final_logit_softcapping", None):
            raise ParentError(f"{self.model_type} with final_logit_softcapping is not supported: set it to null")
