"""``quantize`` and what becomes of its output; official Int4 / Int8 folders through convert_weight.py and back."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from research.qwen.cli import main
from research.qwen.cli.convert import main as convert
from research.qwen.config import QwenConfig
from research.qwen.model import quantise
from research.qwen.model.quantise import Plan, Source, quantised_source
from research.qwen.quant.schemes import quantize_rows
from research.qwen.run_qwen_7b import check_checkpoint
from research.qwen.settings import load_settings
from research.qwen.weights.readers import open_checkpoint
from research.qwen.weights.tensors import FileTensor
from tests.fixtures_util import model_folder
from tests.gptq_fixtures import SCHEMES, VARIANTS, gptq_dequant, gptq_folder, sha256

# Not for the fast run: loads and writes whole checkpoints. MindSpore itself is not needed.
pytestmark = pytest.mark.mindspore

QKV = "transformer.h.0.attn.c_attn"
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def numpy_quantiser(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests compile nothing; that the C++ quantiser gives the same bits is tested elsewhere."""
    monkeypatch.setattr(quantise, "native_quantiser", lambda backend, threads: quantize_rows)


def opened(path: Path, *plan: str | None) -> Source:
    folder = path if path.is_dir() else path.parent
    return quantised_source(
        open_checkpoint(path), QwenConfig.from_folder(folder), Plan(*plan), progress=False
    )


def same(a: Source, b: Source) -> bool:
    assert sorted(a.names()) == sorted(b.names()) and a.formats == b.formats
    return all(
        a.dtype(name) == b.dtype(name) and np.array_equal(a.read(name), b.read(name)) for name in a.names()
    )


def fails(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """The one line on standard error of a command that exits with 2."""
    assert main([str(arg) for arg in argv]) == 2
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and not captured.out, captured.err
    return lines[0]


@pytest.mark.parametrize(
    "plan", [("int4",), ("int8",), ("int4-g64-asym", "bfloat16", "int8"), ("int8-g128", "int4")]
)
@pytest.mark.parametrize("model", ["st_new_bf16", "bin_old_fp16"])
def test_writes_what_loading_would_make(tmp_path: Path, model: str, plan: tuple[str, ...]) -> None:
    options = ["--dtype", plan[0]]
    for name, value in zip(("--lm-head-dtype", "--embedding-dtype"), plan[1:], strict=False):
        options += [name, value]
    assert main(["quantize", str(model_folder(model)), str(tmp_path / "out"), *options]) == 0
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"qwen.safetensors", "qwen.yaml", "config.json", "generation_config.json"} <= files
    assert not any(".tmp-" in name for name in files)
    written = opened(tmp_path / "out")
    assert same(written, opened(model_folder(model), *plan))
    stored = QwenConfig.from_folder(model_folder(model))
    assert QwenConfig.from_folder(tmp_path / "out").to_llama_dict() == stored.to_llama_dict()
    assert load_settings(tmp_path / "out" / "qwen.yaml").model.hidden_size == stored.hidden_size


def test_packed_arrays_are_mapped_on_whole_cache_lines(tmp_path: Path) -> None:
    assert (
        main(["quantize", str(model_folder("st_new_bf16")), f"{tmp_path}/q.safetensors", "--dtype", "int4"])
        == 0
    )
    checkpoint = open_checkpoint(tmp_path / "q.safetensors")
    view = opened(tmp_path / "q.safetensors")
    assert "lm_head" in view.formats and len(view.formats) == 11
    file = np.memmap(tmp_path / "q.safetensors", np.uint8, "r")
    for name in view.formats:
        tensor = checkpoint.tensor(f"{name}.weight")
        assert isinstance(tensor, FileTensor) and tensor._extents[0].offset % 64 == 0
        array = view.read(f"{name}.weight")
        assert not array.flags.owndata and not array.flags.writeable
        start = tensor._extents[0].offset
        assert np.array_equal(array.reshape(-1), file[start : start + array.nbytes])
    for name in view.names():
        assert view.read(name).ctypes.data % 4 == 0 or view.dtype(name) in ("uint8", "float16", "bfloat16")


def test_says_what_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["quantize", str(model_folder("st_new_bf16")), str(tmp_path / "out"), "--dtype", "int4-g128"]
    assert main(argv) == 0
    captured = capsys.readouterr()
    assert f"wrote {tmp_path / 'out' / 'qwen.safetensors'}: 30 tensors" in captured.out
    assert "bfloat16, int4" in captured.out and captured.err == ""
    assert main([*argv, "--force", "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")


def test_info_describes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["quantize", str(model_folder("st_new_bf16")), str(tmp_path / "out"), "--dtype", "int4"]
    assert main([*argv, "--lm-head-dtype", "int8", "--quiet"]) == 0
    for path, formats in (
        (tmp_path / "out", "bfloat16, int4, int8"),
        (gptq_folder("int8"), "float16, int8-g128"),
    ):
        assert main(["info", str(path)]) == 0
        assert f"stored as     {formats}: " in capsys.readouterr().out


def test_the_runner_accepts_it(tmp_path: Path) -> None:
    argv = ["quantize", str(model_folder("st_new_bf16")), str(tmp_path / "out"), "--dtype", "int4"]
    assert main([*argv, "--quiet"]) == 0
    settings = load_settings(tmp_path / "out" / "qwen.yaml")
    assert check_checkpoint(tmp_path / "out" / "qwen.safetensors", settings) == {}


def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = model_folder("st_new_bf16"), tmp_path / "out"
    assert "int5" in fails(capsys, "quantize", source, out, "--dtype", "int5")
    assert "bfloat16" in fails(capsys, "quantize", source, out, "--dtype", "bfloat16")
    assert "fp8" in fails(capsys, "quantize", source, out, "--dtype", "int4", "--lm-head-dtype", "fp8")
    assert "--threads" in fails(capsys, "quantize", source, out, "--dtype", "int4", "--threads", 0)
    assert "nowhere" in fails(capsys, "quantize", tmp_path / "nowhere", out, "--dtype", "int4")
    assert ".safetensors" in fails(capsys, "quantize", source, tmp_path / "x.ckpt", "--dtype", "int4")
    assert not out.exists() and not list(tmp_path.iterdir())


def test_does_not_overwrite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "q.safetensors"
    target.write_bytes(b"mine")
    argv = ["quantize", model_folder("st_new_bf16"), target, "--dtype", "int8"]
    assert "--force" in fails(capsys, *argv)
    assert target.read_bytes() == b"mine" and [path.name for path in tmp_path.iterdir()] == ["q.safetensors"]
    assert main([*map(str, argv), "--force"]) == 0
    assert opened(target).format(QKV) == "int8"
    capsys.readouterr()
    assert "the checkpoint to read" in fails(capsys, "quantize", target, target, "--dtype", "int8", "--force")


def test_no_space(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    full = os.statvfs_result((4096, 4096, 10, 1, 1, 10, 10, 10, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda path: full)
    message = fails(capsys, "quantize", model_folder("st_new_bf16"), tmp_path / "out", "--dtype", "int4")
    assert "not enough space" in message and not list(tmp_path.iterdir())


def test_a_failure_halfway_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(rows: np.ndarray, scheme: object, arrays: object, first: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(quantise, "native_quantiser", lambda backend, threads: full)
    message = fails(capsys, "quantize", model_folder("st_new_bf16"), tmp_path / "out", "--dtype", "int4")
    assert "disk full" in message and not list(tmp_path.iterdir())


def test_a_quantised_checkpoint_is_not_quantised_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["quantize", str(model_folder("st_new_bf16")), str(tmp_path / "a"), "--dtype", "int8"]) == 0
    capsys.readouterr()
    message = fails(capsys, "quantize", tmp_path / "a", tmp_path / "b", "--dtype", "int4")
    assert "already quantised as int8" in message


def test_damaged_descriptions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors import safe_open
    from safetensors.numpy import save_file

    assert main(["quantize", str(model_folder("bin_old_fp16")), str(tmp_path / "a"), "--dtype", "int4"]) == 0
    capsys.readouterr()
    path = tmp_path / "a" / "qwen.safetensors"
    with safe_open(path, "np") as file:
        formats = json.loads(file.metadata()["quantization"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    wrong_scheme, no_matrix = {**formats, QKV: "int4-g64"}, {**formats, "transformer.h.9.mlp.w1": "int4"}
    cases = {
        "{": "damaged",
        "[]": "damaged",
        json.dumps({**formats, QKV: "int3"}): "int3",
        json.dumps(wrong_scheme): "scales",
        json.dumps(no_matrix): "h.9.mlp.w1 is not one",
        json.dumps({}): "quantised",
    }
    for text, word in cases.items():
        save_file(tensors, path, {"quantization": text})
        message = fails(capsys, "quantize", path, tmp_path / "b", "--dtype", "int4")
        assert word in message, message


@pytest.mark.parametrize("variant", VARIANTS)
def test_official_checkpoints_there_and_back(
    tmp_path: Path, variant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, ours, back = gptq_folder(variant), tmp_path / "ours" / "q.safetensors", tmp_path / "back"
    assert convert(["--torch_ckpt_dir", str(folder), "--mindspore_ckpt_path", str(ours)]) == 0
    assert opened(ours).format(QKV) == SCHEMES[variant]
    assert same(opened(ours), opened(folder))
    argv = ["--reverse", "--mindspore_ckpt_path", str(ours), "--torch_ckpt_dir", str(back)]
    assert convert([*argv, "--max_shard_size", "300KB"]) == 0
    assert (back / "model.safetensors.index.json").exists()
    assert capsys.readouterr().err == ""
    first, second = open_checkpoint(folder), open_checkpoint(back)
    assert sorted(first.names()) == sorted(second.names())
    for name in first.names():
        assert first.dtype(name) == second.dtype(name) and np.array_equal(
            first.read(name), second.read(name)
        ), name
    for file, key in (("config.json", "quantization_config"), ("quantize_config.json", "bits")):
        given, written = (json.loads((where / file).read_text()) for where in (folder, back))
        assert given[key] == written[key]
    assert QwenConfig.from_folder(back).to_llama_dict() == QwenConfig.from_folder(folder).to_llama_dict()


def test_the_door_converts_official_checkpoints(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "convert_weight.py"), "--torch_ckpt_dir", str(gptq_folder("int8"))]
        + ["--mindspore_ckpt_path", str(tmp_path / "q.safetensors")],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert "int8-g128" in done.stdout
    assert opened(tmp_path / "q.safetensors").format(QKV) == "int8-g128"


def test_dequantised_conversions(tmp_path: Path) -> None:
    folder, config = gptq_folder("int4_desc_act"), QwenConfig.from_folder(gptq_folder("int4_desc_act"))
    argv = ["--dtype", "float32", "--torch_ckpt_dir", str(folder)]
    assert convert([*argv, "--mindspore_ckpt_path", str(tmp_path / "plain.ckpt")]) == 0
    assert (
        convert(["--torch_ckpt_dir", str(folder), "--mindspore_ckpt_path", str(tmp_path / "q.safetensors")])
        == 0
    )
    argv = ["--reverse", "--dtype", "float32", "--mindspore_ckpt_path", str(tmp_path / "q.safetensors")]
    assert convert([*argv, "--torch_ckpt_dir", str(tmp_path / "plain")]) == 0
    for path in (tmp_path / "plain.ckpt", tmp_path / "plain"):
        checkpoint = open_checkpoint(path)
        assert set(checkpoint.names()) == set(quantise.expected(config))
        for name, wanted in gptq_dequant("int4_desc_act").items():
            assert sha256(checkpoint.read(f"{name}.weight")) == wanted
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())


def test_own_int4_as_an_autogptq_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = tmp_path / "plain"
    shutil.copytree(model_folder("st_new_bf16"), plain)
    argv = ["--dtype", "int4", "--lm-head-dtype", "bfloat16"]
    assert main(["quantize", str(plain), str(tmp_path / "a"), *argv]) == 0
    back = [
        "--reverse",
        "--mindspore_ckpt_path",
        str(tmp_path / "a"),
        "--torch_ckpt_dir",
        str(tmp_path / "gptq"),
    ]
    assert convert(back) == 0
    first, second = opened(tmp_path / "a", "float32"), opened(tmp_path / "gptq", "float32")
    assert same(first, second)
    assert main(["quantize", str(plain), str(tmp_path / "b"), "--dtype", "int4"]) == 0
    capsys.readouterr()
    assert (
        convert(
            ["--reverse", "--mindspore_ckpt_path", str(tmp_path / "b"), "--torch_ckpt_dir", f"{tmp_path}/c"]
        )
        == 2
    )
    assert "lm_head is int" in capsys.readouterr().err and not (tmp_path / "c").exists()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_integers_are_not_rounded_to_half_precision(
    tmp_path: Path, dtype: str, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [
        "--torch_ckpt_dir",
        str(gptq_folder("int4")),
        "--mindspore_ckpt_path",
        str(tmp_path / "q.safetensors"),
    ]
    assert convert([*argv, "--dtype", dtype]) == 2
    assert "--dtype float32" in capsys.readouterr().err
    assert convert([*argv[:2], "--mindspore_ckpt_path", str(tmp_path / "q.ckpt")]) == 2
    assert ".safetensors" in capsys.readouterr().err and not list(tmp_path.iterdir())
