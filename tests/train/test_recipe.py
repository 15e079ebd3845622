"""Recipes: every setting from YAML and from options, checked by name, with a suggestion for typos."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from research.qwen.errors import ConfigError
from research.qwen.train.recipe import SETTINGS, Given, Recipe, build, changed
from research.qwen.train.recipe_file import look_up, read_recipe, recipe_from_mapping

FILE: dict[str, Any] = {
    "run_mode": "finetune",
    "load_checkpoint": "model",
    "output_dir": "out",
    "seed": 3,
    "resume_training": True,
    "use_parallel": True,
    "eval_step_interval": 7,
    "train_dataset": {"data_loader": {"type": "MindDataset", "dataset_dir": "a.json", "shuffle": False}},
    "eval_dataset": {"data_loader": {"type": "MindDataset", "dataset_dir": "b.json"}},
    "runner_config": {"epochs": 4, "batch_size": 3, "gradient_accumulation_steps": 5, "sink_mode": False},
    "optimizer": {"type": "AdamW", "betas": [0.8, 0.9], "eps": "1e-7", "weight_decay": 0.2},
    "lr_schedule": {"type": "LinearWithWarmUpLR", "learning_rate": 1e-3, "lr_end": 1e-4, "warmup_steps": 6},
    "runner_wrapper": {
        "type": "MFTrainOneStepCell",
        "max_grad_norm": 2,
        "scale_sense": {"type": "DynamicLossScaleUpdateCell", "loss_scale_value": 128, "scale_window": 10},
    },
    "recompute_config": {"recompute": False},
    "callbacks": [
        {"type": "MFLossMonitor", "per_print_times": 9},
        {"type": "CheckpointMonitor", "save_checkpoint_steps": 11, "keep_checkpoint_max": 2},
    ],
    "model": {
        "model_config": {
            "type": "LlamaConfig",
            "vocab_size": 520,
            "hidden_size": 64,
            "num_layers": 2,
            "num_heads": 4,
            "intermediate_size": 128,
            "seq_length": 64,
            "compute_dtype": "bfloat16",
            "pet_config": {"pet_type": "lora", "lora_rank": 8, "target_modules": "all"},
        },
        "arch": {"type": "QwenForCausalLM"},
    },
    "processor": {"tokenizer": {"type": "QwenTokenizer", "vocab_file": "v.tiktoken"}},
    "context": {"device_target": "CPU", "device_id": 1, "max_device_memory": "9GB"},
    "parallel_config": {"data_parallel": 2, "model_parallel": 3},
    "parallel": {"enable_parallel_optimizer": True},
    "finetune": {
        "modules_to_save": ["wte", "lm_head"],
        "lora_alpha": 32,
        "max_length": 128,
        "mask": "assistant",
        "packing": True,
        "max_steps": 100,
    },
}


def with_value(place: str, value: Any) -> dict[str, Any]:
    """FILE with one value set; None removes it."""
    mapping = copy.deepcopy(FILE)
    *outer, last = place.split(".")
    section: Any = mapping
    for part in outer:
        section = section.setdefault(part, {})
    section[last] = value
    return mapping


def recipe_of(mapping: dict[str, Any], options: dict[str, Any] | None = None) -> Recipe:
    given = [Given(name, value, f"--{name}") for name, value in (options or {}).items()]
    return build(recipe_from_mapping(mapping, "x.yaml").given, given)


def test_every_place_is_read() -> None:
    recipe = recipe_of(FILE)
    assert recipe == Recipe(
        model=Path("model"), train_data=Path("a.json"), eval_data=Path("b.json"), output_dir=Path("out"),
        resume="latest", seed=3, method="lora", lora_rank=8, lora_alpha=32.0, lora_targets=("all",),
        modules_to_save=("wte", "lm_head"), learning_rate=1e-3, schedule="linear", lr_end=1e-4, warmup_steps=6,
        beta1=0.8, beta2=0.9, eps=1e-7, weight_decay=0.2, clip_norm=2.0, loss_scale=128.0, loss_scale_window=10,
        batch_size=3, accumulation=5, epochs=4, max_steps=100, max_length=128, mask="assistant", packing=True,
        shuffle=False, compute_dtype="bfloat16", recompute=False, device="CPU", device_id=1, device_memory="9GB",
        vocab_file=Path("v.tiktoken"), log_steps=9, save_steps=11, keep=2, eval_steps=7, data_parallel=2,
        model_parallel=3, optimizer_parallel=True,
    )  # fmt: skip
    assert recipe.world == 6


def test_no_two_settings_share_a_place() -> None:
    places = [one.metadata["place"] for one in SETTINGS.values()]
    assert len(places) == len(set(places))


def test_settings_are_json_and_know_what_the_losses_depend_on() -> None:
    recipe = recipe_of(FILE)
    assert json.loads(json.dumps(recipe.as_dict()))["lora_targets"] == ["all"]
    curve = json.loads(json.dumps(recipe.curve()))
    assert {"learning_rate", "seed", "batch_size", "lora_rank", "max_length"} <= set(curve)
    assert not {"output_dir", "save_steps", "keep", "train_data", "model", "device_id", "resume"} & set(curve)
    moved = changed(recipe, train_data=Path("/elsewhere/a.json"), save_steps=3, recompute=True)
    assert moved.curve() == recipe.curve() != changed(recipe, seed=4).curve()


def test_options_win_over_the_file() -> None:
    recipe = recipe_of(FILE, {"learning_rate": 0.5, "lora_targets": ["w1"], "packing": False, "seed": None})
    assert (recipe.learning_rate, recipe.lora_targets, recipe.packing, recipe.seed) == (
        0.5,
        ("w1",),
        False,
        3,
    )


def test_another_method_brings_its_published_values() -> None:
    """A learning rate for LoRA would ruin a model that is trained whole."""
    full = recipe_of(FILE, {"method": "full"})
    assert (full.learning_rate, full.batch_size, full.accumulation) == (1e-5, 1, 16)
    full = recipe_of(FILE, {"method": "full", "learning_rate": 2e-5})
    assert (full.learning_rate, full.batch_size) == (2e-5, 1)
    assert recipe_of(FILE, {"method": "lora"}).learning_rate == 1e-3
    assert recipe_of(FILE, {"method": "qlora"}).base_dtype == "int4"


def test_without_a_method_everything_is_trained() -> None:
    mapping = copy.deepcopy(FILE)
    del mapping["model"]["model_config"]["pet_config"]
    assert recipe_of(mapping).method == "full"
    assert recipe_of({"model": mapping["model"]}).learning_rate == 1e-5


def test_parallel_sections_count_with_use_parallel_only() -> None:
    recipe = recipe_of(with_value("use_parallel", False))
    assert recipe.world == 1 and not recipe.optimizer_parallel


def test_clipping_can_be_off() -> None:
    assert recipe_of(with_value("runner_wrapper.use_clip_grad", False)).clip_norm == 0.0


def test_paths_beside_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[]")
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(FILE))
    recipe = build(read_recipe(tmp_path / "x.yaml").given)
    assert recipe.train_data == tmp_path / "a.json" and recipe.eval_data == Path("b.json")


BAD = [
    ("optimizer.beta", 1, "unknown key optimizer.beta (did you mean 'betas'?)"),
    ("optimizer.type", "Muon", "optimizer.type must be 'AdamW'"),
    (
        "optimizer.betas",
        [0.9, 1.5],
        "optimizer.betas.1 must be a number of at least 0 and at most 0.999999, got 1.5",
    ),
    ("optimizer.eps", 0, "optimizer.eps must be a number above 0, got 0"),
    ("lr_schedule.learning_rat", 1, "unknown key lr_schedule.learning_rat (did you mean 'learning_rate'?)"),
    ("lr_schedule.learning_rate", -1, "lr_schedule.learning_rate must be a number above 0, got -1"),
    ("lr_schedule.learning_rate", 1e-5, "lr_end 0.0001 is above learning_rate 1e-05"),
    ("lr_schedule.type", "PolynomialWithWarmUpLR", "lr_schedule.type must be one of CosineWithWarmUpLR"),
    ("lr_schedule.total_steps", 100, "shorten the run with finetune.max_steps"),
    ("runner_config.batch_size", 0, "runner_config.batch_size must be an integer of at least 1, got 0"),
    ("runner_wrapper.max_grad_norm", -1, "runner_wrapper.max_grad_norm must be a number of at least 0"),
    ("runner_wrapper.scale_sense", 1.0, "runner_wrapper.scale_sense must be a mapping of keys to values"),
    ("runner_wrapper.scale_sense.scale_factor", 3, "runner_wrapper.scale_sense.scale_factor must be 2"),
    ("recompute_config.recompute", "yes", "recompute_config.recompute must be True or False"),
    ("finetune.pakking", True, "unknown key finetune.pakking (did you mean 'packing'?)"),
    ("finetune.max_length", "long", "finetune.max_length must be an integer of at least 8, got 'long'"),
    ("finetune.mask", "user", "finetune.mask must be one of 'published', 'assistant', got 'user'"),
    ("finetune.modules_to_save", ["lm_hed"], "a list of wte, lm_head (did you mean 'lm_head'?)"),
    ("finetune.lora_targets", ["q_proj"], "finetune.lora_targets is ['q_proj'], but"),
    ("finetune.base_dtype", "int3", "finetune.base_dtype must be 'as stored', int8, int4, int4-g64, ..."),
    ("finetune", ["packing"], "finetune must be a mapping of keys to values, found list"),
    ("model.model_config.pet_config.lora_rang", 8, "lora_rang (did you mean 'lora_rank'?)"),
    ("model.model_config.pet_config.target_modules", ".*wq|.*wk", "published names (c_attn, c_proj, w1, w2"),
    ("model.model_config.pet_config.pet_type", "prefix", "must be one of 'full', 'lora', 'qlora'"),
    ("model.model_config.num_hidden_layers", 3, "(did you mean 'num_layers'?)"),
    ("callbacks", {"type": "MFLossMonitor"}, "callbacks must be a list of mappings with a type each"),
    (
        "callbacks",
        [{"type": "LossMonitor"}],
        "unknown key callbacks.LossMonitor (did you mean 'MFLossMonitor'?)",
    ),
    ("callbacks", [{"type": "MFLossMonitor", "per_print_time": 1}], "(did you mean 'per_print_times'?)"),
    ("train_dataset.data_loader.dataset_dirs", "x", "(did you mean 'dataset_dir'?)"),
    ("eval_step_interval", -1, "eval_step_interval must be an integer of at least 0, got -1"),
    ("resume_training", 3, "resume_training must be True, 'latest' or the path of a checkpoint, got 3"),
]


@pytest.mark.parametrize(("place", "value", "message"), BAD, ids=[f"{one[0]}={one[1]}" for one in BAD])
def test_bad_value(place: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        recipe_of(with_value(place, value))
    assert str(caught.value).startswith("x.yaml: ") and message in str(caught.value)


CONTRADICTIONS = [
    ({"method": "full", "base_dtype": "int4"}, "method full trains every weight"),
    ({"lora_targets": ()}, "lora_targets is empty; name matrices, or all"),
    ({"early_stop": 3}, "early_stop needs eval_data"),
    ({"pipeline_stage": 4, "micro_batch_num": 2}, "micro_batch_num 2 is below pipeline_stage 4"),
    ({"lora_rank": 0}, "lora_rank must be an integer of at least 1, got 0"),
    ({"schedule": "constant", "lr_end": 1e-5}, "lr_end 1e-05 has no meaning with a constant learning rate"),
    ({"seed": True}, "seed must be an integer"),
]


@pytest.mark.parametrize(("values", "message"), CONTRADICTIONS)
def test_contradictions(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Recipe(**values)


def test_an_option_that_is_no_value_names_itself() -> None:
    with pytest.raises(
        ConfigError, match=r"^--warmup-ratio must be a number of at least 0 and at most 1, got 3"
    ):
        build([], [Given("warmup_ratio", 3, "--warmup-ratio")])


def test_look_up_in_lists() -> None:
    raw = {"a": [{"type": "X", "b": 1}, {"type": "Y", "b": 2}], "c": [5, 6]}
    assert [look_up(raw, place) for place in ("a.Y.b", "a.Z.b", "c.1", "c.2")] == [2, None, 6, None]
