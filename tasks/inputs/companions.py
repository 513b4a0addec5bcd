"""The files of a model's folder that are copied with its weights: tokenizer, templates, generation config, licence.

Also the terms (licence, language, base model) that the model's card names.
"""

import re
import shutil
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

CARD = "README.md"
# a model's folder has a tokenizer where one of these is there
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "tekken.json")
# what tokens depend on: these files are compared and put into fingerprints
TOKENIZER_FILES = (
    *TOKENIZERS,
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt", "merges.txt"),
)
HUB = "https://huggingface.co/"

# paths relative to the model's folder, in lower case
PATTERNS = (
    "generation_config.json",
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "tekken.json"),
    *("*.tiktoken", "spiece.model", "sentencepiece*", "*.bpe.model", "*.spm"),
    *("preprocessor_config.json", "processor_config.json"),
    *("chat_template*", "additional_chat_templates/*.jinja"),
    *("*license*", "*licence*", "licenses/*", "copying*", "copyright*", "notice*", "third_party_notices*"),
    *("*use_policy*", "*use-policy*", "*terms_of_use*", "*terms-of-use*"),
)
# the same for the hub, where capital letters matter
HUB_PATTERNS = tuple(re.sub("[a-z]", lambda found: f"[{found[0]}{found[0].upper()}]", one) for one in PATTERNS)
NOT = (".py", ".pyc", ".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack")
TERMS = ("license", "license_name", "license_link", "language", "base_model")


def is_companion(path: str) -> bool:
    """Whether a file of a model's folder, by its relative path, is copied with the weights. Code never is."""
    low = path.lower()
    if low.endswith(NOT):
        return False
    return any(fnmatchcase(low, pattern) and low.count("/") == pattern.count("/") for pattern in PATTERNS)


def has_tokenizer(folder: Path) -> bool:
    """Whether a tokenizer lies in a model's folder."""
    return any((folder / name).is_file() for name in TOKENIZERS)


def companions(folder: Path) -> list[Path]:
    """Relative paths of the files in a folder that are copied with the weights."""
    found = [path.relative_to(folder) for path in [*folder.glob("*"), *folder.glob("*/*")] if path.is_file()]
    return sorted(path for path in found if is_companion(path.as_posix()))


def copy_companions(source: Path, target: Path) -> None:
    """Copy the files that go with the weights from one model's folder to another."""
    for path in companions(source):
        (target / path).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / path, target / path)


def terms_of(folder: Path) -> dict[str, Any]:
    """Licence, language and base model, as the card in a folder names them; empty where it names none."""
    card = folder / CARD
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    lines = text.removeprefix("\ufeff").splitlines()
    if not lines or lines[0].strip() != "---":
        return {}
    end = next((at for at, line in enumerate(lines[1:], start=1) if line.strip() == "---"), None)
    try:
        values = yaml.safe_load("\n".join(lines[1:end])) if end else {}
    except yaml.YAMLError:
        return {}
    return {key: values[key] for key in TERMS if values.get(key)} if isinstance(values, dict) else {}


def write_terms(folder: Path, fields: Mapping[str, Any]) -> None:
    """Write the card of a parent that came as a GGUF file: the terms that the file's fields name, if they name any."""
    keys = {"license": "license", "license_name": "license.name", "license_link": "license.link"}
    terms = {key: fields.get(f"general.{name}") for key, name in (keys | {"language": "languages"}).items()}
    url = str(fields.get("general.base_model.0.repo_url") or "")
    if url.startswith(HUB):
        terms["base_model"] = url.removeprefix(HUB)
    found = {key: value for key, value in terms.items() if value}
    if found:
        text = yaml.safe_dump(found, sort_keys=False, allow_unicode=True)
        (folder / CARD).write_text(f"---\n{text}---\n", encoding="utf-8")
