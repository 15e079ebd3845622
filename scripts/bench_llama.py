"""llama.cpp as a contender of the benchmark, through its C API: ids in, logits out, one ``llama_decode`` a pass."""

from __future__ import annotations

import ctypes
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

UBATCH = 512  # llama.cpp's default
SHORT = 256  # cache cells of a sequence without a long context
WORD = struct.Struct("<I")


class LlamaCpp:
    """One GGUF file with a float16 cache.

    Two switches are measured both ways by the benchmark, and the better one is kept: ``flash`` (flash attention) and
    ``repack`` (weights copied into layouts of their own, AMX where it is compiled in; off: the file as mapped).
    """

    def __init__(self, file: Path, threads: int, repack: bool):
        import llama_cpp

        self.api, self.threads, self.file = llama_cpp, threads, file
        self.flash, self.repack = True, repack
        self._quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)  # must outlive the calls
        llama_cpp.llama_log_set(self._quiet, ctypes.c_void_p())
        llama_cpp.llama_backend_init()
        self._models: dict[bool, Any] = {}
        vocabulary = llama_cpp.llama_model_get_vocab(self._model())
        self.vocab = int(llama_cpp.llama_vocab_n_tokens(vocabulary))
        self._batch = llama_cpp.llama_batch_init(UBATCH, 0, 1)
        self._context: Any = None
        self._shape: tuple[int, int, bool, bool] | None = None

    def describe(self) -> dict[str, Any]:
        """Version, and the instruction sets llama.cpp was built for."""
        info = self.api.llama_print_system_info().decode()
        return {"version": f"llama-cpp-python {self.api.__version__}", "system": info}

    def settings(self) -> list[dict[str, bool]]:
        """The switches worth a try."""
        ways = [True, False] if self.repack else [False]
        return [{"flash": flash, "repack": repack} for repack in ways for flash in (True, False)]

    def set(self, flash: bool, repack: bool) -> None:
        """Use these switches from now on."""
        self.flash, self.repack = flash, repack

    def weight_bytes(self) -> int:
        """Bytes of weights one pass reads: all but the table of embeddings, of which it reads some rows."""
        model, name = self._model(), self.file.stem
        size, width = self.api.llama_model_size(model), self.api.llama_model_n_embd(model)
        return int(size) - int(self.vocab * width * {"q4_0": 18 / 32, "q8_0": 34 / 32}.get(name, 2))

    def first_token(self, prompt: list[int]) -> int:
        """The most likely token after a prompt, in a cache of 4096 tokens."""
        self._open(4096, 1)
        return int(self._forward([(token, p, 0) for p, token in enumerate(prompt)])[0].argmax())

    def prefill(self, tokens: int) -> float:
        """Seconds of a prompt from an empty cache, logits of its last token."""
        self._open(-(-tokens // SHORT) * SHORT, 1)
        self._clear()
        begin = time.perf_counter()
        for start in range(0, tokens, UBATCH):
            self._forward([(p % 997, p, 0) for p in range(start, min(start + UBATCH, tokens))])
        return time.perf_counter() - begin

    def prepare(self, sequences: int, context: int) -> None:
        """Sequences with ``context`` tokens in the cache each; long contexts are random keys and values."""
        self._open(-(-(context + SHORT) // SHORT) * SHORT, sequences)
        self._clear()
        for sequence in range(sequences):
            if context > SHORT:
                self._fill(sequence, context)
            else:
                self._forward([(p, p, sequence) for p in range(context)])

    def step(self, sequences: int, position: int) -> None:
        """One more token of every sequence."""
        self._forward([(100 + s, position, s) for s in range(sequences)])

    def rest(self) -> None:
        """Free the context and its cache."""
        if self._context:
            self.api.llama_free(self._context)
        self._context = self._shape = None

    def _model(self) -> Any:
        if self.repack not in self._models:
            params = self.api.llama_model_default_params()
            params.use_extra_bufts = self.repack
            self._models[self.repack] = self.api.llama_model_load_from_file(str(self.file).encode(), params)
        if not self._models[self.repack]:
            raise SystemExit(f"error: llama.cpp cannot load {self.file}")
        return self._models[self.repack]

    def _open(self, cells: int, sequences: int) -> None:
        """Make a context of so many cells a sequence the current one, if it is not."""
        shape = (cells, sequences, self.flash, self.repack)
        if shape == self._shape:
            return
        self.rest()
        params = self.api.llama_context_default_params()
        params.n_ctx, params.n_seq_max = cells * sequences, sequences
        params.n_batch = params.n_ubatch = UBATCH
        params.n_threads = params.n_threads_batch = self.threads
        params.flash_attn_type, params.no_perf = int(self.flash), True
        self._context = self.api.llama_init_from_model(self._model(), params)
        if not self._context:
            raise SystemExit(f"error: llama.cpp made no context of {cells} x {sequences} cells")
        self._shape = shape

    def _forward(self, rows: list[tuple[int, int, int]]) -> list[NDArray[np.float32]]:
        """One pass over (id, position, sequence) rows; logits of the last row of every sequence."""
        batch, last = self._batch, {row[2]: i for i, row in enumerate(rows)}
        batch.n_tokens = len(rows)
        for i, (token, position, sequence) in enumerate(rows):
            batch.token[i], batch.pos[i] = token, position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            batch.logits[i] = last[sequence] == i
        if self.api.llama_decode(self._context, batch):
            raise SystemExit("error: llama_decode failed")
        read = self.api.llama_get_logits_ith
        return [np.ctypeslib.as_array(read(self._context, i), (self.vocab,)) for i in last.values()]

    def _memory(self) -> Any:
        return self.api.llama_get_memory(self._context)

    def _clear(self) -> None:
        self.api.llama_memory_clear(self._memory(), False)

    def _fill(self, sequence: int, tokens: int) -> None:
        """Set the cache of a sequence to random keys and values, as if a prompt of that length had been read."""
        self._forward([(1, 0, sequence)])
        size = self.api.llama_state_seq_get_size(self._context, sequence)
        one = (ctypes.c_uint8 * size)()
        self.api.llama_state_seq_get_data(self._context, one, size, sequence)
        state = longer_state(bytes(one), tokens, np.random.default_rng(sequence))
        self.api.llama_memory_seq_rm(self._memory(), sequence, -1, -1)
        data = (ctypes.c_uint8 * len(state)).from_buffer(state)
        taken = self.api.llama_state_seq_set_data(self._context, data, len(state), sequence)
        if taken != len(state) or self.api.llama_memory_seq_pos_max(self._memory(), sequence) != tokens - 1:
            raise SystemExit("error: llama.cpp did not take the cache; its state format has changed")


def longer_state(one: bytes, tokens: int, rng: np.random.Generator) -> bytearray:
    """The saved state of a sequence of one token -> that of a sequence of ``tokens`` with random contents.

    Format: two words, streams = 1, cells, then of each cell position, number of sequences = 1, sequence; values
    transposed or not, layers; keys of each layer (type, 64-bit bytes a row, rows), values likewise or, transposed,
    (type, bytes an element, width, elements).
    """
    head = np.frombuffer(one[:36], np.uint32)
    if head[2:6].tolist() != [1, 1, 0, 1] or head[7] > 1:
        raise SystemExit(f"error: unknown format of llama.cpp's state: {head.tolist()}")
    transposed, layers = bool(head[7]), int(head[8])
    cells = np.zeros((tokens, 3), np.uint32)
    cells[:, 0], cells[:, 1], cells[:, 2] = np.arange(tokens), 1, head[6]
    out = bytearray(one[:12] + WORD.pack(tokens) + cells.tobytes() + one[28:36])
    place = 36
    for turn in ("keys", "values"):
        for _ in range(layers):
            if turn == "values" and transposed:
                _, element, width = struct.unpack_from("<III", one, place)
                row = element * width
            else:
                row = struct.unpack_from("<Q", one, place + 4)[0]
            out += one[place : place + 12] + random_halves(rng, row * tokens // 2).tobytes()
            place += 12 + row
    if place != len(one):
        raise SystemExit(f"error: llama.cpp's state has {len(one)} bytes, {place} were understood")
    return out


def random_halves(rng: np.random.Generator, count: int) -> NDArray[np.float16]:
    """Normal float16 numbers, a run of them repeated."""
    return np.resize(rng.standard_normal(min(count, 1 << 16), np.float32).astype(np.float16), count)
