"""Make the small fixtures of quantised models from the full golden data.

    python scripts/make_quant_fixtures.py --golden DIR [--out tests/fixtures]

The four GPTQ checkpoints keep every quantised tensor, every config and every greedy text; the model with the int8 KV
cache keeps its layers. What is reduced (tests.gptq_fixtures reads the result):

* wte and lm_head, float16 or float32 and random, are most of the bytes: rows that no golden run reads are zero (a zero
  row of lm_head gives logit 0). ``kept_ids`` in golden.npz are the rows left in lm_head: every id of a golden text,
  every winner of a golden row of logits, and some others. Logits hold these columns only.
* dequantised weights, exact by definition, are kept as SHA-256 of their float32 bytes (dequant.json).
* left out: ``logits_dequantised_in_float16`` and ``float64_step_logits``, of which no test is made.

The pruning is proved here as far as it can be without the model: in every row of golden logits the winner is kept and
above zero; the tests repeat the greedy texts.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import lzma
import tarfile
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save

VARIANTS = ("int4", "int4_desc_act", "int4_asym_g64", "int8")
DROPPED = ("logits_dequantised_in_float16", "float64_step_logits")
HEAD_STRIDE = {"gptq": 5, "kv_int8": 10}
Arrays = dict[str, np.ndarray]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--golden", type=Path, required=True, help="folder of the full golden data")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).resolve().parents[1] / "tests" / "fixtures"
    )
    args = parser.parse_args(argv)
    (args.out / "gptq").mkdir(parents=True, exist_ok=True)
    (args.out / "kv_int8").mkdir(parents=True, exist_ok=True)
    for name in VARIANTS:
        source = args.golden / "gptq" / name
        golden = _load(source / "golden.npz")
        kept = _kept(golden, HEAD_STRIDE["gptq"])
        files = _model(source, golden, kept)
        files["golden.npz"] = _npz(_reduced(golden, kept))
        dequant = _load(source / "dequant_h0.npz")
        hashes = {
            key.removesuffix("__dequant"): hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
            for key, value in dequant.items()
            if key.endswith("__dequant")
        }
        files["dequant.json"] = json.dumps(hashes, indent=1).encode()
        _pack(files, args.out / "gptq" / f"{name}.tar.xz")
    source = args.golden / "kv_int8"
    golden = _load(source / "golden.npz")
    kept = _kept(golden, HEAD_STRIDE["kv_int8"])
    _pack(
        {
            **{f"model/{name}": data for name, data in _model(source / "model", golden, kept).items()},
            "golden.npz": _npz(_reduced(golden, kept)),
            "quantizer.npz": _npz(_load(source / "quantizer.npz")),
        },
        args.out / "kv_int8" / "kv_int8.tar.xz",
    )
    for folder in ("gptq", "kv_int8"):
        for path in sorted((args.out / folder).iterdir()):
            print(f"{path.stat().st_size / 1e6:6.2f} MB  {path}")
    return 0


def _ids(golden: Arrays) -> set[int]:
    return {int(i) for name, value in golden.items() if name.endswith("ids") for i in value.ravel()}


def _kept(golden: Arrays, stride: int) -> np.ndarray:
    """Rows to keep in lm_head."""
    logits = [value for name, value in golden.items() if name.endswith("logits") and name not in DROPPED]
    vocab = logits[0].shape[-1]
    kept = _ids(golden) | set(range(0, vocab, stride))
    for value in logits:
        kept |= {int(i) for i in value.argmax(-1).ravel()}
        assert (value.max(-1) > 0.5).all(), "a zero row would win"
    return np.array(sorted(kept), np.int32)


def _reduced(golden: Arrays, kept: np.ndarray) -> Arrays:
    out = {"kept_ids": kept}
    for name, value in golden.items():
        if name not in DROPPED:
            out[name] = np.ascontiguousarray(value[..., kept]) if name.endswith("logits") else value
    return out


def _model(source: Path, golden: Arrays, kept: np.ndarray) -> dict[str, bytes]:
    """Files of a model folder, its two large matrices pruned."""
    files: dict[str, bytes] = {}
    rows = {"transformer.wte.weight": np.array(sorted(_ids(golden))), "lm_head.weight": kept}
    for path in sorted(source.iterdir()):
        if path.suffix == ".safetensors":
            tensors = load_file(path)
            for name in set(rows) & set(tensors):
                pruned = np.zeros_like(tensors[name])
                pruned[rows[name]] = tensors[name][rows[name]]
                tensors[name] = pruned
            files[path.name] = save(tensors, {"format": "pt"})
        elif path.suffix == ".json":
            files[path.name] = path.read_bytes()
    return files


def _load(path: Path) -> Arrays:
    with np.load(path) as stored:
        return {name: stored[name] for name in stored.files}


def _npz(arrays: Arrays) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, **arrays)  # the archive around it compresses
    return stream.getvalue()


def _pack(files: dict[str, bytes], target: Path) -> None:
    """A .tar.xz whose bytes depend on the contents only."""
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 0, "lp": 2, "pb": 2}]
    with (
        lzma.open(target, "wb", format=lzma.FORMAT_XZ, filters=filters) as stream,
        tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as archive,
    ):
        for name, data in sorted(files.items()):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


if __name__ == "__main__":
    raise SystemExit(main())
