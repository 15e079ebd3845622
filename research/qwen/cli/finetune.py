"""``finetune``: train a model on conversations. Every setting of a recipe is an option.

What takes long to import comes after the signals are watched: see train/signals.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from research.qwen.cli.common import quieten
from research.qwen.train.signals import StopSignals

if TYPE_CHECKING:
    from dataclasses import Field

    from research.qwen.config import QwenConfig
    from research.qwen.train.recipe import Recipe

EPILOG = """\
The data file holds conversations: published JSON, OpenAI messages (JSONL), Alpaca, or MindRecord ('data check' shows
what is learned of it). DIR gets checkpoints/, metrics.jsonl, tensorboard/, loss.png, summary.json and, at the end,
adapter/ (lora, qlora) or model/ (full) with the best or last weights. An adapter becomes a model with 'merge'.

Settings come from the published recipe of the method, then --config (see configs/finetune/), then the options.
SIGTERM and Ctrl-C finish the step, save and end; --resume latest goes on from there, bit for bit."""
# Order and headings of the options; a setting that is not named here would not be shown, so a test compares.
GROUPS = {
    "method": "method lora_rank lora_alpha lora_dropout lora_targets modules_to_save base_dtype model_kind",
    "optimizer": "learning_rate schedule lr_end warmup_ratio warmup_steps beta1 beta2 eps weight_decay decay clip_norm "
    "loss_scale loss_scale_window",
    "length": "batch_size accumulation epochs max_steps seed",
    "data": "train_data eval_data max_length mask specials truncation system packing pad shuffle skip_bad vocab_file",
    "checkpoints and reports": "resume save_steps keep eval_steps early_stop log_steps tensorboard",
    "device": "device device_id device_memory backend threads compute_dtype recompute flash_attention data_parallel "
    "model_parallel pipeline_stage micro_batch_num vocab_emb_dp optimizer_parallel",
}


def build_parser() -> argparse.ArgumentParser:
    """Options of the command: those of the recipe, by their groups."""
    from research.qwen.train.recipe import SETTINGS

    parser = argparse.ArgumentParser(
        prog="python -m research.qwen.cli finetune",
        usage="%(prog)s --model FOLDER --train-data FILE --output DIR [options]",
        description="Fine-tune a model on conversations: full, LoRA or Q-LoRA.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", metavar="FOLDER", help=SETTINGS["model"].metadata["about"])
    parser.add_argument("--output", metavar="DIR", help=SETTINGS["output_dir"].metadata["about"])
    parser.add_argument("--config", metavar="YAML", help="recipe, such as configs/finetune/qwen_7b_lora.yaml")
    parser.add_argument("--force", action="store_true", help="start although the memory will not do")
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything, say what would be done, end"
    )
    parser.add_argument(
        "-v", "--verbose", action="store_true", help="show log lines, also those of MindSpore"
    )
    for heading, names in GROUPS.items():
        group = parser.add_argument_group(heading)
        for name in names.split():
            _add_option(group, name, SETTINGS[name])
    return parser


def _add_option(group: Any, name: str, setting: Field[Any]) -> None:
    flag, kind, about = f"--{name.replace('_', '-')}", str(setting.type), setting.metadata["about"]
    shown = "published" if name in ("learning_rate", "batch_size", "accumulation") else setting.default
    default = f" (default: {shown})" if shown not in (None, (), "") else ""
    about = (about + default).replace("%", "%%")
    if kind == "bool":
        group.add_argument(flag, dest=name, action=argparse.BooleanOptionalAction, default=None, help=about)
    elif kind.startswith("tuple"):
        group.add_argument(flag, dest=name, nargs="*", metavar="NAME", help=f"{about}".replace("'", ""))
    else:
        convert = {"int": int, "float": float}.get(kind, str)
        group.add_argument(flag, dest=name, type=convert, metavar=_placeholder(kind), help=about)


def _placeholder(kind: str) -> str:
    return {"int": "N", "float": "X"}.get(kind, "PATH" if kind.startswith("Path") else "NAME")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0 done (or saved after SIGTERM), 2 an error told in one line, 130 saved after Ctrl-C."""
    with StopSignals() as stop:
        args = build_parser().parse_args(argv)
        quieten(args.verbose)
        recipe, shape = read_arguments(args)
        if args.dry_run:
            return _dry_run(recipe, shape, args.force)
        from research.qwen.train.runner import run

        summary = run(recipe, shape, force=args.force, tell=_tell, stop=stop)
        if summary.result is not None:
            print(summary.result)
            if recipe.method != "full":
                _tell(f"one model of both: {merge_command(recipe, summary.result)}")
        return summary.exit_code


def read_arguments(args: argparse.Namespace) -> tuple[Recipe, QwenConfig | None]:
    """The recipe of the command line over its YAML file, and the model of that file."""
    from research.qwen.train.recipe import Given, build
    from research.qwen.train.recipe_file import read_recipe

    file = read_recipe(args.config) if args.config else None
    names = {"model": "model", "output": "output_dir"}
    names |= {name: name for group in GROUPS.values() for name in group.split()}
    options = [
        Given(field, getattr(args, option), f"--{option.replace('_', '-')}")
        for option, field in names.items()
        if getattr(args, option) is not None
    ]
    return build(file.given if file else [], options), file.shape if file else None


def merge_command(recipe: Recipe, adapter: Path) -> str:
    """What joins adapter and base."""
    return f"python -m research.qwen.cli merge {recipe.model} {adapter} {recipe.output_dir / 'merged'}"


def _dry_run(recipe: Recipe, shape: QwenConfig | None, force: bool) -> int:
    from research.qwen.train.preparing import check_memory, overview, prepare, warnings

    prepared = prepare(recipe, shape)
    for line in [*overview(prepared), *(f"warning: {line}" for line in warnings(prepared))]:
        _tell(line)
    if not force:
        check_memory(prepared)
    return 0


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
