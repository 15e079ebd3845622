"""``chat``: a conversation in the terminal, streamed, with history and commands.

Ctrl-C stops an answer, not the chat.
"""

from __future__ import annotations

import argparse
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING

from research.qwen.cli.common import (
    SAMPLING_OPTIONS,
    add_model_options,
    add_sampling_options,
    load_engine,
    only_adapter,
    sampling_changes,
    sampling_from,
)
from research.qwen.decode.params import SamplingParams
from research.qwen.errors import QwenError, RequestError
from research.qwen.messages import Delta, Message
from research.qwen.text.chatml import DEFAULT_SYSTEM, fit

if TYPE_CHECKING:
    from research.qwen.engine import Engine

SHOWN = (*SAMPLING_OPTIONS, "stop", "stop_token_ids", "ignore_eos")  # what /conf lists
HELP = """/help               this list
/clear              forget the conversation (the system message stays)
/history            show the conversation
/system [TEXT]      show or set the system message
/regen              answer the last question again
/conf [NAME=VALUE]  show or set sampling values, e.g. /conf temperature=0.7 top_p=0.9 seed=none
/exit               leave (also Ctrl-D)
A line ending in \\ goes on in the next one. Ctrl-C stops an answer."""


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


class Conversation(ABC):
    """A chat and its commands; ``read`` gives a line or raises EOFError, ``show`` prints without newline."""

    def __init__(
        self, system: str, read: Callable[[str], str] = input, show: Callable[[str], None] | None = None
    ):
        self.system = system
        self.read = read
        self.show = show or (lambda text: print(text, end="", flush=True))
        self.history: list[tuple[str, str]] = []
        self.commands: dict[str, Callable[[str], bool]] = {
            "/help": self.help,
            "/clear": self.clear,
            "/history": self.print_history,
            "/system": self.set_system,
            "/regen": self.regenerate,
            "/conf": self.configure,
            "/exit": lambda _: False,
        }

    @abstractmethod
    def stream(self, query: str) -> Iterator[Delta]:
        """Deltas of the answer to ``query``; closing the iterator cancels it."""

    @abstractmethod
    def configure(self, text: str) -> bool:
        """Show or set sampling values; an invalid one leaves everything as it was."""

    def run(self) -> int:
        """Read and answer until /exit or the end of the input; 0."""
        while True:
            try:
                line = self.read_line()
                if line.strip() and not self.handle(line):
                    return 0
            except EOFError:
                self.show("\n")
                return 0
            except KeyboardInterrupt:
                self.show("\n(/exit or Ctrl-D leaves)\n")

    def read_line(self) -> str:
        """One message; a trailing backslash joins the next line."""
        line = self.read("> ")
        while line.endswith("\\"):
            line = line[:-1] + "\n" + self.read(". ")
        return line

    def handle(self, line: str) -> bool:
        """Run a command or answer a message; False ends the chat. A mistake is shown, and the chat goes on."""
        name, _, rest = line.strip().partition(" ")
        try:
            if not name.startswith("/"):
                self.answer(line)
                return True
            if name not in self.commands:
                raise RequestError(f"unknown command {name}; /help lists them")
            return self.commands[name](rest.strip())
        except QwenError as error:
            self.show(f"error: {error}\n")
            return True

    def answer(self, query: str) -> None:
        """Stream the answer to ``query`` and append the turn; an interrupted answer is kept as far as it came."""
        pieces: list[str] = []
        stream = self.stream(query)
        try:
            for delta in stream:
                pieces.append(delta.text)
                self.show(delta.text)
        except KeyboardInterrupt:
            self.show(" [stopped]")
        except QwenError:
            self.show("\n" if pieces else "")  # the message begins its own line
            raise
        finally:
            stream.close()  # type: ignore[attr-defined]  # cancels what still runs
        self.show("\n")
        self.history.append((query, "".join(pieces)))

    def messages(self, query: str) -> list[Message]:
        """The conversation so far and the query."""
        listed = [Message("system", self.system)]
        for asked, answered in self.history:
            listed += [Message("user", asked), Message("assistant", answered)]
        return [*listed, Message("user", query)]

    def help(self, _: str) -> bool:
        """Show the commands."""
        self.show(HELP + "\n")
        return True

    def clear(self, _: str) -> bool:
        """Forget the turns."""
        self.history.clear()
        self.show("conversation cleared\n")
        return True

    def print_history(self, _: str) -> bool:
        """Show the turns."""
        if not self.history:
            self.show("no turns yet\n")
        for asked, answered in self.history:
            self.show(f"> {asked}\n{answered}\n")
        return True

    def set_system(self, text: str) -> bool:
        """Show or set the system message."""
        if text:
            self.system = text
        self.show(f"system: {self.system}\n")
        return True

    def regenerate(self, _: str) -> bool:
        """Answer the last question again."""
        if not self.history:
            raise RequestError("nothing to answer again yet")
        turn = self.history.pop()
        try:
            self.answer(turn[0])
        except QwenError:
            self.history.append(turn)
            raise
        return True


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


def assignments(text: str) -> dict[str, object]:
    """``NAME=VALUE ...`` as a mapping. RequestError for a word without an equals sign."""
    values: dict[str, object] = {}
    for item in text.split():
        name, equals, value = item.partition("=")
        if not equals:
            raise RequestError(f"write NAME=VALUE, got {item!r}")
        values[name] = parse_value(value)
    return values


def parse_value(text: str) -> object:
    """``none``, true / false, an integer, a number, or the text itself."""
    lowered = text.lower()
    if lowered in ("none", "true", "false"):
        return {"none": None, "true": True, "false": False}[lowered]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
