"""Every recipe of configs/finetune: our reader and its published values. MindFormers' reader: mf/test_finetune.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from research.qwen.config import SIZES
from research.qwen.settings import load_settings
from research.qwen.train.memory import estimate
from research.qwen.train.recipe import METHODS, Recipe, build
from research.qwen.train.recipe_file import read_recipe

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "finetune"
SLUGS = {"1_8b": "1.8b", "7b": "7b", "14b": "14b", "72b": "72b"}
CASES = [(slug, method) for slug in SLUGS for method in METHODS]


def recipe_path(slug: str, method: str) -> Path:
    return FOLDER / f"qwen_{slug}_{method}.yaml"


def test_the_folder_holds_these_files() -> None:
    assert set(FOLDER.glob("*.yaml")) == {recipe_path(*case) for case in CASES}
    shared = {"common", *METHODS}
    assert {path.stem for path in (FOLDER / "shared").iterdir()} == shared


@pytest.mark.parametrize(("slug", "method"), CASES)
def test_recipe(slug: str, method: str) -> None:
    path = recipe_path(slug, method)
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 25, "inherit, do not repeat"
    file = read_recipe(path)
    assert file.shape == SIZES[SLUGS[slug]]
    recipe = build(file.given)
    assert recipe.method == method
    # The published scripts, word for word.
    assert (recipe.epochs, recipe.max_length, recipe.schedule, recipe.warmup_ratio) == (
        5,
        512,
        "cosine",
        0.01,
    )
    assert (recipe.beta1, recipe.beta2, recipe.eps, recipe.weight_decay) == (0.9, 0.95, 1e-8, 0.1)
    assert (recipe.clip_norm, recipe.decay, recipe.lr_end) == (1.0, "published", 0.0)
    assert (recipe.save_steps, recipe.keep, recipe.log_steps, recipe.recompute) == (1000, 10, 1, True)
    lora = (recipe.lora_rank, recipe.lora_alpha, recipe.lora_dropout, recipe.lora_targets)
    assert lora == (64, 16, 0.05, ("c_attn", "c_proj", "w1", "w2")) and recipe.modules_to_save == ()
    assert (recipe.batch_size, recipe.accumulation) == ((1, 16) if method == "full" else (2, 8))
    assert recipe.learning_rate == (1e-5 if method == "full" else 3e-4)
    assert recipe.base_dtype == ("int4" if method == "qlora" else "as stored")
    assert recipe.compute_dtype == "float16"


def test_the_defaults_without_a_file_are_the_lora_recipe() -> None:
    file = build(read_recipe(recipe_path("7b", "lora")).given)
    assert Recipe() == file


@pytest.mark.parametrize(("slug", "method"), CASES)
def test_settings_reads_them_too(slug: str, method: str) -> None:
    settings = load_settings(recipe_path(slug, method))
    assert settings.run_mode == "finetune" and settings.model == SIZES[SLUGS[slug]]


@pytest.mark.parametrize(("slug", "method"), CASES)
def test_each_fits_the_devices_it_names(slug: str, method: str) -> None:
    """64 GB, of which MindSpore may use 58; Q-LoRA runs on CPU only."""
    file = read_recipe(recipe_path(slug, method))
    recipe = build(file.given)
    device = "cpu" if method == "qlora" else "ascend"
    assert estimate(file.shape, recipe, device).total < {"cpu": 128 << 30, "ascend": 58 << 30}[device]
