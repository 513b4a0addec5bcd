"""Parents that see: a text model with a vision tower and a projector before it, in one folder (LLaVA).

The text model becomes the prepared parent, as any other. What else makes the whole is kept beside it as it is, in the
folder `vision`: the whole model's config, the weights of tower and projector, what prepares pixels. Of it features of
images are made once (`with_images`), and a child is written back as a whole model (tasks/export/whole.py).
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import suppress
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from blocks.compute import Compute
from blocks.errors import CorpusError, DamagedBlock, ParentError, first_line
from blocks.export_code.families_decilm import FAMILIES
from blocks.files import sha256_of
from blocks.images import DIGESTS, FEATURES, TABLE, VISION, features_in, vision_of
from blocks.library import digest_of, is_whole, keep, read_value, remember
from blocks.records import ParentInfo, Ref, Value
from tasks.inputs.image_questions import digest_of_image, opened_image
from tasks.inputs.parent_weights import Weights, check_finite, place_weights, weight_files
from tasks.running.progress import Progress, no_progress

VERSION = 1  # raise it when the same images would give other features
CARRIED = ("llava",)  # model types whose vision part is kept, as transformers names them
TOWERS = ("clip_vision_model", "siglip_vision_model")  # each gives equally many features of any image
TEXT, HEAD = "model.language_model.", "lm_head."  # what the whole's weights of the text model begin with
PIXELS = ("preprocessor_config.json", "processor_config.json")
BATCH = 8  # images


def is_whole_model(values: Mapping[str, Any]) -> bool:
    """Whether a config.json is of a whole model with a text model in it, carried or not."""
    return isinstance(values.get("text_config"), Mapping)


def text_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of the text model in a whole one. Raises ParentError for what is not carried."""
    from transformers import CONFIG_MAPPING

    kind, text = values.get("model_type"), values["text_config"]
    if kind not in CARRIED:
        raise ParentError(
            f"this is a model of text and images (model_type {kind}): of those {', '.join(CARRIED)} is carried. "
            "Save its text model alone, or take a LLaVA of a Llama-like text model."
        )
    tower = values.get("vision_config", {}).get("model_type")
    if tower not in TOWERS:
        raise ParentError(
            f"this LLaVA sees by {tower}: carried are {', '.join(TOWERS)}, which give equally many features of each "
            "image."
        )
    name = text.get("model_type", "llama")
    if name not in FAMILIES:
        return {**text, "model_type": name}  # which is refused with the list of families
    try:
        whole: Any = CONFIG_MAPPING[kind](**{key: value for key, value in values.items() if key != "model_type"})
    except Exception as error:  # transformers raises nothing more precise
        raise ParentError(f"config.json is none of a {kind}: {first_line(error)}") from error
    family = FAMILIES[name]
    if family.logits_divisor or family.restarts_at or family.cap(whole.text_config) is not None:
        own = "whose cache starts anew in long texts" if family.restarts_at else "whose logits are scaled or capped"
        raise ParentError(
            f"the text model of this LLaVA is a {name}, {own}, and transformers' LLaVA leaves that out: take another, "
            "or save its text model alone."
        )
    found = {**text, "model_type": name, "tie_word_embeddings": bool(whole.tie_word_embeddings)}
    if whole.image_token_index >= whole.text_config.vocab_size:
        raise ParentError(
            f"image_token_index is {whole.image_token_index}, and the text model knows {whole.text_config.vocab_size} "
            "words: the image's token must be one of them."
        )
    dtype = next((values[key] for key in ("dtype", "torch_dtype") if values.get(key)), None)
    return found if dtype is None else {"dtype": dtype, **found}


def place_whole(source: Path, target: Path, weights: Weights, place: Callable[[Path, Path], Any]) -> None:
    """Bring the text model's weights of a whole model to `target`, and all else to its folder `vision`."""
    text = {name: found for name, found in weights.tensors.items() if name.startswith((TEXT, HEAD))}
    others = {name: found for name, found in weights.tensors.items() if name not in text}
    named = {name.replace(TEXT, "model.", 1): found for name, found in text.items()}
    place_weights(source, target, _alone(weights, named), place)
    folder = target / VISION
    folder.mkdir()
    place_weights(source, folder, _alone(weights, others), place)
    check_finite(folder, replace(weights, tensors={name: replace(found, name=name) for name, found in others.items()}))
    for name in PIXELS:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def brings_code(values: Any) -> bool:
    """Whether a JSON object names code of its own (auto_map) for what it is of, or for a part of that."""
    return isinstance(values, Mapping) and ("auto_map" in values or any(map(brings_code, values.values())))


def without_code(values: Any) -> Any:
    """A JSON object that names no code of its own."""
    if not isinstance(values, Mapping):
        return values
    return {key: without_code(value) for key, value in values.items() if key != "auto_map"}


def _alone(weights: Weights, tensors: Mapping[str, Any]) -> Weights:
    """Some of the weights; every file holds others too."""
    return replace(weights, tensors=dict(tensors), extra=frozenset(found.file for found in weights.tensors.values()))


def sees(folder: Path) -> bool:
    """Whether a prepared parent has a vision tower."""
    return vision_of(folder) is not None


def vision_tensors(folder: Path) -> dict[str, Tensor]:
    """Tower and projector of a prepared parent, by the whole model's names."""
    return tensors_in(folder / VISION)


def tensors_in(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a model's folder, as its files hold it."""
    found: dict[str, Tensor] = {}
    for file in weight_files(folder):
        with safe_open(folder / file, framework="pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no mapping
    return found


# --- the features of images


class _Seeing(Value):
    """A parent whose folder has a table of images, and the files of that folder. images: of the table, in its order, by
    their digests. by: what saw them; "" in a record of an older version, which does not say.
    """

    parent: ParentInfo
    files: tuple[Ref, ...]
    by: str = ""
    images: tuple[str, ...] = ()

    @property
    def table(self) -> Ref:
        """The file of the features."""
        return next(ref for ref in self.files if ref.path == f"{self.parent.folder}/{TABLE}")


def refuse_blind(name: str, has_tower: bool | None) -> None:
    """Raise ParentError for a parent of that name without a vision tower, where a text asks about images. None: whether
    it has one is not known yet.
    """
    if has_tower is False:
        raise ParentError(
            f"a text asks about images, and {name} has no vision tower: take a parent of model_type "
            f"{' or '.join(CARRIED)}, or leave that text out."
        )


def with_images(
    parent: ParentInfo,
    images: Mapping[str, Path],
    workspace: Path,
    compute: Compute,
    progress: Progress = no_progress,
) -> ParentInfo:
    """The parent with the features of images (blocks/images.py), in a folder of its own: all other files in it are
    links. images: their files by digest, as `by_digest` gives them.

    The same images give the same folder, which is used again; of others, those alone are seen that no table of this
    parent has. Without any it is the parent as it is. Raises ParentError for a parent without a vision tower,
    CorpusError for a file that is no image, or another one by now.
    """
    if not images:
        return parent
    folder = workspace / parent.folder
    refuse_blind(parent.name, sees(folder))
    key = digest_of(parent=parent.fingerprint, images=list(images), version=VERSION)
    manifest = workspace / "parent" / f"images-{key}.json"
    known = remember(manifest, _Seeing, lambda value: list(value.files), workspace, "never")
    if known is not None:
        return known.parent
    target, by = f"{parent.folder}-{key[:16]}", digest_of(parent=parent.fingerprint, version=VERSION)
    before = _seen_before(by, images.keys(), workspace)
    unseen = {digest: path for digest, path in images.items() if digest not in before}
    with tempfile.TemporaryDirectory(dir=manifest.parent, prefix=".making-") as temporary:
        made = Path(temporary) / "parent"
        _link_all(folder, made)
        seen = _features(folder, unseen, compute, progress)
        each = (before[digest] if digest in before else next(seen) for digest in images)
        first = next(each)
        features = torch.empty(len(images), *first.shape)  # once in memory: an image of LLaVA 1.5 takes 9 MiB
        for place, one in enumerate(chain([first], each)):
            features[place] = one
        digests = torch.tensor([list(bytes.fromhex(digest)) for digest in images], dtype=torch.uint8)
        save_file({FEATURES: features.flatten(0, 1), DIGESTS: digests}, made / TABLE)
        (made / TABLE).chmod(0o644)
        shutil.rmtree(workspace / target, ignore_errors=True)
        made.replace(workspace / target)
    files = [path for path in sorted((workspace / target).rglob("*")) if path.is_file()]
    refs = tuple(Ref(path=path.relative_to(workspace).as_posix(), sha256=sha256_of(path)) for path in files)
    found = _Seeing(parent=parent.model_copy(update={"folder": target}), files=refs, by=by, images=tuple(images))
    keep(manifest, found, refs, workspace, "never")
    return found.parent


def _seen_before(by: str, wanted: Set[str], workspace: Path) -> dict[str, Tensor]:
    """The features (tokens, D) of those images that whole tables have, by digest. Tables are mapped: what is not looked
    at is not read, and of several the latest is asked first, since it will have most.
    """
    found: dict[str, Tensor] = {}
    records = (workspace / "parent").glob("images-*.json")
    for path in sorted(records, key=lambda path: path.stat().st_mtime_ns, reverse=True):
        with suppress(DamagedBlock):
            there = read_value(path, _Seeing)
            new = wanted & (set(there.images) - found.keys()) if there.by == by else None
            features = (
                features_in(workspace / there.parent.folder) if new and is_whole(workspace, there.table) else None
            )
            if new and features is not None:
                rows = features.unflatten(0, (len(there.images), -1))
                found |= {digest: one for digest, one in zip(there.images, rows, strict=True) if digest in new}
    return found


def _link_all(source: Path, target: Path) -> None:
    for path in sorted(source.rglob("*")):
        if path.is_file() and path.name != TABLE:
            place = target / path.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(path, place)
            except OSError:  # a file system without links
                shutil.copyfile(path, place)


@torch.no_grad()
def _features(folder: Path, images: Mapping[str, Path], compute: Compute, progress: Progress) -> Iterator[Tensor]:
    """The features (tokens, D) of each image in float32, as the whole model puts them among the words."""
    from transformers import AutoImageProcessor

    model = _tower(folder).to(compute.device)
    try:
        pixels: Any = AutoImageProcessor.from_pretrained(folder / VISION, trust_remote_code=False)
    except Exception as error:  # transformers raises nothing more precise
        raise ParentError(f"nothing says how the parent's pixels are prepared: {first_line(error)}") from error
    named = list(images.items())
    for first in range(0, len(named), BATCH):
        batch = [_opened(*one) for one in named[first : first + BATCH]]
        values = pixels(images=batch, return_tensors="pt")["pixel_values"]
        found = model.get_image_features(pixel_values=values.to(compute.device)).pooler_output
        progress(min(first + BATCH, len(named)), len(named), "images seen")  # who takes the last one asks no further
        yield from (one.cpu() for one in found)


def _tower(folder: Path) -> Any:
    """The whole model without its head, in float32, with a stand-in of one small layer for its text model."""
    from transformers import AutoConfig, AutoModel

    config: Any = AutoConfig.from_pretrained(folder / VISION, trust_remote_code=False)
    text = config.text_config
    text.num_hidden_layers, text.vocab_size, text.pad_token_id = 1, 8, None
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:1]
    model: Any = AutoModel.from_config(config, dtype=torch.float32)
    state = {name.removeprefix("model."): tensor for name, tensor in vision_tensors(folder).items()}
    lacking, unknown = model.load_state_dict(state, strict=False)
    assert not unknown and all(name.startswith("language_model.") for name in lacking), "checked when it was prepared"
    return model.eval()


def _opened(digest: str, path: Path) -> Any:
    """An image as people see it: a photo's orientation stands beside its pixels."""
    from PIL import ImageOps

    with opened_image(path) as image:
        if digest_of_image(path) != digest:
            raise CorpusError(f"{path.name} has changed while texts about it were read: run again.")
        return ImageOps.exif_transpose(image).convert("RGB")
