"""Costs in several types of number: each type is measured as a whole library, and the tables are joined.

Two tables are of two sittings, between which a machine may have become faster or slower. So the parent in a type is
timed in turns with the parent in the profile's precision, and the type's table is scaled to that ratio.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from blocks.compute import HOST
from blocks.library import digest_of, made_once
from blocks.records import Cost, CostTable, Metric, NonBlockCost, ParentInfo, Value
from blocks.typed_labels import typed
from tasks.distill.record import open_parent
from tasks.measure.cost_sums import PHASES, SECONDS
from tasks.measure.costs import CostRequest
from tasks.measure.llama_cpp_costs import LlamaCppTimer
from tasks.measure.variant_timing import Load
from tasks.running.progress import Progress, no_progress

CostT = TypeVar("CostT", Cost, NonBlockCost)
# llama.cpp arranges these anew for its kernels; a tied head then lies in memory twice, arranged and as the embedding
REARRANGED = ("q4_0", "iq4_nl")


class TypeRatio(Value):
    """The parent's time in a type over its time in the profile's precision, load by load: prefill and decode step."""

    shares: tuple[tuple[Metric, Metric], ...]


def measure_ratio(
    asked: CostRequest, kind: str, base: CostTable, table: CostTable, workspace: Path, progress: Progress = no_progress
) -> TypeRatio:
    """The parent in a type beside the parent in the profile's precision; stored for these two tables."""

    def measured() -> TypeRatio:
        reader = open_parent(workspace / asked.parent.folder, HOST)
        timers = [
            LlamaCppTimer(reader, one.variants(reader), one.hardware, one.measure)
            for one in (asked, asked.in_type(kind))
        ]
        shares = []
        for done, load in enumerate(asked.loads, start=1):
            shares.append(timers[0].beside(timers[1], load))
            progress(done, len(asked.loads), kind)
        return TypeRatio(shares=tuple(shares))

    return made_once(_path(base, table, kind, workspace), TypeRatio, workspace, measured)


def _path(base: CostTable, table: CostTable, kind: str, workspace: Path) -> Path:
    key = digest_of(base=base.measured_at, table=table.measured_at, hardware=base.hardware, kind=kind)
    return workspace / "costs" / f"{key}.ratio.json"


def is_tied(parent: ParentInfo, workspace: Path) -> bool:
    """Whether a parent's embedding is its head too."""
    return bool(open_parent(workspace / parent.folder).config.tie_word_embeddings)


def joined(
    base: CostTable, tables: Mapping[str, tuple[CostTable, TypeRatio]], loads: list[Load], tied: bool
) -> CostTable:
    """One table: the costs of `base`, and those of every type under labels such as `ffn768@iq4_nl`."""
    costs, non_block, busy = list(base.costs), list(base.non_block), base.hardware.get("busy", "")
    for kind, (table, ratio) in tables.items():
        factors = _factors(base, table, ratio, loads)
        for cost in table.costs:
            if typed(cost.variant, kind) != cost.variant:
                costs.append(_scaled(cost, factors).model_copy(update={"variant": typed(cost.variant, kind)}))
        for outside in table.non_block:
            twice = 2 if tied and kind in REARRANGED else 1
            update = {"head": kind, "weight_bytes": twice * outside.weight_bytes}
            non_block.append(_scaled(outside, factors).model_copy(update=update))
        busy = busy or table.hardware.get("busy", "")
    described = base.hardware | {"types": ", ".join(tables)} | ({"busy": busy} if busy else {})
    load = max([base.load, *(table.load for table, _ in tables.values())])
    return base.model_copy(
        update={"costs": tuple(costs), "non_block": tuple(non_block), "hardware": described, "load": load}
    )


def _factors(
    base: CostTable, table: CostTable, ratio: TypeRatio, loads: list[Load]
) -> dict[tuple[str, int], dict[str, float]]:
    """By what seconds of a type's table are multiplied, by load and field."""
    parents = {(one.scenario, one.batch_size): one for one in base.parent_measured}
    own = {(one.scenario, one.batch_size): one for one in table.parent_measured}
    found = {}
    for load, shares in zip(loads, ratio.shares, strict=True):
        at = load.scenario.name, load.batch
        found[at] = {
            SECONDS[phase]: share.value * getattr(parents[at], SECONDS[phase]) / getattr(own[at], SECONDS[phase])
            for phase, share in zip(PHASES, shares, strict=True)
        }
    return found


def _scaled(cost: CostT, factors: Mapping[tuple[str, int], Mapping[str, float]]) -> CostT:
    here = factors[cost.scenario, cost.batch_size]
    return cost.model_copy(update={field: factor * getattr(cost, field) for field, factor in here.items()})
