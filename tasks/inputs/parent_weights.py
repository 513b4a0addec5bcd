"""The weights of a folder as transformers would load them, with every name and shape checked against config.json.

The config gives a model without memory (on torch's meta device), and the headers of the safetensors files are compared
with it. What transformers renames, ties or ignores is renamed, tied or ignored here too. What is missing or has another
shape is refused. The prepared parent's folder then holds exactly the tensors of the model.
"""

import copy
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from blocks.errors import ParentError, first_line, first_names
from blocks.families import family_of
from blocks.resources import precision_name

if TYPE_CHECKING:
    from transformers.core_model_loading import WeightConverter, WeightRenaming

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
# buffers of old checkpoints that transformers drops without a word
_LEFT_OVER = r"(^|\.)rotary_emb\.\w+$|(^|\.)position_ids$|\.masked_bias$"
_LAYER = re.compile(r".*\.layers\.\d+\.")


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A tensor of a safetensors file, from its header. dtype: by safetensors' name.

    parts: where it is made of several, such as the experts of a layer, stored one by one: these, each with the pattern
    of its name in `converter`; file is then that of the first.
    """

    file: str
    name: str
    shape: list[int]
    dtype: str
    parts: tuple[tuple[str, "StoredTensor"], ...] = ()
    converter: "WeightConverter | None" = None

    def read(self, load: Callable[["StoredTensor"], Tensor]) -> Tensor:
        """The tensor; `load` reads one that is stored as it is."""
        if self.converter is None:
            return load(self)
        converter = copy.deepcopy(self.converter)
        for pattern, part in self.parts:
            converter.add_tensor(self.name, part.name, pattern, load(part))  # type: ignore[arg-type]
        found: Tensor = converter.convert(self.name)[self.name]
        return found


@dataclass(frozen=True, kw_only=True)
class Model:
    """What a config asks for.

    shapes: of every tensor, by name. tied: a tensor's name, and the name of the one that it is the same as. base:
    prefix of all names but the head's. ignored: names that transformers ignores. renamings, converters: how it takes
    tensors that are stored otherwise, where the layers have experts.
    """

    shapes: Mapping[str, list[int]]
    tied: Mapping[str, str]
    base: str
    ignored: re.Pattern[str]
    renamings: "Sequence[WeightRenaming]" = ()
    converters: "Sequence[WeightConverter]" = ()

    def place(self, stored: str) -> "tuple[str, str | None]":
        """The model's name of a stored tensor. The pattern of its name, where it is a part of the model's tensor."""
        from transformers.core_model_loading import rename_source_key

        name, pattern = rename_source_key(stored, [*self.renamings], [*self.converters])
        return self.name(name), pattern

    def name(self, stored: str) -> str:
        """The model's name of a stored tensor. transformers adds or takes away the prefix of the base model."""
        short = stored.removeprefix(f"{self.base}.")
        if short != stored and short in self.shapes:
            return short
        return f"{self.base}.{stored}" if f"{self.base}.{stored}" in self.shapes else stored


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The weights of a folder.

    tensors: by the model's names. extra: files that hold something else too. settings: what config.json should say.
    notes: sentences on what a person should know of the parent.
    """

    tensors: Mapping[str, StoredTensor]
    extra: frozenset[str]
    settings: Mapping[str, Any]
    notes: tuple[str, ...]

    @property
    def files(self) -> list[str]:
        """Files that hold tensors of the model."""
        return sorted({found.file for found in self.tensors.values()})


def weights_of(folder: Path) -> Weights:
    """The weights of a folder as transformers would load them.

    Raises ParentError where transformers would fill some in, or where they are not what config.json says.
    """
    model = model_of(folder)
    everything = [found for file in weight_files(folder) for found in _header(folder, file)]
    tensors, others = _assigned(everything, model)
    ties = _tied(folder, tensors, model)
    _check_names(folder, tensors, others, model)
    for name, found in tensors.items():
        _check_tensor(name, found, model.shapes[name])
    left = [found.name for found in others if not model.ignored.search(found.name)]
    renamed = {found.file for name, found in tensors.items() if found.name != name}
    dtype = _stored_in(tensors.values())
    notes = [*ties.values()]
    if left:
        notes.append(f"ignored, as transformers ignores them: {first_names(left)}")
    if dtype is None:
        kinds = sorted({precision_name(DTYPES[found.dtype]) for found in tensors.values()})
        notes.append(f"its weights are of several dtypes ({', '.join(kinds)}); it is computed in float32")
    settings: dict[str, Any] = {"tie_word_embeddings": False} if ties else {}
    if not _says_dtype(folder):
        settings["dtype"] = precision_name(dtype or torch.float32)
    extra = renamed | {found.file for found in others}
    extra |= {part.file for found in tensors.values() for _, part in found.parts}
    return Weights(tensors=tensors, extra=frozenset(extra), settings=settings, notes=tuple(notes))


def place_weights(source: Path, target: Path, weights: Weights, place: Callable[[Path, Path], Any]) -> None:
    """Bring the model's tensors to the folder `target`.

    A file is brought there with `place`; one that holds other tensors too, or has other names, is written anew.
    """
    for file in weights.files:
        if file not in weights.extra:
            place(source / file, target / file)
            continue
        with ExitStack() as stack:
            mine = {name: found for name, found in weights.tensors.items() if found.file == file}
            files = {part.file for found in mine.values() for _, part in found.parts} | {file}
            opened = {each: stack.enter_context(safe_open(source / each, framework="pt")) for each in files}

            def load(one: StoredTensor, opened: Mapping[str, Any] = opened) -> Tensor:
                found: Tensor = opened[one.file].get_tensor(one.name)
                return found

            save_file({name: found.read(load) for name, found in mine.items()}, target / file, {"format": "pt"})
    if weights.files != [WEIGHTS]:
        index = {"metadata": {}, "weight_map": {name: found.file for name, found in sorted(weights.tensors.items())}}
        (target / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def check_finite(folder: Path, weights: Weights) -> None:
    """Raise ParentError for a weight that is NaN or infinite. Every tensor is read once."""
    for file in weights.files:
        with safe_open(folder / file, framework="pt") as opened:
            for found in weights.tensors.values():
                if found.file == file and not bool(torch.isfinite(opened.get_tensor(found.name)).all()):
                    raise ParentError(
                        f"{found.name} in {file} holds NaN or infinite weights: its training diverged, or the file is "
                        "damaged. Take another checkpoint, or fetch it again."
                    )


def model_of(folder: Path) -> Model:
    """What the config.json of a folder asks for. No memory is used for weights."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    try:
        config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        text = config.get_text_config()
        family, whole = family_of(text), text is not config  # with a vision tower, whose config checks have passed
        with torch.device("meta"):
            model: Any = (AutoModelForImageTextToText if whole else AutoModelForCausalLM).from_config(config)
    except ParentError:
        raise
    except Exception as error:  # transformers raises nothing more precise
        raise ParentError(f"no model can be built from the parent's config.json: {first_line(error)}") from error
    changes = get_model_conversion_mapping(model, add_legacy=False) if family.experts or whole else []
    patterns = [_LEFT_OVER, *(model._keys_to_ignore_on_load_unexpected or ())]
    return Model(
        shapes={name: list(tensor.shape) for name, tensor in model.state_dict().items()},
        tied=dict(model.all_tied_weights_keys),
        base=model.base_model_prefix,
        ignored=re.compile("|".join(f"(?:{pattern})" for pattern in patterns)),
        renamings=[change for change in changes if isinstance(change, WeightRenaming)],
        converters=[change for change in changes if isinstance(change, WeightConverter)],
    )


def weight_files(folder: Path) -> list[str]:
    """Names of the safetensors files that make the model: model.safetensors or, where there is none, the shards that
    the index names (transformers looks in this order).

    Others (adapters, a second format of the same weights) are not the model's. Raises ParentError.
    """
    names = [WEIGHTS]
    if not (folder / WEIGHTS).is_file() and (folder / INDEX).is_file():
        names = shards_of(folder)
    missing = [name for name in names if Path(name).name != name or not (folder / name).is_file()]
    if not names or missing:
        there = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".gguf"))
        hint = f" There is {', '.join(there[:3])}: load it with transformers and save_pretrained it." if there else ""
        if names != [WEIGHTS]:
            hint = f" {INDEX} names what is not there: fetch the parent again.{hint}"
        raise ParentError(
            f"{folder.name} lacks {', '.join(missing[:3]) or 'weights'}: only *.safetensors are read.{hint}"
        )
    return names


def shards_of(folder: Path) -> list[str]:
    """Files that the index of a folder names. Raises ParentError."""
    try:
        values = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        return sorted({str(name) for name in values["weight_map"].values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ParentError(f"{INDEX} of {folder.name} is not an index of weights: fetch the parent again.") from None


def _header(folder: Path, file: str) -> list[StoredTensor]:
    try:
        with safe_open(folder / file, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - no mapping
            return [
                StoredTensor(file=file, name=name, shape=list(part.get_shape()), dtype=str(part.get_dtype()))
                for name, part in slices.items()
            ]
    except (SafetensorError, OSError) as error:
        raise ParentError(
            f"{file} is not a whole safetensors file ({first_line(error)}): fetch it again "
            "(a file of a few hundred bytes is a Git LFS pointer)."
        ) from error


def _assigned(everything: Iterable[StoredTensor], model: Model) -> tuple[dict[str, StoredTensor], list[StoredTensor]]:
    """Tensors by the model's names, and those that it has no name for."""
    tensors: dict[str, StoredTensor] = {}
    parts: dict[str, list[tuple[str, StoredTensor]]] = {}
    others = []
    for found in everything:
        name, pattern = model.place(found.name)
        if name not in model.shapes:
            others.append(found)
        elif pattern is not None and name not in tensors:
            parts.setdefault(name, []).append((pattern, found))
        elif name in tensors or name in parts:
            first = tensors[name] if name in tensors else parts[name][0][1]
            raise ParentError(
                f"the weights hold {name} twice, as {first.name} in {first.file} and as {found.name} in {found.file}: "
                "take one of them out."
            )
        else:
            tensors[name] = found
    return tensors | {name: _joined(name, found, model) for name, found in parts.items()}, others


def _joined(name: str, parts: list[tuple[str, StoredTensor]], model: Model) -> StoredTensor:
    """A tensor of the model that is made of several stored ones, in the order of the numbers in their names."""
    from transformers.core_model_loading import dot_natural_key

    ordered = tuple(sorted(parts, key=lambda part: dot_natural_key(part[1].name)))
    first = ordered[0][1]
    converter = next(one for one in model.converters if ordered[0][0] in one.source_patterns)
    joined = StoredTensor(file=first.file, name=name, shape=[], dtype=first.dtype, parts=ordered, converter=converter)
    try:
        shape = list(joined.read(lambda one: torch.empty(one.shape, device="meta", dtype=DTYPES.get(one.dtype))).shape)
        whole = len({part.dtype for _, part in ordered}) == 1
    except Exception:  # shapes that do not go together, or one that is missing
        whole = False
    if not whole:
        raise ParentError(
            f"the weights do not fit config.json: {name} cannot be made of {first.name} and the others like it, one is "
            "missing or has another shape or dtype. Fetch the parent again, or correct config.json."
        )
    return replace(joined, shape=shape)


def _tied(folder: Path, tensors: dict[str, StoredTensor], model: Model) -> dict[str, str]:
    """Treat tensors that the config ties as transformers does. Returns a sentence for each that is not tied."""
    notes = {}
    for name, shared in model.tied.items():
        if name in tensors and shared not in tensors:
            tensors[shared] = tensors.pop(name)
        elif name in tensors and not _same(folder, tensors[name], tensors[shared]):
            notes[name] = (
                f"{name} is another tensor than {shared}, so the two are not tied, whatever tie_word_embeddings says "
                "(transformers does the same)"
            )
    return notes


def _same(folder: Path, first: StoredTensor, second: StoredTensor) -> bool:
    if first.shape != second.shape:
        return False
    with safe_open(folder / first.file, framework="pt") as one, safe_open(folder / second.file, framework="pt") as two:
        a, b = one.get_tensor(first.name), two.get_tensor(second.name)
        return bool(torch.equal(a.to(torch.float32), b.to(torch.float32)))


def _check_names(
    folder: Path, tensors: Mapping[str, StoredTensor], others: Iterable[StoredTensor], model: Model
) -> None:
    """Raise ParentError for tensors that the model needs and the files lack, and for tensors within the model's layers
    that the model does not have.
    """
    missing = [name for name in model.shapes if name not in tensors and model.tied.get(name) not in tensors]
    if missing:
        what = f"{first_names(missing)} {'is' if len(missing) == 1 else 'are'} missing"
        raise ParentError(f"the weights do not fit config.json: {what}.{_advice(folder, missing, others)}")
    modules = {name.rpartition(".")[0] for name in model.shapes}
    layers = {match[0] for name in modules if (match := _LAYER.match(name))}
    misplaced = [
        found.name
        for found in others
        if not model.ignored.search(found.name)
        and _computes(model.name(found.name), found, modules, layers, model.base)
    ]
    if misplaced:
        raise ParentError(
            f"the weights hold {first_names(misplaced)}, for which a model of this config.json has no place: it would "
            "not compute what was trained. Set what is missing in config.json (such as attention_bias or "
            "model_type), merge adapters into the weights, or take the tensors out."
        )


def _computes(name: str, found: StoredTensor, modules: set[str], layers: set[str], base: str) -> bool:
    """Whether a tensor lies in a layer or module that the model computes with. A mask does not count: it holds
    booleans, or has more dimensions than any weight.
    """
    if found.dtype in ("BOOL", "U8") or len(found.shape) > 2:
        return False
    names = (name, f"{base}.{name}")
    inside = any(one.startswith(layer) for one in names for layer in layers)
    parents = {".".join(one.split(".")[:count]) for one in names for count in range(1, one.count(".") + 1)}
    return inside or bool(parents & modules)


def _advice(folder: Path, missing: list[str], others: Iterable[StoredTensor]) -> str:
    """A sentence on what to do about missing tensors."""
    if missing == ["lm_head.weight"]:
        return " Set tie_word_embeddings: true in config.json if the head is the embedding; otherwise fetch it again."
    used = set(weight_files(folder))
    for path in sorted(folder.glob("*.safetensors")):
        if path.name not in used and set(missing) & {found.name for found in _header(folder, path.name)}:
            return (
                f" {path.name} holds it, but {INDEX if used != {WEIGHTS} else WEIGHTS} is what is read: mend the index."
            )
    names = [found.name for found in others]
    seen = f" The files have {first_names(names)} instead." if names else ""
    return f"{seen} Fetch the parent again, or correct config.json."


def _check_tensor(name: str, found: StoredTensor, shape: list[int]) -> None:
    if found.shape != shape:
        raise ParentError(
            f"the weights do not fit config.json: {found.name} has shape {found.shape}, expected {shape}. All "
            "layers of a parent are alike: correct config.json, or take the checkpoint before it was pruned."
        )
    if found.dtype not in DTYPES:
        raise ParentError(
            f"{found.name} is stored as {found.dtype}: blocks are cut from float weights ({', '.join(DTYPES)}), take "
            "the float checkpoint."
        )


def _stored_in(tensors: Iterable[StoredTensor]) -> torch.dtype | None:
    """The dtype of the weights; None where they have several."""
    kinds = {DTYPES[found.dtype] for found in tensors}
    return kinds.pop() if len(kinds) == 1 else None


def _says_dtype(folder: Path) -> bool:
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return any(values.get(key) is not None for key in ("dtype", "torch_dtype"))
