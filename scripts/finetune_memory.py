"""Print as a Markdown table what fine-tuning needs in memory: ``python scripts/finetune_memory.py [--lengths N ...]``.

Computed from the models' shapes and the recipes in configs/finetune, not measured on an NPU.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from research.qwen.train.memory import estimate  # noqa: E402
from research.qwen.train.recipe import Recipe, build, changed  # noqa: E402
from research.qwen.train.recipe_file import RecipeFile, read_recipe  # noqa: E402

SIZES = {"1_8b": "1.8B", "7b": "7B", "14b": "14B", "72b": "72B"}
METHODS = {"full": "full", "lora": "LoRA", "qlora": "Q-LoRA"}
NOTES = {
    "en": "Computed from the shapes (batch, length and devices as given), not measured on an NPU. GiB per device.",
    "zh": "由模型形状计算得出（批大小、长度、设备数如表所示），未在 NPU 上实测。单位：每设备 GiB。",
}
HEADS = {
    "en": ("model", "method", "devices", "trained", "weights", "gradients", "optimizer"),
    "zh": ("模型", "方法", "设备数", "训练参数", "权重", "梯度", "优化器"),
}


def rows(lengths: list[int], device: str, alone: bool) -> list[list[str]]:
    """One row a recipe; the last columns are the totals at each length."""
    out = []
    for slug, size in SIZES.items():
        for method, shown in METHODS.items():
            if method == "qlora" and device == "ascend":  # one device only
                continue
            file = read_recipe(ROOT / "configs" / "finetune" / f"qwen_{slug}_{method}.yaml")
            recipe = build(file.given)
            if alone or device == "cpu":
                recipe = changed(
                    recipe, data_parallel=1, model_parallel=1, pipeline_stage=1, optimizer_parallel=False
                )
            out.append([size, shown, *row(file, recipe, lengths, device)])
    return out


def row(file: RecipeFile, recipe: Recipe, lengths: list[int], device: str) -> list[str]:
    """Devices, trained parameters, the parts that do not depend on the length, and the totals."""
    estimates = [estimate(file.shape, changed(recipe, max_length=length), device) for length in lengths]
    one = estimates[0]
    fixed = [f"{size / (1 << 30):.1f}" for size in (one.weights, one.gradients, one.optimizer)]
    count = f"{one.trainable / 1e6:,.1f} M ({one.trainable / one.parameters:.1%})"
    return [str(recipe.world), count, *fixed, *(f"{e.total / (1 << 30):.1f}" for e in estimates)]


def main(argv: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--device", choices=("ascend", "cpu"), default="ascend")
    parser.add_argument("--alone", action="store_true", help="on one device, whatever the recipe says")
    parser.add_argument("--language", choices=("en", "zh"), default="en")
    args = parser.parse_args(argv)
    total = "total at {}" if args.language == "en" else "长度 {} 合计"
    heads = [*HEADS[args.language], *(total.format(length) for length in args.lengths)]
    print(NOTES[args.language] + "\n")
    for cells in [heads, ["---"] * len(heads), *rows(args.lengths, args.device, args.alone)]:
        print(f"| {' | '.join(cells)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
