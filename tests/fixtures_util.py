"""Where the small golden models are. ``model_folder("st_new_bf16")`` is a folder with config.json and
weights."""

from __future__ import annotations

import atexit
import functools
import shutil
import tarfile
import tempfile
from pathlib import Path

FIXTURES = Path(__file__).resolve().parent / "fixtures"


@functools.cache
def model_folder(name: str) -> Path:
    """Folder of a golden model, unpacked if it is stored compressed: st_new_bf16, bin_old_fp16,
    bin_sharded_fp32, full_vocab_bf16, longctx, finetune. Read only: copy it (shutil.copytree) to change something."""
    stored = golden_folder(name) / "model" if name == "longctx" else golden_folder(name)
    packed = stored / "model.tar.xz"
    if not packed.exists():
        return stored
    folder = Path(tempfile.mkdtemp(prefix=f"qwen-fixture-{name}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    with tarfile.open(packed) as archive:
        archive.extractall(folder, filter="data")
    return folder


def golden_folder(name: str) -> Path:
    """Folder with golden.npz, trace.npz, chat.jsonl of a model (longctx: ntk*_logn*.npz); see
    scripts/make_fixtures.py for what was reduced (``vocab_stride``, ``key_stride``, ``kept_ids``)."""
    return FIXTURES / name if name in ("longctx", "finetune") else FIXTURES / "models" / name
