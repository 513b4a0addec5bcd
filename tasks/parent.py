"""Any parent -> one Hugging Face folder inside the workspace, known by its content.

Folder, hub id, GGUF in an installed package, or made on the spot: afterwards all are `parent/<fingerprint>/` with
config.json, safetensors and tokenizer, checked, and free of paths. Nobody downstream asks where a parent came from.
"""

import gc
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from blocks.errors import ParentError
from blocks.families import FAMILIES, family_of
from blocks.files import sha256_of, write_text
from blocks.library import Fetch, digest_of, is_whole, keep, remember
from blocks.records import ParentInfo, Ref, Value
from profiles.schema import FolderParent, HubParent, PackageParent, ParentSource, TinyParent
from tasks.companions import CARD, HUB_PATTERNS, companions, copy_companions, write_terms
from tasks.corpus import TOKENIZER_FILES, installed_file
from tasks.serving.gguf_header import without_vocabulary
from tasks.serving.gguf_tokenizer import split_of
from tasks.tiny import byte_tokenizer, family_config, make_tiny_parent, training_texts

VERSION = 2  # raise it when the same source would give another folder
INDEX = "model.safetensors.index.json"
SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
    INDEX,
    *TOKENIZER_FILES,
    CARD,
    *HUB_PATTERNS,
)
# what save_pretrained leaves in JSON of the machine it ran on
_PATH_KEYS = ("_name_or_path", "name_or_path", "_model_name_or_path")


class Manifest(Value):
    """What a source became: the parent, and every file of its folder by digest."""

    parent: ParentInfo
    files: tuple[Ref, ...]


def prepare_parent(
    source: ParentSource, workspace: Path, corpus_text: Callable[[], Iterable[str]] | None
) -> ParentInfo:
    """Normalise a parent to `workspace/parent/<first 16 digits of its fingerprint>/`; idempotent and atomic.

    `corpus_text` gives the documents a tiny parent is trained on; other kinds do not read it. A hub revision such as
    `main` is resolved once per workspace, the commit it stood for is recorded. Raises ParentError.
    """
    texts = _texts_for(source, corpus_text)
    manifest = workspace / "parent" / f"{_source_key(source, texts)}.json"
    # code that comes with a parent is read where it comes from, never taken from a store
    fetch: Fetch = "never" if getattr(source, "trust_remote_code", False) else "ahead"
    known = remember(manifest, Manifest, lambda value: list(value.files), workspace, fetch)
    if known is not None:
        return known.parent
    manifest.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=manifest.parent, prefix=".making-") as temporary:
        folder = Path(temporary) / "parent"
        folder.mkdir()
        revision = _make(source, folder, texts)
        _clean(folder)
        check_parent(folder)
        made = _manifest(source, folder, revision)
        _install(folder, workspace, made)
    keep(manifest, made, made.files, workspace, fetch)
    return made.parent


def write_config(source: ParentSource, folder: Path) -> None:
    """The config.json that `prepare_parent` would leave, without weights: nothing is converted, trained or downloaded
    but that file. Raises ParentError.
    """
    if isinstance(source, TinyParent):
        family_config(source, len(byte_tokenizer())).save_pretrained(folder)
    elif isinstance(source, PackageParent):
        _gguf_config(_gguf_file(source)).save_pretrained(folder)
    else:
        found = _download(source, config_only=True) if isinstance(source, HubParent) else _source_folder(source)
        values = _read_json(found / "config.json")
        check_config(values, source.trust_remote_code)
        write_text(folder / "config.json", json.dumps(values))


def _gguf_config(path: Path) -> Any:
    """The config that the metadata of a GGUF file stands for; its tensors are not read."""
    from transformers import AutoConfig

    try:
        with tempfile.TemporaryDirectory() as folder:
            without_vocabulary(path, Path(folder) / path.name, weights=False)
            config: Any = AutoConfig.from_pretrained(folder, gguf_file=path.name)
    except Exception as error:  # nothing more precise is raised
        raise ParentError(f"{path.name} cannot be read as GGUF: {_first_line(error)}") from error
    for name in ("quantization_config", "_pre_quantization_dtype"):
        with suppress(AttributeError):
            delattr(config, name)
    return config


def _texts_for(source: ParentSource, corpus_text: Callable[[], Iterable[str]] | None) -> list[str]:
    if not isinstance(source, TinyParent) or source.train_steps == 0:
        return []
    if corpus_text is None:
        raise ParentError("a tiny parent is trained on text: hand over the corpus, or set parent.train_steps to 0.")
    return list(training_texts(corpus_text()))


def _source_key(source: ParentSource, texts: list[str]) -> str:
    """Digest of a source and of the state it is in, without reading its weights."""
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
        content = sha256_of(_gguf_file(source))
    elif isinstance(source, TinyParent):
        content = [hashlib.sha256(text.encode()).hexdigest() for text in texts]
    return digest_of(version=VERSION, source=source, content=content)


def _make(source: ParentSource, folder: Path, texts: list[str]) -> str:
    """Write the parent to `folder`; returns its revision (commit or package version), "" if it has none."""
    if isinstance(source, TinyParent):
        make_tiny_parent(source, folder, texts)
        return ""
    if isinstance(source, PackageParent):
        return _convert_gguf(_gguf_file(source), folder, source.package)
    if isinstance(source, HubParent):
        snapshot = _download(source)
        # blobs of the hub's cache never change, so a hard link is as good as a copy
        _copy_folder(snapshot, folder, source.trust_remote_code, _link)
        return snapshot.name
    _copy_folder(_source_folder(source), folder, source.trust_remote_code, shutil.copyfile)
    return ""


def name_of(source: ParentSource) -> str:
    """The name that the prepared parent will have."""
    return _names(source)[0]


def _names(source: ParentSource) -> tuple[str, str]:
    """Name of the parent, and a word on where it came from; no paths of this machine."""
    if isinstance(source, TinyParent):
        return f"tiny-{source.family}", f"tiny, seed {source.seed}, {source.train_steps} steps"
    if isinstance(source, PackageParent):
        return Path(source.file).stem, f"package {source.package}, {source.file}"
    if isinstance(source, HubParent):
        return source.hub_id, f"hub {source.hub_id}"
    name = _source_folder(source).name
    return name, f"folder {name}"


def _manifest(source: ParentSource, folder: Path, revision: str) -> Manifest:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    digests = {path.relative_to(folder).as_posix(): sha256_of(path) for path in files}
    fingerprint = _fingerprint(folder, digests)
    name, origin = _names(source)
    target = f"parent/{fingerprint[:16]}"
    return Manifest(
        parent=ParentInfo(name=name, folder=target, fingerprint=fingerprint, source=origin, revision=revision),
        files=tuple(Ref(path=f"{target}/{file}", sha256=digest) for file, digest in digests.items()),
    )


def _fingerprint(folder: Path, digests: dict[str, str]) -> str:
    """sha256 over config (without paths and library version), weight files and tokenizer."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kept = {key: value for key, value in config.items() if key != "transformers_version"}
    files = {n: digest for n, digest in digests.items() if n.endswith(".safetensors") or n == "tokenizer.json"}
    text = json.dumps({"config": kept, "files": files}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _install(folder: Path, workspace: Path, made: Manifest) -> None:
    """Move a finished folder into place. One that is whole is kept: another run may be reading it."""
    target = workspace / made.parent.folder
    if all(is_whole(workspace, ref) for ref in made.files):
        return
    if target.exists():
        target.replace(folder.with_name("damaged"))  # removed together with the temporary folder
    folder.replace(target)


def _clean(folder: Path) -> None:
    """Take paths of this machine out of the JSON files; make what safetensors wrote readable like the rest."""
    for path in folder.iterdir():
        if path.is_file() and path.stat().st_nlink == 1:  # a hard link shares its mode with the hub's cache
            path.chmod(0o644)
    for name in ("config.json", "tokenizer_config.json"):
        path = folder / name
        if path.is_file():
            values = {key: value for key, value in _read_json(path).items() if key not in _PATH_KEYS}
            path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


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
    """ParentError for a config.json that no family here understands, judged before any weights are fetched."""
    model_type = config.get("model_type")
    if model_type == "gemma3":
        raise ParentError(
            "this is a multimodal Gemma 3 (model_type gemma3, with a vision tower): only its text part can be a "
            "parent. Take a text-only checkpoint (model_type gemma3_text, such as gemma-3-1b) or save the text model."
        )
    if "auto_map" in config and not trust_remote_code:
        raise ParentError(
            "this parent wants to run Python code of its own (auto_map in its config): set trust_remote_code: true in "
            "the profile's parent if you have read that code, or take a parent that transformers knows."
        )
    if "quantization_config" in config:
        raise ParentError(
            "this parent is quantised (quantization_config in its config): blocks are cut from float weights, take "
            "the float checkpoint."
        )
    if model_type not in FAMILIES:
        family_of(SimpleNamespace(model_type=model_type))  # raises, with the list of families


def check_parent(folder: Path) -> None:
    """ParentError unless config, weights and tokenizer of a normalised folder are usable together."""
    from transformers import AutoConfig, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(folder)
        AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # tokenizers raises nothing more precise
        raise ParentError(f"config or tokenizer of the parent cannot be loaded: {_first_line(error)}") from error
    family_of(config)
    shapes = _shapes(folder)
    expected = {
        "model.embed_tokens.weight": [config.vocab_size, config.hidden_size],
        f"model.layers.{config.num_hidden_layers - 1}.mlp.down_proj.weight": [
            config.hidden_size,
            config.intermediate_size,
        ],
    }
    for name, shape in expected.items():
        if shapes.get(name) != shape:
            found = f"has shape {shapes[name]}" if name in shapes else "is missing"
            raise ParentError(f"the weights do not fit config.json: {name} {found}, expected {shape}.")


def _shapes(folder: Path) -> dict[str, list[int]]:
    shapes: dict[str, list[int]] = {}
    for name in weight_files(folder):
        try:
            with safe_open(folder / name, framework="pt") as file:
                shapes |= {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118 - no mapping
        except (SafetensorError, OSError) as error:
            raise ParentError(
                f"{name} is not a whole safetensors file ({_first_line(error)}): fetch it again "
                "(a file of a few hundred bytes is a Git LFS pointer)."
            ) from error
    return shapes


def weight_files(folder: Path) -> list[str]:
    """Names of the safetensors files that make the model: the shards of the index, or model.safetensors.

    Others (adapters, a second format of the same weights) are not the model's. Raises ParentError.
    """
    names = ["model.safetensors"]
    if (folder / INDEX).is_file():
        names = sorted({str(name) for name in _read_json(folder / INDEX).get("weight_map", {}).values()})
    missing = [name for name in names if Path(name).name != name or not (folder / name).is_file()]
    if not names or missing:
        there = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".gguf"))
        hint = f" There is {', '.join(there[:3])}: load it with transformers and save_pretrained it." if there else ""
        raise ParentError(
            f"{folder.name} lacks {', '.join(missing[:3]) or 'weights'}: only *.safetensors are read.{hint}"
        )
    return names


def _source_folder(source: FolderParent) -> Path:
    folder = Path(source.path).expanduser().resolve()
    if not folder.is_dir():
        raise ParentError(f"the parent's folder {source.path} does not exist (current folder: {Path.cwd()}).")
    return folder


def _copy_folder(source: Path, target: Path, trust_remote_code: bool, place: Callable[[Path, Path], Any]) -> None:
    """Small files are copied, weights `place`d; whatever else lies in the folder stays there."""
    check_config(_read_json(source / "config.json"), trust_remote_code)
    weights = weight_files(source)
    small = [source / name for name in SMALL_FILES if (source / name).is_file()]
    tokenizer = source / "tokenizer_config.json"
    if not trust_remote_code and tokenizer.is_file() and "auto_map" in _read_json(tokenizer):
        raise ParentError("the parent's tokenizer wants to run Python code of its own: set trust_remote_code: true.")
    if not {"tokenizer.json", "tokenizer.model", "vocab.json"} & {path.name for path in small}:
        raise ParentError(f"{source.name} has no tokenizer: add tokenizer.json or tokenizer.model.")
    copy_companions(source, target)
    for path in [*small, *(sorted(source.glob("*.py")) if trust_remote_code else [])]:
        shutil.copyfile(path, target / path.name)
    for name in weights:
        place(source / name, target / name)


def _link(source: Path, target: Path) -> None:
    """Hard link to the file itself (a hub snapshot is made of symlinks); a copy on another file system."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def _download(source: HubParent, config_only: bool = False) -> Path:
    """The hub's snapshot folder, named by its commit; only the files that are needed."""
    from huggingface_hub import snapshot_download

    def fetch(revision: str, names: Iterable[str]) -> Path:
        try:
            return Path(snapshot_download(source.hub_id, revision=revision, allow_patterns=list(names)))
        except (OSError, ValueError) as error:
            raise ParentError(
                f"{source.hub_id} at `{source.revision}` cannot be fetched from the hub: {_first_line(error)} "
                "Check id, revision, network and, for a gated model, `hf auth login`."
            ) from error

    if config_only:
        return fetch(source.revision, ["config.json"])
    code = ["*.py"] if source.trust_remote_code else []
    snapshot = fetch(source.revision, [*SMALL_FILES, *code])
    check_config(_read_json(snapshot / "config.json"), source.trust_remote_code)
    weights = ["model.safetensors"]
    if (snapshot / INDEX).is_file():
        weights = sorted(set(_read_json(snapshot / INDEX).get("weight_map", {}).values()))
    return fetch(snapshot.name, [*SMALL_FILES, *code, *weights])


def _gguf_file(source: PackageParent) -> Path:
    return installed_file(source.package, source.file, ParentError)


def _convert_gguf(path: Path, folder: Path, package: str) -> str:
    """De-quantise a GGUF file to float32 safetensors; returns the version of its package."""
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    short = folder.with_name(path.name)
    try:
        fields = without_vocabulary(path, short, weights=True).fields
        with _without_collection():
            model: Any = AutoModelForCausalLM.from_pretrained(short.parent, gguf_file=short.name, dtype=torch.float32)
        short.unlink()
        tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(str(path.parent), gguf_file=path.name)
        if fields.get("tokenizer.ggml.model") == "gpt2":
            tokenizer.backend_tokenizer.pre_tokenizer = split_of(fields.get("tokenizer.ggml.pre", "default"))
    except Exception as error:  # tokenizers raises nothing more precise
        raise ParentError(f"{path.name} cannot be read as GGUF: {_first_line(error)}") from error
    # the weights are plain float32 by now, but transformers still takes the model for a quantised one
    model.hf_quantizer, model.is_quantized = None, False
    for name in ("quantization_config", "_pre_quantization_dtype"):
        with suppress(AttributeError):
            delattr(model.config, name)
    check_config(model.config.to_dict())
    model.save_pretrained(folder, max_shard_size="1TB")
    tokenizer.save_pretrained(folder)
    write_terms(folder, fields)
    with suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return ""


@contextmanager
def _without_collection() -> Iterator[None]:
    """No garbage is looked for meanwhile: millions of names in tables set it off again and again (half of the time)."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
