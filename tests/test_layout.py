"""The price of generic package names, and of docs that name files: paid in one place (docs/adr/0001)."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import blocks.kinds
from blocks.export_code.modeling_decilm import DeciLMDecoderLayer
from blocks.kinds import KINDS, kind_of, kinds, parse_label
from blocks.records import SUBBLOCKS
from tests.test_modeling import NO_OP, tiny_parent

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("flows", "tasks", "blocks", "profiles")
# the log and the list of changes tell what was true on their day: files that they name may have moved since
DATED = {"CHANGELOG.md", "log.md"}
DOCS = sorted(path for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")] if path.name not in DATED)
# `blocks/parent.py`, `profiles/*.yaml`, `Makefile`; not `a/b` of prose, nor what a run makes
REPO_PATH = re.compile(
    r"^(?:\.ci|benchmarks|blocks|docs|flows|profiles|tasks|tests)/[\w./*-]*$|^[\w-]+\.(?:md|toml|txt)$"
)


def modules(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


@pytest.mark.parametrize("name", PACKAGES)
def test_top_level_package_is_this_repository(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__file__ and Path(module.__file__).is_relative_to(ROOT), (
        f"another distribution brought a package named {name}: uninstall it and run make setup"
    )


@pytest.mark.parametrize("path", modules("flows", "tasks"), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_flow_or_task_bears_a_stdlib_name(path: Path) -> None:
    # Prefect's loader leaves flows/ in front of sys.path: flows/profile.py would be everybody's `profile`
    assert path.stem not in sys.stdlib_module_names


FLOW_FILES = [path for path in modules("flows") if "@flow" in path.read_text()]


@pytest.mark.parametrize("path", FLOW_FILES, ids=lambda path: path.name)
def test_no_class_is_defined_in_a_flow_file(path: Path) -> None:
    # Prefect runs a file that defines a flow under another module name: a worker could not unpickle its classes
    classes = [node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef)]
    assert classes == []


@pytest.mark.parametrize("path", DOCS, ids=lambda path: str(path.relative_to(ROOT)))
def test_paths_named_in_the_docs_exist(path: Path) -> None:
    prose = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    named = [name for name in re.findall(r"`([^`\n]+)`", prose) if REPO_PATH.match(name)]
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", prose)
    missing = [name for name in named if not any(ROOT.glob(name.rstrip("/")))]
    missing += [link for link in links if not (path.parent / link).exists()]
    assert missing == []


def test_documents_named_in_the_code_exist() -> None:
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    missing = []
    for name in files:
        if name.endswith((".md", ".png", ".txt")):
            continue
        text = (ROOT / name).read_text(errors="ignore")
        named = re.findall(r"(?<![\w/'-])(?<!ggml's )docs/[\w/-]+(?:\.md|\.conf|(?=[ ),.;:]))", text)
        missing += [f"{name}: {page}" for page in named if not any(ROOT.glob(f"{page}*"))]
    assert missing == []


# what is loaded, and what must not be by then: each in one process after those above it
LIGHT = (
    ("flows.cli", {"torch", "transformers", "matplotlib", "mlflow", "prefect"}),  # `puzzle --help`
    ("tasks.operating.tracking", {"prefect", "mlflow", "transformers", "matplotlib"}),  # `puzzle sweep` asks it
    (
        "tasks.planning.plan, tasks.planning.machine",  # `puzzle plan`
        {"transformers.modeling_utils", "torch._dynamo", "matplotlib", "mlflow", "prefect", "cvxpy"},
    ),
    ("tasks.probe.words", {"tasks.probe.probe"}),  # pages and MLflow show a probe, and make none
    ("blocks.library, blocks.kinds, profiles.schema", {"prefect", "mlflow"}),
)


def test_what_loads_without_heavy_packages() -> None:
    """Seconds before a command's first word."""
    code = "import sys\n" + "".join(
        f"import {loaded}\nprint(sorted({unwanted} & set(sys.modules)))\n" for loaded, unwanted in LIGHT
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.stdout.splitlines() == ["[]"] * len(LIGHT), run.stdout + run.stderr


def test_every_kind_has_a_name_of_its_own_and_every_file_of_kinds_is_in_the_table() -> None:
    names = [(kind.subblock, kind.name) for kind in KINDS]
    assert len(set(names)) == len(names)
    files = {
        f"blocks.{room}.{path.stem}" for room in ("attention", "ffn") for path in (ROOT / "blocks" / room).glob("*.py")
    }
    assert {type(kind).__module__ for kind in KINDS} == {name for name in files if not name.endswith("__init__")}


def test_every_kind_builds_what_its_labels_say() -> None:
    config = tiny_parent("gemma3_text").config
    for subblock in SUBBLOCKS:
        for label in [label for kind in kinds(subblock) for label in kind.examples(config)]:
            variant = parse_label(subblock, label, config)
            assert variant.label == label
            entry = kind_of(variant).block_entry(variant, config)
            block = {"attention": NO_OP, "ffn": NO_OP, subblock: entry}
            layer = DeciLMDecoderLayer(config, "gemma3_text", block, 0)
            assert any(True for _ in layer.parameters()) != entry["no_op"], label


GUIDE_CHECK = """
from types import SimpleNamespace
import torch
import blocks.kinds
from blocks.kinds import kind_of, parse_label
from tests.test_modeling import ffn, parents_twin, tiny_child, tiny_parent

blocks.kinds.KINDS = (*blocks.kinds.KINDS, FirstChannels())
parent = parents_twin(tiny_parent("llama"))
variant = parse_label("ffn", "first24", parent.config)
entries = parent.config.block_configs
entries[0]["ffn"] = kind_of(variant).block_entry(variant, parent.config)
layer = tiny_child(tiny_parent("llama"), entries).model.layers[0]
whole = parent.model.layers[0].mlp.down_proj.weight
inputs = torch.randn(99, 48) @ torch.randn(48, 48)
context = SimpleNamespace(
    parent_layer=parent.model.layers[0], statistics={"ffn_gram": inputs.T @ inputs}, ridge=1e-3
)
losses = []
for start in (kind_of(variant).initialise, kind_of(variant).closed_form):
    start(variant, layer, context)
    losses.append((inputs[:, :24] @ layer.mlp.down_proj.weight.T - inputs @ whole.T).square().sum())
assert variant.label == "first24"
assert (layer.mlp.up_proj.weight == parent.model.layers[0].mlp.up_proj.weight[:24]).all()
assert losses[1] < 0.9 * losses[0], losses
"""


def test_the_example_kind_of_the_guide_works(monkeypatch: pytest.MonkeyPatch) -> None:
    guide = (ROOT / "docs" / "how-to" / "add-a-variant-kind.md").read_text()
    example = re.search(r"^```python\n(.*?)^```", guide, flags=re.MULTILINE | re.DOTALL)
    assert example
    monkeypatch.setattr(blocks.kinds, "KINDS", KINDS)  # the check adds the kind to the table; afterwards it is gone
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        exec(compile(example[1] + GUIDE_CHECK, "the guide", "exec"), {"__name__": "guide"})


def test_every_room_says_what_it_is_for_and_is_in_the_readme() -> None:
    loose = [path.name for path in (ROOT / "tasks").glob("*.py") if path.name != "__init__.py"]
    assert loose == []
    for room in sorted((ROOT / "tasks").iterdir()):
        if room.is_dir() and any(room.glob("*.py")):
            docstring = ast.get_docstring(ast.parse((room / "__init__.py").read_text()))
            assert docstring and len(docstring.split()) >= 5, room.name
            assert f"\n    tasks/{room.name}/ " in (ROOT / "README.md").read_text(), (
                f"README.md does not list {room.name}"
            )
