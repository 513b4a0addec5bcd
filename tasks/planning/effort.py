"""What each stage of a run computes, counted from the parent's config: FLOPs, bytes, and the seconds they take.

Per token a layer's forward is what its variants count (VariantKind.flops_per_token at the whole sequence, since the
kernels mask) plus 10 D + 6 F floats of element-wise work; a step is three forwards (forward, gradient of the inputs, of
the weights) plus AdamW's passes over weights and moments. The head counts 2 V D for its logits, as much again where the
moment of the distribution is taken (blocks/divergence.py), and element-wise passes over the logits. On top of that:

    record    forward with packed weights; Gram matrices of the FFN's channels, of both inputs and cross terms; backward
              elimination (blocks/fit.py) in float64, whose inverse is rewritten every round; states stored and hashed
    distill   the layer's own forward once; per variant its closed form (VariantKind.fit_flops), held-out losses, steps
    score     layers after the replaced one and the head, for every variant at once, with packed weights
    evaluate  models once over the test sequences, both heads; benchmark items at their mean length
    GKD       the parent's states and moments once; per child steps through layers and head, validation between

A few rates turn counts into seconds (tasks/planning/machine.py). What is left are constants of this program's own
overheads, below: set once from the main job, the same for every parent and machine.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

from blocks.fit import elimination_flops
from blocks.kinds import kind_of, parse_label, parse_labels
from blocks.parent import Parent
from blocks.records import SUBBLOCKS, Subblock
from blocks.resources import non_block_parameters, parameters_of
from blocks.variant import Variant
from profiles.schema import GgufParent, PackageParent, Profile, TinyParent
from tasks.distill.gkd_settings import is_recorded, token_bytes, trial_steps
from tasks.distill.record import CHUNK, fits_in_a_shard
from tasks.inputs.space import layers_of, refused_alone
from tasks.inputs.tiny import TRAIN_BATCH, TRAIN_TOKENS
from tasks.planning.machine import BLOCK_NAMES, Rates

FLOAT = 4  # bytes: the search computes and stores in float32
LOGIT_PASSES = 4  # element-wise passes over a slice of logits that stays in the cache (online softmax)
WHOLE_LOGIT_PASSES = 10  # evaluation's log-softmax, divergence and argmax over whole logits
ADAMW_PASSES = 14  # floats read or written per weight and step: gradient made, clipped, both moments, weight
COLUMN_GATHER = 3.3  # picking columns of a matrix, in time of a stream of its bytes (6.6 ms beside 2.0, F = 1536)
# the elimination's inverse: product written, difference, rows picked, columns picked, each read and written
INVERSE_PASSES = 7 + 2 * COLUMN_GATHER
ATTEMPTS = 1.1  # distillations per variant: one in ten rises and is tried again
HELD_OUT = 3  # losses per distillation: start, closed form, after the steps
TASK_SECONDS = 0.016  # Prefect around one task, on threads (benchmarks/scale.md)
IMPORT_SECONDS = 6.0  # lm-eval and datasets, when the first model is evaluated
CHECK_SECONDS = 0.5  # a parent's config and tokenizer opened, its family's code imported
# transformers looks a GGUF file's tensors up by a table of gguf's, made anew for every module: quadratic in depth
MODULES = 13  # of a layer: itself, attention, FFN, four and three matrices, activation, two norms
ENTRY_NAMES = 2  # a string of the header, walked twice, for the model and for the tokenizer, in names
VOCABULARY_LISTS = 3  # tokens, their types, about as many merges
STEP_SECONDS = 3e-4  # of one token through one layer, whatever its width
CORPUS_TOKENS_PER_SECOND = 40_000  # text cleaned, tokenised, packed
BUILD_BYTES_PER_SECOND = 3.5e8  # a model assembled: weights read, checked against their digests, copied
BENCHMARK_SECONDS = 2.0  # lm-eval around one model: data opened, requests built
# tokens of one item, all choices, padded as batches of 8 are; and items there are. SmolLM2's tokenizer, 200 items each
BENCHMARKS = {
    "hellaswag": (176, 10042),
    "arc_easy": (128, 570),
    "arc_challenge": (156, 299),
    "piqa": (76, 1838),
    "winogrande": (46, 1267),
}


@dataclass(frozen=True, kw_only=True)
class Work:
    """Counts of one stage. product, packed: float32 FLOPs of plain products and of those with packed weights; solve:
    float64 FLOPs; stream, disk: bytes; names: tensor names that gguf enters in a table; fixed: seconds that no rate
    changes.
    """

    product: float = 0.0
    packed: float = 0.0
    solve: float = 0.0
    stream: float = 0.0
    disk: float = 0.0
    names: float = 0.0
    fixed: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    def __mul__(self, times: float) -> "Work":
        return Work(**{f.name: getattr(self, f.name) * times for f in fields(self)})

    def seconds(self, rates: Rates) -> float:
        """Wall seconds at these rates, one after the other."""
        computed = self.product / rates.product + self.packed / rates.packed + self.solve / rates.solve
        moved = self.stream / rates.stream + self.disk / rates.disk
        return computed + moved + self.names / rates.names + self.fixed


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The parent as counts: widths, and its layer's cost per token at the corpus's sequence length."""

    parent: Parent
    profile: Profile
    variants: dict[Subblock, list[Variant]]

    @property
    def depth(self) -> int:
        """Layers."""
        return self.parent.depth

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return self.profile.corpus.sequence_length

    @property
    def hidden(self) -> int:
        """D."""
        return int(self.parent.config.hidden_size)

    @property
    def inner(self) -> int:
        """F."""
        return int(self.parent.config.intermediate_size)

    @property
    def vocabulary(self) -> int:
        """V."""
        return int(self.parent.config.vocab_size)

    def flops(self, variant: Variant, length: int | None = None) -> int:
        """Of one token."""
        return kind_of(variant).flops_per_token(variant, self.parent.config, length or self.length)

    def parameters(self, variant: Variant) -> int:
        """Of one subblock."""
        return parameters_of(self.parent, variant)

    def own(self, subblock: Subblock) -> Variant:
        """The parent's own subblock."""
        return parse_label(subblock, "parent", self.parent.config)

    def layer(self, length: int | None = None) -> int:
        """FLOPs of one token through the parent's own layer."""
        return sum(self.flops(self.own(part), length) for part in SUBBLOCKS)

    @property
    def layer_parameters(self) -> int:
        """Of the parent's own layer."""
        return sum(self.parameters(self.own(part)) for part in SUBBLOCKS)

    @property
    def outside_parameters(self) -> int:
        """Embedding, final norm, head."""
        return non_block_parameters(self.parent.config)

    @property
    def elementwise(self) -> int:
        """Bytes that one token's element-wise work in one layer reads and writes."""
        return FLOAT * (10 * self.hidden + 6 * self.inner)

    def forward(self, tokens: float, layers: float = 1.0, packed: bool = False, length: int | None = None) -> Work:
        """Tokens through so many of the parent's layers (a share counts as a part of one)."""
        flops = tokens * layers * self.layer(length)
        stream = tokens * layers * self.elementwise
        return Work(packed=flops, stream=stream) if packed else Work(product=flops, stream=stream)

    def head(self, tokens: float, moment: bool = False, passes: int = LOGIT_PASSES, packed: bool = True) -> Work:
        """Logits of tokens and what is made of them; `moment`: the product back to D as well."""
        logits = 2.0 * tokens * self.vocabulary * self.hidden
        stream = tokens * self.vocabulary * FLOAT * passes
        return Work(
            packed=logits if packed else 0.0,
            product=(0.0 if packed else logits) + (logits if moment else 0.0),
            stream=stream,
        )

    def states(self, sequences: int) -> int:
        """Bytes of hidden states at one layer."""
        return sequences * self.length * self.hidden * FLOAT


def shape_of(profile: Profile, parent: Parent) -> Shape:
    """Raises UnknownVariant for a search space this parent cannot have. A variant that the engines can run in no layer
    is neither trained nor chosen: it is left out.
    """

    def runs(variant: Variant) -> bool:
        asked = variant.subblock, variant.label
        return not all(refused_alone(profile, parent.config, layer, *asked) for layer in layers_of(profile, parent))

    named = {part: parse_labels(part, getattr(profile.search_space, part), parent.config) for part in SUBBLOCKS}
    variants = {part: [own[0], *filter(runs, own[1:])] for part, own in named.items()}
    return Shape(parent=parent, profile=profile, variants=variants)


def counts_of(shape: Shape, layers: Sequence[int]) -> dict[tuple[int, Subblock], int]:
    """How many variants but the parent's own the engines run, by layer and subblock."""
    profile, config = shape.profile, shape.parent.config
    return {
        (layer, part): sum(
            refused_alone(profile, config, layer, part, v.label) is None for v in shape.variants[part][1:]
        )
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
        work += (shape.forward(tokens, shape.depth) + shape.head(tokens, moment=True, packed=False)) * 3
        work += Work(fixed=source.train_steps * operations_of(shape) * 2e-5)  # a tiny model is all overhead
    return work


def gguf_work(shape: Shape) -> Work:
    """A GGUF file made a float32 model: its header, the tables of names, every weight."""
    header = ENTRY_NAMES * VOCABULARY_LISTS * shape.vocabulary
    table = MODULES * shape.depth * BLOCK_NAMES * shape.depth
    return Work(names=header + table, fixed=model_bytes(shape) / BUILD_BYTES_PER_SECOND)


def operations_of(shape: Shape) -> int:
    """torch operations of one step through all layers, roughly: what overhead counts where tensors are tiny."""
    return 100 * shape.depth


def record_work(shape: Shape) -> Work:
    """Record, all layers."""
    settings, width, inner = shape.profile.record, shape.hidden, shape.inner
    sequences = settings.statistics_sequences + settings.validation_sequences
    counted = settings.statistics_sequences * shape.length
    kept = shape.profile.trained_sequences + settings.validation_sequences if states_are_kept(shape) else 0
    layer = shape.forward(sequences * shape.length, packed=True)
    layer += Work(packed=2.0 * counted * inner**2, product=8.0 * counted * width**2)
    rounds = inner // CHUNK
    layer += Work(
        solve=elimination_flops(inner, width, CHUNK),
        stream=8 * rounds * (INVERSE_PASSES * inner**2 / 3 + 5 * inner * width / 2),
        disk=3 * shape.states(sequences) + shape.states(kept) + statistics_bytes(shape),
        fixed=TASK_SECONDS,
    )
    return layer * shape.depth


def states_are_kept(shape: Shape) -> bool:
    """Whether all hidden states fit in one shard, and stay on the disk."""
    return fits_in_a_shard(shape.profile.record, shape.profile.trained_sequences, shape.length)


def statistics_bytes(shape: Shape) -> int:
    """Bytes of one layer's Gram matrices, contributions (float32) and channel order (int64)."""
    return FLOAT * (shape.inner**2 + 4 * shape.hidden**2 + shape.inner) + 8 * shape.inner


def distill_work(shape: Shape, layers: int) -> Work:
    """Blockwise local distillation of the whole search space in so many layers."""
    trained = shape.profile.trained_sequences + shape.profile.record.validation_sequences
    layer = shape.forward(trained * shape.length)
    if not states_are_kept(shape):  # they are recorded again, a shard at a time
        layer += shape.forward(trained * shape.length, packed=True) + Work(disk=shape.states(trained))
    layer += Work(disk=shape.states(trained) + statistics_bytes(shape) + shape.layer_parameters * FLOAT)
    for part in SUBBLOCKS:
        for variant in shape.variants[part][1:]:
            compared = shape.profile.bld.closed_form == "compare" and kind_of(variant).closed_form_may_lose
            layer += variant_work(shape, variant) * (2 if compared else 1)
    return layer * layers


def variant_work(shape: Shape, variant: Variant) -> Work:
    """One variant: closed form, held-out losses, steps, storage."""
    settings, record = shape.profile.bld, shape.profile.record
    if not kind_of(variant).trainable:
        return Work(fixed=TASK_SECONDS)
    tokens = shape.profile.trained_sequences * shape.length
    held_out = HELD_OUT * record.validation_sequences * shape.length
    steps = shape.profile.trained_steps
    stepped = ATTEMPTS * steps * settings.batch_sequences * shape.length
    products, solves = kind_of(variant).fit_flops(variant, shape.parent.config, tokens if settings.closed_form else 0)
    parameters, flops = shape.parameters(variant), shape.flops(variant)
    share = flops / shape.layer()
    return Work(
        product=flops * (held_out + 3 * stepped) + (products if settings.closed_form else 0),
        solve=solves if settings.closed_form else 0,
        stream=(held_out + 3 * stepped) * share * shape.elementwise
        + ATTEMPTS * steps * parameters * FLOAT * ADAMW_PASSES,
        disk=parameters * FLOAT,
        fixed=TASK_SECONDS,
    )


def coupled_work(shape: Shape, layers: int) -> tuple[Work, int]:
    """The second stage over whole blocks, and how many there are."""
    settings = shape.profile.bld
    if not settings.coupled:
        return Work(), 0
    spaces = [parse_labels(p, getattr(settings, f"coupled_{p}"), shape.parent.config) for p in SUBBLOCKS]
    pairs = [(a, f) for a in spaces[0] for f in spaces[1] if kind_of(a).trainable or kind_of(f).trainable]
    work = Work()
    for pair in pairs:
        work += variant_work(shape, pair[0]) + variant_work(shape, pair[1])
    return work * layers, len(pairs) * layers


def score_work(shape: Shape, layers: list[int], variants: float) -> Work:
    """Replace-1-block scores of so many variants, on average, in each of `layers`."""
    scoring = shape.profile.scoring
    length = scoring.tokens_per_sequence or shape.length
    tokens = scoring.sequences * length * variants
    work = shape.forward(scoring.sequences * length, packed=True) + shape.head(scoring.sequences * length, moment=True)
    work += Work(disk=shape.depth * shape.layer_parameters * FLOAT)
    for layer in layers:
        replaced = 0.75  # one subblock is the parent's, the other a cheaper one
        work += shape.forward(tokens, shape.depth - 1 - layer + replaced, packed=True, length=length)
        work += shape.head(tokens) + Work(fixed=TASK_SECONDS)
        work += Work(disk=FLOAT * sum(shape.parameters(v) for part in SUBBLOCKS for v in shape.variants[part][1:]))
    return work


def model_bytes(shape: Shape, share: float = 1.0) -> float:
    """float32 weights of a model that keeps this share of the layers' parameters."""
    return FLOAT * (share * shape.depth * shape.layer_parameters + shape.outside_parameters)


def evaluate_work(shape: Shape, shares: list[float], first: bool) -> Work:
    """Models that keep these shares of the layers; `first`: the parent's side is made as well."""
    settings = shape.profile.evaluate
    tokens = settings.sequences * shape.length
    work = shape.forward(tokens, shape.depth) if first else Work()
    items = benchmark_tokens(shape)
    if first and items:
        work += Work(fixed=IMPORT_SECONDS)
    for share in shares:
        work += shape.forward(tokens + items, share * shape.depth)
        work += shape.head(tokens, passes=WHOLE_LOGIT_PASSES, packed=False) * 2
        work += shape.head(items, passes=WHOLE_LOGIT_PASSES, packed=False)
        build = model_bytes(shape, share) / BUILD_BYTES_PER_SECOND
        work += Work(fixed=build + TASK_SECONDS + (BENCHMARK_SECONDS if items else 0.0))
    return work


def benchmark_tokens(shape: Shape) -> int:
    """Tokens of all benchmark items of one model."""
    settings = shape.profile.evaluate
    sizes = [BENCHMARKS[name] for name in settings.benchmarks]
    return sum(tokens * min(settings.benchmark_limit or items, items) for tokens, items in sizes)


def answers_work(shape: Shape, share: float) -> Work:
    """Parent and child answer every prompt to the last token: a token at a time, so all weights are read for each."""
    settings = shape.profile.evaluate
    tokens = len(settings.prompts) * settings.answer_tokens
    work = Work()
    for kept in (1.0, share):
        weights = model_bytes(shape, kept)
        steps = tokens * shape.depth * STEP_SECONDS
        work += Work(stream=tokens * weights, fixed=steps + weights / BUILD_BYTES_PER_SECOND + TASK_SECONDS)
    return work


def teacher_work(shape: Shape) -> Work:
    """GKD's targets, once for all children; those of validation alone where the parent runs beside each."""
    settings = shape.profile.gkd
    stepped = settings.steps * settings.batch_sequences if gkd_recorded(shape) else 0
    tokens = (stepped + settings.validation_sequences) * shape.length
    work = shape.forward(tokens, shape.depth) + shape.head(tokens, moment=True)
    build = model_bytes(shape) / BUILD_BYTES_PER_SECOND
    return work + Work(disk=2.0 * teacher_bytes(shape), fixed=TASK_SECONDS + build)


def gkd_recorded(shape: Shape) -> bool:
    """Whether the parent is recorded for GKD, or else runs beside the child."""
    return is_recorded(shape.profile.gkd, shape.length, shape.depth, shape.hidden)


def teacher_bytes(shape: Shape) -> int:
    """Bytes of the recorded targets. Those of validation have no states of layers."""
    settings = shape.profile.gkd
    trained = settings.steps * settings.batch_sequences * shape.length if gkd_recorded(shape) else 0
    validation = settings.validation_sequences * shape.length * (shape.hidden * 2 * FLOAT + 8)
    return trained * token_bytes(settings, shape.depth, shape.hidden) + validation


def gkd_work(shape: Shape, share: float) -> Work:
    """GKD of one child to its last step, with three trials where it finds its learning rate itself."""
    settings = shape.profile.gkd
    trials = 3 if settings.learning_rate is None else 0
    steps = settings.steps + trials * trial_steps(settings.steps)
    tokens = steps * settings.batch_sequences * shape.length
    looks = 1 + trials + math.ceil(settings.steps / settings.evaluate_every)
    watched = looks * settings.validation_sequences * shape.length
    weights = share * shape.depth * shape.layer_parameters * FLOAT
    beside = Work() if gkd_recorded(shape) else shape.forward(tokens, shape.depth) + shape.head(tokens, moment=True)
    return beside + (
        shape.forward(tokens, share * shape.depth) * 3
        + shape.head(tokens, moment=True)
        + shape.forward(watched, share * shape.depth)
        + shape.head(watched)
        + Work(stream=steps * weights * ADAMW_PASSES, disk=teacher_bytes(shape) * 2 + weights)
        + Work(fixed=TASK_SECONDS + model_bytes(shape, share) / BUILD_BYTES_PER_SECOND)
    )
