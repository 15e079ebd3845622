"""Options, loading and quietness shared by the commands."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from research.qwen.decode.params import SamplingParams
from research.qwen.errors import ConfigError
from research.qwen.interrupts import held

if TYPE_CHECKING:
    from research.qwen.engine import Engine

SAMPLING_OPTIONS: dict[str, type] = {
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "min_p": float,
    "repetition_penalty": float,
    "presence_penalty": float,
    "frequency_penalty": float,
    "seed": int,
    "max_new_tokens": int,
}


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """The checkpoint and where it runs."""
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="Hugging Face folder, converted folder, or .ckpt / .safetensors file; default: the embedded demo model",
    )
    parser.add_argument("--device", default="auto", help="cpu, ascend, or auto (default)")
    parser.add_argument("--backend", help="cpu, reference or ascend (default: what the device needs)")
    parser.add_argument(
        "--dtype",
        help="weights: int8, int4, int4-g64-asym, ... or bfloat16 (default: as stored); float32: as stored, nothing "
        "rounded; on ascend the computation: float16 (default) or bfloat16",
    )
    parser.add_argument("--lm-head-dtype", metavar="DTYPE", help="the same for the output matrix")
    parser.add_argument("--embedding-dtype", metavar="DTYPE", help="the same for the embedding table")
    parser.add_argument(
        "--kv-dtype", metavar="DTYPE", help="KV cache: bfloat16 (default on cpu), float32 or int8"
    )
    parser.add_argument(
        "--activations",
        metavar="DTYPE",
        help="beside integer weights on cpu: auto (default), int8, int16, or float32, exact",
    )
    parser.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="[NAME=]PATH",
        help="LoRA adapter (folder as peft writes it) beside the weights; serve takes several, requests choose by name",
    )
    parser.add_argument("--config", help="YAML to read the model from instead of config.json")
    parser.add_argument("--vocab", help="vocabulary file qwen.tiktoken (default: beside the checkpoint)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: physical cores)")
    parser.add_argument(
        "-v", "--verbose", action="store_true", help="show log lines, also those of MindSpore"
    )


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """One option a field of SamplingParams; unset ones keep the checkpoint's own defaults."""
    group = parser.add_argument_group("sampling (default: the checkpoint's generation_config.json)")
    for name, kind in SAMPLING_OPTIONS.items():
        group.add_argument(f"--{name.replace('_', '-')}", dest=name, type=kind, metavar=kind.__name__.upper())
    group.add_argument(
        "--greedy", action="store_true", help="take the likeliest token always (temperature 0)"
    )
    group.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end at this text; may be repeated"
    )


def sampling_changes(args: argparse.Namespace) -> dict[str, Any]:
    """The sampling options that were given on the command line."""
    changes = {name: getattr(args, name) for name in SAMPLING_OPTIONS if getattr(args, name) is not None}
    if args.greedy:
        changes["temperature"] = 0.0
    return changes | ({"stop": tuple(args.stop)} if args.stop else {})


def sampling_from(args: argparse.Namespace, engine: Engine) -> SamplingParams:
    """The checkpoint's defaults with the given options on top. RequestError for an invalid value."""
    return engine.default_params(**sampling_changes(args)).answering()


def adapters_from(args: argparse.Namespace) -> dict[str, Path]:
    """Name -> path of the --lora options, the name by default the folder's. ConfigError for a name given twice."""
    found: dict[str, Path] = {}
    for text in args.lora:
        name, equals, path = text.partition("=")
        if not equals or Path(text).exists():
            name, path = Path(text).resolve().name, text
        if name in found:
            raise ConfigError(f"--lora: two adapters are called {name!r}; write NAME=PATH")
        found[name] = Path(path)
    return found


def only_adapter(args: argparse.Namespace) -> str:
    """Name of the adapter of a command that answers with one, empty without; ConfigError for several."""
    names = list(adapters_from(args))
    if len(names) > 1:
        raise ConfigError(f"--lora was given {len(names)} times; this command answers with one adapter")
    return names[0] if names else ""


def load_engine(args: argparse.Namespace, **options: Any) -> Engine:
    """Load the model of the options, with one line on standard error while it takes long.

    ``options`` go to ``Engine.from_pretrained`` as they are.
    """
    quieten(args.verbose)
    with held():  # see there: threads that are born now leave Ctrl-C to us
        return _load_engine(args, options)


def _load_engine(args: argparse.Namespace, options: dict[str, Any]) -> Engine:
    from research.qwen.demo import demo_folder
    from research.qwen.engine import Engine
    from research.qwen.kernels.devices import resolve_device

    path = Path(args.model) if args.model else demo_folder()
    started = time.monotonic()
    if sys.stderr.isatty():
        print(f"loading {path} ...", file=sys.stderr)
    device = args.device
    if device == "auto":  # a backend that is named decides: the device need not be looked for
        device = ("ascend" if args.backend == "ascend" else "cpu") if args.backend else resolve_device(device)
    engine = Engine.from_pretrained(
        path,
        device=device,
        dtype=args.dtype,
        backend=args.backend,
        lm_head_dtype=args.lm_head_dtype,
        embedding_dtype=args.embedding_dtype,
        kv_dtype=args.kv_dtype,
        activations=args.activations,
        config=args.config,
        vocab_file=args.vocab,
        threads=args.threads,
        adapters=adapters_from(args),
        **options,
    )
    if sys.stderr.isatty():
        print(f"ready after {time.monotonic() - started:.1f} s on {device}", file=sys.stderr)
    return engine


def quieten(verbose: bool) -> None:
    """Keep MindSpore's warnings and our log lines from the user, unless asked for. Call before its import."""
    if verbose or os.environ.get("QWEN_VERBOSE") == "1":
        logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
        return
    os.environ.setdefault("GLOG_v", "3")  # errors only
    os.environ.setdefault("MS_ALLOC_CONF", "")  # else MindSpore prints its allocator settings to stdout
    logging.basicConfig(level=logging.ERROR, format="%(message)s")
    warnings.filterwarnings("ignore")
