"""A store: finished work of several machines, under any fsspec URL. Every file is checked against its digest.

    puzzle-store.json      says that this folder is a store, and of which layout
    objects/<ab>/<sha256>  data, named by its content: two machines that make the same thing write the same object
    records/<path>         what makes data count, named by its path in the workspace: sha256 of the rest, newline, JSON

Data is sent first and its record last, so whoever reads a record finds the data that it names. An object or record that
does not have its digest is reported, removed and never used; whoever asked for it makes it again. All names in a store
are digests or checked relative paths, so no name leads outside. The file system finds its credentials itself
(AWS_ACCESS_KEY_ID, ~/.aws, a machine's role); this program handles none. Why fsspec's caching file systems or Prefect's
result storage cannot do this: docs/adr/0005-store.md.
"""

import hashlib
import json
import logging
import re
import shutil
import threading
import time
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar

from blocks.errors import PuzzleError, PuzzleFailure
from blocks.files import atomic_path, sha256_of, write_text

LAYOUT = 1
SIGN = "puzzle-store.json"
MARKER = ".store"  # a file in a workspace that holds the URL of its store
DELAYS = (1, 2, 4, 8, 16, 32)  # seconds before each further try: a minute in all
LARGE = 256 * 2**20  # bytes; a file of this size is reported before it moves
NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._+=-]*(/[A-Za-z0-9_-][A-Za-z0-9._+=-]*)*")
DIGEST = re.compile(r"[0-9a-f]{64}")
# botocore's errors for missing credentials, by name, so that a store on another file system needs no botocore
NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "CredentialRetrievalError")
AnswerT = TypeVar("AnswerT")


class StoreError(PuzzleError):
    """A store that is named wrongly, or that this user may not use."""


class StoreAway(PuzzleFailure):
    """A store that did not answer, however often it was asked."""


class _Damaged(Exception):
    """Bytes without the right digest; they must not be moved into place."""


class _Gone(Exception):
    """An object that was there a moment ago."""


class Store:
    """A place for finished work. Thread-safe; counts what it moves.

    Raises StoreError for a place that does not exist or is no store, StoreAway when it does not answer for a minute.
    """

    def __init__(self, url: str, delays: tuple[float, ...] = DELAYS, sign: bool = True) -> None:
        self.url, self.delays = url, delays
        self.fs, self.root = _file_system(url)
        self.report: Callable[[str], None] = logging.getLogger("puzzle").info
        self.sent_bytes = self.fetched_bytes = self.sent_files = self.fetched_files = 0
        self._lock = threading.Lock()
        self._folders: dict[str, set[str]] = {}
        self._check(sign)

    def _check(self, write: bool) -> None:
        """Read the sign, or write it: a wrong bucket or a missing permission shows before any work."""
        sign = self._read(SIGN)
        if sign is None:
            if not write:
                return
            self._put(json.dumps({"layout": LAYOUT}).encode(), SIGN)
            return
        try:
            layout = json.loads(sign)["layout"]
        except (ValueError, KeyError, TypeError):
            layout = "unknown"
        if layout != LAYOUT:
            raise StoreError(f"{self.url} has layout {layout}; this puzzle reads {LAYOUT}. Name another prefix.")

    # --- records

    def record(self, path: str) -> bytes | None:
        """The record of a workspace path; None when there is none, or when it was damaged (reported and removed)."""
        name = _record(path)
        body = self._read(name)
        if body is None:
            return None
        digest, _, text = body.partition(b"\n")
        if hashlib.sha256(text).hexdigest().encode() != digest:
            self._remove_damaged(name, "its record does not have its digest")
            return None
        self._count_fetched(len(body))
        return text

    def keep_record(self, path: str, text: bytes) -> None:
        """Write a record; what it names must have been sent before."""
        body = hashlib.sha256(text).hexdigest().encode() + b"\n" + text
        self._put(body, _record(path))
        self._count_sent(len(body))
        self._names_in_folder_of(path).add(path.rpartition("/")[2])

    def has_record(self, path: str) -> bool:
        """True when the record was there when this process first listed its folder, or was written here since."""
        return path.rpartition("/")[2] in self._names_in_folder_of(path)

    def _names_in_folder_of(self, path: str) -> set[str]:
        folder = _record(path).rpartition("/")[0]
        with self._lock:
            known = self._folders.get(folder)
        if known is None:
            found = self._ask("list", lambda: self.fs.ls(self._at(folder), detail=False)) or []
            with self._lock:
                known = self._folders.setdefault(folder, {name.rpartition("/")[2] for name in found})
        return known

    # --- data

    def send(self, source: Path, digest: str) -> None:
        """Send a file whose digest was checked; nothing moves when an object of its name and size is there."""
        name, size = _object(digest), source.stat().st_size
        if self._size(name) == size:
            return
        self._report_large("sending", source.name, size)
        self._put(source, name)
        self._count_sent(size)

    def has(self, digest: str) -> bool:
        """True when there is an object of this digest; its content is checked when it is fetched."""
        return self._size(_object(digest)) is not None

    def fetch(self, digest: str, target: Path) -> bool:
        """Get a file and check it; False when it is missing, or was damaged (reported and removed)."""
        name = _object(digest)
        size = self._size(name)
        if size is None:
            return False
        self._report_large("fetching", target.name, size)
        try:
            with atomic_path(target) as place:
                if not self._ask("read from", partial(self._get_file, name, place)):
                    raise _Gone
                if sha256_of(place) != digest:
                    raise _Damaged
        except _Gone:
            return False
        except _Damaged:
            self._remove_damaged(name, f"{target.name} does not have its digest")
            return False
        self._count_fetched(size)
        return True

    # --- what is reported

    def traffic(self) -> str:
        """What was sent and fetched since this process opened the store."""
        return (
            f"store {self.url}: sent {_bytes(self.sent_bytes)} in {self.sent_files} files, "
            f"fetched {_bytes(self.fetched_bytes)} in {self.fetched_files}"
        )

    def _count_sent(self, size: int) -> None:
        with self._lock:
            self.sent_bytes, self.sent_files = self.sent_bytes + size, self.sent_files + 1

    def _count_fetched(self, size: int) -> None:
        with self._lock:
            self.fetched_bytes, self.fetched_files = self.fetched_bytes + size, self.fetched_files + 1

    def _report_large(self, doing: str, name: str, size: int) -> None:
        if size >= LARGE:
            self.report(f"store {self.url}: {doing} {name}, {_bytes(size)}")

    def _remove_damaged(self, name: str, what: str) -> None:
        self.report(f"store {self.url}: damaged, {what} ({name}). It is removed there and made again.")
        self._ask("remove from", lambda: self.fs.rm_file(self._at(name)))

    # --- the file system, with retries

    def _at(self, name: str) -> str:
        return f"{self.root}/{name}"

    def _size(self, name: str) -> int | None:
        found = self._ask("look into", lambda: self.fs.info(self._at(name)))
        return None if found is None else int(found["size"])

    def _read(self, name: str) -> bytes | None:
        return self._ask("read from", lambda: self.fs.cat_file(self._at(name)))

    def _get_file(self, name: str, place: Path) -> bool:
        self.fs.get_file(self._at(name), str(place))
        return True

    def _put(self, source: Path | bytes, name: str) -> None:
        self._ask("write to", partial(self._put_once, source, self._at(name)))

    def _put_once(self, source: Path | bytes, target: str) -> None:
        """Object stores write atomically; on a local file system fsspec does not, so this does."""
        if _is_local(self.fs):
            with atomic_path(Path(target)) as place:
                place.write_bytes(source) if isinstance(source, bytes) else shutil.copyfile(source, place)
        elif isinstance(source, bytes):
            self.fs.pipe_file(target, source)
        else:
            self.fs.put_file(str(source), target)

    def _ask(self, doing: str, question: Callable[[], AnswerT]) -> AnswerT | None:
        """The answer, None for what is not there. An error that may pass is tried again, with growing delays."""
        for delay in (*self.delays, None):
            try:
                return question()
            except FileNotFoundError as error:
                if doing == "write to" or "bucket does not exist" in str(error):
                    raise StoreError(
                        f"cannot {doing} the store {self.url}: {_line(error)}. Make the bucket or folder first, or "
                        "name another in `store`."
                    ) from error
                return None
            except PermissionError as error:
                raise StoreError(
                    f"this user may not {doing} the store {self.url}: {_line(error)}. Check the credentials in the "
                    "environment, or name another in `store`."
                ) from error
            except (ValueError, TypeError, LookupError, AttributeError):
                raise  # a bug of ours, which no retry mends
            except Exception as error:  # each file system has its own
                if type(error).__name__ in NO_CREDENTIALS:
                    raise StoreError(
                        f"no credentials for the store {self.url}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
                        "AWS_PROFILE, or give this machine a role."
                    ) from error
                if delay is None:
                    raise StoreAway(
                        f"the store {self.url} does not answer ({type(error).__name__}: {_line(error)}), asked "
                        f"{len(self.delays) + 1} times. What is finished is kept in the workspace: start again when "
                        "the store is back, or without `store`."
                    ) from error
                self.report(f"store {self.url} does not answer ({type(error).__name__}); next try in {delay:g} s")
                time.sleep(delay)
        raise AssertionError("the last delay is None")


def check_url(url: str) -> None:
    """StoreError for a store of no known kind, or whose package is not installed. Nothing is read from it."""
    _file_system(url)


def check_answers(url: str, seconds: float) -> None:
    """StoreError or StoreAway for a store that cannot be used, or does not answer in time. Nothing is written."""
    fault: list[PuzzleError] = [StoreAway(f"the store {url} does not answer within {seconds:g} s.")]

    def ask() -> None:
        try:
            Store(url, delays=(), sign=False)
            fault.clear()
        except PuzzleError as error:
            fault[:] = [error]

    asking = threading.Thread(target=ask, daemon=True)  # some file systems wait for minutes
    asking.start()
    asking.join(seconds)
    for error in fault:
        raise error


def _file_system(url: str) -> tuple[Any, str]:
    import fsspec

    # a listing of an hour ago would hide what another machine put there since
    options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
    if url.startswith(("s3://", "s3a://")):
        options["config_kwargs"] = {"retries": {"max_attempts": 2}, "connect_timeout": 10, "read_timeout": 60}
    try:
        fs, root = fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        raise StoreError(
            f"the store {url} needs a package that is not installed ({_line(error)}): pip install 'puzzle[s3]' for "
            "s3://."
        ) from error
    except (ValueError, OSError) as error:  # some kinds look their host up at once
        raise StoreError(f"{url} is no store: {_line(error)}. For instance s3://bucket/prefix.") from error
    return fs, str(root).rstrip("/")


def _is_local(fs: Any) -> bool:
    from fsspec.implementations.local import LocalFileSystem

    return isinstance(fs, LocalFileSystem)


def _record(path: str) -> str:
    """Name of the record of a workspace path; ValueError for one that leads elsewhere."""
    if not NAME.fullmatch(path):
        raise ValueError(f"{path!r} cannot name a record")
    return f"records/{path}"


def _object(digest: str) -> str:
    if not DIGEST.fullmatch(digest):
        raise ValueError(f"{digest!r} is no sha256")
    return f"objects/{digest[:2]}/{digest}"


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} GiB"


def _line(error: BaseException) -> str:
    """The first line of an error."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


# --- which store a workspace has


@lru_cache(maxsize=8)
def _opened(url: str) -> Store:
    return Store(url)


def store_of(workspace: Path) -> Store | None:
    """The store that the runs of a workspace use; None where they use none."""
    url = store_named(workspace)
    return _opened(url) if url else None


def store_named(workspace: Path) -> str | None:
    """The URL of the store that the runs of a workspace use; None where they use none."""
    try:
        return (workspace / MARKER).read_text(encoding="utf-8").strip() or None
    except FileNotFoundError:
        return None


def use_store(workspace: Path, url: str | None) -> Store | None:
    """Set the store of a workspace for every process that works in it; None: it has none from now on."""
    if url is None:
        (workspace / MARKER).unlink(missing_ok=True)
        return None
    store = _opened(url)
    write_text(workspace / MARKER, url + "\n")
    return store
