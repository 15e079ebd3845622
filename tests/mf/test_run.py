"""``run_qwen_7b.py``: the published command, from both folders, silent, and one clear line for each mistake."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from research.qwen.run_qwen_7b import main
from tests.fixtures_util import model_folder

pytestmark = pytest.mark.mindspore


def result_of(output: str) -> list[str]:
    """The texts in the last line of stdout, as scripts around this command parse it."""
    return [
        text for entry in ast.literal_eval(output.splitlines()[-1]) for text in entry["text_generation_text"]
    ]


def arguments(converted: Path, *more: str) -> list[str]:
    yaml_file = str(converted.with_suffix(".yaml"))
    base = ["--config", yaml_file, "--run_mode", "predict", "--load_checkpoint", str(converted)]
    return [*base, "--predict_data", "你好", "--device_id", "0", "--do_sample", "False", *more]


@pytest.fixture(scope="module")
def expected(full: SimpleNamespace) -> str:
    ids = full.tokenizer.encode("你好")
    return str(full.tokenizer.decode(full.model.generate(ids, max_new_tokens=6)[0], skip_special_tokens=True))


@pytest.mark.parametrize("folder", [".", "research/qwen"])
def test_published_command_says_nothing_else(
    repository: Path, converted: Path, tmp_path: Path, expected: str, folder: str
) -> None:
    """Zero extra lines on stdout and stderr, no files left in the working folder."""
    where = repository / folder
    before = sorted(where.iterdir())
    command = [sys.executable, "run_qwen_7b.py", *arguments(converted, "--max_new_tokens", "6")]
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "GLOG", "MS_"))}
    done = subprocess.run(command, cwd=where, capture_output=True, text=True, env=clean, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{[{'text_generation_text': [expected]}]}\n"
    assert [p for p in sorted(where.iterdir()) if p.name != "__pycache__"] == [
        p for p in before if p.name != "__pycache__"
    ]


def test_published_modules_and_verbose(repository: Path, converted: Path, tmp_path: Path) -> None:
    """``PYTHONPATH=research/qwen``, the class imports as published; and -v brings MindFormers' messages back."""
    script = (
        "from mindformers import LlamaConfig\n"
        "from qwen_model import QwenForCausalLM\n"
        "from qwen_tokenizer import QwenTokenizer\n"
        "from qwen_chat import chat\n"
        f"model = QwenForCausalLM(LlamaConfig.from_pretrained({str(converted.with_suffix('.yaml'))!r}))\n"
        f"model.load_checkpoint({str(converted)!r})\n"
        "response, history = chat(model, QwenTokenizer(), '你好', None, max_new_tokens=2, do_sample=False)\n"
        "assert history == [('你好', response)], history\n"
        "from research.qwen.mf import QwenForCausalLM as same\n"
        "assert same is QwenForCausalLM\n"
        "from research.qwen.run_qwen_7b import main\n"
        f"raise SystemExit(main({arguments(converted, '-v', '--max_new_tokens', '2')!r}))\n"
    )
    env = {**os.environ, "PYTHONPATH": str(repository / "research" / "qwen")}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, env=env, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "INFO" in done.stdout + done.stderr
    assert len(result_of(done.stdout)) == 1


def test_help_imports_nothing_heavy(repository: Path) -> None:
    script = (
        "import sys; from research.qwen.run_qwen_7b import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'mindspore', 'mindformers', 'torch', 'transformers'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=repository, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]" and "--predict_data" in done.stdout


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mf: Any) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_other_sources_of_weights(
    here: Path, converted: Path, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A Hugging Face folder, the converted folder's safetensors, and the YAML's own load_checkpoint."""
    from research.qwen.weights.command import main as convert

    safetensors = here / "st" / "q.safetensors"
    assert (
        convert(
            [
                "--torch_ckpt_dir",
                str(model_folder("full_vocab_bf16")),
                "--mindspore_ckpt_path",
                str(safetensors),
            ]
        )
        == 0
    )
    base = ["--predict_data", "你好", "--do_sample", "false", "--max_new_tokens", "6", "--config"]
    yaml_file = str(converted.with_suffix(".yaml"))
    for more in (
        [yaml_file, "--load_checkpoint", str(model_folder("full_vocab_bf16"))],
        [yaml_file, "--load_checkpoint", str(safetensors)],
        [yaml_file],
    ):
        capsys.readouterr()
        assert main([*base, *more]) == 0
        assert result_of(capsys.readouterr().out) == [expected]
    assert sorted(p.name for p in here.iterdir()) == ["st"]


def test_options_and_several_prompts(
    here: Path, converted: Path, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "prompts.txt").write_text("你好\nhello\n", encoding="utf-8")
    more = ["--max_new_tokens", "6", "--backend", "cpu", "--device_target", "CPU", "--save_file", "out.txt"]
    assert main([*arguments(converted, *more), "--predict_data", "hello"]) == 0
    both = result_of(capsys.readouterr().out)
    assert both[0] == expected and len(both) == 2
    assert (here / "out.txt").is_file() and "QWEN_BACKEND" not in os.environ
    from_file = [
        "prompts.txt" if argument == "你好" else argument for argument in arguments(converted, *more)
    ]
    assert main(from_file) == 0
    assert result_of(capsys.readouterr().out) == both
    sampling = [
        "--do_sample",
        "True",
        "--top_p",
        "1.0",
        "--top_k",
        "0",
        "--seed",
        "4",
        "--max_new_tokens",
        "6",
    ]
    assert main(arguments(converted, *sampling)) == 0
    assert result_of(capsys.readouterr().out) != [expected]
    assert main(arguments(converted, "--predict_length", "3")) == 0
    assert len(result_of(capsys.readouterr().out)[0]) < len(expected)


def test_the_checkpoints_own_config_counts(
    here: Path, converted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """run_qwen_7b.yaml says seq_length 8192; a first release checkpoint says 2048 in its config.json."""
    settings = yaml.safe_load(converted.with_suffix(".yaml").read_text(encoding="utf-8"))
    settings["model"]["model_config"].update(rotary_emb_base=500000, seq_length=4096)
    (here / "other.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    ask = [
        "--load_checkpoint",
        str(converted),
        "--predict_data",
        "你好",
        "--max_new_tokens",
        "6",
        "--do_sample",
        "0",
    ]
    assert main(["--config", str(converted.with_suffix(".yaml")), *ask]) == 0
    wanted = capsys.readouterr().out
    assert main(["--config", "other.yaml", *ask]) == 0
    captured = capsys.readouterr()
    assert captured.out == wanted
    assert captured.err.startswith("warning: config.json beside the checkpoint counts: ")
    assert "seq_length 2048 (not 4096)" in captured.err and captured.err.count("\n") == 1


def damaged(converted: Path, here: Path, kind: str) -> str:
    shutil.copytree(converted.parent, here / "copy")
    file = here / "copy" / "q.ckpt"
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2] if kind == "truncated" else b"\x00\xffgarbage" * 1000)
    return str(file)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"--load_checkpoint": "nowhere.ckpt"}, "no such checkpoint: nowhere.ckpt"),
        ({"--load_checkpoint": "truncated"}, "q.ckpt"),
        ({"--load_checkpoint": "garbage"}, "q.ckpt"),
        ({"--load_checkpoint": "small"}, "does not fit"),
        ({"--config": "nowhere.yaml"}, "no such config: nowhere.yaml"),
        ({"--config": "typo.yaml"}, "num_layer"),
        ({"--run_mode": "eval"}, "run_mode eval is not supported; use predict or finetune"),
        ({"--task": "translation"}, "task translation"),
        ({"--use_parallel": "True"}, "--use_parallel True is for run_mode finetune; leave it out"),
        ({"--pet_method": "lora"}, "--pet_method lora is for run_mode finetune; leave it out"),
        ({"--predict_data": ""}, "the prompt is empty"),
        ({"--predict_data": " a" * 40000}, "has 40000 tokens and leaves no room"),
        ({"--vocab_file": "nowhere.tiktoken"}, "nowhere.tiktoken"),
        ({"--vocab_file": "corrupt.tiktoken"}, "corrupt.tiktoken:1: bad base64"),
        ({"--top_p": "1.5"}, "top_p must be"),
        ({"--temperature": "-1"}, "temperature must be"),
        ({"--max_new_tokens": "0"}, "max_new_tokens must be"),
        ({"--save_file": "no/such/folder/x.txt"}, "no/such/folder"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    here: Path, converted: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, str], words: str
) -> None:
    settings = converted.with_suffix(".yaml").read_text(encoding="utf-8")
    (here / "typo.yaml").write_text(settings.replace("num_layers:", "num_layer:"), encoding="utf-8")
    (here / "corrupt.tiktoken").write_text("%%% 0\n", encoding="utf-8")
    values = dict(zip(*[iter(arguments(converted))] * 2, strict=True))
    for name, value in changes.items():
        if value in ("truncated", "garbage"):
            value = damaged(converted, here, value)
        values[name] = str(model_folder("st_new_bf16")) if value == "small" else value
    assert main([word for pair in values.items() for word in pair]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert words in captured.err


def test_ascend_absent(here: Path, converted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from research.qwen.kernels.devices import device_available

    if device_available():
        pytest.skip("this machine has an Ascend device")
    assert main(arguments(converted, "--device_target", "Ascend")) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: device_target Ascend is not available here: ")
    assert captured.err.count("\n") == 1


def test_nothing_asked(here: Path, converted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", str(converted.with_suffix(".yaml"))]) == 2
    assert "--predict_data" in capsys.readouterr().err
