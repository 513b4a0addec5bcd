"""What types of number add to a run: the costs that a plan models in them, and the work of rounding to them.

A type of 4 or 5 bits is fitted to calibration text (tasks/export/quantise.py). The text runs through a layer twice: for
X^T X of what enters its matrices, and, once these are rounded, for what enters the next layer. Matrices that read the
same states share one: all of a subblock but the last. A matrix (D, K) takes K^3 / 3 + K^3 FLOPs in float64 for a factor
and its inverse, and D K^2 for what later columns make up for. Rounding itself takes all threads.
"""

from collections.abc import Sequence
from dataclasses import replace

from blocks.families import weights
from blocks.kinds import kind_of
from blocks.records import SUBBLOCKS, CostTable
from blocks.resources import weight_bytes
from blocks.typed_labels import FITTED_TO, typed
from profiles.schema import Profile
from tasks.inputs.space import measured_space
from tasks.measure.roofline import Setting, modelled_costs
from tasks.planning.effort import (
    BUILD_BYTES_PER_SECOND,
    TASK_SECONDS,
    Shape,
    Work,
    before_scores,
    gkd_work,
    model_bytes,
    scored_texts,
)

# seconds of one thread for a weight (AMD EPYC): rounded by ggml (iq4_nl: by us), and to the nearest number of a grid in
# training
ROUNDING = {"q8_0": 4e-8, "q5_1": 1.5e-7, "q5_0": 7.4e-8, "q4_1": 1.5e-7, "q4_0": 5.7e-8, "iq4_nl": 1.2e-7}
NEAREST = {"iq4_nl": 1e-8}  # two tables
FOUR_BITS = {"q4_1", "q4_0", "iq4_nl"}
EVEN_NEAREST = 1.6e-9  # where the numbers are evenly spaced
Types = tuple[str, str]  # of all layers, and of embedding and head; "" leaves the weights


def costs_with_types(shape: Shape, setting: Setting) -> CostTable:
    """The modelled costs of every variant in the profile's precision and in every type of its search space."""
    space, scenarios = measured_space(shape.profile), shape.profile.scenarios
    table = modelled_costs(shape.parent, space, scenarios, setting)
    costs, outside = list(table.costs), list(table.non_block)
    for kind in space.precision:
        own = modelled_costs(shape.parent, space, scenarios, replace(setting, kind=kind))
        labelled = [cost.model_copy(update={"variant": typed(cost.variant, kind)}) for cost in own.costs]
        costs += [cost for cost in labelled if cost.variant != "no_op"]
        outside += [one.model_copy(update={"head": kind}) for one in own.non_block if kind in space.head_types]
    return table.model_copy(update={"costs": tuple(costs), "non_block": tuple(outside)})


def is_fitted(kind: str) -> bool:
    """Whether a type is so coarse that it is fitted to text."""
    return kind not in ("", "q8_0")


def by_blocks(kinds: Sequence[str]) -> list[str]:
    """The types in which the parent is scored block by block: beside one of 4 bits q8_0 is not (`fine_types` in
    tasks/score/typed_scores.py).
    """
    return [kind for kind in kinds if is_fitted(kind) or not FOUR_BITS & set(kinds)]


def slowest(kinds: Sequence[str]) -> str:
    """The type that takes longest to round to; "" of none. Which one a child will have only the search can tell."""
    return max(kinds, key=lambda kind: ROUNDING[kind], default="")


def types_of_child(profile: Profile) -> Types:
    """The types of a child that takes longest to write."""
    space = profile.search_space
    return slowest(space.precision), slowest(space.head_types)


def types_of_files(profile: Profile) -> list[Types]:
    """The types of every GGUF file that models are judged by before GKD: child, baselines, and the parent in each
    type; a profile that names a type for the KV cache alone has files too, of weights as they are.
    """
    space, hardware = profile.search_space, profile.hardware
    if not space.precision and (hardware.engine != "llama.cpp" or hardware.kv_precision is None):
        return []
    heads = space.head_types
    parents = [(kind, kind if kind in heads else next(iter(heads), "")) for kind in space.precision]
    return [types_of_child(profile)] * (1 + len(profile.evaluate.baselines)) + parents


def matrices(shape: Shape) -> list[list[tuple[int, int]]]:
    """(D, K) of every matrix of the parent's own layer, by subblock."""
    config, found = shape.parent.config, []
    for part in SUBBLOCKS:
        own = shape.own(part)
        modules = weights(config, part, kind_of(own).block_entry(own, config))
        found.append([(one[0], one[1]) for module in modules for one in module if len(one) == 2])
    return found


def entries(shape: Shape) -> int:
    """Numbers in the matrices of one of the parent's layers."""
    return sum(rows * columns for each in matrices(shape) for rows, columns in each)


def corrections(shape: Shape) -> Work:
    """Fitting the matrices of one of the parent's layers: in each subblock all but the last read the same states."""
    work = Work()
    for *first, last in matrices(shape):
        work += correction(shape, first) + correction(shape, [last])
    return work


def correction(shape: Shape, alike: Sequence[tuple[int, int]]) -> Work:
    """Fitting matrices that read the same states to the calibration text: X^T X of these, and float64 arithmetic."""
    grams = 2.0 * FITTED_TO * shape.length * alike[0][1] ** 2
    solve = sum(columns**3 * 4 / 3 + rows * columns**2 for rows, columns in alike)
    return Work(product=grams, float32=grams, solve=solve)


def rounding_work(shape: Shape, types: Types) -> Work:
    """A whole model rounded to its types."""
    layers, head = types
    table, tables = (shape.vocabulary, shape.hidden), shape.outside_parameters // (shape.vocabulary * shape.hidden)
    tokens = FITTED_TO * shape.length
    work = Work()
    if is_fitted(layers) or is_fitted(head):
        work += shape.forward(tokens, shape.depth)
    if is_fitted(layers):
        work += shape.forward(tokens, shape.depth)
        work += corrections(shape) * shape.depth
    if is_fitted(head):  # an embedding of its own is fitted to its entries, without text
        fit = correction(shape, [table])
        work += replace(fit, solve=tables * fit.solve)
    rounded = {layers: shape.depth * entries(shape)}
    rounded[head] = rounded.get(head, 0) + shape.outside_parameters
    return work + Work(threaded=sum(ROUNDING[kind] * count for kind, count in rounded.items() if kind))


def file_work(shape: Shape, types: Types) -> Work:
    """A model built, rounded, and written to its file."""
    size = model_bytes(shape)
    return rounding_work(shape, types) + Work(fixed=size / BUILD_BYTES_PER_SECOND + TASK_SECONDS, disk=size / 4)


def files_bytes(shape: Shape, share: float, distilled: int) -> float:
    """Bytes of all these files, and of the child's copy beside its folder."""
    before, own = types_of_files(shape.profile), shape.profile.hardware.precision
    after = [types_of_child(shape.profile)] * (distilled + 1) if before else []
    layers = share * shape.depth * shape.layer_parameters
    return sum(
        layers * weight_bytes(kind or own) + shape.outside_parameters * weight_bytes(head or own)
        for kind, head in before + after
    )


def files_work(shape: Shape, share: float, layers: float, distilled: int) -> Work:
    """Every file of models before GKD, and of those after it, which are trained as their files will hold them."""
    work = Work()
    for types in types_of_files(shape.profile):
        work += file_work(shape, types)
    if not types_of_files(shape.profile):
        return work
    kind, head = types_of_child(shape.profile)
    trained = rounded_training_work(shape, share, layers)
    again = rounding_work(shape, ("", head)) if trained.flops else Work()  # the head is fitted to the trained layers
    return work + (file_work(shape, (kind, head)) + trained + again) * distilled


def rounded_training_work(shape: Shape, share: float, layers: float) -> Work:
    """GKD whose every pass rounds all weights of the layers to the nearest numbers of their grids."""
    gkd, kinds = shape.profile.gkd, shape.profile.search_space.precision
    if not gkd.rounded_steps:
        return Work()
    own = gkd.model_copy(update={"steps": gkd.rounded_steps, "learning_rate": gkd.rounded_learning_rate})
    looks = 1 + -(-own.steps // own.evaluate_every)
    passes = own.steps * -(-own.batch_sequences * shape.length // shape.at_once)
    passes += looks * -(-own.validation_sequences * shape.length // shape.at_once)
    rounded = passes * share * shape.depth * shape.layer_parameters
    profile = shape.profile.model_copy(update={"gkd": own})
    training = gkd_work(replace(shape, profile=profile), share, layers)
    return training + Work(threaded=rounded * max(NEAREST.get(kind, EVEN_NEAREST) for kind in kinds))


def block_types_work(shape: Shape, layers: Sequence[int]) -> Work:
    """The parent's own blocks scored in types (`by_blocks`), on the corpus and on the text of every capability."""
    work = Work()
    for place, text in enumerate(scored_texts(shape.profile, shape.length)):
        work += _block_types_on(shape, layers, *text)
        work += before_scores(shape, *text, kept=False) if place else Work()  # the corpus's are there
    return work


def _block_types_on(shape: Shape, layers: Sequence[int], sequences: int, length: int) -> Work:
    """On a text. What enters a layer's matrices is found once for all types."""
    kinds, scored = by_blocks(shape.profile.search_space.precision), sequences * length
    fitted, work = any(map(is_fitted, kinds)), Work()
    fit = corrections(shape)
    for layer in layers:
        times = len(SUBBLOCKS) * len(kinds)
        work += shape.forward(scored * times, shape.depth - layer, length=length)
        work += shape.head(scored * times) + Work(fixed=TASK_SECONDS)
        if fitted:  # the attention's inputs, and the FFN's behind the parent's attention
            flops = 2 * shape.flops(shape.own("attention")) + shape.flops(shape.own("ffn"))
            work += shape.forward(FITTED_TO * shape.length, flops / shape.layer())
            work += replace(fit, solve=fit.solve * sum(map(is_fitted, kinds)))
        work += Work(threaded=entries(shape) * sum(ROUNDING[kind] for kind in kinds))
    return work


def whole_types(profile: Profile) -> list[Types]:
    """What of the whole parent is scored: every type in all layers, and every type of embedding and head."""
    space = profile.search_space
    return [(kind, "") for kind in space.precision] + [("", kind) for kind in space.head_types]


def whole_types_work(shape: Shape) -> Work:
    """The whole parent scored in its types: built, run before and after the rounding."""
    size, run = model_bytes(shape), Work()
    for sequences, length in scored_texts(shape.profile, shape.length):
        tokens = sequences * length
        run += shape.forward(tokens, shape.depth, length=length) + shape.head(tokens)
    work = Work()
    for types in whole_types(shape.profile):
        work += rounding_work(shape, types) + run * 2 + Work(fixed=size / BUILD_BYTES_PER_SECOND + TASK_SECONDS)
    return work
