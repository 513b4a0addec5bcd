"""What is wrong with a profile, or with a path that it names."""

from pathlib import Path


class ProfileError(Exception):
    """A profile that cannot be used: one readable message, every problem on its own line."""


def expanded(path: Path | str) -> Path:
    """The path with `~` and `~user` replaced; as it is where there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)
