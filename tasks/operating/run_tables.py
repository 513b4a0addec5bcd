"""What a run found, joined to one row a variant and one row a layer: tables that MLflow shows and compares."""

from collections.abc import Iterator, Mapping, Sequence

from blocks.records import Architecture, BlockRecord, Cost, CostTable, LayerChoice, Score, Value

Place = tuple[int, str, str]  # layer, subblock, variant


class VariantRow(Value):
    """A variant of the block library. Costs at the first scenario, at the batch size that was chosen for it."""

    layer: int
    subblock: str
    variant: str
    chosen: bool
    status: str
    nmse_closed_form: float | None = None
    nmse: float | None = None
    kl: float | None = None
    kl_se: float | None = None
    lm_loss: float | None = None
    parameters: int | None = None
    prefill_seconds: float | None = None
    decode_seconds_per_token: float | None = None
    block: str = ""


class LayerRow(Value):
    """A layer of the child: what stands in it, what it costs in quality, and the digests of its blocks."""

    layer: int
    attention: str
    ffn: str
    kl: float
    parameters: int
    attention_block: str = ""
    ffn_block: str = ""


def variant_rows(
    blocks: Sequence[BlockRecord], scores: Sequence[Score], costs: CostTable, architecture: Architecture
) -> list[VariantRow]:
    """Every distilled variant: losses, score, cost, and whether it stands in the child."""
    scored: dict[Place, Score] = {(score.layer, score.subblock, score.variant): score for score in scores}
    priced, chosen = _priced(costs, architecture), set(_stands([choice.bare for choice in architecture.layers]))
    rows = []
    for block in blocks:
        place = (block.layer, block.subblock, block.variant)
        score, cost = scored.get(place), priced.get((block.subblock, block.variant))
        rows.append(
            VariantRow(
                layer=block.layer,
                subblock=block.subblock,
                variant=block.variant,
                chosen=place in chosen,
                status=block.status,
                nmse_closed_form=block.nmse_closed_form,
                nmse=block.nmse_after,
                kl=score.kl if score else None,
                kl_se=score.kl_se if score else None,
                lm_loss=score.lm_loss if score else None,
                parameters=cost.parameters if cost else None,
                prefill_seconds=cost.prefill_seconds if cost else None,
                decode_seconds_per_token=cost.decode_seconds_per_token if cost else None,
                block=block.weights.sha256 if block.weights else "",
            )
        )
    return rows


def layer_rows(
    blocks: Sequence[BlockRecord], scores: Sequence[Score], costs: CostTable, architecture: Architecture
) -> list[LayerRow]:
    """The child from its first layer to its last; the parent's own subblocks have a KL of 0 and no block."""
    kl: dict[Place, float] = {(score.layer, score.subblock, score.variant): score.kl for score in scores}
    made: dict[Place, BlockRecord] = {(block.layer, block.subblock, block.variant): block for block in blocks}
    priced, rows = _priced(costs, architecture), []
    for layer, choice in enumerate(architecture.layers):
        stand = list(_stands([choice], layer))
        weights = {place[1]: _digest(made.get(place)) for place in _stands([choice.bare], layer)}
        rows.append(
            LayerRow(
                layer=layer,
                attention=choice.attention,
                ffn=choice.ffn,
                kl=sum(kl.get(place, 0.0) for place in stand),
                parameters=sum(
                    priced[where].parameters
                    for where in (("attention", choice.attention), ("ffn", choice.ffn))
                    if where in priced
                ),
                attention_block=weights.get("attention", weights.get("block", "")),
                ffn_block=weights.get("ffn", weights.get("block", "")),
            )
        )
    return rows


def _stands(layers: Sequence[LayerChoice], first: int = 0) -> Iterator[Place]:
    for layer, choice in enumerate(layers, start=first):
        if choice.coupled:
            yield layer, "block", choice.block_label
        else:
            yield layer, "attention", choice.attention
            yield layer, "ffn", choice.ffn


def _priced(costs: CostTable, architecture: Architecture) -> Mapping[tuple[str, str], Cost]:
    at = architecture.totals[0]
    return {
        (cost.subblock, cost.variant): cost
        for cost in costs.costs
        if (cost.scenario, cost.batch_size) == (at.scenario, at.batch_size)
    }


def _digest(block: BlockRecord | None) -> str:
    return block.weights.sha256 if block and block.weights else ""
