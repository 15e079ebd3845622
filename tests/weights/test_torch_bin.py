"""torch .bin files: read through weights_only, refused when they carry code."""

from __future__ import annotations

import builtins
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from research.qwen.errors import CheckpointError
from research.qwen.weights.readers import open_checkpoint
from research.qwen.weights.torch_file import read_torch
from tests.fixtures_util import model_folder
from tests.weights.tools import copy_model

pytestmark = pytest.mark.torch


class Bomb:
    """Unpickling it writes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.target,))


@pytest.mark.parametrize("old_format", [False, True])
def test_values_are_torchs(old_format: bool, tmp_path: Path) -> None:
    state = {
        "a": torch.randn(3, 4).to(torch.bfloat16),
        "b": torch.randn(7).to(torch.float16),
        "c": torch.randn(4, 6).T,  # a view with other strides
        "d": torch.arange(5),
    }
    torch.save(state, tmp_path / "x.bin", _use_new_zipfile_serialization=not old_format)
    found = read_torch(tmp_path / "x.bin")
    for name, tensor in state.items():
        array = found[name].read()
        want = tensor.view(torch.int16).numpy().view(np.uint16) if name == "a" else tensor.numpy()
        assert np.array_equal(array, want)
        for _ in range(2):  # blocks let go of the mapped pages: they must come back
            assert np.array_equal(np.concatenate(list(found[name].blocks())), want.ravel())
        assert np.array_equal(found[name].read(), want)


@pytest.mark.parametrize("old_format", [False, True])
def test_a_malicious_pickle_is_refused_and_not_run(old_format: bool, tmp_path: Path) -> None:
    sentinel = tmp_path / "was-run"
    state = {"transformer.wte.weight": torch.zeros(2), "x": Bomb(sentinel)}
    torch.save(state, tmp_path / "evil.bin", _use_new_zipfile_serialization=not old_format)
    with pytest.raises(CheckpointError, match=r"evil\.bin is refused: it holds code"):
        open_checkpoint(tmp_path / "evil.bin")
    assert not sentinel.exists()


def test_a_bare_malicious_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    sentinel = tmp_path / "was-run"
    (tmp_path / "evil.bin").write_bytes(pickle.dumps(Bomb(sentinel)))
    with pytest.raises(CheckpointError, match=r"evil\.bin"):
        open_checkpoint(tmp_path / "evil.bin")
    assert not sentinel.exists()


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_truncated(share: float, tmp_path: Path) -> None:
    folder = copy_model("bin_old_fp16", tmp_path / "m")
    path = folder / "pytorch_model.bin"
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(CheckpointError, match="pytorch_model.bin") as caught:
        open_checkpoint(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [b"garbage", b"PK\x03\x04" + b"x" * 100, bytes(1000), b"\x80\x02}q\x00."])
def test_garbage(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"x\.bin"):
        open_checkpoint(tmp_path / "x.bin")


def test_something_else_than_a_dictionary_of_tensors(tmp_path: Path) -> None:
    torch.save([torch.zeros(2)], tmp_path / "x.bin")
    with pytest.raises(CheckpointError, match="plain dictionary"):
        open_checkpoint(tmp_path / "x.bin")


def test_without_torch_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def blocked(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "torch":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", blocked)
    with pytest.raises(CheckpointError, match=r'pip install "\.\[convert\]"'):
        open_checkpoint(model_folder("bin_old_fp16"))
