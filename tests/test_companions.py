"""What travels beside a parent's weights into its child: templates, licences, tokenizers; the card's terms."""

import json
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml

from blocks.compute import HOST
from blocks.records import ParentInfo
from profiles.schema import FolderParent
from tasks.distill.record import open_parent
from tasks.export.folder import export_child, model_card
from tasks.inputs.companions import HUB_PATTERNS, companions, is_companion, terms_of, write_terms
from tasks.inputs.parent import prepare_parent
from tests.test_export import CORPUS, PARENT, child_config
from tests.test_modeling import mixed_blocks
from tests.tiny import tiny_parent

TRAVEL = [
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates/tool_use.jinja"),
    *(
        "additional_chat_templates/rag.jinja",
        "LICENSE",
        "LICENSE.md",
        "license.txt",
        "LICENCE",
        "COPYING",
        "NOTICE.txt",
    ),
    *("Notice", "USE_POLICY.md", "LICENSES/Apache-2.0.txt", "MODEL_LICENSE", "Gemma_Terms_of_Use.md"),
    *("generation_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt", "vocab.json"),
    *("tokenizer.model", "tokenizer.model.v3", "qwen.tiktoken", "tekken.json", "preprocessor_config.json"),
]
STAY = [
    *("modeling_own.py", "tokenization_own.py", "license.py", "tokenizer.py", "notes.txt", "training_args.bin"),
    *("optimizer.pt", "pytorch_model.bin", "tokenizer.gguf", "onnx/LICENSE", "data/vocab.json", "README.md"),
    *("additional_chat_templates/notes.txt", "additional_chat_templates/run.py", ".git/NOTICE.pack"),
]
CARD = """---
license: other
license_name: llama-9
license_link: LICENSE
language: [en, de]
base_model: someone/base
library_name: mlx
tags: [a]
---
# The parent
"""


def put(folder: Path, names: list[str]) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if not (folder / name).exists():
            (folder / name).write_text("{}" if name.endswith(".json") else f"text of {name}")


@pytest.mark.parametrize("name", TRAVEL)
def test_what_belongs_to_the_use_travels(name: str) -> None:
    assert is_companion(name)
    assert any(fnmatch(name, pattern) for pattern in HUB_PATTERNS), "nor is it left on the hub"


@pytest.mark.parametrize("name", STAY)
def test_weights_code_and_notes_stay(name: str) -> None:
    assert not is_companion(name)


def test_all_of_it_reaches_the_child(tmp_path: Path) -> None:
    source, work = tmp_path / "source", tmp_path / "work"
    tiny_parent(source)
    put(source, TRAVEL + STAY)
    (source / "README.md").write_text(CARD)
    info = prepare_parent(FolderParent(path=str(source)), work, None)
    reader = open_parent(work / info.folder, HOST)
    child = export_child(reader.model(), info, work, work / "child", "# own card\n")
    assert {path.as_posix() for path in companions(child)} >= set(TRAVEL)
    for name in TRAVEL:
        assert (child / name).read_bytes() == (source / name).read_bytes()
    assert not [name for name in STAY if name != "README.md" and (child / name).exists()]
    assert (child / "README.md").read_text() == "# own card\n"
    assert terms_of(reader.folder)["license"] == "other"
    again = export_child(
        reader.model(), ParentInfo(**info.model_dump() | {"folder": "child"}), work, work / "x", "# y\n"
    )
    assert {path.as_posix() for path in companions(again)} >= set(TRAVEL)  # a child exported from a child

    (source / "additional_chat_templates" / "tool_use.jinja").write_text("another")
    other = prepare_parent(FolderParent(path=str(source)), work, None)
    template = work / other.folder / "additional_chat_templates" / "tool_use.jinja"
    assert template.read_text() == "another", "a template that was changed is seen"


def front_matter(text: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(text.split("---\n")[1])
    return found


@pytest.mark.parametrize(
    ("card", "terms"),
    [
        (CARD, {"license": "other", "license_name": "llama-9", "license_link": "LICENSE", "language": ["en", "de"]}),
        (
            "\ufeff---\r\nlicense: apache-2.0\r\nlanguage: en\r\n---\r\ntext",
            {"license": "apache-2.0", "language": "en"},
        ),
        ("---\nlicense: [mit, cc-by-4.0]\n---", {"license": ["mit", "cc-by-4.0"]}),
        ("# no front matter\n---\nlicense: mit\n---\n", {}),
        ("---\nlicense: [broken\n---\n", {}),
        ("---\nlicense: mit\nnever closed", {}),
        ("---\n- a list\n---\n", {}),
        ("", {}),
    ],
)
def test_the_childs_card_carries_the_parents_terms(card: str, terms: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(card.encode())
    found = terms_of(tmp_path)
    assert {key: value for key, value in found.items() if key != "base_model"} == terms
    config = child_config(mixed_blocks())
    text = model_card(PARENT, CORPUS, config, "", "x", "The weights are bfloat16.", found)
    fields = front_matter(text)
    assert {key: fields[key] for key in terms} == terms
    assert fields["library_name"] == "transformers" and fields["tags"] == ["puzzle"]
    assert fields.get("base_model") == ("someone/base" if card == CARD else None)
    assert ("no licence" in text) == ("license" not in terms)
    assert "The weights are bfloat16." in text
    hub = PARENT.model_copy(update={"name": "owner/parent", "source": "hub owner/parent"})
    assert front_matter(model_card(hub, CORPUS, config, "", "x", "", found))["base_model"] == "owner/parent"


def test_a_parent_without_a_card_gives_no_terms(tmp_path: Path) -> None:
    assert terms_of(tmp_path) == {}
    (tmp_path / "config.json").write_text(json.dumps({}))
    assert companions(tmp_path) == []


@pytest.mark.parametrize(
    ("fields", "terms"),
    [
        ({"license": "apache-2.0", "languages": ["en"]}, {"license": "apache-2.0", "language": ["en"]}),
        (
            {"license": "other", "license.name": "own", "license.link": "https://a.b", "base_model.0.repo_url": "x"},
            {"license": "other", "license_name": "own", "license_link": "https://a.b"},
        ),
        (
            {"license": "mit", "base_model.0.repo_url": "https://huggingface.co/a/b"},
            {"license": "mit", "base_model": "a/b"},
        ),
        ({"name": "no terms"}, {}),
    ],
)
def test_the_terms_of_a_gguf_parent_are_its_fields(fields: dict[str, Any], terms: Any, tmp_path: Path) -> None:
    write_terms(tmp_path, {f"general.{name}": value for name, value in fields.items()})
    assert terms_of(tmp_path) == terms
    assert (tmp_path / "README.md").exists() == bool(terms)
