"""convert_weight.py: there and back bit by bit, number formats, companions, and what it refuses."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from research.qwen.config import QwenConfig
from research.qwen.errors import CheckpointError
from research.qwen.settings import load_settings
from research.qwen.weights import outputs
from research.qwen.weights.command import main, parse_size
from research.qwen.weights.dtypes import convert_block
from research.qwen.weights.readers import open_checkpoint
from tests.fixtures_util import model_folder
from tests.weights.tools import (
    Tensors,
    assert_same,
    copy_model,
    edit_json,
    single_file_model,
    tensors_of,
    write,
)

ROOT = Path(__file__).resolve().parents[2]
MODELS = ("st_new_bf16", "bin_old_fp16", "bin_sharded_fp32", "longctx")


def forward(source: Path, target: Path | str, *more: str) -> int:
    """The forward direction."""
    return main(["--torch_ckpt_dir", str(source), "--mindspore_ckpt_path", str(target), *more])


def backward(source: Path, target: Path | str, *more: str) -> int:
    """The reverse direction."""
    return main(["--reverse", "--mindspore_ckpt_path", str(source), "--torch_ckpt_dir", str(target), *more])


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr."""
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1, err
    return err


def files(folder: Path) -> dict[str, bytes]:
    """Everything below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
@pytest.mark.parametrize("model", MODELS)
def test_there_and_back_is_bit_identical(model: str, suffix: str, tmp_path: Path) -> None:
    source, target = model_folder(model), tmp_path / "new" / f"qwen.{suffix}"
    assert forward(source, target) == 0
    assert_same(tensors_of(target), tensors_of(source))
    assert backward(target, tmp_path / "back") == 0
    assert_same(tensors_of(tmp_path / "back"), tensors_of(source))
    config = QwenConfig.from_folder(source)
    back = QwenConfig.from_folder(tmp_path / "back")
    assert back.torch_dtype == open_checkpoint(source).dtype("lm_head.weight")
    assert vars(back) | {"torch_dtype": config.torch_dtype} == vars(config)
    for name in ("generation_config.json", "tokenizer_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes()
    raw = json.loads((tmp_path / "back" / "config.json").read_text())
    assert "hidden_size" in raw and "n_embd" not in raw
    assert not list(tmp_path.rglob("*tmp*"))


def test_the_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert forward(model_folder("st_new_bf16"), tmp_path / name / "q.ckpt") == 0
        assert forward(model_folder("st_new_bf16"), tmp_path / name / "q2.safetensors") == 0
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_reverse_in_shards(tmp_path: Path) -> None:
    source = model_folder("st_new_bf16")
    assert forward(source, tmp_path / "q.safetensors") == 0
    assert backward(tmp_path / "q.safetensors", tmp_path / "back", "--max_shard_size", "150KB") == 0
    shards = sorted(path.name for path in (tmp_path / "back").glob("model-*"))
    assert shards == [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(a.nbytes for _, a in tensors_of(source).values())
    assert_same(tensors_of(tmp_path / "back"), tensors_of(source))
    # Again with --force and one shard: nothing of the first run may stay behind.
    assert backward(tmp_path / "q.safetensors", tmp_path / "back", "--force") == 0
    assert not list((tmp_path / "back").glob("model-*")) and not list((tmp_path / "back").glob("*index*"))
    assert_same(tensors_of(tmp_path / "back"), tensors_of(source))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("model", ["st_new_bf16", "bin_old_fp16", "bin_sharded_fp32"])
def test_dtype(model: str, dtype: str, tmp_path: Path) -> None:
    assert forward(model_folder(model), tmp_path / "q.safetensors", "--dtype", dtype) == 0
    want = {
        name: (dtype, convert_block(array, stored, dtype)[0].reshape(array.shape))
        for name, (stored, array) in tensors_of(model_folder(model)).items()
    }
    assert_same(tensors_of(tmp_path / "q.safetensors"), want)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == dtype


def test_overflow_into_float16_is_an_error_that_names_the_tensor(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def grow(tensors: Tensors) -> Tensors:
        bits = tensors["transformer.h.1.mlp.w1.weight"][1].copy()
        bits[3, 5:8] = 0x4800  # 131072
        return tensors | {"transformer.h.1.mlp.w1.weight": ("bfloat16", bits)}

    folder = single_file_model(tmp_path / "m", grow)
    assert forward(folder, tmp_path / "out" / "q.ckpt", "--dtype", "float16") == 2
    said = error_of(capsys)
    assert (
        "transformer.h.1.mlp.w1.weight: 3 of 11264 values" in said and "--dtype bfloat16 or float32" in said
    )
    assert not (tmp_path / "out").exists()
    assert forward(folder, tmp_path / "out" / "q.ckpt", "--dtype", "float32") == 0


def test_the_yaml_runs_the_checkpoint(tmp_path: Path) -> None:
    folder = copy_model("st_new_bf16", tmp_path / "m")
    edit_json(folder / "generation_config.json", chat_format="chatml", repetition_penalty=1.1)
    (folder / "qwen.tiktoken").write_text("".join(f"eA== {i}\n" for i in range(300)))
    assert forward(folder, tmp_path / "out" / "demo.ckpt") == 0
    settings = load_settings(tmp_path / "out" / "demo.yaml")
    assert settings.model == QwenConfig.from_folder(folder)
    assert settings.load_checkpoint == tmp_path / "out" / "demo.ckpt"
    assert settings.vocab_file == tmp_path / "out" / "qwen.tiktoken"
    # The control tokens follow the 300 ranks of this vocabulary.
    assert settings.eos_token_id == (302, 301, 1023, 300)
    assert (settings.chat_format, settings.do_sample, settings.top_k, settings.top_p) == (
        "chatml",
        True,
        0,
        0.8,
    )
    assert (settings.repetition_penalty, settings.block_size, settings.num_blocks) == (1.1, 16, 2048)
    assert (settings.compute_dtype, settings.param_init_type, settings.device_target) == (
        "float32",
        "float32",
        "CPU",
    )


@pytest.mark.parametrize("model", MODELS)
def test_every_yaml_is_one_the_settings_accept(model: str, tmp_path: Path) -> None:
    assert forward(model_folder(model), tmp_path / "q.ckpt") == 0
    assert load_settings(tmp_path / "q.yaml").model == QwenConfig.from_folder(model_folder(model))


def test_a_published_chat_model_ends_at_its_three_ids(tmp_path: Path) -> None:
    assert forward(model_folder("full_vocab_bf16"), tmp_path / "q.safetensors") == 0
    assert load_settings(tmp_path / "q.yaml").eos_token_id == (151645, 151644, 151643)


@pytest.mark.parametrize("made", [True, False])
def test_a_folder_as_target(made: bool, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if made:
        out.mkdir()
    assert forward(model_folder("st_new_bf16"), out if made else f"{out}/") == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "config.json",
        "generation_config.json",
        "qwen.safetensors",
        "qwen.yaml",
        "tokenizer_config.json",
    ]
    assert_same(tensors_of(out), tensors_of(model_folder("st_new_bf16")))


def test_existing_files_are_kept_without_force(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "q.ckpt"
    assert forward(model_folder("st_new_bf16"), target) == 0
    before = files(tmp_path)
    capsys.readouterr()
    assert forward(model_folder("st_new_bf16"), target, "--dtype", "float32") == 2
    assert "q.ckpt exists" in error_of(capsys)
    (tmp_path / "q.ckpt").unlink()
    (tmp_path / "q.yaml").write_text("edited by hand")
    assert forward(model_folder("st_new_bf16"), target) == 2
    assert "q.yaml exists" in error_of(capsys)
    assert (tmp_path / "q.yaml").read_text() == "edited by hand"
    assert forward(model_folder("st_new_bf16"), target, "--force") == 0
    assert files(tmp_path) == before


def test_a_second_format_of_the_same_model_may_lie_beside_the_first(tmp_path: Path) -> None:
    assert forward(model_folder("st_new_bf16"), tmp_path / "a.ckpt") == 0
    assert forward(model_folder("st_new_bf16"), tmp_path / "b.safetensors", "--dtype", "float32") == 0


def test_another_model_may_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert forward(model_folder("st_new_bf16"), tmp_path / "a.ckpt") == 0
    assert forward(model_folder("longctx"), tmp_path / "b.ckpt") == 2
    assert "config.json exists" in error_of(capsys)
    assert not (tmp_path / "b.ckpt").exists()


def test_a_folder_in_use_is_refused_by_reverse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert forward(model_folder("st_new_bf16"), tmp_path / "q.ckpt") == 0
    (tmp_path / "back").mkdir()
    (tmp_path / "back" / "mine.txt").write_text("x")
    capsys.readouterr()
    assert backward(tmp_path / "q.ckpt", tmp_path / "back") == 2
    assert "exists and is not empty" in error_of(capsys)
    assert backward(tmp_path / "q.ckpt", tmp_path / "back", "--force") == 0
    assert (tmp_path / "back" / "mine.txt").read_text() == "x"
    assert backward(tmp_path / "q.ckpt", tmp_path / "q.yaml") == 2
    assert "is a file" in error_of(capsys)


def test_the_source_is_never_the_target(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = single_file_model(tmp_path / "m")
    assert forward(folder, folder / "model.safetensors", "--force") == 2
    assert "is the checkpoint to read" in error_of(capsys)


def test_tensors_missing_extra_or_of_another_shape(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {
        "1 tensor (transformer.h.1.attn.c_attn.weight) missing": lambda t: {
            name: value for name, value in t.items() if name != "transformer.h.1.attn.c_attn.weight"
        },
        "1 tensor (transformer.h.2.ln_1.weight) unexpected": lambda t: (
            t | {"transformer.h.2.ln_1.weight": t["transformer.h.1.ln_1.weight"]}
        ),
        "lm_head.weight is (1000, 64), expected (1024, 64)": lambda t: (
            t | {"lm_head.weight": ("bfloat16", t["lm_head.weight"][1][:1000])}
        ),
    }
    for i, (said, change) in enumerate(changes.items()):
        folder = single_file_model(tmp_path / f"m{i}", change)
        assert forward(folder, tmp_path / "out" / "q.ckpt") == 2
        assert said in error_of(capsys)
        assert not (tmp_path / "out").exists()


def test_config_missing_or_of_another_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copy_model("st_new_bf16", tmp_path / "m")
    edit_json(folder / "config.json", model_type="qwen2")
    assert forward(folder, tmp_path / "q.ckpt") == 2
    assert "model_type is 'qwen2'" in error_of(capsys)
    (folder / "config.json").write_text("{")
    assert forward(folder, tmp_path / "q.ckpt") == 2
    assert "cannot be read as JSON" in error_of(capsys)
    (folder / "config.json").unlink()
    assert forward(folder, tmp_path / "q.ckpt") == 2
    assert "config.json not found" in error_of(capsys)
    assert forward(tmp_path / "nowhere", tmp_path / "q.ckpt") == 2
    assert "no such checkpoint" in error_of(capsys)


def test_reverse_takes_the_config_from_elsewhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "alone.ckpt", tensors_of(model_folder("st_new_bf16")))
    assert backward(path, tmp_path / "back") == 2
    assert "config.json not found" in error_of(capsys)
    config = model_folder("st_new_bf16") / "config.json"
    assert backward(path, tmp_path / "back", "--config", str(config)) == 0
    assert_same(tensors_of(tmp_path / "back"), tensors_of(model_folder("st_new_bf16")))


def test_a_damaged_ckpt_is_not_converted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert forward(model_folder("st_new_bf16"), tmp_path / "q.ckpt") == 0
    raw = bytearray((tmp_path / "q.ckpt").read_bytes())
    raw[len(raw) // 2] ^= 1
    (tmp_path / "q.ckpt").write_bytes(raw)
    capsys.readouterr()
    assert backward(tmp_path / "q.ckpt", tmp_path / "back") == 2
    assert "checksum" in error_of(capsys)
    assert not (tmp_path / "back").exists()


def test_disk_full_is_told_before_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=100, f_frsize=4096))
    assert forward(model_folder("st_new_bf16"), tmp_path / "out" / "q.ckpt") == 2
    said = error_of(capsys)
    assert "not enough space" in said and "1.5 MB needed, 409.6 kB free" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
def test_disk_full_while_writing(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(outputs.os, "fsync", full)
    assert forward(model_folder("st_new_bf16"), tmp_path / "out" / f"q.{suffix}") == 2
    assert "disk full" in error_of(capsys)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("x")
    for target in (tmp_path / "file" / "q.ckpt", tmp_path / "file" / "deeper" / "q.ckpt"):
        assert forward(model_folder("st_new_bf16"), target) == 2
        assert "cannot write to" in error_of(capsys)

    def denied(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "mkdir", denied)
    assert forward(model_folder("st_new_bf16"), tmp_path / "new" / "q.ckpt") == 2
    assert "cannot write to" in error_of(capsys)


def test_unknown_output_names_and_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert forward(model_folder("st_new_bf16"), tmp_path / "q.pt") == 2
    assert ".ckpt or .safetensors" in error_of(capsys)
    assert (parse_size("10GB"), parse_size("1.5 mb"), parse_size("7")) == (10**10, 1_500_000, 7)
    for text in ("", "0", "GB", "-1", "10XB"):
        with pytest.raises(CheckpointError, match="is not a size"):
            parse_size(text)


@pytest.mark.parametrize("args", [[], ["--reverse"], ["--export", "qwen2"], ["--dtype", "int4"]])
def test_usage_errors(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(args)
    assert caught.value.code == 2


def test_quiet_says_nothing_and_verbose_shows_a_bar(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert forward(model_folder("st_new_bf16"), tmp_path / "a.ckpt", "--quiet") == 0
    assert capsys.readouterr() == ("", "")
    assert forward(model_folder("st_new_bf16"), tmp_path / "b.ckpt", "-v") == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"wrote {tmp_path / 'b.ckpt'}: 19 tensors, 464.3 kB, bfloat16") and "100%" in err


@pytest.mark.slow
def test_the_door_works_from_any_folder(tmp_path: Path) -> None:
    door = [
        sys.executable,
        str(ROOT / "convert_weight.py"),
        "--torch_ckpt_dir",
        str(model_folder("st_new_bf16")),
    ]
    run = subprocess.run(
        [*door, "--mindspore_ckpt_path", "out/q.ckpt"], cwd=tmp_path, capture_output=True, text=True
    )
    assert (run.returncode, run.stderr) == (0, "")
    assert_same(tensors_of(tmp_path / "out" / "q.ckpt"), tensors_of(model_folder("st_new_bf16")))
    again = subprocess.run(
        [*door, "--mindspore_ckpt_path", "out/q.ckpt"], cwd=tmp_path, capture_output=True, text=True
    )
    assert again.returncode == 2 and again.stderr.startswith("error: ") and again.stderr.count("\n") == 1
