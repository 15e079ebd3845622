"""Make the small fixtures of fine-tuning from the full golden data: the model that is trained, and its LoRA adapter.

    python scripts/make_finetune_fixtures.py --golden DIR [--out tests/fixtures]

* finetune/model.tar.xz: the float32 model. Rows of wte that no golden run reads are zero (they have no gradient, and
  weight decay keeps them zero); all else is whole, lm_head too, since a loss needs every row.
* lora/default_targets: the adapter as it is. golden.npz has every 8th column of the logits, with the winners of the
  whole rows as ``…_argmax``, and every 4th row of the merged matrix.
"""

from __future__ import annotations

import argparse
import io
import lzma
import shutil
import tarfile
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save

VOCAB_STRIDE, ROW_STRIDE = 8, 4
WEIGHTS, TABLE = "model.safetensors", "transformer.wte.weight"
ADAPTERS = ("default_targets", "attn_only_c_proj", "with_embeddings")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--golden", type=Path, required=True, help="folder of the full golden data")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).resolve().parents[1] / "tests" / "fixtures"
    )
    args = parser.parse_args(argv)
    pack_model(args.golden, args.out / "finetune")
    copy_adapter(args.golden / "lora" / ADAPTERS[0], args.out / "lora" / ADAPTERS[0])
    return 0


def read_ids(golden: Path) -> np.ndarray:
    """Every token id that a golden run reads."""
    found = [np.load(golden / "finetune" / "loss.npz")["input_ids"].ravel()]
    for name in ADAPTERS:
        arrays = np.load(golden / "lora" / name / "golden.npz")
        found += [arrays["ids"], arrays["greedy_ids"]]
    return np.unique(np.concatenate(found))


def pack_model(golden: Path, out: Path) -> None:
    """The model's folder as one archive."""
    source = golden / "finetune" / "model"
    tensors = load_file(source / WEIGHTS)
    table = np.zeros_like(tensors[TABLE])
    ids = read_ids(golden)
    ids = ids[ids < len(table)]
    table[ids] = tensors[TABLE][ids]
    files = {path.name: path.read_bytes() for path in sorted(source.glob("*.json"))}
    files[WEIGHTS] = save({**tensors, TABLE: table}, {"format": "pt"})
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    out.mkdir(parents=True, exist_ok=True)
    packed = lzma.compress(stream.getvalue(), preset=9 | lzma.PRESET_EXTREME)
    (out / "model.tar.xz").write_bytes(packed)


def copy_adapter(source: Path, out: Path) -> None:
    """The adapter's files and its reduced golden data."""
    out.mkdir(parents=True, exist_ok=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(source / name, out / name)
    kept = {"vocab_stride": np.asarray(VOCAB_STRIDE), "row_stride": np.asarray(ROW_STRIDE)}
    for name, array in np.load(source / "golden.npz").items():
        kept[name] = array
        if name.endswith("logits"):
            kept[name] = np.ascontiguousarray(array[:, ::VOCAB_STRIDE])
            kept[f"{name}_argmax"] = array.argmax(-1).astype(np.int32)
        elif name == "merged_h0_c_attn_weight":
            kept[name] = np.ascontiguousarray(array[::ROW_STRIDE])
    np.savez_compressed(out / "golden.npz", **kept)


if __name__ == "__main__":
    raise SystemExit(main())
