"""Prompts and answers against the published server and its ReAct example; every difference is listed and pinned."""

from __future__ import annotations

from typing import Any

import pytest

from research.qwen.errors import QwenError, RequestError
from research.qwen.text import chatml
from research.qwen.text.react import ToolChoice, ToolPrompt, build_prompt, parse_answer, tools_from
from research.qwen.text.react_classic import classic_prompt, latest_call
from research.qwen.text.stop import StopMatcher
from research.qwen.text.tokenizer import QwenTokenizer
from tests.text.agent_files import agent_golden, message_of

# Requests the published server answers and we refuse.
REFUSED = {"functions, minimal": "functions[0].name: expected 1 to 128 printable"}
# Requests it refuses, and so do we.
ERRORS = {
    "error: no messages": "at least one user message",
    "error: no user": "at least one user message",
    "error: function before assistant": "messages[1]: the result of a tool must follow an assistant message",
}
# Requests it refuses, or fails at with an internal error, and we answer: roles in the conversation as rendered.
ACCEPTED = {
    "error: assistant first": ["system", "assistant", "user"],
    "error: two users in a row": ["system", "user", "user"],
    "error: three users in a row": ["system", "user", "user", "user"],
    "error: system in the middle": ["system", "user", "system", "user"],
    "error: function without parameters": ["system", "user"],
    "error: call without arguments": ["system", "user", "assistant"],
    "error: system content null": ["system", "user"],
}
# Answers read in another way: text -> (content, (name, arguments) or None). No marker of the format is ever shown,
# markers count at the start of the answer too but not inside a line, and nothing after an observation counts.
READ_OTHERWISE: dict[str, tuple[str | None, tuple[str, str] | None]] = {
    "Final Answer: no newline before": ("no newline before", None),
    "Thought: a\nFinal Answer: first\nFinal Answer: second": ("first\nFinal Answer: second", None),
    "Action: tool\nAction Input: {}\nObservation:": (None, ("tool", "{}")),
    "Thought: x\nAction Input: {}\nAction: tool\nObservation:": ("x", None),
    "Thought: x\nAction: tool\n": ("x", None),
    "Thought: x\nAction:\nAction Input: {}\nObservation: y": ("x", None),
    "Thought:missing space\nAction: t\nAction Input: x": ("missing space", ("t", "x")),
    "preamble Thought: inner Thought: more\nAction: t\nAction Input: x": (
        "preamble Thought: inner Thought: more",
        ("t", "x"),
    ),
    "Thought: a\nObservation: early\nAction: t\nAction Input: x": ("a", None),
    "Thought: a\nObservation: early\nAction: t\nAction Input: x\nObservation: late": ("a", None),
}


def _prompt(tokenizer: QwenTokenizer, wire: dict[str, Any]) -> ToolPrompt:
    tools = tools_from(None, wire.get("functions"))
    messages = [message_of(message) for message in wire["messages"]]
    return build_prompt(messages, tools, ToolChoice.parse(None, None, tools), tokenizer)


def _call(calls: tuple[Any, ...]) -> tuple[str, str] | None:
    assert len(calls) < 2
    return (calls[0].name, calls[0].arguments) if calls else None


MESSAGES = agent_golden("parse_messages")


@pytest.mark.parametrize("case", MESSAGES, ids=[case["name"] for case in MESSAGES])
def test_prompts_equal_the_published_server(tokenizer: QwenTokenizer, case: dict[str, Any]) -> None:
    if case["name"] in REFUSED | ERRORS:
        with pytest.raises(QwenError) as caught:
            _prompt(tokenizer, case)
        assert (REFUSED | ERRORS)[case["name"]] in str(caught.value)
        return
    prompt = _prompt(tokenizer, case)
    if case["name"] in ACCEPTED:
        assert case["error"]
        assert [turn.role for turn in prompt.messages] == ACCEPTED[case["name"]]
        return
    result = case["result"]
    assert prompt.ids == result["prompt_ids"]
    assert prompt.continued == (result["mode"] == "completion")
    if not prompt.continued:
        assert chatml.render_text(prompt.messages) == result["prompt_text"]


def test_every_request_of_the_published_server_is_looked_at() -> None:
    names = [case["name"] for case in MESSAGES]
    failing = {case["name"] for case in MESSAGES if case["error"]}
    assert len(names) == len(set(names)) == 38
    assert failing == set(ERRORS | ACCEPTED) and set(REFUSED) < set(names) - failing


ANSWERS = agent_golden("parse_response")


@pytest.mark.parametrize("case", ANSWERS, ids=[repr(case["text"])[:60] for case in ANSWERS])
def test_answers_are_read_as_published(case: dict[str, Any]) -> None:
    content, calls = parse_answer(case["text"])
    message = case["parsed"]["message"]
    published = message["function_call"]
    expected = (message["content"], (published["name"], published["arguments"]) if published else None)
    if case["text"] in READ_OTHERWISE:
        assert (content, _call(calls)) == READ_OTHERWISE[case["text"]]
        assert (content or "", _call(calls)) != expected
    else:
        assert (content or "", _call(calls)) == expected


def test_the_list_of_other_readings_is_of_these_answers() -> None:
    assert len(ANSWERS) == 22
    assert set(READ_OTHERWISE) < {case["text"] for case in ANSWERS}


@pytest.mark.parametrize("number", range(12))
def test_the_classic_prompt_equals_the_published_example(tokenizer: QwenTokenizer, number: int) -> None:
    case = agent_golden("react_prompt")[number]
    text = classic_prompt(case["chat_history"], tools_from(case["tools"]))
    assert text == case["prompt_text"]
    assert tokenizer.encode(text, allowed_special="all") == case["prompt_ids"]


@pytest.mark.parametrize("number", range(22))
def test_the_latest_call_equals_the_published_example(number: int) -> None:
    case = ANSWERS[number]
    assert list(latest_call(case["text"])) == case["react_demo"]


def _cut(text: str, stops: list[str]) -> str:
    matcher = StopMatcher(stops)
    return matcher.feed(text) + matcher.flush()


@pytest.mark.parametrize(
    "case", [c for c in agent_golden("stop_words") if c["op"] == "trim_stop_words"], ids=repr
)
def test_stop_words_cut_as_published(case: dict[str, Any]) -> None:
    if case["stop_words"] == [""]:  # published: everything is cut away
        with pytest.raises(RequestError, match="must not be empty"):
            StopMatcher([""])
        return
    assert _cut(case["text"], case["stop_words"] or []) == case["result"]


@pytest.mark.parametrize(
    "case", [c for c in agent_golden("stop_words") if c["op"] != "trim_stop_words"], ids=repr
)
def test_stop_words_mean_what_they_say(case: dict[str, Any]) -> None:
    """Published: a stop word with leading newlines also stops without them; here it stops as it is."""
    for added in set(case["result"] or []) - set(case["stop_words"] or []):
        assert any(given != added and given.lstrip("\n") == added for given in case["stop_words"])
        assert _cut(f"before {added} after", case["stop_words"]) == f"before {added} after"
    for given in case["stop_words"] or []:
        assert _cut(f"before{given} after", case["stop_words"]) == "before"


def _ids(tokenizer: QwenTokenizer, call: dict[str, Any]) -> list[int]:
    if call["kind"] == "completion":
        ids: list[int] = call["input_ids"]
        return ids
    return chatml.make_context(tokenizer, call["query"], call["history"], call["system"])[1]


def _answer(tokenizer: QwenTokenizer, prompt: ToolPrompt, reply: str, stops: list[str]) -> tuple[Any, ...]:
    """(content, call): the reply as far as an engine would show it, read by the prompt's reader."""
    ids = tokenizer.encode(reply, allowed_special="all")
    ends = [n for n, token in enumerate(ids) if token in chatml.stop_ids(tokenizer)]
    text = tokenizer.decode(ids[: ends[0]] if ends else ids)
    content, calls = prompt.parse(_cut(text, [*stops, *prompt.stop]))
    return content, _call(calls)


REQUESTS = agent_golden("requests")
ANSWERED = [case for case in REQUESTS if not case["error"]]


@pytest.mark.parametrize("case", ANSWERED, ids=[case["name"] for case in ANSWERED])
def test_whole_requests_equal_the_published_server(tokenizer: QwenTokenizer, case: dict[str, Any]) -> None:
    request = case["request"]
    prompt = _prompt(tokenizer, request)
    assert prompt.ids == _ids(tokenizer, case["model_call"])
    assert prompt.stop == (("Observation:",) if request.get("functions") else ())
    content, call = _answer(tokenizer, prompt, case["reply"], request.get("stop", []))
    message = case["response"]["choices"][0]["message"]
    published = message["function_call"]
    assert call == ((published["name"], published["arguments"]) if published else None)
    if case["name"] == "stop word with leading newlines gets a second form":
        assert content == case["reply"] != message["content"]  # stop strings mean what they say, see above
    else:
        assert content == message["content"]


def test_functions_are_streamed_where_the_published_server_refuses(tokenizer: QwenTokenizer) -> None:
    (case,) = [case for case in REQUESTS if case["error"]]
    assert "not yet implemented for stream" in case["error"]["detail"]
    reader = _prompt(tokenizer, case["request"]).stream()
    assert [*reader.feed("Thought: a\nFinal Answer: b"), *reader.feed("c")] == ["b", "c"]
    assert reader.finish() == ([], "stop")


@pytest.mark.parametrize("number", range(6))
def test_text_completion_equals_the_published_server(tokenizer: QwenTokenizer, number: int) -> None:
    case = agent_golden("text_completion")[number]
    turns = [{"role": "system", "content": case["system"]}]
    for question, answer in case["history"]:
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    prompt = _prompt(tokenizer, {"messages": turns})
    assert prompt.ids == case["input_ids"]
    assert prompt.plain and prompt.continued and prompt.stop == ()
    assert _answer(tokenizer, prompt, case["generated_text"], [])[0] == case["output"]


@pytest.mark.parametrize("number", range(7))
def test_streams_hold_the_text_of_the_published_server(number: int) -> None:
    """The same text in the same order; after a stop word the published stream goes on, ours ends."""
    case = agent_golden("stream")[number]
    matcher, shown, seen = StopMatcher(case["stop_words"] or []), "", ""
    for text in case["texts_so_far"]:
        shown, seen = shown + matcher.feed(text[len(seen) :]), text
    shown += matcher.flush()
    deltas = [event["choices"][0]["delta"] for event in case["events"] if event != "[DONE]"]
    published = "".join(delta.get("content", "") for delta in deltas)
    assert shown == published.partition("\nEND")[0]
    assert published == seen
