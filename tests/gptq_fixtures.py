"""Golden data of quantised models: the compact copies under fixtures/, or the full data where QWEN_GOLDEN says.

``gptq_folder("int4")`` is a folder as published (config, quantize_config, safetensors), read only. In the compact
copies the rows of wte that no golden run reads are zero, and lm_head holds the rows ``kept_ids`` only: compare
``logits[:, kept_ids]`` of a model with golden ``logits``; greedy texts come out as golden. How they are made:
scripts/make_quant_fixtures.py.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import json
import os
import shutil
import tarfile
import tempfile
from pathlib import Path

import numpy as np

from tests.fixtures_util import FIXTURES

VARIANTS = ("int4", "int4_desc_act", "int4_asym_g64", "int8")
SCHEMES = dict(zip(VARIANTS, ("int4", "int4", "int4-g64-asym", "int8-g128"), strict=True))
Arrays = dict[str, np.ndarray]


def gptq_folder(variant: str) -> Path:
    """Folder of one of VARIANTS: an official Int4 or Int8 checkpoint in small. Copy it to change something."""
    return _folder(f"gptq/{variant}", f"gptq/{variant}.tar.xz")


def gptq_golden(variant: str) -> Arrays:
    """golden.npz: ids, logits (its columns are ``kept_ids``), greedyN_ids, greedyN_prompt, greedyN_margin."""
    return _golden(gptq_folder(variant) / "golden.npz")


def gptq_dequant(variant: str) -> dict[str, str]:
    """Module name -> SHA-256 of its dequantised float32 weights (out, in), for two modules of layer 0."""
    folder = gptq_folder(variant)
    if (folder / "dequant.json").exists():
        hashes: dict[str, str] = json.loads((folder / "dequant.json").read_text())
        return hashes
    full = _load(folder / "dequant_h0.npz")
    return {
        name.removesuffix("__dequant"): sha256(a) for name, a in full.items() if name.endswith("__dequant")
    }


def kv_int8_folder() -> Path:
    """Folder of the model whose cache is quantised as published."""
    return _kv_int8() / "model"


def kv_int8_golden() -> Arrays:
    """golden.npz of that model; the columns of logits are ``kept_ids``."""
    return _golden(_kv_int8() / "golden.npz")


def kv_int8_quantizer() -> dict[str, Arrays]:
    """Case -> x, q, scale, zero, dequant of the published quantiser."""
    cases: dict[str, Arrays] = {}
    for name, array in _load(_kv_int8() / "quantizer.npz").items():
        case, _, part = name.partition("__")
        cases.setdefault(case, {})[part] = array
    return cases


def sha256(array: np.ndarray) -> str:
    """Of an array's bytes in C order."""
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def _kv_int8() -> Path:
    return _folder("kv_int8", "kv_int8/kv_int8.tar.xz")


@functools.cache
def _folder(full: str, packed: str) -> Path:
    given = os.environ.get("QWEN_GOLDEN")
    if given:
        return Path(given) / full
    folder = Path(tempfile.mkdtemp(prefix=f"qwen-fixture-{Path(full).name}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    with tarfile.open(FIXTURES / packed) as archive:
        archive.extractall(folder, filter="data")
    return folder


def _golden(path: Path) -> Arrays:
    arrays = _load(path)
    if "kept_ids" not in arrays:
        vocab = next(value.shape[-1] for name, value in arrays.items() if name.endswith("logits"))
        arrays["kept_ids"] = np.arange(vocab)
    return arrays


def _load(path: Path) -> Arrays:
    with np.load(path) as stored:
        return {name: stored[name] for name in stored.files}
