"""What each stage of a run computes, counted from the parent's config: FLOPs, bytes, and the seconds they take.

Per token a layer's forward is what its variants count (VariantKind.flops_per_token at the whole sequence, since the
kernels mask) plus 10 D + 6 F floats of element-wise work; a step is three forwards (forward, gradient of the inputs, of
the weights) plus AdamW's passes over weights and moments. The head counts 2 V D for its logits, as much again where the
moment of the distribution is taken (blocks/divergence.py), and element-wise passes over the logits. On top of that:

    record    forward; Gram matrices of the FFN's channels, of both inputs and cross terms; backward
              elimination (blocks/fit.py) in float64, whose inverse is rewritten every round; states stored and hashed
    distill   the layer's own forward once; per variant its closed form (VariantKind.fit_flops), held-out losses, steps
    score     layers after the replaced one and the head, for every variant
    images    tower and projector once over every image, in float32; the table of their features written
    evaluate  models once over the test sequences, both heads; benchmark items at their mean length
    GKD       the parent's states and moments once; per child steps through layers and head, validation between

A few rates turn counts into seconds (tasks/planning/machine.py). What is left are constants of this program's own
overheads, below: set once from the main job, the same for every parent and machine.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from blocks.families import inner_channels, weights
from blocks.fit import elimination_flops
from blocks.kinds import kind_of, parse_label, parse_labels
from blocks.parent import Parent
from blocks.records import SUBBLOCKS, Subblock
from blocks.resources import BYTES, active_parameters_of, non_block_parameters, parameters_of
from blocks.variant import Variant
from profiles.schema import (
    GENERAL,
    CorpusSource,
    GgufParent,
    PackageParent,
    ParentAnswersSource,
    Profile,
    TinyParent,
    racers_in,
)
from tasks.distill.gkd_settings import is_recorded, texts_of_steps, token_bytes, trial_steps
from tasks.distill.record import CHUNK, fits_in_a_shard, slices
from tasks.inputs.space import layers_of, refused_alone
from tasks.inputs.tiny import TRAIN_BATCH, TRAIN_TOKENS
from tasks.inputs.vision import BATCH
from tasks.planning.machine import BLOCK_NAMES, Rates, with_serial_share
from tasks.planning.tower import Tower, count_images, tower_counts
from tasks.search.capabilities import rows_read

FLOAT = 4  # bytes: the search computes and stores in float32
LOGIT_PASSES = 4  # element-wise passes over a slice of logits that stays in the cache (online softmax)
WHOLE_LOGIT_PASSES = 10  # evaluation's log-softmax, divergence and argmax over whole logits
ADAMW_PASSES = 14  # floats read or written per weight and step: gradient made, clipped, both moments, weight
COLUMN_GATHER = 3.3  # picking columns of a matrix, in time of a stream of its bytes (6.6 ms beside 2.0, F = 1536)
# the elimination's inverse: product written, difference, rows picked, columns picked, each read and written
INVERSE_PASSES = 7 + 2 * COLUMN_GATHER
ATTEMPTS = 1.1  # distillations per variant: one in ten rises and is tried again
LOOKS = 2  # held-out losses before the steps: start, closed form; one more after the steps of each attempt
QUESTION_TOKENS = 12  # said to a question: a known answer of a few, and 8 more (tasks/evaluate/exact.py)
LOOPS_BATCH = 40  # prompts together (tasks/evaluate/loops.py)
TASK_SECONDS = 0.016  # Prefect around one task, on threads (benchmarks/scale.md at commit 712660d, hardly loaded)
IMPORT_SECONDS = 6.0  # lm-eval and datasets, when the first model is evaluated
IMAGE_SECONDS = 0.01  # a photo of 640 x 480 read, unpacked and brought to the size that the tower sees, by one thread
CHECK_SECONDS = 0.5  # a parent's config and tokenizer opened, its family's code imported
# transformers looks a GGUF file's tensors up by a table of gguf's, made anew for every module: quadratic in depth
MODULES = 13  # of a layer: itself, attention, FFN, four and three matrices, activation, two norms
ENTRY_NAMES = 2  # a string of the header, walked twice, for the model and for the tokenizer, in names
VOCABULARY_LISTS = 3  # tokens, their types, about as many merges
STEP_SECONDS = 3e-4  # of one token through one layer, whatever its width
VISIT_BYTES_PER_SECOND = 25e9  # from the host to a GPU and back, PCIe 5.0 x 16 as it is reached
CORPUS_TOKENS_PER_SECOND = 40_000  # text cleaned, tokenised, packed
BUILD_BYTES_PER_SECOND = 3.5e8  # a model assembled: weights read, checked against their digests, copied
BENCHMARK_SECONDS = 2.0  # lm-eval around one model: data opened, requests built
# tokens read for an item, padded as batches are (winogrande's question with each answer); those that meet the head; and
# items there are. SmolLM2's tokenizer, 500 items each
BENCHMARKS = {
    "hellaswag": (203, 147, 10042),
    "arc_easy": (55, 24, 570),
    "arc_challenge": (68, 33, 299),
    "piqa": (72, 55, 1838),
    "winogrande": (45, 45, 1267),
}


@dataclass(frozen=True, kw_only=True)
class Work:
    """Counts of one stage. product: FLOPs of products.

    float32, tf32: how many of those a GPU does in these formats, whatever the stage's own is. solve: float64 FLOPs.
    stream, disk: bytes. weights: bytes of matrices that are each multiplied by one vector. exchange: bytes through the
    link of each device, while it computes. names: tensor names that gguf enters in a table. threaded: seconds of one
    thread that all threads share. fixed: seconds that no rate changes.
    """

    product: float = 0.0
    float32: float = 0.0
    tf32: float = 0.0
    solve: float = 0.0
    stream: float = 0.0
    weights: float = 0.0
    disk: float = 0.0
    exchange: float = 0.0
    names: float = 0.0
    threaded: float = 0.0
    fixed: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    def __mul__(self, times: float) -> "Work":
        return Work(**{f.name: getattr(self, f.name) * times for f in fields(self)})

    @property
    def flops(self) -> float:
        """FLOPs of every kind together."""
        return self.product + self.solve

    def over(self, devices: int) -> "Work":
        """The part of this work that each of so many devices does."""
        whole = {"exchange": self.exchange, "names": self.names, "fixed": self.fixed}
        return replace(self * (1 / devices), **whole)

    def seconds(self, rates: Rates) -> float:
        """Wall seconds at these rates, one after the other."""
        computed = self.product / rates.product + self.solve / rates.solve
        for flops, rate in ((self.float32, rates.float32), (self.tf32, rates.tf32)):
            computed += flops * (1 / rate - 1 / rates.product) if rate else 0.0
        computed += self.threaded / rates.threads * with_serial_share(rates.threads)
        moved = self.stream / rates.stream + self.weights / rates.weights + self.disk / rates.disk
        return max(computed + moved, self.exchange / rates.link) + self.names / rates.names + self.fixed


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The parent as counts: widths, and its layer's cost per token at the corpus's sequence length.

    images: that its texts ask about; None where they are not here to be counted. tower: what they are seen by.
    """

    parent: Parent
    profile: Profile
    variants: dict[Subblock, list[Variant]]
    images: int | None = 0
    tower: Tower | None = None

    @property
    def depth(self) -> int:
        """How many layers the parent has."""
        return self.parent.depth

    @property
    def length(self) -> int:
        """How many tokens a sequence of the corpus has."""
        return self.profile.corpus.sequence_length

    @property
    def hidden(self) -> int:
        """Width of the hidden states (D)."""
        return int(self.parent.config.hidden_size)

    @property
    def inner(self) -> int:
        """Channels of the parent's FFN (F) that a token has: with experts, of those that it is sent to."""
        return inner_channels(self.own_entry)

    @property
    def recorded(self) -> int:
        """Channels of the parent's FFN that are recorded with each other; 0 where it has experts."""
        return 0 if "moe" in self.own_entry else self.inner

    @property
    def largest(self) -> int:
        """Numbers in the largest tensor of the parent's FFN."""
        modules = weights(self.parent.config, "ffn", self.own_entry)
        return max(math.prod(size) for module in modules for size in module)

    @property
    def own_entry(self) -> dict[str, Any]:
        """The `block_configs` entry of the parent's own FFN."""
        own = self.own("ffn")
        return kind_of(own).block_entry(own, self.parent.config)

    @property
    def vocabulary(self) -> int:
        """Size of the vocabulary (V)."""
        return int(self.parent.config.vocab_size)

    def flops(self, variant: Variant, length: int | None = None) -> int:
        """FLOPs of one token through a variant."""
        return kind_of(variant).flops_per_token(variant, self.parent.config, length or self.length)

    def runs(self, layer: int, variant: Variant) -> bool:
        """Whether the engines run a variant in a layer."""
        return refused_alone(self.profile, self.parent.config, layer, variant.subblock, variant.label) is None

    def parameters(self, variant: Variant) -> int:
        """Parameters of a variant."""
        return parameters_of(self.parent, variant)

    def own(self, subblock: Subblock) -> Variant:
        """The parent's own subblock."""
        return parse_label(subblock, "parent", self.parent.config)

    def layer(self, length: int | None = None) -> int:
        """FLOPs of one token through the parent's own layer."""
        return sum(self.flops(self.own(part), length) for part in SUBBLOCKS)

    @property
    def layer_parameters(self) -> int:
        """Parameters of the parent's own layer."""
        return sum(self.parameters(self.own(part)) for part in SUBBLOCKS)

    @property
    def active_parameters(self) -> int:
        """Those of them that one token is computed with: of experts, those that it is sent to."""
        return sum(active_parameters_of(self.parent, self.own(part)) for part in SUBBLOCKS)

    @property
    def outside_parameters(self) -> int:
        """Parameters of the embedding, the final norm and the head."""
        return non_block_parameters(self.parent.config)

    @property
    def elementwise(self) -> int:
        """Bytes that one token's element-wise work in one layer reads and writes."""
        return self.size * (10 * self.hidden + 6 * self.inner)

    @property
    def size(self) -> int:
        """Bytes of a number in the precision that the stages compute in."""
        return BYTES[self.profile.compute_precision]

    @property
    def processes(self) -> int:
        """How many processes GKD has, and how many tasks run at a time: one for each device of all machines."""
        return len(self.profile.devices) * self.profile.orchestration.machines

    @property
    def devices(self) -> int:
        """How many times as fast as one device all are together. Several slots on one CPU count as one device."""
        return self.profile.orchestration.machines if self.on_cpu else self.processes

    @property
    def on_cpu(self) -> bool:
        """Whether the devices are this machine's CPU, whose memory is the host's."""
        return self.profile.devices[0].startswith("cpu")

    @property
    def workers(self) -> int:
        """How many layers the states of a shard lie there for, and are recorded or trained at a time."""
        return min(self.depth, self.profile.orchestration.workers)

    @property
    def layers_at_once(self) -> int:
        """How many devices have a layer, where each has one to itself."""
        return min(self.depth, self.devices)

    @property
    def parts(self) -> int:
        """How many devices share a shard's sequences: each has a micro-batch at least."""
        return min(self.devices, -(-(max(self.shards) + self.held_out) * self.length // self.at_once))

    @property
    def at_once(self) -> int:
        """How many tokens go through in one forward pass."""
        return max(1, self.profile.hardware.micro_batch_tokens // self.length) * self.length

    @property
    def shards(self) -> list[int]:
        """How many train sequences each shard has. Variants are trained on one shard after another."""
        whole = self.profile.trained_sequences
        if states_are_kept(self):
            return [whole]
        most = max(1, self.profile.record.shard_tokens // self.length)
        return [last - first for first, last in slices(whole, most)]

    @property
    def held_out(self) -> int:
        """How many validation sequences are recorded beside each shard."""
        most = max(1, self.profile.record.shard_tokens // self.length)
        return min(self.profile.record.validation_sequences, most)

    def forward(self, tokens: float, layers: float = 1.0, length: int | None = None) -> Work:
        """Tokens through so many of the parent's layers (a share counts as a part of one)."""
        flops = tokens * layers * self.layer(length)
        stream = tokens * layers * self.elementwise
        return Work(product=flops, stream=stream)

    def head(self, tokens: float, moment: bool = False, passes: int = LOGIT_PASSES) -> Work:
        """The logits of so many tokens, and what is reckoned from them.

        moment: the logits are multiplied back to the width D as well. passes: how often all logits are read or written.
        """
        logits = 2.0 * (1 + moment) * tokens * self.vocabulary * self.hidden
        return Work(product=logits, float32=logits, stream=tokens * self.vocabulary * FLOAT * passes)

    def states(self, sequences: int) -> int:
        """Bytes of the hidden states of so many sequences at one layer."""
        return sequences * self.length * self.hidden * self.size


def shape_of(profile: Profile, parent: Parent) -> Shape:
    """Raises UnknownVariant for a search space this parent cannot have. A variant that the engines can run in no layer
    is neither trained nor chosen: it is left out.
    """

    def runs(variant: Variant) -> bool:
        asked = variant.subblock, variant.label
        return not all(refused_alone(profile, parent.config, layer, *asked) for layer in layers_of(profile, parent))

    named = {part: parse_labels(part, getattr(profile.search_space, part), parent.config) for part in SUBBLOCKS}
    variants = {part: [own[0], *filter(runs, own[1:])] for part, own in named.items()}
    shape = Shape(parent=parent, profile=profile, variants=variants)
    if parent.vision is None or not profile.images:
        return shape
    return replace(shape, images=count_images(profile), tower=tower_counts(parent.vision, shape.hidden))


def counts_of(shape: Shape, layers: Sequence[int]) -> dict[tuple[int, Subblock], int]:
    """How many variants but the parent's own the engines run, by layer and subblock."""
    return {
        (layer, part): sum(shape.runs(layer, variant) for variant in shape.variants[part][1:])
        for layer in layers
        for part in SUBBLOCKS
    }


def parent_work(shape: Shape) -> Work:
    """Parent: converted, copied or made, and digested."""
    work = Work(disk=model_bytes(shape), fixed=CHECK_SECONDS)
    source = shape.profile.parent
    if isinstance(source, PackageParent | GgufParent):
        work += gguf_work(shape)
    if isinstance(source, TinyParent):
        tokens = source.train_steps * TRAIN_BATCH * TRAIN_TOKENS
        work += (shape.forward(tokens, shape.depth) + shape.head(tokens, moment=True)) * 3
        work += Work(fixed=source.train_steps * operations_of(shape) * 2e-5)  # a tiny model is all overhead
    return work


def images_work(shape: Shape) -> Work | None:
    """Tower and projector once over every image; their table written, and the parent's folder digested with it. None
    where nobody knows how many images there are.
    """
    if shape.tower is None:
        return Work()
    if shape.images is None:
        return None
    flops = shape.images * shape.tower.flops
    weights = math.ceil(shape.images / BATCH) * FLOAT * shape.tower.parameters
    work = Work(product=flops, float32=flops, stream=shape.images * shape.tower.elementwise + weights)
    work += Work(disk=table_bytes(shape) + model_bytes(shape) + FLOAT * shape.tower.parameters)
    return work + Work(fixed=CHECK_SECONDS + shape.images * IMAGE_SECONDS)


def table_bytes(shape: Shape) -> int:
    """Bytes of the table of images."""
    return (shape.images or 0) * shape.tower.table if shape.tower else 0


def gguf_work(shape: Shape) -> Work:
    """A GGUF file made a float32 model: its header, the tables of names, every weight."""
    header = ENTRY_NAMES * VOCABULARY_LISTS * shape.vocabulary
    table = MODULES * shape.depth * BLOCK_NAMES * shape.depth
    return Work(names=header + table, fixed=model_bytes(shape) / BUILD_BYTES_PER_SECOND)


def operations_of(shape: Shape) -> int:
    """torch operations of one step through all layers, roughly: what overhead counts where tensors are tiny."""
    return 100 * shape.depth


def record_work(shape: Shape) -> Work:
    """Record, all layers. Several workers take the states through the layers first, and then record a layer each."""
    settings, width, inner = shape.profile.record, shape.hidden, shape.recorded
    sequences = settings.statistics_sequences + settings.validation_sequences
    counted = settings.statistics_sequences * shape.length
    kept = shape.profile.trained_sequences + settings.validation_sequences if states_are_kept(shape) else 0
    layer = shape.forward(sequences * shape.length)
    grams = 2.0 * counted * inner**2, 8.0 * counted * width**2
    layer += Work(product=sum(grams), float32=sum(grams))
    if "moe" in shape.own_entry:  # once more, expert by expert
        layer += Work(product=counted * shape.flops(shape.own("ffn")))
    rounds = inner // CHUNK
    alone = shape.workers == 1
    layer += Work(
        solve=elimination_flops(inner, width, CHUNK),
        stream=8 * rounds * (INVERSE_PASSES * inner**2 / 3 + 5 * inner * width / 2),
        disk=(3 if alone else 1) * shape.states(sequences) + shape.states(kept) + statistics_bytes(shape),
        fixed=TASK_SECONDS / shape.layers_at_once,
    )
    if not alone:
        layer += _entering(shape, sequences, shards=-(-sequences // max(1, settings.shard_tokens // shape.length)))
    return layer * shape.depth


def states_are_kept(shape: Shape) -> bool:
    """Whether all hidden states fit in one shard, and stay on the disk."""
    return fits_in_a_shard(shape.profile.record, shape.profile.trained_sequences, shape.length)


def statistics_bytes(shape: Shape) -> int:
    """Bytes of one layer's Gram matrices, contributions (float32) and channel order (int64)."""
    inner, moe = shape.recorded, shape.own_entry.get("moe")
    own = moe["num_local_experts"] * (moe["expert_intermediate_dim"] + 3) if moe else inner**2 + inner
    return int(FLOAT * (own + 4 * shape.hidden**2) + 8 * inner)


def entering_work(shape: Shape) -> Work:
    """States that are not kept, recorded again for BLD, shard by shard: each device takes its part of the sequences."""
    if states_are_kept(shape):
        return Work()
    sequences = sum(trained + shape.held_out for trained in shape.shards)
    return _entering(shape, sequences, len(shape.shards)) * shape.depth


def _entering(shape: Shape, sequences: int, shards: int) -> Work:
    """A layer that sequences go through. Their states are written for every layer, and read again for as many layers
    as there are workers; each device reads the weights for each shard.
    """
    weights = 0.0 if shape.on_cpu else shards * shape.size * shape.layer_parameters / VISIT_BYTES_PER_SECOND
    states = shape.states(sequences) * (1 + 1 / shape.workers)
    return shape.forward(sequences * shape.length) + Work(disk=states, fixed=weights)


def distill_work(shape: Shape, layers: int) -> Work:
    """Blockwise local distillation of the whole search space in so many layers.

    A layer's states are read, and go through the parent's layer, on each device that trains a variant of it.
    """
    seen = sum(trained + shape.held_out for trained in shape.shards)
    loaded = shape.forward(seen * shape.length)
    loaded += Work(disk=shape.states(seen) + statistics_bytes(shape) + shape.layer_parameters * FLOAT)
    layer = loaded * loads(shape)
    for part in SUBBLOCKS:
        for variant in shape.variants[part][1:]:
            compared = shape.profile.bld.closed_form == "compare" and kind_of(variant).closed_form_may_lose
            layer += variant_work(shape, variant) * (2 if compared else 1)
    return layer * layers


def loads(shape: Shape) -> int:
    """How many devices load a layer's states: one that has the layer to itself (flows/stages.py), else every device
    that gets a variant of it.
    """
    own = not states_are_kept(shape) and shape.profile.orchestration.runner == "threads"
    return 1 if own else min(shape.devices, sum(len(variants) - 1 for variants in shape.variants.values()))


def variant_work(shape: Shape, variant: Variant, coupled: bool = False) -> Work:
    """One variant: closed form on the first shard, held-out losses, steps; storage, also between two shards."""
    settings = shape.profile.bld_of("" if coupled else variant.label)
    if not kind_of(variant).trainable:
        # its loss is measured all the same, twice, on the first shard
        return step_work(shape, variant, 2 * shape.held_out * shape.length, 0, 0) + Work(fixed=TASK_SECONDS)
    shards, steps = shape.shards, settings.steps
    held_out = (LOOKS + ATTEMPTS * len(shards)) * shape.held_out * shape.length
    stepped = ATTEMPTS * steps * settings.batch_sequences * shape.length
    work = step_work(shape, variant, held_out, stepped, ATTEMPTS * steps)
    work += Work(product=kind_of(variant).initial_flops(variant, shape.parent.config))
    if settings.closed_form:
        products, solves = kind_of(variant).fit_flops(
            variant, shape.parent.config, shards[0] * shape.length, shape.length
        )
        work += Work(product=products, float32=products, solve=solves)
    # between two shards weights, moments and the best weights are written and read
    stored = shape.parameters(variant) * FLOAT * (1 + 2 * 4 * (len(shards) - 1))
    return work + Work(disk=stored, fixed=TASK_SECONDS * len(shards))


def step_work(shape: Shape, variant: Variant, watched: float, stepped: float, steps: float) -> Work:
    """The work of training a variant: `watched` tokens go forward only, `stepped` tokens forward and backward."""
    flops, passes = shape.flops(variant), watched + 3 * stepped
    moved = passes * flops / shape.layer() * shape.elementwise
    return Work(product=flops * passes, stream=moved + steps * shape.parameters(variant) * FLOAT * ADAMW_PASSES)


def coupled_work(shape: Shape, layers: int) -> tuple[Work, int]:
    """The second stage over whole blocks, and how many there are."""
    settings = shape.profile.bld
    if not settings.coupled:
        return Work(), 0
    pairs, work = coupled_pairs(shape), Work()
    for pair in pairs:
        work += variant_work(shape, pair[0], True) + variant_work(shape, pair[1], True)
    return work * layers, len(pairs) * layers


def coupled_pairs(shape: Shape) -> list[tuple[Variant, Variant]]:
    """The whole blocks of the second stage."""
    spaces = [parse_labels(p, getattr(shape.profile.bld, f"coupled_{p}"), shape.parent.config) for p in SUBBLOCKS]
    return [(a, f) for a in spaces[0] for f in spaces[1] if kind_of(a).trainable or kind_of(f).trainable]


def score_work(shape: Shape, layers: Sequence[int]) -> Work:
    """Replace-1-block scores of all variants of `layers`, on the corpus and on the text of every capability."""
    work = Work()
    for place, text in enumerate(scored_texts(shape.profile, shape.length)):
        work += _score_text(shape, layers, *text, kept=not place)
    return work


def scored_texts(profile: Profile, length: int) -> list[tuple[int, int]]:
    """Sequences that everything is scored on, and tokens of each: of the corpus first, and then of every capability.

    length: of the corpus's sequences.
    """
    own = profile.own_capabilities.values()
    first = (profile.scoring.sequences, profile.scoring.tokens_per_sequence or length)
    return [first, *((one.validation_sequences, one.sequence_length) for one in own)]


def before_scores(shape: Shape, sequences: int, length: int, kept: bool) -> Work:
    """The parent's targets on some sequences, and the states that enter its layers. kept: those that are recorded,
    where any are.
    """
    behind, tokens = 1 if kept and states_are_kept(shape) else 2 * shape.depth - 1, sequences * length
    return shape.forward(tokens, behind, length=length) + shape.head(tokens, moment=True)


def _score_text(shape: Shape, layers: Sequence[int], sequences: int, length: int, kept: bool) -> Work:
    """Scores on some sequences. kept: see `before_scores`."""
    settings, tokens = shape.profile.bld, sequences * length
    work = before_scores(shape, sequences, length, kept)
    work += Work(disk=shape.depth * shape.layer_parameters * FLOAT)
    whole = shape.layer(length)
    for layer in layers:
        replaced = [
            whole - shape.flops(shape.own(part), length) + shape.flops(variant, length)
            for part in SUBBLOCKS
            for variant in shape.variants[part][1:]
            if shape.runs(layer, variant)
        ]
        if settings.coupled:
            replaced += [sum(shape.flops(each, length) for each in pair) for pair in coupled_pairs(shape)]
        suffix = shape.depth - 1 - layer + sum(replaced) / whole / max(len(replaced), 1)
        work += shape.forward(tokens * len(replaced), suffix, length=length)
        work += shape.head(tokens * len(replaced)) + Work(fixed=TASK_SECONDS)
        work += Work(disk=FLOAT * sum(shape.parameters(v) for part in SUBBLOCKS for v in shape.variants[part][1:]))
    return work


def capability_tokens(shape: Shape, split: str) -> int:
    """Tokens of a split of every capability that has text of its own."""
    own = shape.profile.own_capabilities.values()
    return sum(getattr(one, f"{split}_sequences") * one.sequence_length for one in own)


def stepped_tokens(shape: Shape, steps: int) -> int:
    """Tokens of so many steps of GKD, which are of the corpus and of capabilities by their weights."""
    own, weights = shape.profile.own_capabilities, shape.profile.capability_weights
    lengths = [shape.length, *(one.sequence_length for one in own.values())]
    shares = [weights[name] for name in (GENERAL, *own)] if weights else [1.0]
    return shape.profile.gkd.batch_sequences * sum(lengths[place] for place, _ in texts_of_steps(steps, shares))


def watched_tokens(shape: Shape) -> int:
    """Validation tokens of one look of GKD."""
    return shape.profile.gkd.validation_sequences * shape.length + capability_tokens(shape, "validation")


def looked_at(profile: Profile) -> int:
    """Answers of the search that are measured for limits: a second one where it is allowed."""
    return min(profile.search.floor_rounds, 2)


def floors_work(shape: Shape, share: float) -> tuple[int, int, Work]:
    """Looks at chosen children for `max_kl`, the tokens and the work of them. The parent reads every text as well,
    again and again where there are several.
    """
    profile, own = shape.profile, shape.profile.own_capabilities
    rounds = looked_at(profile)
    children, tokens, work = rounds * profile.race.candidates, 0, Work()
    for name in profile.capability_limits if rounds else ():
        text = own.get(name)
        length = text.sequence_length if text else shape.length
        read = length * rows_read(text.train_sequences if text else profile.corpus.validation_sequences, length)
        parents = rounds if len(profile.capability_limits) > 1 else 1
        work += shape.forward(read * parents, shape.depth, length=length)
        work += shape.forward(read * children, share * shape.depth, length=length)
        work += shape.head(read * children, passes=WHOLE_LOGIT_PASSES) * 2
        work += Work(fixed=children * (model_bytes(shape, share) / BUILD_BYTES_PER_SECOND + TASK_SECONDS))
        tokens += read * children
    return children * len(profile.capability_limits), tokens, work


def model_bytes(shape: Shape, share: float = 1.0) -> float:
    """float32 weights of a model that keeps this share of the layers' parameters."""
    return FLOAT * (share * shape.depth * shape.layer_parameters + shape.outside_parameters)


def evaluate_work(shape: Shape, shares: list[float], first: bool) -> Work:
    """Models that keep these shares of the layers; `first`: the parent's side is made as well.

    The benchmarks are asked of the child, the second of the first, only after its GKD where it has one.
    """
    settings = shape.profile.evaluate
    tokens = settings.sequences * shape.length + capability_tokens(shape, "test")
    texts = 1 + len(shape.profile.own_capabilities)  # a model is put together for each
    work = shape.forward(tokens, shape.depth) if first else Work()
    items, predicted = benchmark_tokens(shape)
    if first and items:
        work += Work(fixed=IMPORT_SECONDS)
    for share in shares:
        work += shape.forward(tokens, share * shape.depth)
        work += shape.head(tokens, passes=WHOLE_LOGIT_PASSES) * 2
        build = model_bytes(shape, share) / BUILD_BYTES_PER_SECOND
        work += Work(fixed=(build + TASK_SECONDS) * texts)
    for share in asked_benchmarks(shape, shares, first) if items else ():
        work += shape.forward(items, share * shape.depth)
        work += shape.head(predicted, passes=WHOLE_LOGIT_PASSES)
        work += Work(fixed=BENCHMARK_SECONDS)
    return work


def asked_benchmarks(shape: Shape, shares: list[float], first: bool) -> list[float]:
    """Those of them that are asked the benchmarks, see `evaluate_work`."""
    return [*shares[:1], *shares[2:]] if first and shape.profile.gkd.steps else shares


def benchmark_tokens(shape: Shape) -> tuple[int, int]:
    """Tokens of all benchmark items that one model reads, and those of them that meet the head."""
    settings = shape.profile.evaluate
    sizes = [BENCHMARKS[name] for name in settings.benchmarks]
    read, predicted = (
        sum(size[part] * min(settings.benchmark_limit or size[2], size[2]) for size in sizes) for part in (0, 1)
    )
    return read, predicted


def prompt_tokens(shape: Shape) -> int:
    """Tokens of the parent's own answers that the corpus asks for, each at its longest."""
    return sum(one.answers * one.answer_tokens for one in _answered(shape))


def _answered(shape: Shape) -> list[ParentAnswersSource]:
    return [one for one in asked_sources(shape.profile) if isinstance(one, ParentAnswersSource)]


def asked_sources(profile: Profile) -> list[CorpusSource]:
    """Every source of the corpus and of capabilities."""
    return [source for text in profile.texts.values() for source in text.sources]


def prompts_work(shape: Shape) -> Work:
    """The parent answers a batch of prompts together, a token of each at a time."""
    tokens = prompt_tokens(shape)
    steps = sum(math.ceil(one.answers / one.batch_prompts) * one.answer_tokens for one in _answered(shape))
    weights = shape.size * (shape.depth * shape.layer_parameters + shape.outside_parameters)
    work = shape.forward(tokens, shape.depth) + shape.head(tokens)
    return work + Work(weights=steps * weights, fixed=steps * shape.depth * STEP_SECONDS + TASK_SECONDS)


def answers_work(shape: Shape, share: float) -> Work:
    """Parent and child answer every prompt to the last token: a token at a time, so all weights are read for each."""
    settings = shape.profile.evaluate
    return _said_alone(shape, (1.0, share), len(settings.prompts) * settings.answer_tokens)


def all_heard(shape: Shape, share: float) -> list[float]:
    """Layers of the parent, the child and the best baseline, as shares of the parent's: all three are heard."""
    return [1.0, share, *([share] if shape.profile.evaluate.baselines else [])]


def _said_alone(shape: Shape, shares: Sequence[float], tokens: int) -> Work:
    work = Work()
    for kept in shares:
        weights = model_bytes(shape, kept)
        steps = tokens * shape.depth * STEP_SECONDS
        work += Work(weights=tokens * weights, fixed=steps + weights / BUILD_BYTES_PER_SECOND + TASK_SECONDS)
    return work


def questions_tokens(profile: Profile) -> list[int]:
    """What a model reads of each capability with known answers: most of a sequence before a question."""
    return [profile.evaluate.answered_questions * one.sequence_length * 3 // 4 for one in profile.answered.values()]


def questions_work(shape: Shape, share: float) -> Work:
    """Each reads what stands before each question and answers it: few prompts are of one length."""
    heard, work, said = all_heard(shape, share), Work(), shape.profile.evaluate.answered_questions * QUESTION_TOKENS
    for read in questions_tokens(shape.profile):
        work += _said_alone(shape, heard, said) + shape.forward(read, sum(heard) * shape.depth)
    return work


def looping_steps(profile: Profile) -> int:
    """Tokens that a model says one after the other where its loops are counted: a batch says them together."""
    return math.ceil(profile.evaluate.loop_prompts / LOOPS_BATCH) * profile.evaluate.answer_tokens


def loops_work(shape: Shape, share: float) -> Work:
    """Each goes on from beginnings of test text, a batch together, a token of each at a time."""
    settings = shape.profile.evaluate
    tokens, work = settings.loop_prompts * settings.answer_tokens, Work()
    for kept in all_heard(shape, share):
        weights = model_bytes(shape, kept)
        batches = looping_steps(shape.profile)
        work += shape.forward(tokens, kept * shape.depth) + shape.head(tokens)
        work += Work(stream=batches * weights, fixed=batches * shape.depth * STEP_SECONDS)
        work += Work(fixed=weights / BUILD_BYTES_PER_SECOND + TASK_SECONDS)
    return work


def teacher_work(shape: Shape) -> Work:
    """GKD's targets, once for all children; those of validation alone where the parent runs beside each."""
    settings = shape.profile.gkd
    tokens = (stepped_tokens(shape, settings.steps) if gkd_recorded(shape) else 0) + watched_tokens(shape)
    work = shape.forward(tokens, shape.depth) + shape.head(tokens, moment=True)
    build = model_bytes(shape) / BUILD_BYTES_PER_SECOND
    return work + Work(disk=2.0 * teacher_bytes(shape), fixed=TASK_SECONDS + build)


def gkd_recorded(shape: Shape) -> bool:
    """Whether the parent is recorded for GKD, or else runs beside the child."""
    longest = max([shape.length, *(one.sequence_length for one in shape.profile.own_capabilities.values())])
    return is_recorded(shape.profile.gkd, longest, shape.depth, shape.hidden)


def teacher_bytes(shape: Shape) -> int:
    """Bytes of the recorded targets. Those of validation have no states of layers."""
    settings = shape.profile.gkd
    trained = stepped_tokens(shape, settings.steps) if gkd_recorded(shape) else 0
    validation = watched_tokens(shape) * (shape.hidden * 2 * FLOAT + 8)
    return trained * token_bytes(settings, shape.depth, shape.hidden) + validation


def race_shares(profile: Profile) -> tuple[float, float]:
    """GKD in the race of all architectures together, and of the winner after it, each as a share of one whole GKD."""
    before, done = 0, 0
    if not profile.gkd.steps:
        return 0.0, 1.0
    for steps, racers in racers_in(profile.race.rounds, profile.race.candidates):
        done, before = done + racers * (steps - before), steps
    return done / profile.gkd.steps, 1 - before / profile.gkd.steps


def race_looks(profile: Profile) -> int:
    """How often an architecture of the race is measured."""
    rounds = profile.race.rounds if profile.gkd.steps else ()
    return sum(racers for _, racers in racers_in(rounds, profile.race.candidates))


def gkd_work(shape: Shape, share: float, layers: float | None = None) -> Work:
    """GKD of one child to its last step, with three trials where it finds its learning rate itself.

    layers: the parent's layers that have as many FLOPs as the child's. What checkpointing does again is not counted.
    """
    settings = shape.profile.gkd
    trials = 3 if settings.learning_rate is None else 0
    steps = settings.steps + trials * trial_steps(settings.steps)
    tokens = stepped_tokens(shape, steps)
    looks = 1 + trials + math.ceil(settings.steps / settings.evaluate_every)
    watched = looks * watched_tokens(shape)
    weights = share * shape.depth * shape.layer_parameters * FLOAT
    beside = Work() if gkd_recorded(shape) else shape.forward(tokens, shape.depth) + shape.head(tokens, moment=True)
    layers = share * shape.depth if layers is None else layers
    own = shape.forward(tokens, layers)
    work = beside + own * 3 + shape.head(tokens, moment=True) + shape.forward(watched, layers) + shape.head(watched)
    most = shape.devices * shape.at_once
    parts = steps * math.ceil(tokens / max(1, steps) / most) + math.ceil(watched / most)
    parent = 0.0 if gkd_recorded(shape) else shape.size * shape.depth * shape.layer_parameters
    gathered = 0.0 if shape.devices == 1 else parts * (parent + (2 * shape.size + FLOAT) * weights / FLOAT)
    return Work(**{**vars(work), "tf32": work.float32, "float32": 0.0}) + (
        Work(exchange=gathered)
        + Work(stream=steps * weights * ADAMW_PASSES, disk=teacher_bytes(shape) * 2 + weights)
        + Work(fixed=TASK_SECONDS + model_bytes(shape, share) / BUILD_BYTES_PER_SECOND)
    )
