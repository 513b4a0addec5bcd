"""What is wrong with a profile, or with a path that it names."""

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path


class ProfileError(Exception):
    """A profile that cannot be used: one readable message, every problem on its own line."""


def expanded(path: Path | str) -> Path:
    """The path with `~` and `~user` replaced; as it is where there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def nearest(given: str, names: Sequence[str]) -> str:
    """` Did you mean `name`?` for the name that is spelled most alike; empty where none is alike."""
    match = get_close_matches(given.lower(), names, n=1, cutoff=0.55)
    return f" Did you mean `{match[0]}`?" if match else ""
