"""Are the pages of figures what their commands wrote, and how old is each? Run without arguments:

    .venv/bin/python -m benchmarks.pages

A page is written by its command alone, never by hand. Its first line is a header that a program can read: the command,
the commit, the machine, the load at the start, and a digest of the rest. This check prints, for every page, how many
commits have touched what it measures since. It fails when a page was edited by hand or put back to an older one.
"""

import hashlib
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
HEADER = re.compile(r"<!-- (\{.*\}) -->\n")
LEARNING = ("blocks", "tasks/inputs", "tasks/distill")
# page -> the code whose figures it shows
MEASURES: dict[str, tuple[str, ...]] = {
    "attention": (*LEARNING, "tasks/score"),
    "attention_recurrent": (*LEARNING, "tasks/score"),
    "auth": ("tasks/operating", "tasks/running"),
    "bld": LEARNING,
    "capabilities": ("tasks/evaluate", "tasks/score", "tasks/search"),
    "experts": (*LEARNING, "tasks/score"),
    "families": ("blocks", "tasks/distill", "tasks/export", "tasks/score"),
    "faults": ("flows", "tasks/operating", "tasks/running"),
    "gkd": ("blocks/divergence.py", "tasks/distill"),
    "hardware": ("tasks/measure/roofline.py", "profiles/hardware"),
    "headline": (*LEARNING, "tasks/evaluate", "tasks/export", "tasks/search"),
    "more_tokens": (*LEARNING, "tasks/score"),
    "multimodal": (*LEARNING, "tasks/evaluate", "tasks/export", "tasks/score", "tasks/search"),
    "operate": ("flows", "tasks/operating", "tasks/running"),
    "peers": ("tasks/search", "tasks/studies", "tasks/score"),
    "plan": ("tasks/planning",),
    "precision": ("blocks/error_correction.py", "tasks/engines/ggml.py", "tasks/export/quantise.py"),
    "race": (*LEARNING, "tasks/evaluate", "tasks/score", "tasks/search"),
    "quality": (*LEARNING, "tasks/evaluate", "tasks/score", "tasks/search"),
    "robustness": (*LEARNING, "tasks/evaluate", "tasks/probe", "tasks/search"),
    "scale": ("flows", "tasks/running"),
    "scale_tokens": (*LEARNING, "tasks/score"),
    "scoring": ("blocks/divergence.py", "tasks/score"),
    "search": ("tasks/search",),
    "serving": ("tasks/engines", "tasks/export", "tasks/gguf", "tasks/measure"),
    "stores": ("blocks/store.py", "blocks/library.py"),
}


@dataclass(frozen=True, kw_only=True)
class Page:
    """A page of figures: its name, its header (None where it has none) and the text under it."""

    name: str
    header: dict[str, Any] | None
    body: str


def with_header(fields: dict[str, Any], body: str) -> str:
    """The text of a page: a header line with the digest of the body, then the body."""
    digest = hashlib.sha256(body.encode()).hexdigest()
    return f"<!-- {json.dumps(fields | {'sha256': digest}, sort_keys=True)} -->\n{body}"


def parse(name: str, text: str) -> Page:
    """The page that a file's text is."""
    match = HEADER.match(text)
    return Page(name=name, header=json.loads(match[1]) if match else None, body=text[match.end() :] if match else text)


def pages() -> list[Page]:
    """Every page under benchmarks/."""
    return [parse(path.stem, path.read_text(encoding="utf-8")) for path in sorted((ROOT / "benchmarks").glob("*.md"))]


def problem(page: Page, before: Page | None) -> str | None:
    """Why a page is not what its command wrote, None when it is; `before` is the version that was committed last."""
    if page.header is None:
        return "it has no header: print it again by its command"
    if hashlib.sha256(page.body.encode()).hexdigest() != page.header["sha256"]:
        return "it was edited by hand: print it again by its command"
    if before is not None and before.header is not None and _is_older(page.header["commit"], before.header["commit"]):
        return f"it was put back from commit {before.header['commit']} to the older {page.header['commit']}"
    return None


def _is_older(commit: str, other: str) -> bool:
    """Whether `commit` is an ancestor of `other` and not the same."""
    return commit != other and _git("merge-base", "--is-ancestor", commit, other).returncode == 0


def committed(page: Page, back: int = 0) -> Page | None:
    """The version of a page that git holds, `back` versions before the last one; None where there is none."""
    path = f"benchmarks/{page.name}.md"
    commits = _git("log", "--format=%H", f"-{back + 1}", "--", path).stdout.split()
    if len(commits) <= back:
        return None
    found = _git("show", f"{commits[back]}:{path}")
    return parse(page.name, found.stdout) if found.returncode == 0 else None


def age(page: Page) -> str:
    """How many commits have touched what a page measures since it was printed."""
    if page.header is None or page.name not in MEASURES:
        return "unknown"
    found = _git("rev-list", "--count", f"{page.header['commit']}..HEAD", "--", *MEASURES[page.name])
    return found.stdout.strip() or "unknown: that commit is not here"


def _git(*words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)


def problems() -> dict[str, str]:
    """Pages that are not what their command wrote, and why; each is compared with the two versions before it."""
    found = {}
    for page in pages():
        why = problem(page, committed(page)) or problem(page, committed(page, back=1))
        if why:
            found[page.name] = why
    return found


def main() -> None:
    """Print the age of every page; exit code 1 when one is not what its command wrote."""
    wrong = problems()
    for page in pages():
        header = page.header or {}
        load = header.get("load")
        print(
            f"{page.name:15} commit {header.get('commit', '?'):9} {header.get('date', '?'):10} "
            f"load {'?' if load is None else load:<5} commits to what it measures since: {age(page)}"
        )
    for name, why in wrong.items():
        print(f"benchmarks/{name}.md: {why}", file=sys.stderr)
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
