"""Reading answers while they are written: the same whatever the pieces, nothing of the format shown."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research.qwen.messages import ToolCall, ToolCallDelta
from research.qwen.text.react_stream import MARKERS, Piece, ReactStream, collect, new_call_id, parse_answer
from tests.text.agent_files import agent_golden

CALL = 'Thought: look it up\nAction: search\nAction Input: {"q": "周杰伦"}\n'
FINAL = "Thought: I now know the final answer.\nFinal Answer: 歌手 🎵\n- one\n- two"
PIECES = st.sampled_from(
    [
        *MARKERS,
        "\n",
        "\n",
        " ",
        "  ",
        "\n\n",
        "a",
        "Act",
        "Final",
        "search",
        '{"q": 1}',
        "中文",
        "Thought",
        ":",
        "x y",
    ]
)
TEXTS = st.lists(PIECES, max_size=16).map("".join)


def _reader(prefix: str = "", **options: object) -> ReactStream:
    counter = itertools.count()
    return ReactStream(prefix, new_id=lambda: f"call_{next(counter)}", **options)  # type: ignore[arg-type]


def _run(parts: list[str], prefix: str = "", **options: object) -> tuple[list[Piece], str]:
    reader = _reader(prefix, **options)
    pieces = [piece for part in parts for piece in reader.feed(part)]
    rest, reason = reader.finish()
    return pieces + rest, reason


def _split(text: str, cuts: list[int]) -> list[str]:
    edges = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(edges)]


def _joined(pieces: list[Piece]) -> tuple[str, list[tuple[str | None, str]]]:
    """(content, [(name, arguments)]); also checks the order that OpenAI clients need."""
    calls: list[tuple[str | None, str]] = []
    for piece in pieces:
        if isinstance(piece, str):
            continue
        if piece.id is not None:
            assert piece.index == len(calls) and piece.name and piece.arguments == ""
            calls.append((piece.name, ""))
        else:
            assert piece.index == len(calls) - 1 and piece.name is None and piece.arguments
            calls[-1] = (calls[-1][0], calls[-1][1] + piece.arguments)
    return "".join(piece for piece in pieces if isinstance(piece, str)), calls


@pytest.mark.slow
@settings(max_examples=800, deadline=None)
@given(TEXTS, st.lists(st.integers(0, 200), max_size=8), st.sampled_from(["", "Thought:"]), st.booleans())
def test_pieces_do_not_matter(text: str, cuts: list[int], prefix: str, parallel: bool) -> None:
    whole, reason = _run([text], prefix, parallel=parallel)
    split, split_reason = _run(_split(text, cuts), prefix, parallel=parallel)
    single, single_reason = _run(list(text), prefix, parallel=parallel)
    assert _joined(whole) == _joined(split) == _joined(single)
    assert reason == split_reason == single_reason
    assert reason == ("tool_calls" if _joined(whole)[1] else "stop")
    assert parallel or len(_joined(whole)[1]) < 2


@pytest.mark.parametrize("case", [*(case["text"] for case in agent_golden("parse_response")), CALL, FINAL])
def test_every_split_of_known_answers(case: str) -> None:
    expected = _joined(_run([case])[0])
    for cut in range(len(case) + 1):
        assert _joined(_run([case[:cut], case[cut:]])[0]) == expected


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@given(TEXTS)
def test_calls_never_leak_into_content(text: str) -> None:
    # Markers count at the start of a line, so thoughts and answers get a first word.
    worded = f"Thought: {text}".replace("Thought:", "Thought: so").replace(
        "Final Answer:", "Final Answer: so"
    )
    content, calls = _joined(_run([worded])[0])
    shown = content.splitlines()
    if "Final Answer:" not in text:  # what stands in a final answer is for the reader
        assert not any(
            line.startswith(("Action:", "Action Input:", "Observation:", "Final Answer:")) for line in shown
        )
    assert not any(line.startswith("Observation:") for line in shown)
    assert content == content.strip()
    for name, arguments in calls:
        assert name and name == name.strip()
        assert arguments == arguments.strip() != ""
        assert not any(f"\n{marker}" in arguments for marker in MARKERS)


def test_a_call_is_streamed_name_first_then_arguments_as_they_come() -> None:
    reader = _reader()
    assert reader.feed("Thought: look it up\nAction: sea") == []
    assert reader.feed("rch\nAction Inp") == []
    assert reader.feed('ut: {"q"') == [
        "look it up",
        ToolCallDelta(0, "", "call_0", "search"),
        ToolCallDelta(0, '{"q"'),
    ]
    assert reader.feed(': "周') == [ToolCallDelta(0, ': "周')]
    assert reader.feed('杰伦"}\nObserv') == [ToolCallDelta(0, '杰伦"}')]
    assert reader.finish() == ([], "tool_calls")


def test_a_final_answer_streams_at_once() -> None:
    reader = _reader()
    assert reader.feed("Thought: I now know the final answer.\nFinal Answer:") == []
    assert [reader.feed(part) for part in (" 歌", "手 ", "🎵\n", "- one")] == [
        ["歌"],
        ["手"],
        [" 🎵"],
        ["\n- one"],
    ]
    assert reader.finish() == ([], "stop")


def test_plain_text_streams_at_once() -> None:
    reader = _reader()
    assert [reader.feed(part) for part in ("你", "好", "！\n", "Act", "ive: yes")] == [
        ["你"],
        ["好"],
        ["！"],
        [],
        ["\nActive: yes"],
    ]


@pytest.mark.parametrize("text", ["A", "Act", "Film:\nAction", "T", "Ob", "Final"])
def test_half_a_marker_at_the_end_of_plain_text_is_text(text: str) -> None:
    assert parse_answer(text) == (text, ())


@pytest.mark.parametrize(
    "end", ["\nA", "\nAction", "\nAction:", "\nAction: sear", "\nAction: search\nAction Inpu", "\nObs"]
)
def test_an_answer_that_breaks_off_shows_its_thought_only(end: str) -> None:
    assert parse_answer(f"Thought: x{end}") == ("x", ())


def test_plain_text_with_a_line_of_action_stays_text() -> None:
    text = "Genre list\nAction: Die Hard\nComedy: Airplane"
    assert _joined(_run(list(text))[0]) == (text, [])
    assert _joined(_run(["Genres\nAction: Die Hard"])[0]) == ("Genres\nAction: Die Hard", [])


def test_plain_text_with_a_broken_call_of_a_known_tool_does_not_show_it() -> None:
    assert _joined(_run(["I look.\nAction: search"], names=["search"])[0]) == ("I look.", [])


def test_no_action_and_then_an_answer() -> None:
    assert parse_answer("Thought: a\nAction: None\nFinal Answer: b") == ("b", ())


def test_a_line_after_an_action_keeps_its_indent() -> None:
    text = "Thought: x\nAction:\n  a"
    assert _joined(_run([text])[0]) == _joined(_run(list(text))[0]) == ("x\n  a", [])


def test_several_calls_in_one_answer() -> None:
    text = "Thought: both\nAction: a\nAction Input: 1\nAction: b\nAction Input: \nThought: wait"
    assert _joined(_run(list(text))[0]) == ("both", [("a", "1"), ("b", "{}")])
    assert _joined(_run(list(text), parallel=False)[0]) == ("both", [("a", "1")])


def test_text_before_a_thought_and_its_call() -> None:
    assert _joined(_run(list("Sure.\nThought: x\nAction: a\nAction Input: {}"))[0]) == (
        "Sure.\nx",
        [("a", "{}")],
    )


@pytest.mark.parametrize("arguments", ["{'a': 1}", '{"a":', "print(1)", '{"a": "x\ny"}'])
def test_arguments_are_passed_on_as_written(arguments: str) -> None:
    _, calls = parse_answer(f"Thought: x\nAction: t\nAction Input: {arguments}\nObservation:")
    assert calls[0].arguments == arguments


def test_calls_can_be_refused() -> None:
    assert _joined(_run([CALL], calls=False)[0]) == ("look it up", [])
    assert _run([CALL], calls=False)[1] == "stop"


def test_what_the_prompt_already_said_is_not_repeated() -> None:
    named = "Thought: I need to call search.\nAction: search\nAction Input:"
    pieces, reason = _run([' {"q": 1}'], named)
    assert pieces == [ToolCallDelta(0, "", "call_0", "search"), ToolCallDelta(0, '{"q": 1}')]
    assert reason == "tool_calls"
    assert _run([" world"], "Thought: x\nFinal Answer: Hello")[0] == [" world"]
    assert _run([" so\nFinal Answer: yes"], "Thought:")[0] == ["yes"]
    assert _run([" only this"], "Thought:")[0] == ["only this"]


def test_whole_answers_are_collected() -> None:
    content, calls = parse_answer(CALL)
    assert content == "look it up"
    assert calls == (ToolCall(calls[0].id, "search", '{"q": "周杰伦"}'),)
    assert collect(_reader(), "Action: a\nAction Input: 1") == (None, (ToolCall("call_0", "a", "1"),))
    assert parse_answer("") == ("", ())


def test_call_ids_are_fresh() -> None:
    ids = {new_call_id() for _ in range(200)}
    assert len(ids) == 200 and all(value.startswith("call_") and len(value) == 29 for value in ids)
