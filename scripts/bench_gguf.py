"""A checkpoint as GGUF files for llama.cpp: F16 written here, other types by llama.cpp's own quantizer.

Only what the benchmark needs: architecture ``qwen``, no vocabulary (token ids go in, logits come out). The layout is
that of the GGUF specification, version 3: header, metadata, table of tensors, then the tensors at multiples of 32.
"""

from __future__ import annotations

import io
import re
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from research.qwen.config import QwenConfig
from research.qwen.weights.readers import open_checkpoint

ALIGNMENT = 32
UINT32, FLOAT32, STRING, UINT64 = 4, 6, 8, 10  # types of metadata values
F32, F16 = 0, 1  # types of tensors
FILE_TYPES = {"f16": 1, "q4_0": 2, "q8_0": 7}  # llama.cpp's numbers of whole recipes
BLOCK = 1 << 22
NAMES = {  # of this architecture in llama.cpp
    r"transformer\.wte\.(.*)": r"token_embd.\1",
    r"transformer\.ln_f\.(.*)": r"output_norm.\1",
    r"lm_head\.(.*)": r"output.\1",
    r"transformer\.h\.(\d+)\.ln_1\.(.*)": r"blk.\1.attn_norm.\2",
    r"transformer\.h\.(\d+)\.ln_2\.(.*)": r"blk.\1.ffn_norm.\2",
    r"transformer\.h\.(\d+)\.attn\.c_attn\.(.*)": r"blk.\1.attn_qkv.\2",
    r"transformer\.h\.(\d+)\.attn\.c_proj\.(.*)": r"blk.\1.attn_output.\2",
    r"transformer\.h\.(\d+)\.mlp\.w1\.(.*)": r"blk.\1.ffn_up.\2",
    r"transformer\.h\.(\d+)\.mlp\.w2\.(.*)": r"blk.\1.ffn_gate.\2",
    r"transformer\.h\.(\d+)\.mlp\.c_proj\.(.*)": r"blk.\1.ffn_down.\2",
}


def gguf_name(name: str) -> str:
    """llama.cpp's name of a published tensor."""
    for pattern, replacement in NAMES.items():
        if re.fullmatch(pattern, name):
            return re.sub(pattern, replacement, name)
    raise ValueError(f"no GGUF name for {name}")


def metadata(config: QwenConfig) -> dict[str, tuple[int, Any]]:
    """What llama.cpp reads of a model of this architecture: name -> (type, value)."""
    return {
        "general.architecture": (STRING, "qwen"),
        "general.name": (STRING, "random weights"),
        "general.file_type": (UINT32, FILE_TYPES["f16"]),
        "general.alignment": (UINT32, ALIGNMENT),
        "qwen.context_length": (UINT32, config.max_length),
        "qwen.block_count": (UINT32, config.num_layers),
        "qwen.embedding_length": (UINT32, config.hidden_size),
        "qwen.feed_forward_length": (UINT32, config.intermediate_size),
        "qwen.rope.freq_base": (FLOAT32, config.rotary_emb_base),
        "qwen.rope.dimension_count": (UINT32, config.head_dim),
        "qwen.attention.head_count": (UINT32, config.num_heads),
        "qwen.attention.layer_norm_rms_epsilon": (FLOAT32, config.layer_norm_epsilon),
        "qwen.vocab_size": (UINT32, config.vocab_size),
        "tokenizer.ggml.model": (STRING, "no_vocab"),
    }


def write_gguf(source: Path, target: Path) -> None:
    """A published checkpoint (bfloat16) as F16; vectors in F32, as llama.cpp's own converter has them."""
    if target.exists():
        return
    config, checkpoint = QwenConfig.from_folder(source), open_checkpoint(source)
    partial = target.with_name(target.name + ".partial")
    with partial.open("wb") as out:
        shapes = {name: tuple(checkpoint.shape(name)) for name in checkpoint.names()}
        out.write(_head(config, shapes))
        for name in shapes:
            _pad(out)
            for block in _blocks(checkpoint.read(name), wide=len(shapes[name]) == 1):
                out.write(block.tobytes())
        _pad(out)
    partial.rename(target)


def quantize(source: Path, target: Path, recipe: str, threads: int) -> None:
    """llama.cpp's default recipe of that name (q4_0 stores the output matrix as Q6_K)."""
    if target.exists():
        return
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread, params.ftype = threads, FILE_TYPES[recipe]
    partial = target.with_name(target.name + ".partial")
    if llama_cpp.llama_model_quantize(str(source).encode(), str(partial).encode(), params):
        raise SystemExit(f"error: llama.cpp could not quantize {source} to {recipe}")
    partial.rename(target)


def _head(config: QwenConfig, shapes: dict[str, tuple[int, ...]]) -> bytes:
    values = metadata(config)
    out = io.BytesIO()
    out.write(b"GGUF" + struct.pack("<IQQ", 3, len(shapes), len(values)))
    for key, (kind, value) in values.items():
        out.write(_string(key) + struct.pack("<I", kind))
        out.write(_string(value) if kind == STRING else struct.pack("<f" if kind == FLOAT32 else "<I", value))
    offset = 0
    for name, shape in shapes.items():
        kind = F32 if len(shape) == 1 else F16
        out.write(_string(gguf_name(name)) + struct.pack("<I", len(shape)))
        out.write(struct.pack(f"<{len(shape)}Q", *reversed(shape)) + struct.pack("<IQ", kind, offset))
        size = int(np.prod(shape)) * (4 if kind == F32 else 2)
        offset += -(-size // ALIGNMENT) * ALIGNMENT
    return out.getvalue()


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _pad(out: BinaryIO) -> None:
    out.write(b"\0" * (-out.tell() % ALIGNMENT))


def _blocks(bits: NDArray[np.uint16], *, wide: bool) -> Iterator[NDArray[Any]]:
    flat = bits.reshape(-1)
    for start in range(0, flat.size, BLOCK):
        values = (flat[start : start + BLOCK].astype(np.uint32) << 16).view(np.float32)
        yield values if wide else values.astype(np.float16)


def main() -> None:
    """SOURCE_FOLDER TARGET_FOLDER RECIPE...: write TARGET_FOLDER/RECIPE.gguf for each."""
    source, folder, recipes = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    write_gguf(source, folder / "f16.gguf")
    for recipe in recipes:
        if recipe != "f16":
            quantize(folder / "f16.gguf", folder / f"{recipe}.gguf", recipe, 2)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    main()
