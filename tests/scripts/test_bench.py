"""The benchmark's own arithmetic and file formats; no speed is judged here."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from research.qwen.config import QwenConfig
from research.qwen.weights.readers import open_checkpoint
from scripts.bench_checkpoint import SMALLEST, write_random
from scripts.bench_gguf import ALIGNMENT, F16, F32, STRING, gguf_name, metadata, write_gguf
from scripts.bench_llama import longer_state
from scripts.bench_report import markdown_of, text_of
from scripts.bench_rows import BANDWIDTH, PEERS, ROWS, TARGETS, judge

TINY = QwenConfig(
    vocab_size=96, hidden_size=64, num_layers=2, num_heads=2, intermediate_size=160, kv_channels=32
)


class Reader:
    """GGUF by its specification, independent of the writer."""

    def __init__(self, data: bytes):
        self.data, self.place = data, 0

    def take(self, code: str) -> Any:
        value = struct.unpack_from("<" + code, self.data, self.place)
        self.place += struct.calcsize("<" + code)
        return value[0] if len(value) == 1 else value

    def text(self) -> str:
        size = self.take("Q")
        self.place += size
        return self.data[self.place - size : self.place].decode()


def test_gguf_holds_the_checkpoint(tmp_path: Path) -> None:
    write_random(tmp_path / "plain", TINY, "bfloat16")
    write_gguf(tmp_path / "plain", tmp_path / "f16.gguf")
    checkpoint = open_checkpoint(tmp_path / "plain")
    reader = Reader((tmp_path / "f16.gguf").read_bytes())
    assert reader.data[:4] == b"GGUF"
    reader.place = 4
    version, tensors, values = reader.take("IQQ")
    assert (version, tensors) == (3, len(list(checkpoint.names())))
    read: dict[str, tuple[int, Any]] = {}
    for _ in range(values):
        key, kind = reader.text(), reader.take("I")
        read[key] = (kind, reader.text() if kind == STRING else reader.take("f" if kind == 6 else "I"))
    assert read.keys() == metadata(TINY).keys()
    assert read["qwen.feed_forward_length"] == (4, 160)
    assert read["qwen.vocab_size"] == (4, 96)
    table = {}
    for _ in range(tensors):
        name, rank = reader.text(), reader.take("I")
        shape = tuple(reader.take("Q") for _ in range(rank))[::-1]
        table[name] = (shape, *reader.take("IQ"))
    start = -(-reader.place // ALIGNMENT) * ALIGNMENT
    for published in checkpoint.names():
        shape, kind, offset = table[gguf_name(published)]
        assert shape == tuple(checkpoint.shape(published))
        assert offset % ALIGNMENT == 0 and kind == (F32 if len(shape) == 1 else F16)
        dtype, count = (np.float32 if kind == F32 else np.float16), int(np.prod(shape))
        stored = np.frombuffer(reader.data, dtype, count, start + offset).astype(np.float32)
        bits = checkpoint.read(published).reshape(-1).astype(np.uint32) << 16
        np.testing.assert_array_equal(stored, bits.view(np.float32))
    assert reader.place < start + table["token_embd.weight"][2] < len(reader.data)


def test_weights_are_never_subnormal(tmp_path: Path) -> None:
    write_random(tmp_path / "plain", TINY, "bfloat16")
    checkpoint = open_checkpoint(tmp_path / "plain")
    for name in checkpoint.names():
        values = (checkpoint.read(name).astype(np.uint32) << 16).view(np.float32)
        assert np.abs(values).min() >= SMALLEST


def test_unknown_tensor_has_no_gguf_name() -> None:
    with pytest.raises(ValueError, match=r"transformer\.h\.0\.attn\.rotary"):
        gguf_name("transformer.h.0.attn.rotary")


def saved_state(cells: int, layers: int, row: int, transposed: bool) -> bytes:
    """llama.cpp's state of sequence 3 with so many cells."""
    out = struct.pack("<IIII", 0xAF143CD8, 0, 1, cells)
    for cell in range(cells):
        out += struct.pack("<III", cell, 1, 3)
    out += struct.pack("<II", int(transposed), layers)
    for turn in range(2):
        for _ in range(layers):
            head = struct.pack("<III", 1, 2, row // 2) if turn and transposed else struct.pack("<IQ", 1, row)
            out += head + bytes(row * cells)
    return out


@pytest.mark.parametrize("transposed", [False, True])
def test_state_of_a_long_sequence_has_the_layout_of_a_saved_one(transposed: bool) -> None:
    one, wanted = saved_state(1, 3, 64, transposed), saved_state(70, 3, 64, transposed)
    made = longer_state(one, 70, np.random.default_rng(0))
    assert len(made) == len(wanted)
    cells = 16 + 70 * 12 + 8
    assert made[:cells] == wanted[:cells]
    for block in range(6):
        place = cells + block * (12 + 64 * 70)
        assert made[place : place + 12] == wanted[place : place + 12]
        values = np.frombuffer(made, np.float16, 32 * 70, place + 12).astype(np.float32)
        assert np.isfinite(values).all() and 0.8 < values.std() < 1.2


def test_state_of_another_format_is_refused() -> None:
    with pytest.raises(SystemExit, match="unknown format"):
        longer_state(saved_state(2, 3, 64, False), 70, np.random.default_rng(0))


def test_ratio_is_the_median_within_rounds() -> None:
    figures = {
        "decode_1": {"int4": {0: 10.0, 1: 40.0, 2: 30.0}, "llama-q4_0": {0: 10.0, 1: 20.0, 2: 10.0}},
        "prefill_512": {
            "int4": {0: 100.0},
            "int8": {0: 300.0},
            "llama-q4_0": {0: 50.0},
            "transformers": {0: 200.0},
        },
    }
    found = {(t["what"], t["against"]): t for t in judge(figures, {})}
    assert len(found) == 2
    decode = found["decode, batch 1", "llama.cpp Q4_0"]
    assert (decode["ratio"], decode["range"], decode["passed"], decode["rounds"]) == (
        2.0,
        [1.0, 3.0],
        True,
        3,
    )
    prefill = found["prefill 512", "best of llama.cpp Q4_0, transformers bf16"]
    assert (prefill["ratio"], prefill["passed"]) == (1.5, False)


def test_bandwidth_target_uses_the_share_of_the_limit() -> None:
    figures = {"decode_1": {"int8": {0: 20.0, 1: 21.0}}}
    limits = {"decode_1": {"int8": {0: 0.7, 1: 0.86}}}
    (target,) = judge(figures, limits)
    assert (target["against"], target["ratio"], target["passed"]) == (BANDWIDTH, 0.78, False)


def test_targets_name_known_rows_and_contenders() -> None:
    assert {target.row for target in TARGETS} <= set(ROWS)
    assert {row.like for row in ROWS.values()} <= set(ROWS)
    assert all(set(target.others) <= {*PEERS, BANDWIDTH} for target in TARGETS)


def test_tables_show_what_was_measured() -> None:
    start = {"load_s": [1.0], "first_token_s": [2.0], "peak_mib": [1024.0], "anonymous_mib": [512.0]}
    figures = {"decode_1": {"int4": {0: 40.0, 1: 60.0}, "llama-q4_0": {0: 20.0, 1: 20.0}}, "prefill_512": {}}
    result = {
        "machine": {"cpu": "some processor", "memory_gib": 23.5},
        "date": "2026-01-02",
        "threads": 2,
        "shape": {"size": "1.8b", "layers": 24, "hidden": 2048},
        "rounds": 2,
        "notes": ["transformers: not installed"],
        "contenders": {"int4": {"version": "a"}, "llama-q4_0": {"version": "b", "system": "AVX = 1"}},
        "settings": {"llama-q4_0": {"decode_1": {"flash": True, "repack": False}}},
        "read_bytes_per_s": [30e9, 32e9],
        "start": {"int4": start, "llama-q4_0": start},
        "tokens_per_s": figures,
        "share_of_bandwidth": {"decode_1": {"int4": {0: 0.8, 1: 0.9}}},
        "targets": judge(figures, {}),
    }
    for text in (text_of(result), markdown_of(result)):
        assert "50.0 (85 %)" in text
        assert "2.50 x" in text and "pass" in text
        assert "31.0 GB/s (30.0-32.0)" in text
        assert "flash on repack off" in text and "not installed" in text
    assert "| decode, batch 1 | 50.0 (85 %) | 20.0 |" in markdown_of(result)
