"""Bytes of a device in every stage: weights, gradients, optimiser and shards exactly as the stages hold them, and what
one micro-batch needs beside, as its widths give it.

Legend: b = bytes of a number in the stages' precision, D = hidden_size, F = intermediate_size, V = vocab_size,
m = tokens of a micro-batch, P and C = bytes of parent and child. Trained weights, Gram matrices and heads are float32.
"""

from dataclasses import dataclass

from blocks.divergence import CHUNK, SLICE
from blocks.errors import PuzzleError
from blocks.families import experts_of, inner_channels
from blocks.kinds import kind_of
from blocks.records import SUBBLOCKS
from blocks.resources import BLOCK, weight_bytes
from blocks.variant import Variant
from tasks.distill.gkd_settings import cosine_layers
from tasks.distill.record import CHUNK as ELIMINATED
from tasks.inputs.vision import BATCH
from tasks.planning.effort import FLOAT, Shape, gkd_recorded, scored_texts, statistics_bytes
from tasks.planning.number_types import slowest
from tasks.planning.tower import Tower

DOUBLE = 8
EVALUATED = 512  # tokens whose logits exist at a time in evaluation (tasks/evaluate/quality.py)
LOGITS = 6  # copies of them: logits and log-probabilities of model and parent, their differences


class NoRoom(PuzzleError):
    """A profile of which a stage does not fit on its device."""


@dataclass(frozen=True, kw_only=True)
class Need:
    """Bytes on each device that a stage uses: what stays, and what a micro-batch adds. cure: what makes it smaller."""

    stage: str
    held: float
    passing: float
    cure: str

    @property
    def bytes(self) -> int:
        """What stays and what a micro-batch adds, together."""
        return int(self.held + self.passing)


def needs_of(shape: Shape, share: float, room: float | None = None) -> list[Need]:
    """What every stage needs.

    share: how much of the layers' parameters a child keeps. room: bytes that a device has, None where nobody knows.
    """
    profile = shape.profile
    found = [record_need(shape), distill_need(shape), score_need(shape, room)]
    found += [images_need(shape.tower)] if shape.tower else []
    room = None if profile.devices[0].startswith("cpu") else room  # whole models do not wait elsewhere then
    found.append(evaluate_need(shape, room))
    if profile.search_space.precision and shape.on_cpu:  # else on the host, beside no stage that computes
        found.append(whole_types_need(shape))
    if profile.gkd.steps:
        found += [teacher_need(shape, room), gkd_need(shape, share)]
        found += [rounded_need(shape, share)] if profile.gkd.rounded_steps else []
    return found


def images_need(tower: Tower) -> Need:
    """Tower and projector, and a batch of images."""
    held, passing = FLOAT * tower.parameters, BATCH * tower.passing
    return Need(stage="images", held=held, passing=passing, cure="take a device with more memory")


def no_room(needs: list[Need], room: float | None) -> str:
    """Stages that need more than a device has: which, how much, and what to do; "" where all fit, or nobody knows."""
    return "; ".join(
        f"{need.stage} needs {_gib(need.bytes)} of a device that has {_gib(room)}, {_gib(need.bytes - room)} too much: "
        f"{need.cure}"
        for need in needs
        if room is not None and need.bytes > room
    )


def _gib(size: float) -> str:
    return f"{size / 2**30:,.1f} GiB" if size >= 2**28 else f"{size / 2**20:,.1f} MiB"


def passing(shape: Shape) -> float:
    """What a layer's forward without gradients holds: states in and out, attention, both matrices of the FFN; copies of
    a token for each expert that it is sent to.
    """
    moe = shape.own_entry.get("moe")
    copies = 2 * shape.hidden * moe["num_experts_per_tok"] if moe else 0
    return shape.at_once * (shape.size * (8 * shape.hidden + 3 * shape.inner + copies) + scores_bytes(shape))


def scores_bytes(shape: Shape) -> int:
    """Of a token in an attention whose code makes all scores at once, as it must where they have soft caps: the scores,
    and what becomes of them before and after the softmax, which is float32.
    """
    whole = shape.parent.attention_code == "eager"
    return whole * shape.parent.config.num_attention_heads * shape.length * (2 * shape.size + FLOAT)


def record_need(shape: Shape) -> Need:
    """A layer, its sums over the micro-batches before and those of this one; or the elimination in float64."""
    inner, width = shape.recorded, shape.hidden
    sums = statistics_bytes(shape)
    weights = shape.size * shape.layer_parameters
    apart = passing(shape) * ("moe" in shape.own_entry)  # experts once more, each with its tokens alone
    batch = passing(shape) + apart + shape.at_once * FLOAT * (inner + 4 * width) + sums
    # Gram, regularised Gram, its inverse and factors; coefficients before and after
    solving = DOUBLE * (4 * inner**2 + 2 * inner * width + 2 * ELIMINATED * inner)
    more = "lower hardware.micro_batch_tokens" if batch > solving else "take a device with more memory"
    # while a layer is loaded, its tensors lie there twice
    return Need(stage="record", held=weights + sums, passing=max(batch, solving, weights), cure=more)


def trained_bytes(shape: Shape, variant: Variant) -> int:
    """A variant in training: weights, gradients, two moments; the state to go back to, with moments after a first shard
    and the best weights until then; AdamW's temporaries.
    """
    copies = 4 + 1 + 1 + (4 + 2 if len(shape.shards) > 1 else 1)
    return FLOAT * copies * shape.parameters(variant)


def solved_bytes(shape: Shape, variant: Variant) -> int:
    """A closed form in float64: Gram, regularised Gram, its factors; right sides and solution. Of experts one by one,
    behind the Gram matrices of all in float32.
    """
    if variant.kind == "expert_width":
        sizes, one = experts_of(shape.parent.config), variant.size or 0
        return FLOAT * sizes.count * sizes.width**2 + DOUBLE * (4 * one**2 + 3 * one * shape.hidden)
    side = variant.size if variant.kind == "width" and variant.size else shape.hidden
    return DOUBLE * (4 * side**2 + 3 * side * shape.hidden)


def distill_need(shape: Shape) -> Need:
    """The parent's layer in float32, its statistics, and a variant: trained on a micro-batch, or solved for."""
    variants = [v for part in SUBBLOCKS for v in shape.variants[part][1:] if kind_of(v).trainable]
    held = FLOAT * shape.layer_parameters + statistics_bytes(shape)
    cast = shape.size if shape.size < FLOAT else 0  # autocast keeps weights in the precision of the products
    loss = FLOAT * 3 * shape.hidden  # of a token: what comes out, what should, their difference
    batch = {v: shape.at_once * (activation_bytes(shape, v) + loss) + cast * shape.parameters(v) for v in variants}
    most = max(variants, key=lambda v: trained_bytes(shape, v) + batch[v], default=shape.own("ffn"))
    trained, passing = trained_bytes(shape, most), batch.get(most, 0)
    solved = max((solved_bytes(shape, v) for v in variants), default=0) if shape.profile.bld.closed_form else 0
    more = max(0, solved - trained - passing)
    return Need(stage="distill", held=held + trained, passing=passing + more, cure="lower hardware.micro_batch_tokens")


def activation_bytes(shape: Shape, variant: Variant) -> int:
    """Of a token in a subblock, kept for its gradients: three states of its norm in float32; rotated queries, keys,
    values and what is mixed of them; or gate, its activation, up and their product.
    """
    width, config = shape.hidden, shape.parent.config
    norm = FLOAT * 3 * width
    kind = kind_of(variant)
    if variant.subblock == "ffn":
        entry = kind.block_entry(variant, config)
        # each expert has copies of the tokens that it is sent, and puts out as many
        copies = 2 * width * entry["moe"]["num_experts_per_tok"] if "moe" in entry else 0
        return norm + shape.size * (4 * inner_channels(entry) + copies)
    states = kind.kv_elements_per_token(variant, config)
    more = FLOAT * kind.trained_elements_per_token(variant, config) + (scores_bytes(shape) if states else 0)
    return norm + shape.size * (2 * width + states) + more


def head_bytes(shape: Shape) -> int:
    """The head in float32, and a slice of logits."""
    logits = min(CHUNK, shape.at_once) * min(SLICE, shape.vocabulary)
    return FLOAT * (shape.vocabulary * shape.hidden + 2 * logits)


def layers_held(shape: Shape, room: float | None) -> float:
    """Bytes of a model's layers: all where they take less than half of the device, else two at a time."""
    outside = shape.size * shape.outside_parameters
    parent = shape.size * shape.depth * shape.layer_parameters + outside
    stays = room is None or parent < room / 2  # as Passes and for_passes decide
    return parent if stays else outside + 2 * shape.size * shape.layer_parameters


def score_need(shape: Shape, room: float | None) -> Need:
    """The parent, or a layer of it at a time; the largest variant; targets and logits of a micro-batch."""
    length = shape.profile.scoring.tokens_per_sequence or shape.length
    tokens = max(1, shape.profile.hardware.micro_batch_tokens // length) * length
    held = layers_held(shape, room) + head_bytes(shape) + shape.size * shape.layer_parameters
    batch = passing(shape) * tokens / shape.at_once + tokens * 6 * FLOAT * shape.hidden
    return Need(stage="score", held=held, passing=batch, cure="lower hardware.micro_batch_tokens")


def evaluate_need(shape: Shape, room: float | None) -> Need:
    """The parent twice, since its targets are made while it is judged itself; logits of a few tokens."""
    batch = passing(shape) + LOGITS * FLOAT * EVALUATED * shape.vocabulary + 2 * FLOAT * shape.vocabulary * shape.hidden
    return Need(
        stage="evaluate",
        held=2 * layers_held(shape, room),
        passing=batch,
        cure="lower hardware.micro_batch_tokens, or take a device with more memory",
    )


def teacher_need(shape: Shape, room: float | None) -> Need:
    """The parent, whose targets of validation are made once."""
    batch = passing(shape) + shape.at_once * 4 * FLOAT * shape.hidden
    return Need(
        stage="GKD parent",
        held=layers_held(shape, room) + head_bytes(shape),
        passing=batch,
        cure="lower hardware.micro_batch_tokens",
    )


def trained_in_gkd(shape: Shape, share: float) -> float:
    """Bytes of what is trained: float32 weights, their best so far, two moments. The gradient comes beside it."""
    extra = {"norm": shape.hidden, "head": shape.vocabulary * shape.hidden}
    count = share * shape.depth * shape.layer_parameters + sum(extra[name] for name in shape.profile.gkd.also_train)
    return 4 * FLOAT * count / shape.processes


def gkd_need(shape: Shape, share: float) -> Need:
    """A slice of all that is trained, of the frozen rest and of the parent; the layers that are whole at a time; the
    activations of a micro-batch, or AdamW's temporaries after them.
    """
    settings, among, size = shape.profile.gkd, shape.processes, shape.size
    gradients, beside = trained_in_gkd(shape, share) / 4, not gkd_recorded(shape)
    held = 4 * gradients + FLOAT * shape.outside_parameters / among + (1 + beside * (among == 1)) * head_bytes(shape)
    if beside:
        held += size * (shape.depth * shape.layer_parameters + shape.outside_parameters) / among
    if among > 1:  # two layers on their way, embedding and head of both until the step ends; a layer's gradients
        held += 2 * size * (shape.layer_parameters + shape.outside_parameters)
        held += (size + FLOAT) * shape.layer_parameters
    states, compared = shape.at_once * shape.hidden, len(cosine_layers(shape.depth, settings.cosine_every))
    layer = sum(activation_bytes(shape, shape.own(part)) for part in SUBBLOCKS) * shape.at_once
    kept = size * states * shape.depth + layer if settings.gradient_checkpointing else share * shape.depth * layer
    kept += states * (compared * (2 * FLOAT * (size < FLOAT) + 2) + 6 * FLOAT)
    own = settings.batch_sequences // among * shape.length
    kept = gradients + kept if own > shape.at_once else max(gradients, kept)
    # on a GPU of all weights at once, on a CPU of one after the other
    stepping = FLOAT * 2 * shape.largest if shape.profile.devices[0].startswith("cpu") else gradients
    kept = max(kept, gradients + stepping)
    cure = "lower hardware.micro_batch_tokens or corpus.sequence_length"
    if not settings.gradient_checkpointing:
        cure = "set gkd.gradient_checkpointing: true, or lower hardware.micro_batch_tokens"
    if held > kept:
        cure = f"share it among more than {among} devices (orchestration.devices, orchestration.machines)"
    return Need(stage="GKD child", held=held, passing=kept, cure=cure)


def stored_bytes(shape: Shape, parameters: float) -> float:
    """Matrices in a type of 4 or 5 bits, as their file holds them, and what was rounded to them."""
    kind = slowest(shape.profile.search_space.precision)
    return parameters * (weight_bytes(kind) + FLOAT)


def whole_types_need(shape: Shape) -> Need:
    """The parent on the host with its head as it was, and the states before it of all scored tokens; what its file
    holds, and the head, rounded in float64; or log-probabilities of a sequence before and after.
    """
    whole, texts = shape.depth * shape.layer_parameters, scored_texts(shape.profile, shape.length)
    logits = LOGITS * max(length for _, length in texts) * shape.vocabulary * FLOAT
    states = FLOAT * shape.hidden * (shape.vocabulary + sum(sequences * length for sequences, length in texts))
    rounding = stored_bytes(shape, whole) + (DOUBLE + 2 * FLOAT) * shape.vocabulary * shape.hidden
    return Need(
        stage="score whole parents",
        held=FLOAT * (whole + shape.outside_parameters) + states,
        passing=max(rounding, logits),
        cure="lower scoring.tokens_per_sequence, or sequence_length of the longest capability",
    )


def rounded_need(shape: Shape, share: float) -> Need:
    """GKD of a child whose matrices are rounded in every pass: beside GKD's own, what its file held before with the
    scales, and the rounded matrices, which the gradients of the layers' inputs are taken with.
    """
    trained = share * shape.depth * shape.layer_parameters
    own, scales = gkd_need(shape, share), 2 * FLOAT / BLOCK
    rounded = 0 if shape.profile.gkd.gradient_checkpointing else FLOAT
    held = own.held + stored_bytes(shape, trained) + scales * trained
    return Need(stage="write files", held=held, passing=own.passing + rounded * trained, cure=own.cure)
