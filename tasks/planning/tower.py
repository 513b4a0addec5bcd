"""What a parent sees with, counted from its config alone, and how many images a profile asks about."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from blocks.errors import CorpusError
from profiles.schema import Profile
from tasks.inputs.image_questions import images_of, tokens_of_an_image, tower_of

FLOAT = 4  # bytes: features are made and kept in float32


@dataclass(frozen=True, kw_only=True)
class Tower:
    """Tower and projector. flops, elementwise: of an image, FLOPs of products and bytes read or written beside them.
    passing: bytes that the forward of an image holds. table: bytes of its features.
    """

    parameters: int
    flops: float
    elementwise: float
    passing: float
    table: int


def tower_counts(values: Mapping[str, Any], hidden: int) -> Tower:
    """The counts of a LLaVA's tower, by its config.json and the width of its text model.

    The pooling that SigLIP has behind its layers is not counted: it is less than a layer, and nobody asks for it.
    """
    vision, states = tower_of(values)
    width, inner, layers = vision.hidden_size, vision.intermediate_size, vision.num_hidden_layers
    features = tokens_of_an_image(values)
    taken = values.get("vision_feature_layer", -2)  # transformers' default
    read = width * (1 if isinstance(taken, int) else len(taken))
    pixels = vision.num_channels * vision.patch_size**2 * width
    layer, projector = 4 * width**2 + 2 * width * inner, read * hidden + hidden**2
    patches = (vision.image_size // vision.patch_size) ** 2
    attention = 4 * states**2 * width
    token = FLOAT * (10 * width + 6 * inner)
    return Tower(
        parameters=pixels + states * width + layers * layer + projector,
        flops=2.0 * patches * pixels + layers * (2.0 * states * layer + attention) + 2.0 * features * projector,
        elementwise=float(layers * states * token),
        passing=float(states * (FLOAT * layers * width + token)),  # the states behind every layer are kept
        table=FLOAT * features * hidden,
    )


def count_images(profile: Profile) -> int | None:
    """How many images the texts of a profile ask about: files, of which some may have one content. None where they are
    not here.
    """
    with suppress(CorpusError):
        return len({image for source in profile.images for image in images_of(source)})
    return None
