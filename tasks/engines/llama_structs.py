"""The two parameter structs of llama.cpp's C interface, whose fields are found by the values that they have by default.

llama.cpp adds fields to these structs in nearly every release, and no installed package says where they lie
(docs/adr/0007-llama-cpp-structs.md). A library fills in its own defaults, so each field that is set here is found by a
run of known defaults. A build whose defaults look otherwise is refused: it is never given a value in a wrong field.
"""

import ctypes
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from tasks.engines.errors import EngineFailed

FLASH_OFF, FLASH_ON = 0, 1  # llama_flash_attn_type
_BLOB_BYTES = 512  # more than either struct takes; a struct that is passed by value may be longer than what is read
_HEAD = (512, 2048, 512, 1)  # n_ctx, n_batch, n_ubatch, n_seq_max
_THREADS = (4, 4)  # n_threads, n_threads_batch
_ENUMS = (-1, -1, -1, -1)  # rope scaling, pooling, attention, flash attention
_F16_PAIR = (1, 1)  # type_k, type_v
_MINUS_ONE = struct.unpack("<i", struct.pack("<f", -1.0))[0]  # defrag_thold, the last field before the callbacks
_LOAD_AUTO, _LOAD_READ, _LOAD_MMAP = -1, 0, 1  # llama_load_mode
_NO_DEVICES = (ctypes.c_void_p * 1)(None)  # a list of devices that ends at once


class Blob(ctypes.Structure):
    """A parameter struct whose fields are set by their place."""

    _fields_ = [("words", ctypes.c_int32 * (_BLOB_BYTES // 4))]


@dataclass(frozen=True, kw_only=True)
class ContextFields:
    """Places, in 32-bit words, of the fields of llama_context_params that are set here."""

    n_threads: int
    flash_attention: int
    type_k: int


def find_fields(words: Sequence[int]) -> ContextFields:
    """The places in a library's default llama_context_params. Raises EngineFailed when known defaults are not found."""
    if tuple(words[:4]) != _HEAD:
        raise EngineFailed(unknown_layout("its default batch sizes"))
    threads = _after(words, _THREADS, 4)
    flash = _after(words, _ENUMS, threads + 2) + 3
    defrag = max(place for place in range(flash, flash + 10) if words[place] == _MINUS_ONE)
    return ContextFields(n_threads=threads, flash_attention=flash, type_k=_after(words, _F16_PAIR, defrag + 4))


def _after(words: Sequence[int], wanted: Sequence[int], start: int) -> int:
    """The place, soon after `start`, at which the values `wanted` stand in a row."""
    for place in range(start, start + 12):
        if tuple(words[place : place + len(wanted)]) == tuple(wanted):
            return place
    raise EngineFailed(unknown_layout(f"the defaults {tuple(wanted)}"))


def unmap(blob: Blob) -> None:
    """Change llama_model_params so that weights are read into memory, not mapped from the file.

    A machine that is short of memory drops mapped pages while a model is timed, and reading them again counts as the
    model's CPU time (benchmarks/serving.md). A struct whose layout is unknown is left as it is.
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
    """Change llama_model_params so that they name no device, and return whether that could be done.

    A build with a GPU backend would otherwise put every layer on the GPU, and its times would be taken for the CPU's.
    """
    # two pointers, null by default: devices, buffer types; then n_gpu_layers, split_mode
    if any(blob.words[:4]) or blob.words[5] != 1:
        return False
    address = ctypes.addressof(_NO_DEVICES)
    blob.words[0], blob.words[1] = struct.unpack("<ii", struct.pack("<Q", address))
    blob.words[4] = 0
    return True


def unknown_layout(what: str) -> str:
    """The sentence for a build whose structs are not understood."""
    return f"this build of llama.cpp has an unknown layout ({what} were not found): use xllamacpp, which was tested"
