"""Which experts to keep: those that add most, in all or to a token (REAP), those most used, or any. And other kinds.

.venv/bin/python -m benchmarks.experts

The parent is small, of the family qwen3_moe, and trained here for minutes. All layers of a child have the same kind.
"""

import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from benchmarks.bld import job
from benchmarks.common import Bench, arguments, open_bench, table, write_page
from blocks.child import assemble_layers, library_of
from blocks.compute import HOST
from blocks.estimates import mean, plain, rounded
from blocks.experts import keep_experts
from blocks.ffn.experts import FewerExperts
from blocks.fit import FitContext
from blocks.kinds import kind_of, parse_label
from blocks.library import read_rows
from blocks.records import LayerChoice
from blocks.resources import resources
from blocks.variant import Variant
from tasks.distill.bld import distill, layer_data

SEEDS = 3  # random choices
KIND = FewerExperts()
Contexts = Sequence[FitContext]
Kept = Callable[[Variant, FitContext], Tensor]


def main() -> None:
    """Train the parent, record it, judge every choice, write the page."""
    parser = arguments(__doc__)
    parser.set_defaults(profile="benchmarks/experts.yaml")
    options = parser.parse_args()
    started = time.process_time()
    bench = open_bench(options)
    labels = [label for label in bench.profile.search_space.ffn if label.startswith("experts")]
    contexts = [context_of(bench, layer) for layer in range(bench.reader.depth)]
    rows = [row for label in labels for row in chosen(bench, contexts, parse_label("ffn", label, bench.reader.config))]
    counts = [context.statistics["expert_tokens"] for context in contexts]
    shares = "; ".join(" ".join(f"{share:.0%}" for share in (own / own.sum()).tolist()) for own in counts)
    intro = (
        f"{bench.parent.name}, {bench.parent.source}: {bench.reader.depth} layers of {len(counts[0])} experts, "
        f"{bench.reader.config.num_experts_per_tok} for each token, loss {lm_loss(bench):.3f} nats per byte. Share of "
        f"the tokens that each expert is sent, layer by layer: {shares}. In every child all layers are changed alike. "
        f"KL: of the whole child, on {len(held_out(bench))} held-out sequences, nats per token, ± over sequences."
    )
    parts = [
        intro,
        all_kept(bench, contexts),
        "## Which experts are kept",
        table(["experts", "chosen by", "KL", "fitted"], rows),
    ]
    parts.append(
        "what they add: the sum over all tokens, which the kind uses; REAP: the mean over those an expert is sent. "
        "fitted: how much each expert counts, by ridge regression to what the parent's FFN puts out. random: the mean "
        f"of {SEEDS} choices, ± over choices."
    )
    parts += ["## All kinds", kinds_trained(bench)]
    parts.append(f"{time.process_time() - started:.0f} CPU-seconds, those of stages that were not there yet included.")
    write_page("experts", "Experts: which to keep", parts)


def chosen(bench: Bench, contexts: Contexts, variant: Variant) -> Iterator[list[str]]:
    """A row for each way to choose the experts that are kept."""

    def highest(rank: Callable[[dict[str, Tensor]], Tensor]) -> Kept:
        return lambda own, context: rank(context.statistics).topk(own.size or 0).indices.sort().values

    def drawn(seed: int) -> Kept:
        def kept(own: Variant, context: FitContext) -> Tensor:
            draw = torch.Generator().manual_seed(seed * 1000 + context.layer)
            return torch.randperm(len(context.statistics["expert_tokens"]), generator=draw)[: own.size].sort().values

        return kept

    ways = {
        "what they add": KIND.kept,
        "REAP": highest(lambda found: (found["expert_outputs"] / found["expert_tokens"]).nan_to_num(0.0)),
        "frequency": highest(lambda found: found["expert_tokens"]),
    }
    for name, how in ways.items():
        figures = [
            mean(child_kl(bench, made(bench, contexts, variant, how, fitted))).metric for fitted in (False, True)
        ]
        yield [variant.label, name, *map(rounded, figures)]
    values = [
        [float(child_kl(bench, made(bench, contexts, variant, drawn(seed), fitted)).mean()) for seed in range(SEEDS)]
        for fitted in (False, True)
    ]
    yield [variant.label, "random", *(rounded(mean(each).metric) for each in values)]


def context_of(bench: Bench, layer: int) -> FitContext:
    """What a variant of a layer starts from."""
    data = layer_data(
        job(bench, layer, "ffn", "linear", bench.profile.bld), bench.recording.shards[0], bench.workspace, HOST
    )
    return FitContext(
        config=bench.reader.config,
        layer=layer,
        parent_layer=data.module,
        statistics=data.statistics,
        hidden=data.states["train", "hidden"],
        context=data.context,
        ridge=bench.profile.bld.ridge,
        batch_sequences=8,
    )


def made(bench: Bench, contexts: Contexts, variant: Variant, kept: Kept, fitted: bool) -> nn.Module:
    """A child whose layers keep these experts, not trained."""
    model = bench.reader.model([LayerChoice(ffn=variant.label)] * bench.reader.depth)
    with torch.no_grad():
        for context, layer in zip(contexts, model.model.layers, strict=True):
            keep_experts(layer, context, kept(variant, context))
            if fitted:
                KIND.closed_form(variant, layer, context)
    return model


def all_kept(bench: Bench, contexts: Contexts) -> str:
    """Whether a child that keeps every expert gives the parent's logits."""
    model = bench.reader.model()
    own = KIND.variant("experts", bench.reader.config.num_experts)
    with torch.no_grad():
        for context, layer in zip(contexts, model.model.layers, strict=True):
            for weight in layer.core("ffn").parameters():  # type: ignore[operator]
                weight.fill_(float("nan"))
            KIND.initialise(own, layer, context)
        same = torch.equal(model(held_out(bench)[:8]).logits, bench.reader.model()(held_out(bench)[:8]).logits)
    return f"All experts kept: the parent's logits bit for bit: {'yes' if same else 'NO'}."


def held_out(bench: Bench) -> Tensor:
    """Tokens of the test split."""
    return read_rows(bench.workspace, bench.corpus.tokens, "test", 0, bench.corpus.test_sequences).long()


@torch.no_grad()
def child_kl(bench: Bench, child: nn.Module) -> Tensor:
    """KL of the parent to a child, of each held-out sequence."""
    parent, ids = bench.reader.model(), held_out(bench)
    found = []
    for part in ids.split(16):
        p, q = (model(part).logits.double().log_softmax(-1) for model in (parent, child))
        found.append((p.exp() * (p - q)).sum(-1).mean(-1))
    return torch.cat(found)


@torch.no_grad()
def lm_loss(bench: Bench) -> float:
    """The parent's loss on the test split."""
    ids = held_out(bench)
    return float(bench.reader.model()(ids, labels=ids).loss)


def kinds_trained(bench: Bench) -> str:
    """Every kind in all layers, distilled block by block."""
    header = ["variant", "parameters", "active", "MFLOPs of a token", "nMSE: start, fitted, trained", "KL"]
    rows = []
    for label in ("parent", *bench.profile.search_space.ffn):
        variant = parse_label("ffn", label, bench.reader.config)
        needs = resources(bench.reader, variant, 0, 4)
        counts = [f"{needs.parameters:,}", f"{needs.active_parameters:,}", plain(needs.flops_per_token / 1e6)]
        if not kind_of(variant).trainable:
            rows.append([label, *counts, "", "0"])
            continue
        jobs = [job(bench, layer, "ffn", label, bench.profile.bld) for layer in range(bench.reader.depth)]
        blocks = [distill(one, bench.workspace, HOST) for one in jobs]
        choice = LayerChoice(ffn=label)
        child = assemble_layers(bench.reader, library_of(blocks), [choice] * bench.reader.depth, bench.workspace)
        errors = [(one.nmse_start, one.nmse_closed_form, one.nmse_after) for one in blocks]
        told = " ".join(f"{sum(filter(None, each)) / len(blocks):.3g}" for each in zip(*errors, strict=True))
        rows.append([label, *counts, told, rounded(mean(child_kl(bench, child)).metric)])
    settings = bench.profile.bld
    told = f"{settings.steps} steps of {settings.batch_sequences} sequences a block; nMSE: the mean of the layers."
    return f"{told}\n\n{table(header, rows)}"


if __name__ == "__main__":
    main()
