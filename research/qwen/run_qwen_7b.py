"""The published command: ``python run_qwen_7b.py --config run_qwen_7b.yaml --run_mode predict|finetune ...``.

Reads and checks everything cheap first, so that a mistake is answered before MindFormers is imported (10 s).
"""

from __future__ import annotations

import argparse
import atexit
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":  # run from this folder: its module names (text, model, ...) must not hide others'
    sys.path[0] = str(ROOT)

from research.qwen.config import QwenConfig, disagreement  # noqa: E402
from research.qwen.decode.params import SamplingParams  # noqa: E402
from research.qwen.errors import CheckpointError, ConfigError, QwenError, RequestError  # noqa: E402
from research.qwen.settings import RunSettings, load_settings  # noqa: E402

if TYPE_CHECKING:
    from research.qwen.mf.run import Plan

SAMPLING = ("max_new_tokens", "do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "seed")


def build_parser() -> argparse.ArgumentParser:
    """Arguments of the published script, and the generation options it never had."""
    parser = argparse.ArgumentParser(
        prog="run_qwen_7b.py", description="Run Qwen through MindFormers' Trainer."
    )
    add = parser.add_argument
    add("--config", default="run_qwen_7b.yaml", help="YAML file: a path, or a name in configs/ (%(default)s)")
    add("--task", default="text_generation", help="only %(default)s")
    add("--run_mode", default="predict", help="predict (default) or finetune")
    add(
        "--load_checkpoint", help=".ckpt, .safetensors, converted or Hugging Face folder; default: the YAML's"
    )
    add(
        "--predict_data",
        nargs="+",
        action="extend",
        metavar="TEXT",
        help="prompts, or a file with one per line",
    )
    add("--predict_length", type=int, help="most tokens of prompt and answer together")
    add(
        "--vocab_file",
        help="qwen.tiktoken; default: the YAML's, beside the checkpoint, or the dashscope package",
    )
    add("--device_target", choices=("auto", "CPU", "Ascend"), help="default: the YAML's")
    add("--device_id", type=int, help="default: the YAML's")
    add("--backend", choices=("cpu", "reference", "ascend"), help="default: that of the device")
    add("--max_new_tokens", type=int)
    add("--do_sample", type=_boolean, metavar="BOOL")
    add("--temperature", type=float)
    add("--top_k", type=int, help="0: off")
    add("--top_p", type=float)
    add("--repetition_penalty", type=float)
    add("--seed", type=int)
    add("--save_file", help="also write the result there")
    add("--use_parallel", type=_boolean, default=False, metavar="BOOL", help="finetune under msrun")
    add("-v", "--verbose", action="store_true", help="show MindFormers' own messages")
    _add_training(parser.add_argument_group("finetune (everything else: the YAML file)"))
    return parser


# Option -> setting of the recipe.
TRAINING = {
    "train_dataset": "train_data",
    "eval_dataset": "eval_data",
    "output_dir": "output_dir",
    "pet_method": "method",
    "seq_length": "max_length",
    "learning_rate": "learning_rate",
    "epochs": "epochs",
    "max_steps": "max_steps",
    "batch_size": "batch_size",
    "resume_training": "resume",
    "optimizer_parallel": "optimizer_parallel",
    "load_checkpoint": "model",
    "vocab_file": "vocab_file",
    "device_target": "device",
    "device_id": "device_id",
    "backend": "backend",
    "seed": "seed",
}


def _add_training(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--train_dataset",
        metavar="FILE",
        help="conversations: published JSON, messages JSONL, Alpaca, MindRecord",
    )
    add("--eval_dataset", metavar="FILE", help="held-out conversations")
    add("--output_dir", metavar="DIR", help="for checkpoints and the result; default: the YAML's")
    add("--pet_method", choices=("", "lora", "qlora"), help="lora, qlora or '' (full); default: the YAML's")
    add("--seq_length", type=int, help="longest row in tokens")
    add("--learning_rate", type=float)
    add("--epochs", type=int)
    add("--max_steps", type=int)
    add("--batch_size", type=int)
    add("--resume_training", metavar="BOOL|PATH", help="True: go on from the last checkpoint in output_dir")
    add("--optimizer_parallel", type=_boolean, metavar="BOOL", help="split AdamW's state over the devices")


def prepare(args: argparse.Namespace) -> Plan:
    """Everything that can be checked without MindSpore; raises the QwenError that says what is wrong."""
    _refuse_unsupported(args)
    config = find_config(args.config)
    settings = load_settings(config)
    path = Path(args.load_checkpoint) if args.load_checkpoint else settings.load_checkpoint
    if path is None:
        raise CheckpointError(f"no checkpoint: give --load_checkpoint, or load_checkpoint in {config}")
    changes = check_checkpoint(path, settings)
    vocab_file = _find_vocabulary(args.vocab_file or settings.vocab_file, path, settings.model)
    options = {name: getattr(args, name) for name in SAMPLING if getattr(args, name) is not None}
    SamplingParams(**{name: value for name, value in options.items() if name != "do_sample"})
    if args.predict_length is not None:
        options["max_length"] = args.predict_length
    target = args.device_target or settings.device_target or "auto"
    device_id = settings.device_id if args.device_id is None else args.device_id
    values = {
        "config": config,
        "checkpoint": path,
        "vocab_file": vocab_file,
        "prompts": _prompts(args.predict_data),
        "device_target": target,
        "device_id": device_id,
        "backend": args.backend,
        "options": options,
        "model_changes": changes,
        "save_file": args.save_file,
    }
    from research.qwen.mf.run import Plan  # imports MindFormers

    return Plan(**values)


def find_config(name: str) -> Path:
    """A path as given, or a name in the repository's configs/ folder; ConfigError if there is neither."""
    for path in (Path(name), ROOT / "configs" / name, ROOT / "configs" / "finetune" / name):
        if path.is_file():
            return path
    raise ConfigError(f"no such config: {name} (looked here and in {ROOT / 'configs'})")


def check_checkpoint(path: Path, settings: RunSettings) -> dict[str, Any]:
    """Open a checkpoint and compare it with the YAML's model; CheckpointError names what does not fit.

    Returns the model keys to take from the config.json beside it, where that says otherwise than the YAML.
    """
    from research.qwen.model.quantise import Plan, quantised_source
    from research.qwen.weights.readers import open_checkpoint

    checkpoint = open_checkpoint(path)
    quantised_source(checkpoint, settings.model, Plan(), progress=False)
    if not (checkpoint.folder / "config.json").exists():
        return {}
    own = QwenConfig.from_folder(checkpoint.folder)
    different = disagreement(own, settings.model)
    if not different:
        return {}
    print(f"warning: config.json beside the checkpoint counts: {different}", file=sys.stderr)
    return own.to_llama_dict()


def main(argv: list[str] | None = None) -> int:
    """Predict and print MindFormers' result list as the last line, or train and print the folder of the result.

    Errors are one line on stderr, exit code 2.
    """
    args = build_parser().parse_args(argv)
    if args.verbose:
        os.environ["QWEN_VERBOSE"] = "1"
    try:
        if args.run_mode in ("finetune", "train"):
            return finetune(args)
        _keep_logs_out_of_here()
        plan = prepare(args)
        from research.qwen.mf.run import predict

        print(predict(plan))
    except QwenError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def finetune(args: argparse.Namespace) -> int:
    """Train as the YAML file and the options say: the same run as that of the command ``finetune``."""
    from research.qwen.cli.common import quieten
    from research.qwen.train.recipe import Given, build
    from research.qwen.train.recipe_file import read_recipe
    from research.qwen.train.runner import run
    from research.qwen.train.signals import StopSignals

    _refuse_prediction(args)
    with StopSignals() as stop:
        quieten(args.verbose)
        file = read_recipe(find_config(args.config))
        values = {option: getattr(args, option) for option in TRAINING if getattr(args, option) is not None}
        if "pet_method" in values:
            values["pet_method"] = values["pet_method"] or "full"
        if "resume_training" in values:
            said = values["resume_training"]
            values["resume_training"] = {"true": True, "false": False}.get(said.lower(), said)
        given = [Given(TRAINING[option], value, f"--{option}") for option, value in values.items()]
        recipe = build(file.given, given)
        summary = run(recipe, file.shape, tell=lambda line: print(line, file=sys.stderr), stop=stop)
    if summary.result is not None:
        print(summary.result)
    return summary.exit_code


def _refuse_prediction(args: argparse.Namespace) -> None:
    from research.qwen.model.parallel import started_by_msrun

    for name in ("predict_data", "predict_length", "save_file"):
        if getattr(args, name):
            raise RequestError(f"--{name} is for run_mode predict; leave it out")
    if args.task != "text_generation":
        raise RequestError(f"task {args.task} is not supported; use text_generation")
    if args.use_parallel and not started_by_msrun():
        raise RequestError(
            "--use_parallel True needs several processes: start with scripts/msrun_finetune.sh"
        )


def _keep_logs_out_of_here() -> None:
    """MindFormers opens log files in ./output when it is imported; LOCAL_DEFAULT_PATH is its own variable for that."""
    if "LOCAL_DEFAULT_PATH" not in os.environ:
        folder = tempfile.mkdtemp(prefix="qwen-log-")
        os.environ["LOCAL_DEFAULT_PATH"] = folder
        atexit.register(shutil.rmtree, folder, ignore_errors=True)


def _refuse_unsupported(args: argparse.Namespace) -> None:
    if args.run_mode != "predict":
        raise RequestError(f"run_mode {args.run_mode} is not supported; use predict or finetune")
    if args.task != "text_generation":
        raise RequestError(f"task {args.task} is not supported; use text_generation")
    for name in ("use_parallel", "optimizer_parallel", "pet_method", "train_dataset", "resume_training"):
        if getattr(args, name):
            raise RequestError(f"--{name} {getattr(args, name)} is for run_mode finetune; leave it out")
    if not args.predict_data:
        raise RequestError("nothing to do: give --predict_data TEXT")


def _prompts(given: list[str]) -> str | list[str]:
    """One text or file name as MindFormers takes it, or several texts."""
    return given[0] if len(given) == 1 else given


def _find_vocabulary(named: str | Path | None, checkpoint: Path, config: QwenConfig) -> Path:
    from research.qwen.text.tokenizer import QwenTokenizer, find_vocab_file

    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    tokenizer = QwenTokenizer(find_vocab_file(named, folder))
    if len(tokenizer) > config.vocab_size:
        raise ConfigError(
            f"{tokenizer.vocab_file} has {len(tokenizer)} tokens, the model only {config.vocab_size} rows: "
            "not its vocabulary; give --vocab_file"
        )
    return tokenizer.vocab_file


def _boolean(text: str) -> bool:
    if text.lower() in ("true", "1", "yes"):
        return True
    if text.lower() in ("false", "0", "no"):
        return False
    raise argparse.ArgumentTypeError(f"expected True or False, got {text!r}")


if __name__ == "__main__":
    sys.exit(main())
