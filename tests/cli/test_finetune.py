"""The command ``finetune`` before its first step: options, what it says, and one clear line for each mistake.

Nothing here loads MindSpore: all of it is checked before. The training itself: train/test_end_to_end.py.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from research.qwen.cli import main
from research.qwen.cli.finetune import GROUPS, build_parser, read_arguments
from research.qwen.demo import demo_folder
from research.qwen.train.recipe import SETTINGS, Recipe

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "tests" / "fixtures" / "finetune" / "dialogues.json"
DEMO = demo_folder()


def turns(*pairs: tuple[str, str]) -> list[dict[str, Any]]:
    return [{"id": "x", "conversations": [{"from": role, "value": text} for role, text in pairs]}]


@pytest.fixture
def command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str]]:
    """Run a dry run of the demo model on the dialogues, with some options changed; exit code and standard error."""
    # Watching signals costs a tenth of a second to end; tests of its own are in train/test_loop_signals.py.
    monkeypatch.setattr("research.qwen.cli.finetune.StopSignals", contextlib.nullcontext)

    def run(*words: object, **options: object) -> tuple[int, str]:
        values = {"model": DEMO, "train_data": DATA, "output": tmp_path / "out", "device": "CPU", **options}
        named = [
            (f"--{name.replace('_', '-')}", value) for name, value in values.items() if value is not None
        ]
        argv = ["finetune", "--dry-run", *(str(word) for pair in named for word in pair), *map(str, words)]
        code = main(argv)
        captured = capsys.readouterr()
        assert captured.out == "" and "Traceback" not in captured.err
        return code, captured.err

    return run


def test_every_setting_is_an_option() -> None:
    named = [name for group in GROUPS.values() for name in group.split()]
    assert sorted([*named, "model", "output_dir"]) == sorted(SETTINGS)


def test_options_become_settings() -> None:
    args = build_parser().parse_args(
        "--model m --output o --lora-targets attention w1 --no-shuffle --packing --lora-alpha 32 --resume best".split()
    )
    recipe, shape = read_arguments(args)
    assert shape is None
    assert recipe == Recipe(
        model=Path("m"),
        output_dir=Path("o"),
        lora_targets=("attention", "w1"),
        shuffle=False,
        packing=True,
        lora_alpha=32.0,
        resume="best",
    )


def test_options_over_a_file() -> None:
    config = ROOT / "configs" / "finetune" / "qwen_7b_lora.yaml"
    recipe, shape = read_arguments(build_parser().parse_args(["--config", str(config), "--method", "full"]))
    assert (recipe.method, recipe.learning_rate, recipe.batch_size) == ("full", 1e-5, 1)
    assert shape is not None and shape.hidden_size == 4096


def test_the_overview(command: Callable[..., tuple[int, str]]) -> None:
    code, said = command(max_steps=7, batch_size=5, accumulation=2, eval_data=DATA, lora_rank=8)
    assert code == 0
    lines = [line.split(maxsplit=1) for line in said.splitlines()]
    assert [name for name, _ in lines] == [
        "model",
        "method",
        "data",
        "evaluation",
        "steps",
        "memory",
        "output",
    ]
    told = dict(lines)
    assert told["model"].endswith("chat, 0.76 million parameters")
    # 3 layers, rank 8: c_attn 128 + 384, attn.c_proj 128 + 128, w1, w2 and c_proj 128 + 256 each.
    assert told["method"].startswith("lora (rank 8, alpha 16): 0.05 million trainable (5.75% of all)")
    assert 3 * 8 * (512 + 256 + 3 * 384) == 46080
    assert told["data"].endswith("10 samples, 630 tokens an epoch, of which 333 are learned")
    assert told["steps"] == "7 of 5 x 2 rows" and told["evaluation"].endswith("10 samples")
    assert "estimated peak" in told["memory"] and "there are on cpu" in told["memory"]


def test_steps_follow_the_epochs(command: Callable[..., tuple[int, str]]) -> None:
    assert "steps       6 of 4 x 2 rows, 3 epochs" in command(epochs=3, batch_size=4, accumulation=2)[1]
    said = command("--packing", epochs=3, batch_size=1, accumulation=1, max_length=512)[1]
    assert "steps       6 of 1 x 1 rows, 3 epochs, 2 packed rows an epoch" in said


# ---- warnings ----


def model_of(tmp_path: Path, chat_format: str | None) -> Path:
    """The demo model under a misleading name, as a base model or as one that does not say."""
    folder = Path(shutil.copytree(DEMO, tmp_path / "Qwen-7B-Chat"))
    path = folder / "generation_config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    del content["chat_format"]
    path.write_text(
        json.dumps(content | ({"chat_format": chat_format} if chat_format else {})), encoding="utf-8"
    )
    return folder


BASE = "a base model has never seen <|im_start|>"


@pytest.mark.parametrize(
    ("chat_format", "words", "message"),
    [
        ("chatml", [], None),
        ("chatml", ["--modules-to-save", "wte", "lm_head"], "a chat model knows its control tokens"),
        ("raw", [], BASE),
        ("raw", ["--modules-to-save", "wte"], BASE),
        ("raw", ["--modules-to-save", "wte", "lm_head"], None),
        ("raw", ["--model-kind", "chat"], None),
        ("raw", ["--method", "full"], None),
        ("chatml", ["--model-kind", "base"], BASE),
        (None, [], "nothing says whether this is a base or a chat model"),
    ],
)
def test_base_models_need_their_embeddings_trained(
    command: Callable[..., tuple[int, str]],
    tmp_path: Path,
    chat_format: str | None,
    words: list[str],
    message: str | None,
) -> None:
    """generation_config.json decides, or the option; never the name of the folder."""
    code, said = command(*words, model=model_of(tmp_path, chat_format))
    warnings = [line for line in said.splitlines() if line.startswith("warning: ")]
    assert code == 0 and len(warnings) == (message is not None)
    assert message is None or message in warnings[0]


def test_long_samples_are_told_of(command: Callable[..., tuple[int, str]]) -> None:
    code, said = command(max_length=64)
    assert code == 0 and "samples have more than 64 tokens (the longest 84); each is cut" in said


# ---- mistakes ----


def fails(result: tuple[int, str], message: str) -> None:
    code, said = result
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(errors) == 1 and message in said, said


RECORDS: dict[str, tuple[Any, str]] = {
    "empty file": ("", "is empty"),
    "empty list": ([], "is empty"),
    "broken JSON": ('[{"conversations": [}]', "data.json:1"),
    "unknown role": (turns(("user", "a"), ("robot", "b")), "robot"),
    "two user turns in a row": (turns(("user", "a"), ("user", "b"), ("assistant", "c")), "user"),
}


@pytest.mark.parametrize("name", RECORDS)
def test_bad_data(command: Callable[..., tuple[int, str]], tmp_path: Path, name: str) -> None:
    content, message = RECORDS[name]
    path = tmp_path / "data.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    fails(command(train_data=path), message)


OPTIONS: list[tuple[dict[str, object], str]] = [
    ({"model": None}, "no model to start from: give --model FOLDER"),
    ({"model": "nowhere"}, "no such checkpoint: nowhere"),
    ({"train_data": None}, "no training data: give --train-data FILE"),
    ({"train_data": "nowhere.json"}, "nowhere.json"),
    ({"eval_data": "nowhere.json"}, "nowhere.json"),
    ({"config": "nowhere.yaml"}, "nowhere.yaml not found"),
    ({"method": "prefix"}, "--method must be one of 'full', 'lora', 'qlora', got 'prefix'"),
    ({"lora_targets": "q_proj"}, "--lora-targets must be a list of"),
    ({"learning_rate": -1}, "--learning-rate must be a number above 0, got -1.0"),
    ({"lora_rank": 0}, "--lora-rank must be an integer of at least 1, got 0"),
    ({"max_length": 4096}, "max_length 4096 is more than the model can hold, 2048 tokens"),
    ({"early_stop": 2}, "early_stop needs eval_data"),
    ({"device": "GPU"}, "--device must be one of 'auto', 'CPU', 'Ascend', got 'GPU'"),
    ({"device_memory": "much"}, "'much' is no size"),
    ({"base_dtype": "int4", "method": "full"}, "method full trains every weight"),
    ({"base_dtype": "as stored", "method": "qlora"}, "qlora needs base_dtype int4 or int8"),
    ({"vocab_file": "nowhere.tiktoken"}, "nowhere.tiktoken"),
]


@pytest.mark.parametrize(("options", "message"), OPTIONS, ids=[next(iter(one[0])) for one in OPTIONS])
def test_bad_options(
    command: Callable[..., tuple[int, str]], options: dict[str, object], message: str
) -> None:
    fails(command(**options), message)


def test_a_checkpoint_that_does_not_cover_the_model(
    command: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(DEMO, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}), encoding="utf-8")
    fails(command(model=folder), "8 tensors (transformer.h.3.ln_1.weight")


def test_a_vocabulary_of_another_model(
    command: Callable[..., tuple[int, str]], published_vocab: Path
) -> None:
    fails(command(vocab_file=published_vocab), "has 151851 tokens, the model only 1024 rows")


def test_an_adapter_is_no_model(command: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}", encoding="utf-8")
    fails(command(model=tmp_path), "is an adapter, not a model; merge it into its base first")


def test_a_file_with_a_typo(command: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    base = ROOT / "configs" / "finetune" / "qwen_7b_lora.yaml"
    path.write_text(yaml.safe_dump({"base_config": str(base), "finetune": {"lora_rnk": 4}}), encoding="utf-8")
    fails(command(config=path), "recipe.yaml: unknown key finetune.lora_rnk (did you mean 'lora_rank'?)")


def test_too_little_memory(command: Callable[..., tuple[int, str]]) -> None:
    """With what helps; and --force goes on."""
    result = command(device_memory="100MB", batch_size=4)
    fails(result, "but cpu has 100 MiB: try --batch-size 1 with more --accumulation, a shorter --max-length")
    assert "--method qlora; --force starts it all the same" in result[1]
    assert command("--force", device_memory="100MB")[0] == 0


@pytest.mark.slow
def test_help_is_quick_and_light() -> None:
    script = (
        "import sys; from research.qwen.cli import main\n"
        "try: main(['finetune', '--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'mindspore', 'mindformers', 'torch', 'transformers'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]" and "--learning-rate X" in done.stdout
