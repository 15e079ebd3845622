"""Our .ckpt and MindSpore's own are the same format, in both directions."""

from __future__ import annotations

from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from research.qwen.weights import writers
from research.qwen.weights.ckpt_file import read_ckpt, verify_crc
from research.qwen.weights.command import main
from research.qwen.weights.dtypes import bfloat16_to_float32
from research.qwen.weights.readers import open_checkpoint
from tests.fixtures_util import model_folder
from tests.weights.tools import tensors_of

pytestmark = pytest.mark.mindspore
TYPES = {"float32": ms.float32, "float16": ms.float16, "bfloat16": ms.bfloat16}


def widened(dtype: str, array: np.ndarray) -> np.ndarray:
    """float32 values of stored numbers."""
    return bfloat16_to_float32(array) if dtype == "bfloat16" else array.astype(np.float32)


@pytest.mark.parametrize("chunk", [512 << 20, 1000])
@pytest.mark.parametrize("model", ["st_new_bf16", "bin_old_fp16", "longctx"])
def test_mindspore_loads_ours(
    model: str, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writers, "CKPT_CHUNK", chunk)
    args = ["--torch_ckpt_dir", str(model_folder(model)), "--mindspore_ckpt_path", str(tmp_path / "q.ckpt")]
    assert main(args) == 0
    loaded = ms.load_checkpoint(str(tmp_path / "q.ckpt"), crc_check=True)
    want = tensors_of(model_folder(model))
    assert set(loaded) == set(want)
    for name, (dtype, array) in want.items():
        assert loaded[name].dtype == TYPES[dtype]
        assert np.array_equal(loaded[name].astype(ms.float32).asnumpy(), widened(dtype, array))


def test_mindspore_loads_our_safetensors(tmp_path: Path) -> None:
    args = [
        "--torch_ckpt_dir",
        str(model_folder("st_new_bf16")),
        "--mindspore_ckpt_path",
        str(tmp_path / "q.safetensors"),
    ]
    assert main(args) == 0
    loaded = ms.load_checkpoint(str(tmp_path / "q.safetensors"), format="safetensors")
    for name, (dtype, array) in tensors_of(model_folder("st_new_bf16")).items():
        assert loaded[name].dtype == TYPES[dtype]
        assert np.array_equal(loaded[name].astype(ms.float32).asnumpy(), widened(dtype, array))


@pytest.mark.parametrize("crc", [True, False])
def test_we_read_mindspores(crc: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mindspore.train import serialization

    monkeypatch.setattr(serialization, "SLICE_SIZE", 1)  # in kB: its writer then cuts tensors into parts
    values = np.random.default_rng(0).standard_normal((60, 50)).astype(np.float32)
    saved = [{"name": f"t.{dtype}", "data": Tensor(values).astype(kind)} for dtype, kind in TYPES.items()]
    saved.append({"name": "scalar", "data": Tensor(np.float32(2.5))})
    path = tmp_path / "x.ckpt"
    ms.save_checkpoint(saved, str(path), crc_check=crc)
    found = read_ckpt(path)
    assert set(found) == {entry["name"] for entry in saved}
    for entry in saved:
        tensor = found[entry["name"]]
        assert tensor.shape == entry["data"].shape
        want = entry["data"].astype(ms.float32).asnumpy()
        assert np.array_equal(widened(tensor.dtype, tensor.read()), want)
    assert open_checkpoint(path).shape("scalar") == ()
    assert verify_crc(path) is crc
