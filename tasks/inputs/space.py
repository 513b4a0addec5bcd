"""The layers and variants that a profile asks for, checked against the parent's config."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from blocks.engine_limits import NO_CACHE, check_parent, gaps, known_engine, refusal, runnable
from blocks.errors import PuzzleError, UnknownVariant
from blocks.families import head_dim
from blocks.kinds import kind_of, parse_label
from blocks.parent import Parent
from blocks.records import SUBBLOCKS, LayerChoice, Subblock
from blocks.resources import BLOCK, BLOCK_BYTES
from blocks.variant import Variant
from profiles.schema import Profile, SearchSpace
from tasks.inputs.precision import served_precision


def layers_of(profile: Profile, reader: Parent) -> list[int]:
    """The layers that are searched."""
    return list(range(reader.depth)) if profile.search_space.layers is None else sorted(profile.search_space.layers)


def check_search_space(profile: Profile, reader: Parent) -> None:
    """Raise PuzzleError for a search space that this parent cannot have, with all that is wrong."""
    found = misfits(profile, reader)
    if found:
        raise PuzzleError("\n  ".join(found))


def misfits(profile: Profile, reader: Parent) -> list[str]:
    """What of a search space this parent cannot have, a sentence each."""
    found: list[str] = []
    searched = set()
    for subblock in SUBBLOCKS:
        for section, field in (("search_space", subblock), ("bld", f"coupled_{subblock}")):
            for label in getattr(getattr(profile, section), field):
                try:
                    variant = parse_label(subblock, label, reader.config)
                    searched |= {variant.label} if section == "search_space" else set()
                    entry = kind_of(variant).block_entry(variant, reader.config)
                    found += [f"{section}.{field}: {label}: {why}" for why in unshared(profile, reader.config, entry)]
                    found += _unseen(profile, variant, f"{section}.{field}")
                except UnknownVariant as error:
                    found.append(f"{section}.{field}: {error}")
        own = parse_label(subblock, "parent", reader.config)
        entry = kind_of(own).block_entry(own, reader.config)
        found += [f"hardware.tensor_parallel: the parent: {why}" for why in unshared(profile, reader.config, entry)]
    found += [*_narrow(profile, reader), *_uncached(profile, reader)]
    found += [
        f"bld.otherwise: {label} is none of the search space's variants, which are {', '.join(sorted(searched))}"
        for other in profile.bld.otherwise
        for label in other.variants
        if label not in searched
    ]
    outside = [layer for layer in profile.search_space.layers or () if not 0 <= layer < reader.depth]
    if outside:
        found.append(f"search_space.layers names {outside}, but the parent's layers are 0 to {reader.depth - 1}")
    if profile.race.candidates > 1 and profile.race.min_different > reader.depth:
        found.append(f"race.min_different is {profile.race.min_different}, but the parent has {reader.depth} layers")
    try:
        check_parent(target_engines(profile), reader.config, profile.hardware.precision)
    except PuzzleError as error:
        found.append(f"hardware: {error}")
    return found


def _unseen(profile: Profile, variant: Variant, field: str) -> list[str]:
    """Why the scored text is too short to tell what a window leaves out; nothing where it is long enough."""
    length = profile.scoring.tokens_per_sequence or profile.corpus.sequence_length
    if kind_of(variant).kv_tokens(variant) is None or variant.size is None or length >= 2 * variant.size:
        return []
    return [
        f"{field}: {variant.label} would be scored on {length} tokens of a text. Its window hides few of them or none, "
        "and its score would say that it costs nothing. Raise scoring.tokens_per_sequence and corpus.sequence_length "
        f"to {2 * variant.size} or more, or take a window of at most {length // 2}."
    ]


def _narrow(profile: Profile, reader: Parent) -> list[str]:
    """Variants with rows that the blocks of the types of `search_space.precision` do not divide."""
    space, found = profile.search_space, []
    for subblock in SUBBLOCKS if space.precision else ():
        for label in ("parent", *getattr(space, subblock)):
            pair = LayerChoice().model_copy(update={subblock: label})
            try:
                free, held = (
                    runnable("llama.cpp", reader.config, reader.depth - 1, pair.attention, pair.ffn, precision)
                    for precision in ("float32", space.precision[0])
                )
            except UnknownVariant:  # said above
                continue
            if free is None and held is not None:
                found.append(
                    f"search_space.precision: {space.precision[0]} holds rows of whole blocks of {BLOCK}, which "
                    f"{subblock} {label} of this parent does not have: leave out that variant, or the types"
                )
    return found


def _uncached(profile: Profile, reader: Parent) -> Iterator[str]:
    """What forbids the KV cache that the profile names."""
    hardware, channels = profile.hardware, head_dim(reader.config)
    if hardware.kv_precision in BLOCK_BYTES and channels % BLOCK:
        yield (
            f"hardware.kv_precision: {hardware.kv_precision} holds whole blocks of {BLOCK} numbers, and a head of this "
            f"parent has {channels} channels: leave it out, or name float16"
        )
    judged = hardware.kv_precision is not None and hardware.engine == "llama.cpp"
    if judged and (written := served_precision(hardware, reader)) != hardware.precision:
        yield (
            "hardware.kv_precision: every child is then judged and served as a GGUF file, and nothing says what its "
            f"weights are in. Costs would be of {hardware.precision}, memory of {written}: name hardware.precision too"
        )


def unshared(profile: Profile, config: Any, entry: Mapping[str, Any]) -> Iterator[str]:
    """Why `hardware.tensor_parallel` devices cannot share a subblock with this entry of `block_configs`.

    Engines give each device as many heads and as many columns of the FFN; a KV head may be held by several devices.
    """
    devices = profile.hardware.tensor_parallel
    moe, heads = entry.get("moe", {}), entry.get("num_attention_heads") or config.num_attention_heads
    kv_heads, width = (
        entry.get("num_key_value_heads"),
        moe.get("expert_intermediate_dim", entry.get("intermediate_size")),
    )
    if kv_heads and (heads % devices or max(kv_heads, devices) % min(kv_heads, devices)):
        yield f"{devices} devices cannot share {heads} heads with {kv_heads} KV heads equally"
    if width and width % devices:
        yield f"{devices} devices cannot share a width of {width} equally"


def refused(profile: Profile, config: Any, layer: int, attention: str, ffn: str) -> str | None:
    """Why an engine that has to run the child cannot run these variants in a layer of it, None when all can."""
    return refusal(target_engines(profile), config, layer, attention, ffn, profile.hardware.precision)


def refused_alone(profile: Profile, config: Any, layer: int, subblock: Subblock, label: str) -> str | None:
    """Why an engine that has to run the child cannot run one variant beside the parent's other subblock; None when it
    can.
    """
    choice = LayerChoice().model_copy(update={subblock: label})
    return refused(profile, config, layer, choice.attention, choice.ffn)


def refused_whole(profile: Profile, reader: Parent, layers: Sequence[LayerChoice]) -> str | None:
    """Why an engine that has to run the child cannot run together what it can layer by layer; None when all can."""
    config = reader.child_config([choice.bare for choice in layers])
    unable = [known_engine(name).title for name in target_engines(profile) if NO_CACHE in gaps(name, config)]
    return f"{unable[0]} cannot run {NO_CACHE}" if unable else None


def left_out(profile: Profile, reader: Parent) -> tuple[str, ...]:
    """Variants of the search space that no layer can have, because an engine that has to run the child cannot run them:
    a sentence for each reason.
    """
    found: dict[str, list[str]] = {}
    for subblock in SUBBLOCKS:
        for label in getattr(profile.search_space, subblock):
            reasons = [
                refused_alone(profile, reader.config, layer, subblock, label) for layer in layers_of(profile, reader)
            ]
            if all(reasons):
                found.setdefault(str(reasons[0]), []).append(f"{subblock} {label}")
    return tuple(f"{', '.join(labels)}: {reason}" for reason, labels in found.items())


def target_engines(profile: Profile) -> tuple[str, ...]:
    """The engines that have to run the child. The engine `roofline` is a model and runs nothing."""
    hardware = profile.hardware
    return tuple(name for name in dict.fromkeys((hardware.engine, *hardware.must_run)) if name != "roofline")


def measured_space(profile: Profile) -> SearchSpace:
    """The variants whose costs are measured: those of the search space, and those that only coupled blocks use."""
    space, settings = profile.search_space, profile.bld
    if not settings.coupled:
        return space
    attention = tuple(dict.fromkeys(space.attention + settings.coupled_attention))
    return space.model_copy(
        update={"attention": attention, "ffn": tuple(dict.fromkeys(space.ffn + settings.coupled_ffn))}
    )
