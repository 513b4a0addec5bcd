"""llama.cpp's C library, called through ctypes: the build that is installed is found, checked and bound.

Only two parameter structs of its C interface change between builds: see llama_structs.py.
"""

import ctypes
import hashlib
import importlib.util
import os
from functools import lru_cache
from importlib import metadata
from pathlib import Path

from tasks.engines.errors import EngineFailed, EngineMissing
from tasks.engines.llama_structs import Blob, find_fields, keep_off_gpus, unknown_layout, unmap

LIBRARY_VARIABLE = "LLAMA_CPP_LIB_PATH"  # a folder with libllama, as llama-cpp-python reads it
INSTALL = (
    "llama.cpp is not installed: pip install xllamacpp (or puzzle[llama-cpp]), or name the folder of another build's "
    f"libllama in {LIBRARY_VARIABLE}"
)
# import name, distribution, folder of the library inside the package
_PACKAGES = (("llama_cpp", "llama-cpp-python", "lib"), ("xllamacpp", "xllamacpp", "."))


_log_callback = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)


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


class LlamaLibrary:
    """The bound functions of one build."""

    def __init__(self, path: Path, origin: str) -> None:
        self.path, self.origin = path, origin
        try:
            self.c = ctypes.CDLL(str(path))
            self._bind()
        except (OSError, AttributeError) as error:
            raise EngineFailed(f"{path.name} ({origin}) is not a llama.cpp that can be used here: {error}") from error
        self._silence = _log_callback(lambda level, text, data: None)
        self.c.llama_log_set(self._silence, None)
        self._load_backends()
        self.c.llama_backend_init()
        self.fields = find_fields(list(self.c.llama_context_default_params().words))

    def model_parameters(self) -> Blob:
        """The default parameters, changed so that weights are read into memory, not mapped, and stay off GPUs."""
        blob: Blob = self.c.llama_model_default_params()
        unmap(blob)
        if not keep_off_gpus(blob) and self.c.llama_supports_gpu_offload():
            raise EngineFailed(unknown_layout("the places of its devices, and it may use GPUs"))
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
    """The libraries on this machine, the preferred one first, each with the name of where it comes from."""
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
    """A digest that tells builds of one's own apart, which have no version: names, sizes and times of the folder's
    files.
    """
    files = sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(repr(stats).encode()).hexdigest()[:12]


def _libraries(folder: Path) -> list[Path]:
    patterns = ("libllama.so", "libllama.dylib", "llama.dll", "libllama.v*.so", "xllamacpp*.so", "xllamacpp*.pyd")
    return [path for pattern in patterns for path in sorted(folder.glob(pattern))]


def library_path() -> Path | None:
    """The library that would be used; None when there is none."""
    candidates = _candidates()
    return candidates[0][0] if candidates else None


@lru_cache(maxsize=1)
def llama_library() -> LlamaLibrary:
    """The library, loaded once per process. Raises EngineMissing, EngineFailed."""
    candidates = _candidates()
    if not candidates:
        raise EngineMissing(f"{INSTALL}.")
    return LlamaLibrary(*candidates[0])
