"""ggml's own rounding to its block types, from the library of llama.cpp that is installed; iq4_nl faster than it."""

import ctypes
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import gguf
import gguf.quants
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from tasks.engines.errors import EngineFailed
from tasks.engines.iq4_nl import round_iq4_nl
from tasks.engines.llama_library import llama_library

LEAST_ROWS = 256  # of a thread


@dataclass(frozen=True, kw_only=True)
class GgmlRounding:
    """Rounds rows to a ggml type of blocks of 32 values; see blocks/error_correction.py, `Rounding`."""

    kind: Type

    def __call__(self, columns: Tensor, importance: Tensor | None) -> tuple[np.ndarray, Tensor]:
        """Columns (D, s) with s a multiple of 32, importance (s,) or None -> bytes (D, bytes of s), values (D, s).

        Rows are rounded each on its own, on as many threads as torch has.
        """
        if self.kind == Type.IQ4_NL:
            return round_iq4_nl(columns.detach().float(), importance)
        parts = columns.detach().chunk(max(1, min(torch.get_num_threads(), len(columns) // LEAST_ROWS)))
        with ThreadPoolExecutor(len(parts)) as pool:
            found = list(pool.map(lambda part: self.by_library(part, importance), parts))
        return np.concatenate([rows for rows, _ in found]), torch.cat([values for _, values in found])

    def by_library(self, columns: Tensor, importance: Tensor | None) -> tuple[np.ndarray, Tensor]:
        """The same, by the library on one thread."""
        rows, width = columns.shape
        source = np.ascontiguousarray(columns.numpy(), dtype=np.float32)
        target = np.empty((rows, self.row_bytes(width)), dtype=np.uint8)
        weights = None if importance is None else np.ascontiguousarray(importance.numpy(), dtype=np.float32)
        pointer = ctypes.POINTER(ctypes.c_float)
        written = _chunk()(
            int(self.kind),
            source.ctypes.data_as(pointer),
            target.ctypes.data,
            0,
            rows,
            width,
            None if weights is None else weights.ctypes.data_as(pointer),
        )
        if written != target.nbytes:
            raise EngineFailed(f"ggml wrote {written} bytes of {self.kind.name}, {target.nbytes} were expected")
        return target, torch.from_numpy(gguf.quants.dequantize(target, self.kind).astype(np.float32))

    def row_bytes(self, width: int) -> int:
        """Bytes of so many values."""
        block, size = gguf.GGML_QUANT_SIZES[self.kind]
        return width // block * size


def _chunk() -> "ctypes._NamedFuncPointer":
    function = llama_library().c.ggml_quantize_chunk
    pointer, whole = ctypes.POINTER(ctypes.c_float), ctypes.c_int64
    function.restype = ctypes.c_size_t
    function.argtypes = [ctypes.c_int, pointer, ctypes.c_void_p, whole, whole, whole, pointer]
    return function
