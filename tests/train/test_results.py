"""What a run leaves: adapters and models written, named as peft matches them, and published under one name."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from research.qwen.config import QwenConfig
from research.qwen.errors import CheckpointError, ConfigError, TrainingError
from research.qwen.model.lora import first_values
from research.qwen.train.fingerprint import fingerprint
from research.qwen.train.preparing import Prepared, check_device, prepare
from research.qwen.train.recipe import Recipe, build, changed
from research.qwen.train.recipe_file import read_recipe
from research.qwen.train.results import publish, saver, target_names, write_adapter, written_bytes
from research.qwen.train.runner import layout, loop_options, settings
from research.qwen.weights.adapters import check_fits, load_adapter
from research.qwen.weights.dtypes import convert_block
from research.qwen.weights.readers import open_checkpoint

DATA = Path(__file__).resolve().parents[1] / "fixtures" / "finetune" / "dialogues.json"


@pytest.fixture
def run(demo_folder: Path, tmp_path: Path) -> Prepared:
    return prepare(
        Recipe(model=demo_folder, train_data=DATA, output_dir=tmp_path / "out", device="CPU", lora_rank=4)
    )


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        (("c_attn", "c_proj", "w1", "w2"), ("c_attn", "w1", "w2", "c_proj")),
        (("all",), ("c_attn", "w1", "w2", "c_proj")),
        (("attention",), ("c_attn", "attn.c_proj")),
        (("mlp",), ("w1", "w2", "mlp.c_proj")),
        (("w1", "attn.c_proj"), ("attn.c_proj", "w1")),
    ],
)
def test_targets_as_peft_matches_them(
    run: Prepared, tmp_path: Path, targets: tuple[str, ...], names: tuple[str, ...]
) -> None:
    """By the end of a module's name, so ``c_proj`` alone would mean both: nothing lacks and nothing is more."""
    recipe = changed(run.recipe, lora_targets=targets)
    assert target_names(recipe) == names
    (tmp_path / "step").mkdir()
    write_adapter(tmp_path / "step", recipe, first_values(run.config, recipe.method_spec(), 1))
    adapter = load_adapter(tmp_path / "step")
    check_fits(adapter, run.config)
    assert len(adapter.updates()) == 3 * len(recipe.method_spec().matrices())
    assert adapter.config.base == os.path.abspath(run.recipe.model or "")


def test_an_adapter_that_is_no_number_is_not_written(run: Prepared, tmp_path: Path) -> None:
    arrays = first_values(run.config, run.recipe.method_spec(), 1)
    arrays[next(iter(arrays))][0, 0] = np.nan
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        saver(run, lambda: arrays)(tmp_path / "step")
    assert not (tmp_path / "step").exists()


def test_a_model_is_written_in_the_formats_of_its_base(run: Prepared, tmp_path: Path) -> None:
    full = prepare(changed(run.recipe, method="full"))
    base = open_checkpoint(run.checkpoint.folder)
    arrays = {
        name: convert_block(base.read(name).reshape(-1), base.dtype(name), "float32")[0].reshape(
            base.shape(name)
        )
        for name in base.names()
    }
    folder = tmp_path / "step"
    saver(full, lambda: arrays)(folder)
    again = open_checkpoint(folder)
    for name in base.names():
        assert again.dtype(name) == base.dtype(name)
        np.testing.assert_array_equal(again.read(name), base.read(name))
    assert QwenConfig.from_folder(folder) == full.config
    assert (folder / "generation_config.json").is_file() and (folder / "qwen.tiktoken").is_file()
    size = (folder / "model.safetensors").stat().st_size
    assert size - 10_000 < written_bytes(full) < size
    arrays["lm_head.weight"][0, 0] = np.inf
    with pytest.raises(TrainingError, match="lm_head.weight has grown beyond what bfloat16 can hold"):
        saver(full, lambda: arrays)(tmp_path / "diverged")


def test_publishing_replaces_the_whole_folder(tmp_path: Path) -> None:
    step = tmp_path / "checkpoints" / "step-000001"
    (step / "training").mkdir(parents=True)
    for name in ("adapter_config.json", "adapter_model.safetensors", "training/state.json"):
        (step / name).write_text(name)
    target = tmp_path / "adapter"
    target.mkdir()
    (target / "left over").write_text("x")
    assert publish(step, target) == target
    assert sorted(path.name for path in target.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert (target / "adapter_config.json").stat().st_ino == (step / "adapter_config.json").stat().st_ino
    (step / "adapter_config.json").unlink()  # a rotated checkpoint takes nothing with it
    assert (target / "adapter_config.json").read_text() == "adapter_config.json"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "checkpoints"]
    with pytest.raises(TrainingError, match="the result could not be written to .*; it is in "):
        publish(step, tmp_path / "no folder" / "adapter")


def test_what_the_loop_is_told(run: Prepared) -> None:
    recipe = changed(
        run.recipe,
        lr_end=3e-5,
        warmup_steps=7,
        eval_data=DATA,
        early_stop=2,
        max_steps=9,
        keep=3,
        eval_steps=4,
    )
    options = loop_options(recipe)
    assert (options.schedule.lr, options.schedule.min_ratio, options.schedule.warmup_steps) == (3e-4, 0.1, 7)
    assert (options.max_steps, options.accumulate, options.patience) == (9, 8, 2)
    assert (options.keep_last, options.eval_every, options.save_every) == (3, 4, 1000)
    plain = loop_options(run.recipe)
    assert (plain.max_steps, plain.epochs, plain.eval_every, plain.patience) == (None, 5, None, None)
    assert plain.schedule.warmup_steps is None and plain.schedule.warmup_ratio == 0.01


def test_what_a_resumed_run_must_have_in_common(run: Prepared) -> None:
    """Everything the losses depend on and the loop does not record itself; JSON values."""
    recorded = json.loads(json.dumps(settings(run)))
    assert recorded["samples"] == 10 and recorded["tokens"] == 630
    assert recorded["base weights"] == fingerprint(*run.checkpoint.files)
    assert recorded["training data"] == fingerprint(run.recipe.train_data)
    assert {"lora_rank", "seed", "weight_decay", "mask", "packing", "clip_norm"} <= set(recorded)
    assert not {"learning_rate", "epochs", "accumulation", "output_dir", "save_steps"} & set(recorded)


def test_layouts_of_the_recipes(repository: Path) -> None:
    """Each divides its model and its rows over the devices it names."""
    for path in sorted((repository / "configs" / "finetune").glob("*.yaml")):
        file = read_recipe(path)
        recipe = build(file.given)
        rows = recipe.batch_size * recipe.accumulation * recipe.data_parallel
        layout(recipe).check(file.shape, recipe.world, rows)


@pytest.mark.parametrize(
    ("device", "changes", "message"),
    [
        (
            "ascend",
            {"method": "qlora", "base_dtype": "int4", "data_parallel": 2},
            "on one Ascend device only",
        ),
        ("ascend", {"method": "qlora", "base_dtype": "int4"}, None),
        ("ascend", {"compute_dtype": "float32"}, "on ascend training computes in float16"),
        ("ascend", {"data_parallel": 2, "eval_data": DATA}, "no evaluation during training"),
        ("cpu", {"model_parallel": 2}, "on CPU there is data_parallel only"),
        ("cpu", {"optimizer_parallel": True}, "on CPU there is data_parallel only"),
        ("ascend", {"data_parallel": 2}, None),
        ("cpu", {"compute_dtype": "bfloat16", "data_parallel": 2, "eval_data": DATA}, None),
    ],
)
def test_what_a_device_cannot_do(
    run: Prepared, device: str, changes: dict[str, Any], message: str | None
) -> None:
    recipe = changed(run.recipe, **changes)
    if message is None:
        check_device(recipe, device, False)
    else:
        with pytest.raises(ConfigError, match=message):
            check_device(recipe, device, False)
