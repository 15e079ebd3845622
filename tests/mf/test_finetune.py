"""``Trainer(args=yaml).finetune`` and ``.train``, and run_qwen_7b.py: the same loop and recipe, then predict."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from research.qwen.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    QwenError,
    RequestError,
    TrainingError,
)

pytestmark = [pytest.mark.mindspore, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "configs" / "finetune").glob("*.yaml"))
DATA = ROOT / "tests" / "fixtures" / "finetune" / "dialogues.json"


@pytest.fixture
def recipe(tmp_path: Path, demo_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The 7B recipe with the sizes of the demo model and two steps."""
    monkeypatch.chdir(tmp_path)  # MindFormers writes its results there
    shape = json.loads((demo_folder / "config.json").read_text(encoding="utf-8"))
    model = {
        "vocab_size": shape["vocab_size"],
        "hidden_size": shape["hidden_size"],
        "num_layers": shape["num_hidden_layers"],
        "num_heads": shape["num_attention_heads"],
        "kv_channels": shape["kv_channels"],
        "intermediate_size": shape["intermediate_size"] // 2,
        "seq_length": shape["seq_length"],
        "max_position_embedding": shape["max_position_embeddings"],
        "eos_token_id": 816,
        "pad_token_id": 816,
        "num_blocks": 64,
        "max_decode_length": 512,
    }
    content = {
        "base_config": str(ROOT / "configs" / "finetune" / "qwen_7b_lora.yaml"),
        "output_dir": str(tmp_path / "out"),
        "runner_config": {"epochs": 1, "batch_size": 5, "gradient_accumulation_steps": 1},
        "lr_schedule": {"learning_rate": 5e-3},
        "finetune": {"max_steps": 2, "lora_rank": 8},
        "model": {"model_config": model},
        "context": {"device_target": "CPU"},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def trainer_of(mf: Any, recipe: Path, **options: Any) -> Any:
    from mindformers import Trainer

    return Trainer(args=str(recipe), task="text_generation", **{"train_dataset": str(DATA), **options})


def edit(path: Path, **sections: Any) -> Path:
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    for section, values in sections.items():
        content[section] = {**content.get(section, {}), **values} if isinstance(values, dict) else values
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


@pytest.mark.parametrize("path", RECIPES, ids=[path.stem for path in RECIPES])
def test_mindformers_reads_every_recipe_as_we_do(mf: Any, path: Path) -> None:
    from mindformers import MindFormerConfig

    from research.qwen.mf.finetune import _plain
    from research.qwen.train.recipe import SETTINGS
    from research.qwen.train.recipe_file import look_up, read_recipe

    theirs = _plain(MindFormerConfig(str(path)))
    ours = read_recipe(path)
    assert look_up(theirs, "model.model_config.hidden_size") == ours.shape.hidden_size
    for given in ours.given:
        assert look_up(theirs, SETTINGS[given.name].metadata["place"]) == given.value, given.name


def test_finetune_then_predict(mf: Any, recipe: Path, demo_folder: Path, tmp_path: Path) -> None:
    """The same answers as those of base and adapter merged by the command, without merging."""
    from research.qwen.cli import main

    trainer = trainer_of(mf, recipe)
    summary = trainer.finetune(finetune_checkpoint=str(demo_folder))
    assert summary.outcome.reason == "finished" and summary.outcome.step == 2
    assert summary.result == tmp_path / "out" / "adapter"
    ask = {"input_data": "你好", "max_new_tokens": 6, "do_sample": False}
    learned = trainer.predict(**ask)  # what was learned, without being told where it is
    assert learned == trainer.predict(predict_checkpoint=str(summary.result), **ask)
    merged = tmp_path / "merged"
    assert (
        main(["merge", str(demo_folder), str(summary.result), str(merged), "--dtype", "float32", "-q"]) == 0
    )
    assert learned == trainer.predict(predict_checkpoint=str(merged), **ask)


def test_an_adapter_is_added_exactly(mf: Any, demo_folder: Path, tmp_path: Path) -> None:
    """Sums in float32; what the adapter trained whole is in place of the base's."""
    from research.qwen.config import QwenConfig
    from research.qwen.kernels.arrays import widen
    from research.qwen.mf.weights import AdaptedSource
    from research.qwen.model.lora import lora_shapes
    from research.qwen.train.recipe import Recipe
    from research.qwen.train.results import write_adapter
    from research.qwen.weights.readers import open_checkpoint

    config = QwenConfig.from_folder(demo_folder)
    recipe = Recipe(model=demo_folder, lora_rank=4, lora_alpha=8, modules_to_save=("lm_head",))
    draw = np.random.default_rng(0).standard_normal
    arrays = {n: draw(s).astype(np.float32) for n, s in lora_shapes(config, recipe.method_spec()).items()}
    arrays["lm_head.weight"] = draw((config.vocab_size, config.hidden_size)).astype(np.float32)
    (tmp_path / "adapter").mkdir()
    write_adapter(tmp_path / "adapter", recipe, arrays)
    source, base = AdaptedSource(tmp_path / "adapter", config), open_checkpoint(demo_folder)
    assert {name for name in source.names() if source.format(name) == "float32"} == {
        name for name in base.names() if len(base.shape(name)) == 2 and "wte" not in name
    }
    stem = "transformer.h.1.mlp.w1"
    product = arrays[f"{stem}.lora_B.weight"] @ arrays[f"{stem}.lora_A.weight"]
    want = widen(base.read(f"{stem}.weight"), "bfloat16") + np.float32(8 / 4) * product
    np.testing.assert_allclose(source.read(f"{stem}.weight"), want, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(source.read("lm_head.weight"), arrays["lm_head.weight"])
    bias = "transformer.h.0.attn.c_attn.bias"
    np.testing.assert_array_equal(source.read(bias), base.read(bias))


def test_an_adapter_whose_base_is_gone(mf: Any, recipe: Path, tmp_path: Path) -> None:
    config = {
        "peft_type": "LORA",
        "r": 1,
        "lora_alpha": 1,
        "target_modules": ["w1"],
        "base_model_name_or_path": "gone",
    }
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(CheckpointError):
        trainer_of(mf, recipe).predict(input_data="x", predict_checkpoint=str(adapter))


def test_full_then_predict(mf: Any, recipe: Path, demo_folder: Path, tmp_path: Path) -> None:
    """From a MindFormerConfig and its load_checkpoint, which MindFormers' own finetune forgets."""
    from mindformers import MindFormerConfig, Trainer

    edit(recipe, finetune={"method": "full", "max_steps": 1}, load_checkpoint=str(demo_folder))
    config = MindFormerConfig(str(recipe))
    trainer = Trainer(args=config, task="text_generation", train_dataset=str(DATA))
    summary = trainer.finetune()
    assert summary.result == tmp_path / "out" / "model"
    names = sorted(path.name for path in summary.result.iterdir())
    assert {"config.json", "model.safetensors", "generation_config.json", "qwen.tiktoken"} <= set(names)
    (answer,) = trainer.predict(input_data="你好", max_new_tokens=4, do_sample=False)
    assert answer["text_generation_text"][0].startswith("你好")


def test_resume(mf: Any, recipe: Path, demo_folder: Path) -> None:
    trainer = trainer_of(mf, recipe)
    trainer.train(train_checkpoint=str(demo_folder))
    with pytest.raises(TrainingError, match="checkpoints of another run"):
        trainer_of(mf, recipe).finetune(finetune_checkpoint=str(demo_folder))
    trainer = trainer_of(mf, recipe)
    trainer.config.finetune.max_steps = 3  # what is changed in the configuration counts
    summary = trainer.finetune(finetune_checkpoint=str(demo_folder), resume_training=True)
    assert summary.outcome.step == 3 and len(summary.outcome.history) == 3
    trainer = trainer_of(mf, edit(recipe, seed=7))
    with pytest.raises(TrainingError, match="seed: 42 there, 7 now"):
        trainer.finetune(finetune_checkpoint=str(demo_folder), resume_training=True)


def test_a_checkpoint_that_does_not_cover_the_model(
    mf: Any, recipe: Path, demo_folder: Path, tmp_path: Path
) -> None:
    """MindFormers trains on with random weights in place of those that are missing."""
    from research.qwen.weights.readers import open_checkpoint
    from research.qwen.weights.writers import OutputTensor, write_safetensors

    broken = tmp_path / "broken"
    broken.mkdir()
    for name in ("config.json", "qwen.tiktoken"):
        (broken / name).write_bytes((demo_folder / name).read_bytes())
    base = open_checkpoint(demo_folder)
    kept = [name for name in base.names() if "h.2." not in name]
    tensors = [
        OutputTensor(
            name, base.shape(name), base.dtype(name), lambda name=name: iter([base.read(name).reshape(-1)])
        )
        for name in kept
    ]
    with (broken / "model.safetensors").open("wb") as stream:
        write_safetensors(stream, tensors, {}, lambda count: None)
    with pytest.raises(CheckpointError, match="8 tensors .*missing"):
        trainer_of(mf, recipe).finetune(finetune_checkpoint=str(broken))


BAD: list[tuple[dict[str, Any], dict[str, Any], type[QwenError], str]] = [
    ({}, {}, CheckpointError, "no model to start from"),
    ({}, {"finetune_checkpoint": "nowhere"}, CheckpointError, "no such checkpoint: nowhere"),
    ({}, {"finetune_checkpoint": "DEMO", "auto_trans_ckpt": True}, RequestError, "auto_trans_ckpt has no meaning"),
    ({}, {"finetune_checkpoint": "DEMO", "resume": True}, RequestError, "unknown option 'resume'"),
    ({}, {"finetune_checkpoint": "DEMO", "do_eval": True}, RequestError, "do_eval needs held-out data"),
    ({"finetune": {"pakking": True}}, {"finetune_checkpoint": "DEMO"}, ConfigError, "did you mean 'packing'"),
    ({"optimizer": {"type": "Came"}}, {"finetune_checkpoint": "DEMO"}, ConfigError, "must be 'AdamW'"),
    ({"use_parallel": True, "parallel_config": {"data_parallel": 8}}, {"finetune_checkpoint": "DEMO"}, ConfigError,
     "the recipe is for 8 devices"),
]  # fmt: skip


@pytest.mark.parametrize(("sections", "call", "kind", "message"), BAD)
def test_refusals(
    mf: Any,
    recipe: Path,
    demo_folder: Path,
    sections: dict[str, Any],
    call: dict[str, Any],
    kind: type[QwenError],
    message: str,
) -> None:
    trainer = trainer_of(mf, edit(recipe, **sections))
    call = {key: str(demo_folder) if value == "DEMO" else value for key, value in call.items()}
    with pytest.raises(kind, match=message):
        trainer.finetune(**call)


def test_what_a_trainer_may_not_bring(mf: Any, recipe: Path, demo_folder: Path) -> None:
    from mindformers.core.callback import MFLossMonitor
    from mindspore.dataset import GeneratorDataset

    for option, value in (
        ("callbacks", [MFLossMonitor()]),
        ("train_dataset", GeneratorDataset([[1]], ["input_ids"])),
        ("model", mf.QwenForCausalLM.from_pretrained(demo_folder)),
    ):
        trainer = trainer_of(mf, recipe, **{option: value})
        with pytest.raises(RequestError, match=rf"Trainer\({option}="):
            trainer.finetune(finetune_checkpoint=str(demo_folder))


def test_another_model_goes_through_mindformers(
    mf: Any, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mindformers.trainer.causal_language_modeling import CausalLanguageModelingTrainer

    seen = []
    monkeypatch.setattr(CausalLanguageModelingTrainer, "train", lambda self, **options: seen.append(options))
    trainer = trainer_of(mf, recipe)
    trainer.config.model.arch.type = "LlamaForCausalLM"
    trainer.finetune()
    trainer.train()
    assert len(seen) == 2


# ---- run_qwen_7b.py ----


def test_published_command(
    recipe: Path, demo_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from research.qwen.run_qwen_7b import main

    options = ["--run_mode", "finetune", "--train_dataset", str(DATA), "--load_checkpoint", str(demo_folder)]
    assert main(["--config", str(recipe), *options, "--pet_method", "lora", "--max_steps", "1"]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{tmp_path / 'out' / 'adapter'}\n"
    assert "trainable" in captured.err and "step 1/1" in captured.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--load_checkpoint", "DEMO"], "no training data"),
        (["--train_dataset", "nowhere.json", "--load_checkpoint", "DEMO"], "nowhere.json"),
        (["--train_dataset", str(DATA)], "no model to start from"),
        (["--predict_data", "x"], "--predict_data is for run_mode predict"),
        (["--use_parallel", "True"], "--use_parallel True needs several processes"),
        (["--train_dataset", str(DATA), "--load_checkpoint", "DEMO", "--learning_rate", "-1"],
         "--learning_rate must be a number above 0, got -1.0"),
    ],
)  # fmt: skip
def test_published_command_refuses(
    recipe: Path, demo_folder: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    from research.qwen.run_qwen_7b import main

    words = [str(demo_folder) if word == "DEMO" else word for word in options]
    assert main(["--config", str(recipe), "--run_mode", "finetune", *words]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and message in captured.err and captured.out == ""


def test_the_pet_method_of_a_trainer_counts(mf: Any, recipe: Path, demo_folder: Path) -> None:
    trainer = trainer_of(mf, recipe, pet_method="ptuning")
    with pytest.raises(
        ConfigError, match="method of the call must be one of 'full', 'lora', 'qlora', got 'ptuning'"
    ):
        trainer.finetune(finetune_checkpoint=str(demo_folder))


def test_missing_data_is_named(mf: Any, recipe: Path, demo_folder: Path) -> None:
    from mindformers import Trainer

    with pytest.raises(DataError, match="no training data"):
        Trainer(args=str(recipe), task="text_generation").finetune(finetune_checkpoint=str(demo_folder))
