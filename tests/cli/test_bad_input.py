"""Every mistake a user can make ends in one line on standard error and exit code 2."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from research.qwen.cli import main
from tests.fixtures_util import model_folder

pytestmark = pytest.mark.mindspore
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(tmp_path):
    """A copy of a small checkpoint to break."""
    return Path(shutil.copytree(model_folder("st_new_bf16"), tmp_path / "model"))


def fails(capsys, *argv):
    """The one line on standard error of a command that exits with 2."""
    assert main([str(arg) for arg in argv]) == 2
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), captured.err
    assert "Traceback" not in captured.err and captured.out == ""
    return lines[0]


def generate(capsys, folder, *extra):
    return fails(capsys, "generate", folder, "-p", "x", *extra)


def test_no_such_checkpoint(capsys, tmp_path):
    assert "nowhere" in generate(capsys, tmp_path / "nowhere")


def test_truncated_shard(capsys, folder):
    shard = folder / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1000])
    assert shard.name in generate(capsys, folder)


def test_garbage_shard(capsys, folder):
    shard = folder / "model-00002-of-00003.safetensors"
    shard.write_bytes(b"\xff" * 5000)
    assert shard.name in generate(capsys, folder)


def test_missing_shard(capsys, folder):
    (folder / "model-00003-of-00003.safetensors").unlink()
    assert "model-00003-of-00003.safetensors" in generate(capsys, folder)


@pytest.mark.parametrize("name", ["broken.ckpt", "broken.safetensors", "broken.bin"])
@pytest.mark.parametrize("content", [b"", b"garbage" * 100])
def test_garbage_file(capsys, folder, name, content):
    (folder / name).write_bytes(content)
    assert name in generate(capsys, folder / name)


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    config.update(changes)
    (folder / "config.json").write_text(json.dumps(config))


def test_config_missing_or_of_another_model(capsys, folder):
    change_config(folder, model_type="qwen2")
    assert "'qwen2'" in generate(capsys, folder)
    (folder / "config.json").write_text("{")
    assert "config.json" in generate(capsys, folder)
    (folder / "config.json").unlink()
    assert "config.json" in generate(capsys, folder)


def test_tensor_missing_and_of_the_wrong_shape(capsys, folder):
    change_config(folder, num_hidden_layers=3)
    assert "transformer.h.2." in generate(capsys, folder)
    change_config(folder, num_hidden_layers=2, vocab_size=1000)
    assert "transformer.wte.weight" in generate(capsys, folder)


def test_corrupt_vocabulary(capsys, folder):
    (folder / "qwen.tiktoken").write_bytes(b"not base64 at all\n")
    assert "qwen.tiktoken" in generate(capsys, folder)


def test_vocabulary_missing(capsys, folder, tmp_path):
    assert "none.tiktoken" in generate(capsys, folder, "--vocab", tmp_path / "none.tiktoken")
    message = generate(capsys, folder)  # the published one is too large for this model
    assert "vocabulary" in message


@pytest.mark.parametrize("prompt", ["", None])
def test_empty_prompt(capsys, monkeypatch, prompt):
    if prompt is None:
        monkeypatch.setattr(sys, "stdin", io.StringIO(""))
        assert "empty" in fails(capsys, "generate")
    else:
        assert "empty" in fails(capsys, "generate", "-p", prompt)


def test_prompt_longer_than_the_context(capsys):
    message = fails(capsys, "generate", "-p", "你好 " * 30000)
    assert "tokens" in message and "context" in message


def test_unknown_device_and_absent_ascend(capsys, folder):
    assert "unknown device 'tpu'" in generate(capsys, folder, "--device", "tpu")
    assert "Ascend" in generate(capsys, folder, "--device", "ascend")


@pytest.mark.parametrize(
    ("option", "value", "named"),
    [
        ("--temperature", "-1", "temperature"),
        ("--top-p", "1.5", "top_p"),
        ("--max-new-tokens", "0", "max_new_tokens"),
    ],
)
def test_invalid_sampling_values(capsys, option, value, named):
    assert named in fails(capsys, "generate", "-p", "x", option, value)


def test_unknown_yaml_key(capsys, tmp_path, folder):
    text = (ROOT / "configs" / "run_qwen_7b.yaml").read_text().replace("num_layers:", "num_hidden_layers:")
    (tmp_path / "run.yaml").write_text(text)
    message = generate(capsys, folder, "--config", tmp_path / "run.yaml")
    assert "num_hidden_layers" in message and "num_layers" in message


def test_no_compiler(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("QWEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    message = fails(capsys, "generate", "-p", "x", "--backend", "cpu")
    assert "compiler" in message


def test_unwritable_output(capsys, folder, tmp_path):
    (tmp_path / "file").write_text("")
    arguments = ("--torch_ckpt_dir", folder, "--mindspore_ckpt_path", tmp_path / "file" / "out.ckpt")
    assert "file" in fails(capsys, "convert", *arguments)


def test_as_a_process():
    """The exit code reaches the shell."""
    command = [sys.executable, "-m", "research.qwen.cli", "info", "/nonexistent"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr == "error: no such checkpoint: /nonexistent\n"


def test_help_is_quick_and_loads_nothing_heavy():
    code = (
        "import sys\nfrom research.qwen.cli import main\n"
        "for command in ([], ['chat'], ['generate'], ['convert'], ['info']):\n"
        "    try: main([*command, '--help'])\n"
        "    except SystemExit as end: assert end.code == 0\n"
        "heavy = {'mindspore', 'mindformers', 'torch', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "regen" not in done.stderr and done.stdout.count("usage:") == 5
