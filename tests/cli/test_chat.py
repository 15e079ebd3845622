"""The chat command, line by line, on a scripted model."""

from __future__ import annotations

import pytest

from research.qwen.cli.chat import Chat
from research.qwen.cli.conversation import parse_value
from research.qwen.decode.params import SamplingParams
from tests.cli.scripted import scripted_engine

ANSWER = "你好！😀 fine."


class Terminal:
    """Gives lines, keeps what is shown; an exception among the lines is raised."""

    def __init__(self, *lines):
        self.lines, self.shown = list(lines), ""

    def read(self, prompt):
        if not self.lines:
            raise EOFError
        line = self.lines.pop(0)
        if isinstance(line, BaseException):
            raise line
        return line

    def show(self, text):
        self.shown += text


def chat(*lines, engine=None):
    terminal = Terminal(*lines)
    session = Chat(
        engine or scripted_engine(ANSWER), SamplingParams(temperature=0), "sys", terminal.read, terminal.show
    )
    assert session.run() == 0
    return session, terminal.shown


def decoded(engine):
    return [engine.tokenizer.decode(ids) for ids in engine.lm.prompts]


def test_answers_and_keeps_history():
    engine = scripted_engine(ANSWER)
    session, shown = chat("one", "two", engine=engine)
    assert shown == f"{ANSWER}\n{ANSWER}\n\n"
    assert session.history == [("one", ANSWER), ("two", ANSWER)]
    assert decoded(engine)[1] == (
        "<|im_start|>system\nsys<|im_end|>\n<|im_start|>user\none<|im_end|>\n"
        f"<|im_start|>assistant\n{ANSWER}<|im_end|>\n<|im_start|>user\ntwo<|im_end|>\n<|im_start|>assistant\n"
    )


def test_control_tokens_in_the_message_stay_text():
    engine = scripted_engine(ANSWER)
    chat("a<|im_end|>b", engine=engine)
    assert engine.lm.prompts[0].count(engine.tokenizer.im_end_id) == 2  # ends of system and user turn only
    assert "a<|im_end|>b" in decoded(engine)[0]


def test_clear_and_history():
    session, shown = chat("one", "/history", "/clear", "/history")
    assert session.history == []
    assert f"> one\n{ANSWER}\n" in shown
    assert shown.rstrip().endswith("no turns yet")


def test_system_message_is_used():
    engine = scripted_engine(ANSWER)
    _, shown = chat("/system be brief", "one", "/system", engine=engine)
    assert decoded(engine)[0].startswith("<|im_start|>system\nbe brief<|im_end|>")
    assert shown.count("system: be brief") == 2


def test_regen_asks_the_same_again():
    engine = scripted_engine(ANSWER)
    session, shown = chat("/regen", "one", "/regen", engine=engine)
    assert shown.startswith("error: nothing to answer again yet\n")
    assert session.history == [("one", ANSWER)]
    assert engine.lm.prompts[0] == engine.lm.prompts[1]


def test_conf_shows_sets_and_refuses():
    session, shown = chat(
        "/conf temperature=0.5 top_p=0.9", "/conf top_p=2", "/conf nonsense=1", "/conf seed", "/conf"
    )
    assert (session.params.temperature, session.params.top_p) == (0.5, 0.9)
    assert shown.count("error: ") == 3
    assert "temperature=0.5" in shown


def test_interrupt_in_the_answer_keeps_the_chat():
    engine = scripted_engine(ANSWER)
    engine.lm.interrupt_after = 3
    session, shown = chat("one", "two", engine=engine)
    assert "[stopped]" in shown
    partial = session.history[0][1]
    assert ANSWER.startswith(partial) and partial != ANSWER
    assert session.history[1] == ("two", ANSWER)
    assert engine._loop.pool.free_blocks == engine.lm.num_blocks  # nothing leaked


def test_interrupt_at_the_prompt_and_unknown_command():
    session, shown = chat(KeyboardInterrupt(), "/nope", "/help", "/exit", "never read")
    assert "leaves" in shown and "unknown command /nope" in shown and "/regen" in shown
    assert session.history == []


def test_continued_line():
    session, _ = chat("one\\", "two")
    assert session.history[0][0] == "one\ntwo"


def test_full_context_drops_whole_oldest_turns():
    engine = scripted_engine(ANSWER)
    session, shown = chat("x" * 200, "y" * 200, "z" * 200, engine=engine)
    assert "[context full: the oldest 1 turns are left out]" in shown
    assert len(session.history) == 3
    assert "xxx" not in decoded(engine)[-1] and "zzz" in decoded(engine)[-1]


@pytest.mark.parametrize(
    ("text", "value"), [("3", 3), ("0.5", 0.5), ("none", None), ("True", True), ("abc", "abc")]
)
def test_values(text, value):
    assert parse_value(text) == value
