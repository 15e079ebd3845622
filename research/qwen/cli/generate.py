"""``generate``: complete prompts; one answer is streamed, several come as a list or as JSON lines."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from research.qwen.cli.common import (
    add_model_options,
    add_sampling_options,
    load_engine,
    only_adapter,
    sampling_from,
)
from research.qwen.errors import PromptError

if TYPE_CHECKING:
    from research.qwen.engine import Result


def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    parser = argparse.ArgumentParser(
        prog="python -m research.qwen.cli generate",
        description="Complete prompts. Without --prompt or --file the prompt is read from standard input.",
    )
    add_model_options(parser)
    parser.add_argument("-p", "--prompt", action="append", default=[], help="a prompt; may be repeated")
    parser.add_argument("-f", "--file", help="file with one prompt a line")
    parser.add_argument("--chat", action="store_true", help="each prompt is a user's message to a chat model")
    parser.add_argument("--system", help="system message for --chat")
    parser.add_argument(
        "--json", action="store_true", help="one JSON object a line: prompt, text, ids, finish_reason"
    )
    add_sampling_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    args = build_parser().parse_args(argv)
    prompts, adapter = read_prompts(args), only_adapter(args)
    engine = load_engine(args)
    params = sampling_from(args, engine)
    inputs: list[str | list[int]] = list(prompts)
    if args.chat:
        system = [{"role": "system", "content": args.system}] if args.system is not None else []
        inputs = [engine.render([*system, {"role": "user", "content": text}]) for text in prompts]
    if len(inputs) == 1 and params.n == 1 and not args.json:
        for delta in engine.stream(inputs[0], params, adapter):
            print(delta.text, end="", flush=True)
        print()
        return 0
    for prompt, result in zip(prompts, engine.generate(inputs, params, adapter), strict=True):
        print(as_json(prompt, result) if args.json else f"{prompt}\n{result.text}\n")
    return 0


def read_prompts(args: argparse.Namespace) -> list[str]:
    """Prompts of the options; PromptError if there is none or one is empty."""
    prompts = list(args.prompt)
    if args.file:
        try:
            text = Path(args.file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PromptError(f"prompt file {args.file} cannot be read: {error}") from None
        prompts += text.splitlines()
    if not prompts and not args.file:
        if sys.stdin.isatty():
            print("prompt (end with Ctrl-D):", file=sys.stderr)
        prompts = [sys.stdin.read().removesuffix("\n")]
    empty = [place for place, prompt in enumerate(prompts, 1) if not prompt]
    if empty or not prompts:
        raise PromptError(
            f"prompt {empty[0] if empty else 1} is empty; give a text with --prompt, --file or on stdin"
        )
    return prompts


def as_json(prompt: str, result: Result) -> str:
    """One line of --json."""
    value = {
        "prompt": prompt,
        "text": result.text,
        "ids": result.ids,
        "finish_reason": result.finish_reason,
        "prompt_tokens": result.usage.prompt_tokens,
        "completion_tokens": result.usage.completion_tokens,
    }
    return json.dumps(value, ensure_ascii=False)
