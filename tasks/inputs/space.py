"""The layers and variants that a profile asks for, checked against the parent's config."""

from typing import Any

from blocks.engine_limits import check_parent, refusal
from blocks.errors import PuzzleError, UnknownVariant
from blocks.kinds import kind_of, parse_label
from blocks.parent import Parent
from blocks.records import SUBBLOCKS, LayerChoice, Subblock
from blocks.variant import Variant
from profiles.schema import Profile, SearchSpace


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
    found = []
    for subblock in SUBBLOCKS:
        for section, field in (("search_space", subblock), ("bld", f"coupled_{subblock}")):
            for label in getattr(getattr(profile, section), field):
                try:
                    found += _unseen(profile, parse_label(subblock, label, reader.config), f"{section}.{field}")
                except UnknownVariant as error:
                    found.append(f"{section}.{field}: {error}")
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


def refused(profile: Profile, config: Any, layer: int, attention: str, ffn: str) -> str | None:
    """Why an engine that has to run the child cannot run these variants in a layer of it, None when all can."""
    return refusal(target_engines(profile), config, layer, attention, ffn, profile.hardware.precision)


def refused_alone(profile: Profile, config: Any, layer: int, subblock: Subblock, label: str) -> str | None:
    """Why an engine that has to run the child cannot run one variant beside the parent's other subblock; None when it
    can.
    """
    choice = LayerChoice().model_copy(update={subblock: label})
    return refused(profile, config, layer, choice.attention, choice.ffn)


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
