"""``python -m research.qwen.cli COMMAND``: a command's module is imported only when it is chosen, so help is quick."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from research.qwen import __version__
from research.qwen.errors import QwenError

COMMANDS = {
    "chat": "talk to a chat model in the terminal (without a model: the embedded demo)",
    "generate": "complete prompts from the command line, a file or standard input",
    "serve": "serve a model to OpenAI clients, with a web page to chat (needs the extra [serve])",
    "convert": "convert weights: Hugging Face to MindSpore and back, export as Qwen2",
    "quantize": "write a checkpoint with int8 or int4 weights, so that later starts only map it",
    "finetune": "train a model on conversations: full, LoRA or Q-LoRA; resumable",
    "merge": "add a LoRA adapter to its base model: a Hugging Face folder that serves like any other",
    "data": "check training data, or convert it (published JSON, OpenAI messages, Alpaca, MindRecord)",
    "info": "show what a checkpoint is, and what this machine can run it on",
}


def build_parser() -> argparse.ArgumentParser:
    """The parser of the top level; each command has its own."""
    width = max(map(len, COMMANDS))
    listing = "\n".join(f"  {name:<{width}}  {text}" for name, text in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="python -m research.qwen.cli",
        description="First-generation Qwen on MindSpore.",
        epilog=f"commands:\n{listing}\n\n'COMMAND --help' shows the options of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"qwen-mindspore {__version__}")
    parser.add_argument("command", choices=list(COMMANDS), metavar="COMMAND")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0 on success, 2 with one line on standard error for a mistake the user can mend."""
    args = build_parser().parse_args(argv)
    try:
        command = importlib.import_module(f"research.qwen.cli.{args.command}")
        code: int = command.main(args.arguments)
        return code
    except QwenError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has left, as head does
        sys.stderr.close()
        return 141
