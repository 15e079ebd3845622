"""A conversation in the terminal and its commands, whoever answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

from research.qwen.cli.common import SAMPLING_OPTIONS
from research.qwen.errors import QwenError, RequestError
from research.qwen.messages import Delta, Message

SHOWN = (*SAMPLING_OPTIONS, "stop", "stop_token_ids", "ignore_eos")  # what /conf lists
HELP = """/help               this list
/clear              forget the conversation (the system message stays)
/history            show the conversation
/system [TEXT]      show or set the system message
/regen              answer the last question again
/conf [NAME=VALUE]  show or set sampling values, e.g. /conf temperature=0.7 top_p=0.9 seed=none
/exit               leave (also Ctrl-D)
A line ending in \\ goes on in the next one. Ctrl-C stops an answer."""


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
