"""The engine `llama.cpp`: runs GGUF files with the C library that an installed package brings."""

# B = batch, P = prompt tokens, T = tokens, V = vocabulary

import ctypes
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from blocks.records import Turn
from blocks.resources import BLOCK_BYTES
from tasks.engines.base import Engine, LoadOptions, Session
from tasks.engines.errors import EngineFailed
from tasks.engines.llama_library import INSTALL, Batch, LlamaLibrary, library_path, llama_library
from tasks.engines.llama_structs import FLASH_OFF, FLASH_ON
from tasks.engines.timing_in_turns import cpu_clock

CACHE_TYPES = {
    "float32": Type.F32,
    "bfloat16": Type.BF16,
    "float16": Type.F16,
    **{kind: Type[kind.upper()] for kind in BLOCK_BYTES},
}
_PAGE = 256  # llama.cpp rounds a sequence's context up to this


class LlamaCpp(Engine):
    """llama.cpp, from the package xllamacpp or llama-cpp-python, or a build of one's own."""

    name: ClassVar[str] = "llama.cpp"
    format: ClassVar[str] = "gguf"
    precisions: ClassVar[tuple[str, ...]] = ("float32", "float16", "bfloat16", "q8_0")

    def missing(self) -> str | None:
        return None if library_path() else INSTALL

    def version(self) -> str:
        return f"llama.cpp ({llama_library().origin})"

    def load(self, path: Path, how: LoadOptions) -> "LlamaSession":
        return LlamaSession(llama_library(), path, how)


class LlamaSession(Session):
    """One GGUF file in a context of its own."""

    def __init__(self, library: LlamaLibrary, path: Path, how: LoadOptions) -> None:
        self.library, self.c, self.how = library, library.c, how
        self.model = self.c.llama_model_load_from_file(os.fsencode(path), library.model_parameters())
        if not self.model:
            raise EngineFailed(f"llama.cpp ({library.origin}) cannot load {path.name}: is it a whole GGUF file?")
        self.vocabulary = self.c.llama_model_get_vocab(self.model)
        self.vocab_size = self.c.llama_vocab_n_tokens(self.vocabulary)
        self.context = self._open(how.batch_size, how.context_tokens)
        self.room = how.batch_size * how.context_tokens
        self.batch: Any = self.c.llama_batch_init(self.room, 0, 1)

    def _open(self, sequences: int, tokens: int) -> Any:
        """A context that holds this many sequences of this many tokens."""
        per_sequence = -(-tokens // _PAGE) * _PAGE
        parameters = self.c.llama_context_default_params()
        words, fields = parameters.words, self.library.fields
        words[0] = sequences * per_sequence
        words[1] = max(sequences * tokens, 32)  # all prompts in one call
        words[2] = 512
        words[3] = sequences
        words[fields.n_threads] = words[fields.n_threads + 1] = self.how.threads
        kept = "float32" if self.how.exact else self.how.kv_precision
        words[fields.type_k] = words[fields.type_k + 1] = int(CACHE_TYPES[kept])
        if self.how.exact:  # flash attention is float16
            words[fields.flash_attention] = FLASH_OFF
        elif kept in BLOCK_BYTES:  # values in blocks are read by flash attention alone
            words[fields.flash_attention] = FLASH_ON
        context = self.c.llama_init_from_model(self.model, parameters)
        if not context:
            raise EngineFailed(
                f"llama.cpp cannot make a context of {sequences} x {per_sequence} tokens with a KV cache in {kept}: "
                "ask for a smaller batch, a shorter scenario, or a KV cache in float16"
            )
        return context

    def _decode(self, tokens: Sequence[Sequence[int]], start: int, all_logits: bool = False) -> None:
        """Run (B, T) tokens at positions start ... start + T - 1.

        Logits are kept of all tokens, or else of the last token of each sequence.
        """
        batch: Batch = self.batch
        count = 0
        for sequence, row in enumerate(tokens):
            for offset, token in enumerate(row):
                batch.token[count], batch.pos[count] = token, start + offset
                batch.n_seq_id[count], batch.seq_id[count][0] = 1, sequence
                batch.logits[count] = all_logits or offset == len(row) - 1
                count += 1
        batch.n_tokens = count
        status = self.c.llama_decode(self.context, batch)
        if status:
            raise EngineFailed(f"llama.cpp's decode of {count} tokens at position {start} failed with status {status}")
        self.c.llama_synchronize(self.context)

    def _row(self, index: int) -> Tensor:
        """(V,) logits of one token of the last batch."""
        pointer = self.c.llama_get_logits_ith(self.context, index)
        if not pointer:
            raise EngineFailed(f"llama.cpp gave no logits for token {index}")
        values = (ctypes.c_float * self.vocab_size).from_address(ctypes.addressof(pointer.contents))
        return torch.frombuffer(values, dtype=torch.float32).clone()

    def _fresh(self) -> None:
        self.c.llama_memory_clear(self.c.llama_get_memory(self.context), True)

    def logits(self, tokens: Sequence[int]) -> Tensor:
        self._fresh()
        self._decode([tokens], 0, all_logits=True)
        return torch.stack([self._row(index) for index in range(len(tokens))])

    def generate(self, tokens: Sequence[int], steps: int) -> list[int]:
        self._fresh()
        self._decode([tokens], 0)
        found = [int(self._row(len(tokens) - 1).argmax())]
        while len(found) < steps:
            self._decode([found[-1:]], len(tokens) + len(found) - 1)
            found.append(int(self._row(0).argmax()))
        return found

    def request(self, prompt: Tensor, steps: int, grow: int = 0) -> Turn:
        self._fresh()
        batch, length = prompt.shape
        rows, clock = prompt.tolist(), cpu_clock(self.how.threads)
        wall, cpu = time.perf_counter(), clock()
        self._decode(rows, 0)
        prefill, prefill_cpu = time.perf_counter() - wall, clock() - cpu
        last = [self._row((sequence + 1) * length - 1) for sequence in range(batch)]
        if grow:
            self._decode([row[:1] * grow for row in rows], length)
        wall, cpu = time.perf_counter(), clock()
        for step in range(steps):
            self._decode([[int(row.argmax())] for row in last], length + grow + step)
            last = [self._row(sequence) for sequence in range(batch)]
        return Turn(
            prefill=prefill,
            step=(time.perf_counter() - wall) / steps,
            prefill_cpu=prefill_cpu,
            step_cpu=(clock() - cpu) / steps,
        )

    def tokenize(self, text: str, add_special: bool = False) -> list[int]:
        """Token ids of a text, in which special tokens are recognised.

        add_special: also put the tokens that begin and end a text.
        """
        raw = text.encode()
        ids = (ctypes.c_int32 * (len(raw) + 8))()
        count = self.c.llama_tokenize(self.vocabulary, raw, len(raw), ids, len(ids), add_special, True)
        if count < 0:
            raise EngineFailed(f"llama.cpp gives more tokens for a text than it has bytes: {-count} for {len(raw)}")
        return list(ids[:count])

    def text(self, tokens: Sequence[int]) -> str:
        """The text of tokens, decoded one after another as a server does. Special tokens are written by name."""
        piece = ctypes.create_string_buffer(1 << 12)
        raw = b""
        for token in tokens:
            length = self.c.llama_token_to_piece(self.vocabulary, token, piece, len(piece), 0, True)
            if length < 0:
                raise EngineFailed(f"llama.cpp spells the token {token} in {-length} bytes")
            raw += piece.raw[:length]
        return raw.decode(errors="replace")

    def close(self) -> None:
        self.c.llama_batch_free(self.batch)
        self.c.llama_free(self.context)
        self.c.llama_model_free(self.model)
