"""llama.cpp's C library through ctypes: whatever build is installed, found, checked and bound.

The C interface is stable but for two parameter structs that grow. Their layout is read off the library's own defaults
(an anchor of known values for each field that is set here), so one binding serves old and new builds, and a build
whose defaults look otherwise is refused instead of being fed wrong fields.
"""

import ctypes
import hashlib
import importlib.util
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path

from blocks.errors import PuzzleError, PuzzleFailure

LIBRARY_VARIABLE = "LLAMA_CPP_LIB_PATH"  # a folder with libllama, as llama-cpp-python reads it
INSTALL = (
    "llama.cpp is not installed: pip install xllamacpp (or puzzle[llama-cpp]), or name the folder of another build's "
    f"libllama in {LIBRARY_VARIABLE}"
)
F32 = 0  # ggml_type
# import name, distribution, folder of the library inside the package
_PACKAGES = (("llama_cpp", "llama-cpp-python", "lib"), ("xllamacpp", "xllamacpp", "."))
_BLOB_BYTES = (
    512  # more than either struct takes: what is passed by value lies on the stack, a longer tail harms nobody
)
_HEAD = (512, 2048, 512, 1)  # n_ctx, n_batch, n_ubatch, n_seq_max
_THREADS = (4, 4)  # n_threads, n_threads_batch
_ENUMS = (-1, -1, -1, -1)  # rope scaling, pooling, attention, flash attention
_F16_PAIR = (1, 1)  # type_k, type_v
_MINUS_ONE = struct.unpack("<i", struct.pack("<f", -1.0))[0]  # defrag_thold, the last field before the callbacks
_LOAD_AUTO, _LOAD_READ, _LOAD_MMAP = -1, 0, 1  # llama_load_mode

_NO_DEVICES = (ctypes.c_void_p * 1)(None)  # a list of devices that ends at once

_log_callback = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)


class EngineMissing(PuzzleError):
    """The engine that was asked for is not installed."""


class EngineFailed(PuzzleFailure):
    """An engine that is installed did not do what it was asked."""


class Blob(ctypes.Structure):
    """A parameter struct whose fields are set by their place."""

    _fields_ = [("words", ctypes.c_int32 * (_BLOB_BYTES // 4))]


class Batch(ctypes.Structure):
    """llama_batch."""

    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.POINTER(ctypes.c_float)),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


@dataclass(frozen=True, kw_only=True)
class ContextFields:
    """Places, in 32-bit words, of the fields of llama_context_params that are set here."""

    n_threads: int
    flash_attention: int
    type_k: int


def find_fields(words: Sequence[int]) -> ContextFields:
    """The places in the default llama_context_params; EngineFailed when the anchors are not where they must be."""
    if tuple(words[:4]) != _HEAD:
        raise EngineFailed(_unknown("its default batch sizes"))
    threads = _after(words, _THREADS, 4)
    flash = _after(words, _ENUMS, threads + 2) + 3
    defrag = max(place for place in range(flash, flash + 10) if words[place] == _MINUS_ONE)
    return ContextFields(n_threads=threads, flash_attention=flash, type_k=_after(words, _F16_PAIR, defrag + 4))


def _after(words: Sequence[int], wanted: Sequence[int], start: int) -> int:
    for place in range(start, start + 12):
        if tuple(words[place : place + len(wanted)]) == tuple(wanted):
            return place
    raise EngineFailed(_unknown(f"the defaults {tuple(wanted)}"))


def unmap(blob: Blob) -> None:
    """Have llama_model_params read the weights. A machine short of memory drops mapped pages while a model is timed,
    and reading them again counts as its CPU time (benchmarks/serving.md). A layout that is unknown stays as it is.
    """
    split_mode, third = blob.words[5], blob.words[6]
    if split_mode == 1 and third in (_LOAD_AUTO, _LOAD_MMAP):  # since llama.cpp b10107: an enum
        blob.words[6] = _LOAD_READ
    elif split_mode == 1 and third == 0:  # before: main_gpu, four pointers, then vocab_only and use_mmap
        flags = bytearray(struct.pack("<i", blob.words[16]))
        if flags[:2] == b"\x00\x01":
            flags[1] = 0
            blob.words[16] = struct.unpack("<i", bytes(flags))[0]


def keep_off_gpus(blob: Blob) -> bool:
    """Have llama_model_params name no device: a build with a GPU backend would put every layer there, and the figures
    would be called the CPU's. False where the layout is unknown.
    """
    # two pointers, null by default: devices, buffer types; then n_gpu_layers, split_mode
    if any(blob.words[:4]) or blob.words[5] != 1:
        return False
    address = ctypes.addressof(_NO_DEVICES)
    blob.words[0], blob.words[1] = struct.unpack("<ii", struct.pack("<Q", address))
    blob.words[4] = 0
    return True


def _unknown(what: str) -> str:
    return f"this build of llama.cpp has an unknown layout ({what} were not found): use xllamacpp, which was tested"


class LlamaLibrary:
    """The bound functions of one build."""

    def __init__(self, path: Path, origin: str) -> None:
        self.path, self.origin = path, origin
        try:
            self.c = ctypes.CDLL(str(path))
            self._bind()
        except (OSError, AttributeError) as error:
            raise EngineFailed(f"{path.name} ({origin}) is no llama.cpp that can be used here: {error}") from error
        self._silence = _log_callback(lambda level, text, data: None)
        self.c.llama_log_set(self._silence, None)
        self._load_backends()
        self.c.llama_backend_init()
        self.fields = find_fields(list(self.c.llama_context_default_params().words))

    def model_parameters(self) -> Blob:
        """The defaults, but weights are read into memory instead of mapped from the file, and stay off GPUs."""
        blob: Blob = self.c.llama_model_default_params()
        unmap(blob)
        if not keep_off_gpus(blob) and self.c.llama_supports_gpu_offload():
            raise EngineFailed(_unknown("the places of its devices, and it may use GPUs"))
        return blob

    def _bind(self) -> None:
        c, pointer, integer = self.c, ctypes.c_void_p, ctypes.c_int32
        signatures = {
            "llama_log_set": (None, [_log_callback, pointer]),
            "llama_backend_init": (None, []),
            "llama_supports_gpu_offload": (ctypes.c_bool, []),
            "llama_model_default_params": (Blob, []),
            "llama_context_default_params": (Blob, []),
            "llama_model_load_from_file": (pointer, [ctypes.c_char_p, Blob]),
            "llama_model_free": (None, [pointer]),
            "llama_model_get_vocab": (pointer, [pointer]),
            "llama_vocab_n_tokens": (integer, [pointer]),
            "llama_init_from_model": (pointer, [pointer, Blob]),
            "llama_free": (None, [pointer]),
            "llama_get_memory": (pointer, [pointer]),
            "llama_memory_clear": (None, [pointer, ctypes.c_bool]),
            "llama_batch_init": (Batch, [integer, integer, integer]),
            "llama_batch_free": (None, [Batch]),
            "llama_decode": (integer, [pointer, Batch]),
            "llama_synchronize": (None, [pointer]),
            "llama_get_logits_ith": (ctypes.POINTER(ctypes.c_float), [pointer, integer]),
            "llama_tokenize": (
                integer,
                [pointer, ctypes.c_char_p, integer, pointer, integer, ctypes.c_bool, ctypes.c_bool],
            ),
            "llama_token_to_piece": (
                integer,
                [pointer, integer, ctypes.c_char_p, integer, integer, ctypes.c_bool],
            ),
        }
        for name, (result, arguments) in signatures.items():
            function = getattr(c, name)
            function.restype, function.argtypes = result, arguments

    def _load_backends(self) -> None:
        """Builds with one library per instruction set load the best one from their own folder."""
        folder = self.path.parent
        for name in ("libggml.so", "libggml.dylib", "ggml.dll"):
            if (folder / name).exists():
                ggml = ctypes.CDLL(str(folder / name))
                ggml.ggml_backend_load_all_from_path.argtypes = [ctypes.c_char_p]
                ggml.ggml_backend_load_all_from_path(str(folder).encode())


def _candidates() -> list[tuple[Path, str]]:
    """Libraries in the order of preference, each with a word on where it comes from."""
    found = []
    named = os.environ.get(LIBRARY_VARIABLE)
    if named:
        found += [(path, f"{LIBRARY_VARIABLE}, build {_build(Path(named))}") for path in _libraries(Path(named))]
        if not found:
            raise EngineMissing(
                f"{LIBRARY_VARIABLE} names {named}, which holds no libllama: name its folder, or unset it"
            )
    for package, distribution, inside in _PACKAGES:
        spec = importlib.util.find_spec(package)
        for folder in spec.submodule_search_locations or [] if spec else []:
            origin = f"{distribution} {metadata.version(distribution)}"
            found += [(path, origin) for path in _libraries(Path(folder) / inside)]
    return found


def _build(folder: Path) -> str:
    """Tells builds of one's own apart, which have no version: names, sizes and times of the libraries in the folder."""
    files = sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(repr(stats).encode()).hexdigest()[:12]


def _libraries(folder: Path) -> list[Path]:
    patterns = ("libllama.so", "libllama.dylib", "llama.dll", "libllama.v*.so", "xllamacpp*.so", "xllamacpp*.pyd")
    return [path for pattern in patterns for path in sorted(folder.glob(pattern))]


def library_path() -> Path | None:
    """The library that would be used, None when there is none."""
    candidates = _candidates()
    return candidates[0][0] if candidates else None


@lru_cache(maxsize=1)
def llama_library() -> LlamaLibrary:
    """The library, loaded once per process. Raises EngineMissing, EngineFailed."""
    candidates = _candidates()
    if not candidates:
        raise EngineMissing(f"{INSTALL}.")
    return LlamaLibrary(*candidates[0])
