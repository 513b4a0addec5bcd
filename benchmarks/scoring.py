"""Batched scoring from recorded states beside a full forward for every variant: equal scores, and how much faster.

.venv/bin/python -m benchmarks.scoring
"""

import statistics
import time
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from benchmarks.bld import job
from benchmarks.common import Bench, arguments, open_bench, table, write_page
from blocks.compute import HOST
from blocks.library import read_tensors
from blocks.records import SUBBLOCKS, BlockRecord
from tasks.distill.bld import distill
from tasks.score import scoring
from tasks.score.scoring import load_variant, open_suffix, score_batch


def main() -> None:
    """Score all variants of evenly spread layers three ways."""
    parser = arguments(__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 7, 12, 17, 22, 27])
    options = parser.parse_args()
    bench = open_bench(options)
    blocks = {layer: library(bench, layer) for layer in options.layers}
    count = sum(len(members) for members in blocks.values())
    ours, our_time = suffix_scores(bench, blocks)
    twice, twice_time, stored_time = full_scores(bench, blocks)
    worst = max(abs(ours[key] - twice[key]) for key in ours)
    relative = max(abs(ours[key] - twice[key]) / max(twice[key], 1e-3) for key in ours)
    rows = [
        ["two full forwards (parent and child), softmax over the vocabulary", *line(twice_time, twice_time, count)],
        ["one full forward (child), the parent's log-probabilities kept", *line(stored_time, twice_time, count)],
        ["suffix from recorded states, variants batched, moment form", *line(our_time, twice_time, count)],
    ]
    intro = (
        f"{count} variants of layers {', '.join(map(str, options.layers))} of {bench.parent.name}, "
        f"{bench.scored.count} x {bench.scored.length} tokens. All ways under the same allocator settings, in one "
        "process, after one warm-up. The full forward is Hugging Face's own model with the subblock swapped in; its KL "
        "is the plain double log-softmax in float32."
    )
    outro = (
        f"Largest difference of a score {worst:.1e} nats (relative to the score, {relative:.1e}); median score "
        f"{statistics.median(twice.values()):.4f}. Against two full forwards {twice_time / our_time:.2f}x faster, "
        f"against one {stored_time / our_time:.2f}x.\n\n"
        "Where the time goes: the suffix is half of the layers on average (layers are 79 % of this parent's work, "
        "the head 21 %), and logsumexp needs the head in full. What is saved beyond that is the vocabulary-sized "
        "targets and their softmax."
    )
    header = ["way", "seconds", "CPU-s", "per variant, s", "faster"]
    write_page("scoring", "Replace-1-block scoring", [intro, table(header, rows), outro])


def line(clock: "Clock", base: "Clock", count: int) -> list[str]:
    """Seconds, CPU-seconds, seconds a variant, speed-up."""
    return [f"{clock.wall:.1f}", f"{clock.cpu:.1f}", f"{clock.wall / count:.2f}", f"{base / clock:.2f}x"]


class Clock:
    """Wall and CPU seconds."""

    def __init__(self) -> None:
        self.wall, self.cpu = -time.perf_counter(), -time.process_time()

    def stop(self) -> "Clock":
        """Close the interval."""
        self.wall += time.perf_counter()
        self.cpu += time.process_time()
        return self

    def add(self, other: "Clock") -> None:
        """Add another interval."""
        self.wall += other.wall
        self.cpu += other.cpu

    def __truediv__(self, other: "Clock") -> float:
        return self.wall / other.wall


Key = tuple[int, str, str]


def library(bench: Bench, layer: int) -> list[BlockRecord]:
    """All trained and free variants of a layer."""
    members = []
    for subblock in SUBBLOCKS:
        for label in getattr(bench.profile.search_space, subblock):
            members.append(distill(job(bench, layer, subblock, label, bench.profile.bld), bench.workspace, HOST))
    return members


def suffix_scores(bench: Bench, blocks: dict[int, list[BlockRecord]]) -> tuple[dict[Key, float], Clock]:
    """Our scores and their time; the parent's targets are part of it."""
    sequences, length = bench.scored.count, bench.scored.length
    folder = bench.workspace / bench.parent.folder
    found: dict[Key, float] = {}
    for _ in range(2):  # the first round warms up
        scoring._passes.cache_clear()
        open_suffix.cache_clear()
        clock = Clock()
        suffix = open_suffix(folder, bench.workspace, bench.scored, HOST)
        for layer, members in blocks.items():
            boundary = read_tensors(bench.workspace, bench.records[layer].boundary, ["validation"])["validation"]
            for start in range(0, len(members), 4):
                batch = members[start : start + 4]
                scores = score_batch(suffix, batch, boundary[:, :length], tuple(range(sequences)), bench.workspace)
                found |= {
                    (block.layer, block.subblock, block.variant): statistics.fmean(score.kl)
                    for block, score in zip(batch, scores, strict=True)
                    if score is not None
                }
        clock.stop()
    return found, clock


@torch.no_grad()
def full_scores(bench: Bench, blocks: dict[int, list[BlockRecord]]) -> tuple[dict[Key, float], Clock, Clock]:
    """Scores by full forwards; time with the parent run again for each variant, and with its log-probs kept."""
    sequences, length = bench.scored.count, bench.scored.length
    tokens = read_tensors(bench.workspace, bench.corpus.tokens)["validation"][:sequences, :length].long()
    model: Any = AutoModelForCausalLM.from_pretrained(bench.workspace / bench.parent.folder, dtype=torch.float32).eval()
    log_probs(model, tokens)
    found: dict[Key, float] = {}
    twice, once = Clock().stop(), Clock().stop()
    for layer, members in blocks.items():
        for block in members:
            clock = Clock()
            parents = log_probs(model, tokens)
            forward = clock.stop()
            clock = Clock()
            kl = swapped_kl(bench, model, layer, block, tokens, parents)
            rest = clock.stop()
            found[block.layer, block.subblock, block.variant] = kl
            once.add(rest)
            twice.add(rest)
            twice.add(forward)
    return found, twice, once


def log_probs(model: Any, tokens: Tensor) -> Tensor:
    """(S, T) -> (S, T, V)"""
    return F.log_softmax(model(tokens, use_cache=False).logits, dim=-1)


def swapped_kl(bench: Bench, model: Any, layer: int, block: BlockRecord, tokens: Tensor, parents: Tensor) -> float:
    """KL with the block swapped into Hugging Face's model; the model is restored after."""
    module, stand_in = model.model.layers[layer], load_variant(bench.reader, block, bench.workspace)
    core = "self_attn" if block.subblock == "attention" else "mlp"
    norm = "input_layernorm" if block.subblock == "attention" else "post_attention_layernorm"
    kept = {name: getattr(module, name) for name in (core, norm)}
    for name in kept:
        setattr(module, name, getattr(stand_in, name, None) or (Nothing(core) if name == core else torch.nn.Identity()))
    child = log_probs(model, tokens)
    for name, part in kept.items():
        setattr(module, name, part)
    return F.kl_div(child, parents, reduction="none", log_target=True).sum(-1).mean().item()


class Nothing(torch.nn.Module):
    """A no-op in Hugging Face's layer: zeros for a core."""

    def __init__(self, core: str) -> None:
        super().__init__()
        self.core = core

    def forward(self, hidden_states: Tensor, **_: Any) -> Any:
        """Zeros, with the attention's second output where the layer expects one."""
        zeros = torch.zeros_like(hidden_states)
        return (zeros, None) if self.core == "self_attn" else zeros


if __name__ == "__main__":
    main()
