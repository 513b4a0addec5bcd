"""Prepare a parent, wherever it comes from, as a Hugging Face folder in the workspace.

A parent may be a folder, a hub id, a GGUF file (also in an installed package), or a tiny model that is made for the
run. Afterwards each is `parent/<fingerprint>/` with config.json, safetensors and tokenizer, checked, and without paths
of this machine. Later stages do not ask where it came from.
"""

import gc
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from blocks.errors import ParentError, PuzzleError, first_line
from blocks.export_code.families_decilm import FAMILIES
from blocks.families import family_of
from blocks.files import sha256_of, write_text
from blocks.images import VISION
from blocks.library import Fetch, digest_of, is_whole, keep, remember
from blocks.records import ParentInfo, Ref, Value
from blocks.resources import precision_name
from profiles.schema import FolderParent, GgufParent, HubParent, PackageParent, ParentSource, TinyParent
from tasks.gguf.header import Header, read_header, stem_of, without_vocabulary
from tasks.gguf.parent_file import check_model, describe, dtype_of, parts_of
from tasks.gguf.tokenizer_reader import tokenizer_of
from tasks.inputs.companions import CARD, HUB_PATTERNS, companions, copy_companions, has_tokenizer, write_terms
from tasks.inputs.installed_packages import installed_file
from tasks.inputs.parent_weights import INDEX, WEIGHTS, Weights, check_finite, place_weights, shards_of, weights_of
from tasks.inputs.rotated import rotate, rotated_config
from tasks.inputs.tiny import byte_tokenizer, family_config, make_tiny_parent, training_texts
from tasks.inputs.vision import (
    PIXELS,
    brings_code,
    is_whole_model,
    place_whole,
    refuse_blind,
    text_values,
    without_code,
)
from tasks.running.progress import say

SEES = (
    "it sees: its text model is the parent, and its vision tower and projector are kept as they are. `puzzle export "
    "CHILD --format transformers` writes a whole model of text and images again"
)
VERSION = 2  # raise it when the same source would give another folder
HUB_FILES = ("config.json", CARD, *HUB_PATTERNS, INDEX, "adapter_config.json")  # all of the hub's but weights
# keys by which save_pretrained writes paths of this machine into JSON
_PATH_KEYS = ("_name_or_path", "name_or_path", "_model_name_or_path")
# keys that a prepared parent's config.json does not have: its code is never run, its weights are not quantised, and a
# forward pass returns what its caller asks for
_LEFT_OUT = ("auto_map", "quantization_config", "output_attentions", "output_hidden_states", "return_dict")


class Manifest(Value):
    """A prepared parent, and every file of its folder with its digest."""

    parent: ParentInfo
    files: tuple[Ref, ...]


def prepare_parent(
    source: ParentSource, workspace: Path, corpus_text: Callable[[], Iterable[str]] | None, must_see: bool = False
) -> ParentInfo:
    """Prepare a parent as `workspace/parent/<first 16 digits of its fingerprint>/`; one that is there is used again.

    `corpus_text` gives the documents that a tiny parent is trained on; other kinds do not read it. must_see: a text
    asks about images. A hub revision such as `main` is looked up once per workspace, and its commit is recorded. Raises
    ParentError.
    """
    texts = _texts_for(source, corpus_text)
    manifest = workspace / "parent" / f"{_source_key(source, texts)}.json"
    # a parent that brings code is read where it comes from, never taken from a store
    fetch: Fetch = "never" if getattr(source, "trust_remote_code", False) else "ahead"
    known = remember(manifest, Manifest, lambda value: list(value.files), workspace, fetch)
    if known is not None:
        return known.parent
    if must_see:
        check_sees(source, download=True)
    manifest.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=manifest.parent, prefix=".making-") as temporary:
        folder = Path(temporary) / "parent"
        folder.mkdir()
        revision, notes = _make(source, folder, texts)
        if source.rotate:
            notes = (*notes, rotate(folder))
        _clean(folder)
        check_parent(folder)
        made = _manifest(source, folder, revision, notes)
        _install(folder, workspace, made)
    for note in notes:
        say(f"parent {made.parent.name}: {note}")
    keep(manifest, made, made.files, workspace, fetch)
    return made.parent


def at_its_commit(source: ParentSource) -> ParentSource:
    """A hub parent with the commit that its revision names now, so that a branch that has moved is another parent.

    Where the hub does not answer, and for other sources, it is the source as it is.
    """
    if not isinstance(source, HubParent) or re.fullmatch(r"[0-9a-f]{40}", source.revision):
        return source
    from huggingface_hub import HfApi

    try:
        commit = HfApi().model_info(source.hub_id, revision=source.revision).sha
    except (OSError, ValueError) as error:
        say(f"the hub does not say what {source.hub_id} is now: what was fetched before is used ({first_line(error)})")
        return source
    return source.model_copy(update={"revision": commit})


def check_source(source: FolderParent | GgufParent) -> None:
    """Raise ParentError for a folder or file that is missing or cannot be a parent. Of weights, headers are read."""
    if isinstance(source, GgufParent):
        parts_of(_gguf_file(source))
    else:
        _checked_weights(_source_folder(source), source)


def check_sees(source: ParentSource, download: bool = False) -> None:
    """Raise ParentError for a parent that is known to have no vision tower, where a text asks about images."""
    refuse_blind(name_of(source), has_tower(source, download))


def has_tower(source: ParentSource, download: bool = False) -> bool | None:
    """Whether a parent is a whole model of text and images, by its config.json; None where that would have to be
    downloaded, and may not be. Raises ParentError.
    """
    if not isinstance(source, FolderParent | HubParent):
        return False
    found = _with_config(source, download)
    return None if found is None else is_whole_model(_read_json(found / "config.json"))


def write_config(source: ParentSource, folder: Path, download: bool = True) -> bool:
    """Write the config.json that `prepare_parent` would write, and no weights.

    Nothing is converted or trained. Of the hub, config.json alone is fetched; where nothing may be downloaded and the
    hub's cache has none, the answer is False. The headers of a folder's weights are checked against the config. Raises
    ParentError.
    """
    if isinstance(source, TinyParent):
        family_config(source, len(byte_tokenizer())).save_pretrained(folder)
    elif isinstance(source, PackageParent | GgufParent):
        _gguf_config(_gguf_file(source)).save_pretrained(folder)
    else:
        found = _with_config(source, download)
        if found is None:
            return False
        own = isinstance(source, FolderParent) and any(found.glob("*.safetensors"))
        _copy_config(found, folder, source, weights_of(found).settings if own else {})
    if source.rotate:
        write_text(folder / "config.json", json.dumps(rotated_config(_read_json(folder / "config.json"))))
    return True


def write_tokenizer(source: ParentSource, folder: Path) -> bool:
    """Write the tokenizer that `prepare_parent` would write; False for one that would have to be downloaded. Raises
    ParentError.
    """
    if isinstance(source, TinyParent):
        byte_tokenizer().save_pretrained(folder)
    elif isinstance(source, PackageParent | GgufParent):
        path = _gguf_file(source)
        try:
            tokenizer_of(read_header(path).fields).save_pretrained(folder)
        except (ValueError, KeyError) as error:
            raise ParentError(f"{path.name} cannot be read as GGUF: {first_line(error)}") from error
    else:
        found = _cached(source) if isinstance(source, HubParent) else _source_folder(source)
        if found is not None:
            copy_companions(found, folder)
    return has_tokenizer(folder)


def _with_config(source: FolderParent | HubParent, download: bool) -> Path | None:
    """A folder that holds the config.json of a parent. Of the hub, nothing else is fetched."""
    if isinstance(source, HubParent):
        return _download(source, config_only=True) if download else _cached(source)
    return _source_folder(source)


def _cached(source: HubParent) -> Path | None:
    """The folder in the hub's cache that holds the config of a parent, None where it was never fetched."""
    from huggingface_hub import try_to_load_from_cache

    known = try_to_load_from_cache(source.hub_id, "config.json", revision=source.revision)
    return Path(known).parent if isinstance(known, str) else None


def _copy_config(found: Path, folder: Path, asked: FolderParent | HubParent, settings: Mapping[str, Any]) -> None:
    values = _read_json(found / "config.json")
    _check_values(values, asked)
    if is_whole_model(values):
        kept = {key: value for key, value in values.items() if key not in (*_LEFT_OUT, *_PATH_KEYS)}
        write_text(folder / VISION / "config.json", json.dumps(kept, indent=2) + "\n")
        values = text_values(values)
    values = {key: value for key, value in {**values, **settings}.items() if key not in _LEFT_OUT}
    write_text(folder / "config.json", json.dumps(values))


def _gguf_config(path: Path) -> Any:
    """The config of a GGUF file, from its metadata. Its tensors are not read."""
    from transformers import AutoConfig

    try:
        with tempfile.TemporaryDirectory() as folder:
            header = without_vocabulary(path, Path(folder) / path.name, False, parts_of(path)[1:])
            _refuse_export(header, path)
            config: Any = AutoConfig.from_pretrained(folder, gguf_file=path.name)
    except PuzzleError:
        raise
    except Exception as error:  # nothing more precise is raised
        raise ParentError(f"{path.name} cannot be read as GGUF: {first_line(error)}") from error
    _forget_quantisation(config)
    config.dtype = dtype_of(header)
    if config.model_type == "gemma3_text":
        config.query_pre_attn_scalar = _gemma3_scale(config)
    check_config(config.to_dict())
    check_model(header, config, path.name)
    return config


def _refuse_export(header: Header, path: Path) -> None:
    """Raise ParentError for what `puzzle export` writes, whose layers may differ."""
    if header.fields.get("general.architecture") == "deci":
        raise ParentError(
            f"{path.name} has the architecture deci, which `puzzle export` writes: give the folder it was made of. "
            f"If its layers are all alike, `puzzle export {path} --format native --out FOLDER` makes a folder of it."
        )


def _gemma3_scale(config: Any) -> int:
    """What a query of Gemma 3 is divided by the square root of. A GGUF file does not say, and transformers takes 256
    whatever the size of a head. llama.cpp takes that size, but in the 27B model (62 layers) hidden_size / query heads.
    """
    whole: int = config.hidden_size // config.num_attention_heads
    return whole if config.num_hidden_layers == 62 else int(config.head_dim)


def _texts_for(source: ParentSource, corpus_text: Callable[[], Iterable[str]] | None) -> list[str]:
    if not isinstance(source, TinyParent) or source.train_steps == 0:
        return []
    if corpus_text is None:
        raise ParentError("a tiny parent is trained on text: hand over the corpus, or set parent.train_steps to 0.")
    return list(training_texts(corpus_text()))


def _source_key(source: ParentSource, texts: list[str]) -> str:
    """A digest of a source and of the state that it is in. Weights are not read, except those in packages."""
    content: Any = None
    if isinstance(source, FolderParent):
        folder = _source_folder(source)
        files = [path for path in [*folder.iterdir(), *folder.glob("*/*")] if path.is_file()]
        kept = [
            path for path in sorted(files) if path.parent == folder or path.relative_to(folder) in companions(folder)
        ]
        stats = {path.relative_to(folder).as_posix(): path.stat() for path in kept}
        content = [str(folder), {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}]
    elif isinstance(source, PackageParent):
        content = [sha256_of(part) for part in parts_of(_gguf_file(source))]
    elif isinstance(source, GgufParent):
        parts = [(part, part.stat()) for part in parts_of(_gguf_file(source))]
        content = [[str(part.resolve()), stat.st_size, stat.st_mtime_ns] for part, stat in parts]
    elif isinstance(source, TinyParent):
        content = [hashlib.sha256(text.encode()).hexdigest() for text in texts]
    asked = source.model_dump(mode="json", exclude=set() if source.rotate else {"rotate"})
    return digest_of(version=VERSION, source=asked, content=content)


def _make(source: ParentSource, folder: Path, texts: list[str]) -> tuple[str, tuple[str, ...]]:
    """Write the parent to `folder`. Returns its revision (commit or package version, "" if it has none) and sentences
    on what a person should know of it.
    """
    if isinstance(source, TinyParent):
        make_tiny_parent(source, folder, texts)
        return "", ()
    if isinstance(source, PackageParent | GgufParent):
        header = _convert_gguf(_gguf_file(source), folder)
        return _version_of(source), (describe(header),)
    if isinstance(source, HubParent):
        snapshot = _download(source)
        # blobs of the hub's cache never change, so a hard link is as good as a copy
        return snapshot.name, _copy_folder(snapshot, folder, source, _link)
    return "", _copy_folder(_source_folder(source), folder, source, shutil.copyfile)


def _version_of(source: PackageParent | GgufParent) -> str:
    with suppress(metadata.PackageNotFoundError):
        return metadata.version(source.package) if isinstance(source, PackageParent) else ""
    return ""


def name_of(source: ParentSource) -> str:
    """The name that the prepared parent will have."""
    return _names(source)[0]


def _names(source: ParentSource) -> tuple[str, str]:
    """Name of the parent, and a few words on where it came from, without paths of this machine."""
    if isinstance(source, TinyParent):
        return f"tiny-{source.family}", f"tiny, seed {source.seed}, {source.train_steps} steps"
    if isinstance(source, PackageParent):
        return stem_of(Path(source.file)), f"package {source.package}, {source.file}"
    if isinstance(source, GgufParent):
        return stem_of(Path(source.path)), f"gguf {Path(source.path).name}"
    if isinstance(source, HubParent):
        return source.hub_id, f"hub {source.hub_id}"
    name = _source_folder(source).name
    return name, f"folder {name}"


def _manifest(source: ParentSource, folder: Path, revision: str, notes: tuple[str, ...]) -> Manifest:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    digests = {path.relative_to(folder).as_posix(): sha256_of(path) for path in files}
    fingerprint = _fingerprint(folder, digests)
    name, origin = _names(source)
    origin += ", rotated" if source.rotate else ""
    target = f"parent/{fingerprint[:16]}"
    return Manifest(
        parent=ParentInfo(
            name=name, folder=target, fingerprint=fingerprint, source=origin, revision=revision, notes=notes
        ),
        files=tuple(Ref(path=f"{target}/{file}", sha256=digest) for file, digest in digests.items()),
    )


def _fingerprint(folder: Path, digests: dict[str, str]) -> str:
    """sha256 of config (without the version of transformers), weight files and tokenizer."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kept = {key: value for key, value in config.items() if key != "transformers_version"}
    kinds = (".safetensors", "tokenizer.json")
    files = {n: digest for n, digest in digests.items() if n.endswith(kinds) or n.startswith(f"{VISION}/")}
    text = json.dumps({"config": kept, "files": files}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _install(folder: Path, workspace: Path, made: Manifest) -> None:
    """Move a finished folder into place. A folder that is there and complete is kept: another run may be reading it."""
    target = workspace / made.parent.folder
    if all(is_whole(workspace, ref) for ref in made.files):
        return
    if target.exists():
        target.replace(folder.with_name("damaged"))  # removed together with the temporary folder
    folder.replace(target)


def _clean(folder: Path) -> None:
    """Take paths of this machine, and code that prepares images, out of the JSON files. Make the files that safetensors
    wrote readable for all.
    """
    for path in folder.iterdir():
        if path.is_file() and path.stat().st_nlink == 1:  # a hard link shares its mode with the hub's cache
            path.chmod(0o644)
    for name in ("config.json", "tokenizer_config.json"):
        path = folder / name
        if path.is_file():
            values = {key: value for key, value in _read_json(path).items() if key not in _PATH_KEYS}
            path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for path in (place / name for place in (folder, folder / VISION) for name in PIXELS):
        if path.is_file() and brings_code(values := _read_json(path)):
            path.write_text(json.dumps(without_code(values), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise ParentError(
            f"{path.parent} has no {path.name}: a parent is a Hugging Face folder with config.json, *.safetensors "
            "and a tokenizer."
        ) from None
    except ValueError as error:
        raise ParentError(f"{path} is not valid JSON ({error}): fetch the parent again.") from None
    if not isinstance(values, dict):
        raise ParentError(f"{path} holds no JSON object: fetch the parent again.")
    return values


def check_config(config: dict[str, Any], trust_remote_code: bool = False) -> None:
    """Raise ParentError for a config.json that no family here understands. No weights are needed for this."""
    model_type = config.get("model_type")
    if "nemotron-nas" in (model_type, config["text_config"].get("model_type") if is_whole_model(config) else None):
        raise ParentError(
            "this is a child that puzzle wrote, or another model of the nemotron-nas schema (model_type in its config)."
            " Its layers differ, and a parent's are all alike: name the parent that it was made from, with another "
            "budget for another child."
        )
    if model_type == "gemma3":
        raise ParentError(
            "this is a multimodal Gemma 3 (model_type gemma3, with a vision tower): only its text part can be a "
            "parent. Take a text-only checkpoint (model_type gemma3_text, such as gemma-3-1b) or save the text model."
        )
    text_type = text_values(config)["model_type"] if is_whole_model(config) else model_type
    if text_type not in FAMILIES:
        family_of(SimpleNamespace(model_type=text_type))  # raises, with the list of families
    if "auto_map" in config and not trust_remote_code:
        raise ParentError(
            "this parent brings Python code of its own (auto_map in its config), which is not run here: transformers' "
            f"{model_type} would compute it. If that is the same model, set trust_remote_code: true in the profile's "
            "parent; otherwise take a parent without code."
        )
    if config.get("quantization_config") is not None:
        raise ParentError(
            "this parent is quantised (quantization_config in its config): blocks are cut from float weights, take "
            "the float checkpoint."
        )


def check_parent(folder: Path) -> None:
    """Raise ParentError unless config, weights and tokenizer of a prepared folder fit together."""
    from transformers import AutoTokenizer

    try:
        AutoTokenizer.from_pretrained(folder, trust_remote_code=False)  # without it, transformers asks at the console
    except Exception as error:  # tokenizers raises nothing more precise
        raise ParentError(f"config or tokenizer of the parent cannot be loaded: {first_line(error)}") from error
    check_finite(folder, weights_of(folder))


def _source_folder(source: FolderParent) -> Path:
    folder = Path(source.path).expanduser().resolve()
    ggufs = [folder] if folder.is_file() else sorted(folder.glob("*.gguf")) if folder.is_dir() else []
    if any(path.suffix == ".gguf" for path in ggufs) and not (folder / "config.json").is_file():
        file = source.path if folder.is_file() else str(Path(source.path) / ggufs[0].name)
        raise ParentError(f"{source.path} is GGUF: write `parent: {{kind: gguf, path: {json.dumps(file)}}}`.")
    if folder.is_file():
        raise ParentError(f"{source.path} is a file: name the folder that holds config.json and *.safetensors.")
    if not folder.is_dir():
        raise ParentError(f"the parent's folder {source.path} does not exist (current folder: {Path.cwd()}).")
    return folder


def _copy_folder(
    source: Path, target: Path, asked: FolderParent | HubParent, place: Callable[[Path, Path], Any]
) -> tuple[str, ...]:
    """Copy tokenizer, card and the like, and bring weights to `target` with `place`; other files are left out. Returns
    notes.
    """
    weights = _checked_weights(source, asked)
    copy_companions(source, target)
    if (source / CARD).is_file():
        shutil.copyfile(source / CARD, target / CARD)
    whole = is_whole_model(_read_json(source / "config.json"))
    if whole:
        place_whole(source, target, weights, place)
    else:
        place_weights(source, target, weights, place)
    _copy_config(source, target, asked, weights.settings)
    return (*weights.notes, SEES) if whole else weights.notes


def _checked_weights(source: Path, asked: FolderParent | HubParent) -> Weights:
    """The weights of a folder, by their headers. Raises ParentError for a folder that cannot be a parent."""
    values, trust_remote_code = _read_json(source / "config.json"), asked.trust_remote_code
    _check_values(values, asked)
    if (source / "adapter_config.json").is_file():
        raise ParentError(
            f"{source.name} holds an adapter (adapter_config.json): merge it into the weights (peft's "
            "merge_and_unload, then save_pretrained), or take it out of the folder."
        )
    weights = weights_of(source)
    tokenizer = source / "tokenizer_config.json"
    if not trust_remote_code and tokenizer.is_file() and "auto_map" in _read_json(tokenizer):
        raise ParentError(
            "the parent's tokenizer brings Python code of its own (auto_map in tokenizer_config.json), which is not "
            "run here: set trust_remote_code: true if tokenizer.json does without it."
        )
    _refuse_pixel_code(source, values, trust_remote_code)
    if not has_tokenizer(source):
        raise ParentError(f"{source.name} has no tokenizer: add tokenizer.json or tokenizer.model.")
    return weights


def _check_values(values: dict[str, Any], asked: FolderParent | HubParent) -> None:
    """Raise ParentError for a config.json that cannot be the one of this parent."""
    check_config(values, asked.trust_remote_code)
    if asked.rotate and is_whole_model(values):
        raise ParentError(
            "parent.rotate turns the states between layers, and the projector of this parent, which is kept as it is, "
            "would not follow: leave rotate out."
        )


def _refuse_pixel_code(source: Path, values: dict[str, Any], trust_remote_code: bool) -> None:
    if trust_remote_code or not is_whole_model(values):
        return
    for name in PIXELS:
        if (source / name).is_file() and brings_code(_read_json(source / name)):
            raise ParentError(
                f"what prepares the parent's images brings Python code of its own (auto_map in {name}), which is not "
                "run here: set trust_remote_code: true if transformers' own class prepares the same pixels."
            )


def _link(source: Path, target: Path) -> None:
    """Link to the file itself (a hub snapshot is made of symbolic links), or copy it to another file system."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def _download(source: HubParent, config_only: bool = False) -> Path:
    """Fetch the files that are needed from the hub, the config alone first: it tells what cannot be a parent. Returns
    the snapshot's folder, which is named by its commit.
    """
    from huggingface_hub import snapshot_download

    def fetch(revision: str, names: Iterable[str]) -> Path:
        try:
            return Path(snapshot_download(source.hub_id, revision=revision, allow_patterns=list(names)))
        except (OSError, ValueError) as error:
            raise ParentError(
                f"{source.hub_id} at `{source.revision}` cannot be fetched from the hub: {first_line(error)} "
                "Check id, revision, network and, for a gated model, `hf auth login`."
            ) from error

    snapshot = fetch(source.revision, ["config.json"])
    if config_only:
        return snapshot
    _check_values(_read_json(snapshot / "config.json"), source)
    whole = fetch(snapshot.name, [*HUB_FILES, WEIGHTS])
    if (whole / WEIGHTS).is_file() or not (whole / INDEX).is_file():
        return whole
    return fetch(snapshot.name, [*HUB_FILES, *shards_of(whole)])


def _gguf_file(source: PackageParent | GgufParent) -> Path:
    if isinstance(source, PackageParent):
        return installed_file(source.package, source.file, ParentError)
    path = Path(source.path).expanduser()
    if path.is_dir():
        raise ParentError(f"{source.path} is a folder: name the .gguf file in it, of a split model the first.")
    if not path.is_file():
        raise ParentError(f"the parent's file {source.path} does not exist (current folder: {Path.cwd()}).")
    return path


def _convert_gguf(path: Path, folder: Path) -> Header:
    """Write the weights of a GGUF file (all parts of a split one) as float32 safetensors. Returns its header."""
    from transformers import AutoModelForCausalLM

    config = _gguf_config(path)
    short = folder.with_name(path.name)
    try:
        header = without_vocabulary(path, short, True, parts_of(path)[1:])
        with _without_collection():
            model: Any = AutoModelForCausalLM.from_pretrained(short.parent, gguf_file=short.name, dtype=torch.float32)
        short.unlink()
        tokenizer = tokenizer_of(header.fields)
    except PuzzleError:
        raise
    except Exception as error:  # tokenizers raises nothing more precise
        raise ParentError(f"{path.name} cannot be read as GGUF: {first_line(error)}") from error
    # the weights are plain float32 by now, but transformers still takes the model for a quantised one
    model.hf_quantizer, model.is_quantized = None, False
    _forget_quantisation(model.config)
    model.save_pretrained(folder, max_shard_size="1TB")
    tokenizer.save_pretrained(folder)
    write_terms(folder, header.fields)
    values = _read_json(folder / "config.json") | {"dtype": precision_name(config.dtype)}
    if config.model_type == "gemma3_text":
        values["query_pre_attn_scalar"] = config.query_pre_attn_scalar
    write_text(folder / "config.json", json.dumps(values, ensure_ascii=False))
    return header


def _forget_quantisation(config: Any) -> None:
    for name in ("quantization_config", "_pre_quantization_dtype"):
        with suppress(AttributeError):
            delattr(config, name)


@contextmanager
def _without_collection() -> Iterator[None]:
    """Switch garbage collection off meanwhile: millions of new strings would trigger it so often that it takes half of
    the time.
    """
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()
