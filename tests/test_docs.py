"""The documents cannot rot silently: commands run, commands and profiles that are named exist."""

import gc
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch

from flows import cli
from profiles.load import load_profile, shipped_profiles
from tests.test_nvlabs import puzzle

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def console_commands() -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        for block in re.findall(r"```console\n(.*?)```", page.read_text(), flags=re.DOTALL):
            found += [(page.name, line[2:]) for line in block.splitlines() if line.startswith("$ .venv/bin/")]
    return found


@pytest.mark.parametrize(("page", "command"), console_commands())
def test_commands_of_the_documents_run(
    page: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The README's in a process of its own, as a reader starts it; another puzzle's start takes five seconds each."""
    words = shlex.split(command)
    if words[1] == "optimize":
        # the whole run is tests/test_flow.py's; here: does the profile of this command validate
        words[1] = "validate"
        if "--workspace" in words:
            at = words.index("--workspace")
            del words[at : at + 2]
    if page != "README.md" and words[0] == ".venv/bin/puzzle":
        monkeypatch.chdir(ROOT)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # a plan is of a machine measured now, and leaves nothing
        threads = torch.get_num_threads()
        try:
            code, out, told = puzzle(*words[1:])
        finally:
            torch.set_num_threads(threads)
            gc.unfreeze()
        assert code == 0 and out, f"{page}: {command}\n{out}{told}"
        return
    process = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert process.returncode == 0, f"{page}: {command}\n{process.stdout}{process.stderr}"


def test_every_command_is_documented() -> None:
    readme = (ROOT / "README.md").read_text()
    for command in cli.app.registered_commands:
        assert command.callback is not None
        assert f"puzzle {command.name or command.callback.__name__}" in readme


@pytest.mark.parametrize("name", shipped_profiles())
def test_shipped_profiles_load(name: str) -> None:
    assert load_profile(ROOT / "profiles" / f"{name}.yaml").name == name


def test_readme_tells_how_to_test() -> None:
    """.ci/run calls the command that the README gives."""
    assert "make test" in (ROOT / "README.md").read_text()
    assert "step make test" in (ROOT / ".ci" / "run").read_text()
