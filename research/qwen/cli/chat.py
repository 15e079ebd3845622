"""``chat``: a conversation in the terminal, streamed, with history and commands.

Ctrl-C stops an answer, not the chat.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING

from research.qwen.cli.common import (
    add_model_options,
    add_sampling_options,
    load_engine,
    only_adapter,
    sampling_changes,
    sampling_from,
)
from research.qwen.cli.conversation import SHOWN, Conversation, assignments
from research.qwen.decode.params import SamplingParams
from research.qwen.errors import RequestError
from research.qwen.messages import Delta
from research.qwen.text.chatml import DEFAULT_SYSTEM, fit

if TYPE_CHECKING:
    from research.qwen.engine import Engine


def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    parser = argparse.ArgumentParser(
        prog="python -m research.qwen.cli chat",
        description="Talk to a chat model. Without MODEL: the embedded demo model (it only knows a dozen dialogues). "
        "With --url: the model of a running server, nothing is loaded here.",
    )
    add_model_options(parser)
    server = parser.add_argument_group("running server")
    server.add_argument("--url", help="address of a server that speaks OpenAI's API: http://HOST:PORT")
    server.add_argument("--api-key", metavar="KEY", help="its key (default: the variable QWEN_API_KEY)")
    server.add_argument(
        "--model", dest="served_model", metavar="NAME", help="one of its models (default: the first it lists)"
    )
    parser.add_argument(
        "--system", default=DEFAULT_SYSTEM, help=f"system message (default: {DEFAULT_SYSTEM!r})"
    )
    add_sampling_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    args = build_parser().parse_args(argv)
    if args.url is not None:
        return talk_to_server(args)
    if args.api_key is not None or args.served_model is not None:
        raise RequestError("--api-key and --model belong to a running server: give --url too")
    adapter = only_adapter(args)
    engine = load_engine(args)
    if engine.tokenizer is None:
        raise RequestError("chat needs a vocabulary: put qwen.tiktoken beside the checkpoint or give --vocab")
    demo = "This is the tiny demo model: it only knows a dozen dialogues. Try 你好 or: 你是谁？"
    greet("" if args.model else demo)
    return Chat(engine, sampling_from(args, engine), args.system, adapter=adapter).run()


def talk_to_server(args: argparse.Namespace) -> int:
    """The same chat with the model of a running server."""
    from research.qwen.cli.remote import RemoteChat, Server

    refuse_model_options(args)
    server = Server(args.url, args.api_key or os.environ.get("QWEN_API_KEY", ""), args.served_model or "")
    try:
        greet(f"{server.pick_model()} at {server.base}")
        return RemoteChat(server, sampling_changes(args), args.system).run()
    finally:
        server.close()


def refuse_model_options(args: argparse.Namespace) -> None:
    """RequestError for an option that says how to load a model, beside --url."""
    alone = argparse.ArgumentParser(add_help=False)
    add_model_options(alone)
    for name, default in vars(alone.parse_args([])).items():
        if name != "verbose" and getattr(args, name) != default:
            option = "MODEL" if name == "model" else f"--{name.replace('_', '-')}"
            raise RequestError(f"{option} loads a model here, --url talks to one that runs: give one of them")


def greet(line: str) -> None:
    """What a person at a terminal reads first."""
    if not sys.stdin.isatty():
        return
    import readline  # noqa: F401  (line editing and history for input())

    print("Type a message, /help for commands, /exit to leave.")
    if line:
        print(line)


class Chat(Conversation):
    """The conversation with a model of this process."""

    def __init__(
        self,
        engine: Engine,
        params: SamplingParams,
        system: str,
        read: Callable[[str], str] = input,
        show: Callable[[str], None] | None = None,
        adapter: str = "",
    ):
        super().__init__(system, read, show)
        self.engine, self.params, self.adapter = engine, params, adapter

    def stream(self, query: str) -> Iterator[Delta]:
        """Deltas of the answer; the oldest turns are left out, with a notice, when the context is full."""
        tokenizer = self.engine.tokenizer
        assert tokenizer is not None  # main() refuses an engine without one
        messages = self.messages(query)
        kept = fit(messages, tokenizer, self.engine.lm.max_length - 1)
        if len(kept) < len(messages):
            left_out = (len(messages) - len(kept)) // 2
            self.show(f"[context full: the oldest {left_out} turns are left out]\n")
        return self.engine.stream(self.engine.render(kept), self.params, self.adapter)

    def configure(self, text: str) -> bool:
        """Show or set sampling values; an invalid one leaves everything as it was."""
        values = {field.name: getattr(self.params, field.name) for field in fields(self.params)}
        values |= assignments(text)
        self.params = SamplingParams.from_mapping(values)
        shown = ", ".join(f"{name}={values[name]}" for name in values if name in SHOWN)
        self.show(f"{shown}\n")
        return True
