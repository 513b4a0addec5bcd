"""Read a profile from YAML. All that is wrong is reported at once: the field, what is allowed, the nearest key.

Overrides (`--set budget.speedup=1.5`) change the YAML tree before it is validated, so the same rules hold for them.
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from profiles.errors import ProfileError, expanded, nearest
from profiles.hardware import target_for
from profiles.schema import Profile

SHIPPED = Path(__file__).parent


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key that is written twice in one mapping. PyYAML would keep the last one without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)  # type: ignore[no-untyped-call,unused-ignore]
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(None, None, "a key must be plain text", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key `{key}` stands twice: keep one of the two", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def shipped_profiles() -> list[str]:
    """Names of the profiles that come with puzzle."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def runnable_profiles() -> list[str]:
    """Of these, the profiles for the machine at hand; the others are for planning a run on other hardware."""
    return [name for name in shipped_profiles() if load_profile(name).hardware.engine != "roofline"]


def load_profile(path: Path | str, overrides: Sequence[str] = ()) -> Profile:
    """Read, override and validate a profile. `path` is a file, or the name of a shipped profile such as `tiny`.

    An override is `path.to.key=value`: the value is YAML, a number in the path indexes a list.
    Raises ProfileError, which lists every problem.
    """
    file = _find(path)
    tree = _parse(_read(file), str(file))
    if not isinstance(tree, dict):
        raise ProfileError(f"{file} holds {_kind(tree)}: a profile is a mapping with `name`, `parent`, `corpus`, ...")
    for override in overrides:
        _override(tree, override)
    try:
        profile = Profile.model_validate(tree)
    except ValidationError as error:
        found = [details for details in error.errors(include_url=False) if not _is_echo(details)]
        problems = [_problem(details) for details in found]
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        raise ProfileError("\n  ".join([f"{file} is not a valid profile, {count}:", *problems])) from None
    if profile.hardware.engine == "roofline":
        target_for(profile.hardware)
    return profile


def _find(path: Path | str) -> Path:
    file = expanded(path)
    if file.is_file():
        return file
    if file.is_dir():
        raise ProfileError(f"{file} is a folder: name a YAML file in it.")
    names = shipped_profiles()
    if file.name == str(path):
        shipped = SHIPPED / f"{file.name.removesuffix('.yaml')}.yaml"
        if shipped.is_file():
            return shipped
    hint = nearest(file.name.removesuffix(".yaml"), names)
    raise ProfileError(f"no profile {file}: give a YAML file, or one of {', '.join(names)}.{hint}")


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ProfileError(f"{file} is not UTF-8 text: save it as UTF-8.") from None
    except OSError as error:
        raise ProfileError(f"{file} cannot be read: {error.strerror}.") from None


def _parse(text: str, origin: str) -> Any:
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ProfileError(f"{origin}{where}: not valid YAML: {error.problem or error.context}.") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        # ValueError: PyYAML takes 2024-13-45 for a date
        raise ProfileError(f"{origin}: not valid YAML: {error}.") from None


def _override(tree: dict[Any, Any], override: str) -> None:
    """Set one key of the tree in place. Mappings that are missing on the way are made."""
    path, separator, text = override.partition("=")
    keys = path.strip().split(".")
    if not separator or not all(keys):
        raise ProfileError(f"override `{override}` is not `path.to.key=value`, for example `budget.speedup=1.5`.")
    value = _parse(text, f"override `{override}`")
    node: Any = tree
    for position, key in enumerate(keys):
        last = position == len(keys) - 1
        where = ".".join(keys[:position]) or "the profile"
        if isinstance(node, list):
            index = _index(key, node, override, where)
            if last:
                node[index] = value
            node = node[index]
        elif isinstance(node, dict):
            if last:
                node[key] = value
            elif node.get(key) is None:
                node[key] = {}
            node = node[key]
        else:
            raise ProfileError(f"override `{override}`: {where} is {_kind(node)}, there is no `{key}` in it.")


def _index(key: str, items: list[Any], override: str, where: str) -> int:
    if not key.isdecimal() or int(key) >= len(items):
        allowed = f"0 to {len(items) - 1}" if items else "none, the list is empty"
        raise ProfileError(
            f"override `{override}`: {where} is a list, `{key}` is not an index of it (allowed: {allowed})."
        )
    return int(key)


def _problem(details: ErrorDetails) -> str:
    """One line: field path, what is wrong, what is allowed."""
    path, sections = _walk(details["loc"])
    where = f"{path}: " if path else ""
    kind, given = details["type"], details["input"]
    if kind in ("extra_forbidden", "invalid_key"):
        return f"{where}unknown key. {_allowed(str(details['loc'][-1]), _keys(sections))}"
    if kind == "missing":
        return f"{where}missing, it has no default: add it."
    if kind == "union_tag_not_found":
        return f"{path}.kind: missing. {_allowed('', _tags(sections))}"
    if kind in ("union_tag_invalid", "literal_error"):
        field, name, names = _choice(details, path, sections)
        return f"{field}: is `{name}`. {_allowed(name, names)}"
    if kind == "value_error":
        return f"{where}{details['msg'].removeprefix('Value error, ')}."
    if kind in ("model_type", "model_attributes_type", "tuple_type"):
        shape = "list" if kind == "tuple_type" else "mapping"
        return f"{where}is {_kind(given)}, must be a {shape}."
    share = f"{details['loc'][-1]}_fraction"
    other = f" A share of the parent's is written as `{share}`." if share in _keys(sections) else ""
    return f"{where}is {_short(given)}, {_must(details['msg'])}.{other}"


def _choice(details: ErrorDetails, path: str, sections: Sequence[type[BaseModel]]) -> tuple[str, str, list[str]]:
    """Field, given name and allowed names, for a value that is not one of a closed list."""
    context = details["ctx"]
    if details["type"] == "union_tag_invalid":
        return f"{path}.kind", str(context["tag"]), _tags(sections)
    names = [part.strip(" '") for part in context["expected"].replace(" or ", ", ").split(",")]
    return path, str(details["input"]), names


def _is_echo(details: ErrorDetails) -> bool:
    """Whether an error only repeats another: pydantic also calls a list too short when its items are wrong."""
    return details["type"] == "too_short" and bool(details["input"])


def _must(message: str) -> str:
    """Pydantic's `Input should be ...` as `must be ...`."""
    for start in ("Input should ", "String should ", "Value should ", "Tuple should "):
        if message.startswith(start):
            return f"must {message.removeprefix(start)}"
    return message


def _walk(loc: tuple[int | str, ...]) -> tuple[str, list[type[BaseModel]]]:
    """The path of a field as a user writes it, and the sections in which its last key was looked up.

    Pydantic puts the tag of a discriminated union (such as `package`) into the location. It is not a key, so it is left
    out. In a table of sections by name, the name is no key of a section.
    """
    path, by_name = "", False
    sections: list[type[BaseModel]] = [Profile]
    holders = sections
    for step in loc:
        if isinstance(step, int):
            path += f"[{step}]"
            continue
        if by_name:
            path, by_name = f"{path}.{step}", False
            continue
        if len(sections) > 1 and (tagged := [one for one in sections if step in _tags([one])]):
            sections = holders = tagged
            continue
        path += f".{step}" if path else str(step)
        holders = sections
        fields = [one.model_fields[step] for one in sections if step in one.model_fields]
        sections = [found for field in fields for found in sections_of(field.annotation)]
        by_name = any(get_origin(field.annotation) is Mapping for field in fields)
    return path, sections or holders


def sections_of(annotation: Any) -> list[type[BaseModel]]:
    """The pydantic models that an annotation mentions, through Annotated, unions and tuples."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for part in get_args(annotation) for found in sections_of(part)]


def _keys(sections: Iterable[type[BaseModel]]) -> list[str]:
    return list(dict.fromkeys(key for section in sections for key in section.model_fields))


def _tags(sections: Iterable[type[BaseModel]]) -> list[str]:
    fields = [section.model_fields["kind"] for section in sections if "kind" in section.model_fields]
    return [str(tag) for field in fields for tag in get_args(field.annotation)]


def _allowed(given: str, names: Sequence[str]) -> str:
    return f"Allowed: {', '.join(names)}.{nearest(given, names)}"


def _kind(value: Any) -> str:
    names = {dict: "a mapping", list: "a list", str: "text", bool: "true/false", type(None): "nothing"}
    return names.get(type(value), f"a {type(value).__name__}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def in_yaml(profile: Profile) -> str:
    """A profile as text that `load_profile` reads as the same profile."""
    return yaml.safe_dump(profile.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
