"""Ask an agent with tools: ``python -m examples.react.run [QUESTION] [--model PATH | --url URL]``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from examples.react.agent import Agent, Backend, EngineBackend, ServerBackend
from examples.react.toolbox import Toolbox, calculator, employee_database
from research.qwen.errors import QwenError
from research.qwen.messages import Message

QUESTION = "研发部每个月的工资总共是多少？"


def build_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(prog="python -m examples.react.run", description=__doc__)
    parser.add_argument("question", nargs="*", default=[QUESTION], help="default: %(default)s")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--model", help="a chat model to load here")
    where.add_argument("--url", help="an OpenAI server, for example http://127.0.0.1:8000")
    parser.add_argument("--served-model", default="qwen", help="name of the model on the server")
    parser.add_argument(
        "--api-key", default=os.environ.get("QWEN_API_KEY", ""), help="default: $QWEN_API_KEY"
    )
    parser.add_argument("--dtype", help="of the weights, for example int4 (with --model)")
    parser.add_argument("--max-tokens", type=int, default=512, help="per answer of the model")
    parser.add_argument("--max-steps", type=int, default=6, help="answers with calls before the last one")
    parser.add_argument(
        "--code-interpreter",
        action="store_true",
        help="let the model run Python in a limited process (Linux; read examples/react/README.md first)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Ask the questions one after the other in one conversation; 2 for a mistake the user can mend."""
    args = build_parser().parse_args(argv)
    try:
        agent = Agent(_backend(args), _toolbox(args.code_interpreter), max_steps=args.max_steps, show=_show)
        conversation: list[Message] = []
        for question in args.question:
            print(f"> {question}", flush=True)
            conversation.append(Message("user", question))
            conversation += agent.run(conversation)
            print()
    except QwenError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def _toolbox(with_code: bool) -> Toolbox:
    tools = [employee_database(), calculator()]
    if with_code:
        from examples.react.interpreter import code_interpreter

        tools.append(code_interpreter())
    return Toolbox(tools)


def _backend(args: argparse.Namespace) -> Backend:
    if args.url:
        return ServerBackend(
            args.url, model=args.served_model, api_key=args.api_key, max_tokens=args.max_tokens, show=_show
        )
    from research.qwen.engine import Engine

    engine = Engine.from_pretrained(args.model, dtype=args.dtype)
    return EngineBackend(engine, max_tokens=args.max_tokens, show=_show)


def _show(text: str) -> None:
    print(text, end="", flush=True)


if __name__ == "__main__":
    sys.exit(main())
