"""What each part of BLD gains for every kind of variant: pruned start, closed form, closed form + steps, steps alone.

.venv/bin/python -m benchmarks.bld
"""

import statistics
from collections.abc import Sequence

import torch

from benchmarks.common import Bench, arguments, open_bench, table, write_page
from blocks.compute import HOST
from blocks.fit import contribution_order, ridge_solve
from blocks.library import read_tensors
from blocks.records import BlockRecord, Subblock
from profiles.schema import BLD
from tasks.distill.bld import Job, distill, layer_data
from tasks.score.scoring import open_suffix, score_batch

VARIANTS: tuple[tuple[Subblock, str], ...] = (
    ("attention", "kv1"),
    ("attention", "linear"),
    ("ffn", "ffn768"),
    ("ffn", "ffn256"),
    ("ffn", "linear"),
)


def main() -> None:
    """Distil and score every kind in a few layers, four ways."""
    parser = arguments(__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[3, 10, 17, 25])
    parser.add_argument("--steps", type=int, default=24)
    options = parser.parse_args()
    bench = open_bench(options)
    base = bench.profile.bld
    ways = {
        "pruned start": base.model_copy(update={"closed_form": False, "steps": 0}),
        "closed form": base.model_copy(update={"steps": 0}),
        "closed form + steps": base.model_copy(update={"steps": options.steps}),
        "steps alone": base.model_copy(update={"closed_form": False, "steps": options.steps}),
    }
    rows = []
    for subblock, variant in VARIANTS:
        for way, settings in ways.items():
            figures = [measure(bench, layer, subblock, variant, settings) for layer in options.layers]
            loss, kl, cpu = (statistics.mean(column) for column in zip(*figures, strict=True))
            each = " / ".join(f"{figure[0]:.3f}" for figure in figures)
            rows.append([f"{subblock} {variant}", way, f"{loss:.4f}", each, f"{kl:.4f}", f"{cpu:.2f}"])
    layers = ", ".join(map(str, options.layers))
    tokens = bench.profile.record.statistics_sequences * bench.corpus.sequence_length
    intro = (
        f"Mean over layers {layers} of {bench.parent.name}; {tokens:,} calibration tokens for the Gram matrices, "
        f"{options.steps} AdamW steps of {base.batch_sequences * bench.corpus.sequence_length:,} tokens at "
        f"{base.learning_rate:g}, seed {bench.profile.seed}. nMSE on {bench.profile.record.validation_sequences} "
        "held-out sequences; KL = replace-1-block score on "
        f"{bench.scored.count} x {bench.scored.length} held-out tokens; CPU-seconds of one variant, loading included; "
        "the closed form's Gram matrices and channel order are made in the record stage, once per layer. "
        "When steps end above the closed form, the closed form is what is kept."
    )
    write_page(
        "bld",
        "BLD: what each part buys",
        [
            intro,
            table(["variant", "way", "nMSE", "nMSE per layer", "KL", "CPU-s"], rows),
            "## Which channels a narrower FFN keeps\n\nHeld-out nMSE after the same ridge fit, channels chosen by "
            "contribution (the paper's rule) and by backward elimination with refit (blocks/fit.py).",
            table(["layer", "width", "contribution", "elimination"], channels(bench, options.layers)),
        ],
    )


def job(bench: Bench, layer: int, subblock: Subblock, variant: str, settings: BLD) -> Job:
    """One distillation of this bench."""
    return Job(
        recording=bench.recording,
        record=bench.records[layer],
        layer=layer,
        subblock=subblock,
        variant=variant,
        settings=settings,
        seed=bench.profile.seed,
    )


def measure(bench: Bench, layer: int, subblock: Subblock, variant: str, settings: BLD) -> tuple[float, float, float]:
    """Held-out nMSE, replace-1-block KL, CPU-seconds."""
    block = distill(job(bench, layer, subblock, variant, settings), bench.workspace, HOST)
    assert block.nmse_after is not None, block.reason
    return block.nmse_after, score(bench, [block])[0], block.cpu_seconds


def score(bench: Bench, blocks: Sequence[BlockRecord]) -> list[float]:
    """Replace-1-block KL of blocks of one layer."""
    sequences, length = bench.scored.count, bench.scored.length
    suffix = open_suffix(bench.workspace / bench.parent.folder, bench.workspace, bench.scored, HOST)
    boundary = read_tensors(bench.workspace, bench.records[blocks[0].layer].boundary, ["validation"])["validation"]
    found = score_batch(suffix, blocks, boundary[:, :length], tuple(range(sequences)), bench.workspace)
    return [statistics.fmean(score.kl) for score in found if score is not None]


@torch.no_grad()
def channels(bench: Bench, layers: Sequence[int]) -> list[list[str]]:
    """Contribution against elimination, the same fit after both."""
    rows = []
    for layer in layers:
        own = job(bench, layer, "ffn", "parent", bench.profile.bld)
        data = layer_data(own, bench.recording.shards[0], bench.workspace, HOST)
        gram, down = data.statistics["ffn_gram"], data.module.mlp.down_proj.weight  # type: ignore[union-attr]
        inputs: list[torch.Tensor] = []
        hook = data.module.mlp.down_proj.register_forward_pre_hook(  # type: ignore[union-attr]
            lambda _, arguments, seen=inputs: seen.append(arguments[0].flatten(0, 1))
        )
        target = data.module.ffn(data.pairs(own, "validation", slice(None))[0]).flatten(0, 1)
        hook.remove()
        orders = (contribution_order(data.statistics["ffn_contribution"]), data.statistics["ffn_order"])
        for width in (1280, 768, 256):
            losses = []
            for order in orders:
                kept = order[:width]
                prior = down[:, kept].T
                weight = ridge_solve(gram[kept][:, kept], gram[kept] @ down.T, prior, bench.profile.bld.ridge)
                error = (inputs[0][:, kept] @ weight - target).square().sum() / target.square().sum()
                losses.append(f"{error.item():.4f}")
            rows.append([str(layer), str(width), *losses])
    return rows


if __name__ == "__main__":
    main()
