"""Every kind of attention beside the parent's: what it learns on long rows, what it keeps of a text, how long it takes.

.venv/bin/python -m benchmarks.attention --set record.hidden_sequences=80 --set bld.steps=160

Windows need fewer tokens and steps, recurrent kinds need so many. All kinds get the same.
"""

import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers.initialization import no_init_weights

from benchmarks.bld import job
from benchmarks.common import Bench, arguments, open_bench, table, write_page
from blocks.attention.ssd import SSD
from blocks.compute import HOST
from blocks.export_code.modeling_decilm import CACHE, DeciLMModel
from blocks.kinds import kinds
from blocks.records import BlockRecord, LayerChoice, Score
from tasks.distill.bld import distill
from tasks.score.scoring import score_sequences

LENGTHS = (1024, 4096, 8192)
STEPS = 16  # decode steps that are timed
RECURRENT = tuple(kind.name for kind in kinds("attention") if isinstance(kind, SSD))
LAYERS = 2  # copies of an attention that are timed


def main() -> None:
    """Distil and score all attentions of evenly spread layers, then time each."""
    parser = arguments(__doc__)
    parser.set_defaults(profile="profiles/long-context.yaml")
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 7, 12, 17, 22, 27])
    parser.add_argument("--page", default="attention", help="name of the page, benchmarks/<name>.md")
    options = parser.parse_args()
    bench = open_bench(options)
    settings = bench.profile.bld
    labels = tuple(dict.fromkeys([*bench.profile.search_space.attention, *RECURRENT]))
    blocks = {(layer, label): learned(bench, layer, label) for layer in options.layers for label in labels}
    scores = {}
    for layer in options.layers:
        for score in scored(bench, layer, [blocks[layer, label] for label in labels]):
            scores[layer, score.variant] = score
    intro = (
        f"{bench.parent.name}, rows of {bench.corpus.sequence_length} tokens, {bench.recording.trained} of them for "
        f"training; {settings.steps} steps of {settings.batch_sequences} row(s) at {settings.learning_rate:g}; scored "
        f"on {bench.scored.count} rows. "
        "nMSE: held out, after the start from the parent's weights, the ridge regression, the steps. KL: of the parent "
        "with this one attention replaced, nats per token. Windows have 4 sink tokens."
    )
    parts = [intro, "## What is learnt", table(*learning(options.layers, labels, blocks, scores))]
    parts += [verdict(options.layers, scores), "## State and time", timing(bench, ["parent", *labels])]
    write_page(options.page, "Kinds of attention on long texts", parts)


def learned(bench: Bench, layer: int, label: str) -> BlockRecord:
    """One variant, distilled."""
    return distill(job(bench, layer, "attention", label, bench.profile.bld), bench.workspace, HOST)


def scored(bench: Bench, layer: int, records: Sequence[BlockRecord]) -> list[Score]:
    """Replace-1-block scores, kept for a later run of the profile."""
    work = [(record, bench.scored.sequences) for record in records]
    return score_sequences(work, bench.records[layer], bench.scored, bench.parent, bench.workspace, HOST)


Blocks = dict[tuple[int, str], BlockRecord]
Scores = dict[tuple[int, str], Score]


def learning(
    layers: Sequence[int], labels: Sequence[str], blocks: Blocks, scores: Scores
) -> tuple[list[str], list[list[str]]]:
    """A row for each variant, a pair of columns for each layer."""
    header = ["variant", *(f"layer {layer}: {what}" for what in ("nMSE", "KL") for layer in layers), "CPU-s of BLD"]
    rows = []
    for label in labels:
        own = [blocks[layer, label] for layer in layers]
        errors = [
            " ".join(f"{one:.3g}" for one in (record.nmse_start, record.nmse_closed_form, record.nmse_after) if one)
            for record in own
        ]
        kl = [f"{scores[layer, label].kl:.4f} ±{scores[layer, label].kl_se:.4f}" for layer in layers]
        rows.append([label, *errors, *kl, f"{sum(record.cpu_seconds for record in own) / len(own):.1f}"])
    return header, rows


def verdict(layers: Sequence[int], scores: Scores) -> str:
    """The KL of window128 beside that of kv1, and of recurrent kinds beside those of kv1 and linear."""
    asked = [("window128", "kv1", 1 / 3, "a third")]
    asked += [(label, other, 1, "the same") for label in RECURRENT for other in ("kv1", "linear")]
    found = []
    for label, other, most, words in asked:
        shares = [scores[layer, label].kl / scores[layer, other].kl for layer in layers]
        told = ", ".join(f"{share:.2f}" for share in shares)
        kept = "yes" if all(share <= most for share in shares) else "no"
        found.append(f"KL of {label} / KL of {other}, layer by layer: {told}. At most {words} in every layer: {kept}.")
    return "\n\n".join(found)


def timing(bench: Bench, labels: Sequence[str]) -> str:
    """Bytes of the state and CPU-seconds of one attention in one layer, one sequence, one thread."""
    header = ["variant"]
    for what in ("state, KiB", "prefill, CPU-ms", "decode step, CPU-ms"):
        header += [f"{what} at {length}" for length in LENGTHS]
    rows = []
    for label in labels:
        figures = [measured(bench, label, length) for length in LENGTHS]
        rows.append([label, *(f"{one[column]:,.2f}" for column in range(3) for one in figures)])
    told = f"Mean over {LAYERS} copies with their norm, float32, random weights; the better of two turns."
    return f"{told}\n\n{table(header, rows)}"


@torch.inference_mode()
def measured(bench: Bench, label: str, length: int) -> tuple[float, float, float]:
    """KiB of state, CPU-ms of a prefill and of a decode step behind it."""
    if label == "no_op":
        return 0.0, 0.0, 0.0
    config = bench.reader.child_config([LayerChoice.only("attention", label)] * LAYERS)
    config.vocab_size, config.pad_token_id, config._attn_implementation = 8, None, "sdpa"
    with no_init_weights():
        stack: Any = DeciLMModel(config).eval()
    for parameter in stack.parameters():
        parameter.data.normal_(0, 0.02)
    best = [float("inf")] * 2
    for _ in range(2):
        clock, cache = time.process_time(), None
        for step, tokens in enumerate([length, *[1] * STEPS]):
            states = torch.full((1, tokens, config.hidden_size), 0.1)
            positions = torch.arange(tokens)[None] + (length + step - 1 if step else 0)
            more = {} if cache is None else {CACHE: cache}
            cache = getattr(stack(inputs_embeds=states, position_ids=positions, use_cache=True, **more), CACHE)
            if not step:
                prefilled = time.process_time()
        spent = prefilled - clock, (time.process_time() - prefilled) / STEPS
        best = [min(pair) for pair in zip(best, spent, strict=True)]
    held = [layer for layer in (cache.layers if cache else []) if getattr(layer, "keys", None) is not None]
    size = sum(one.numel() * one.element_size() for layer in held for one in (layer.keys, layer.values)) / LAYERS
    return size / 1024, *(1000 * seconds / LAYERS for seconds in best)


if __name__ == "__main__":
    main()
