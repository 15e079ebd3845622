"""Tool calls over the ReAct text, whole and streamed: nothing of that text ever shows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.serve.scripted import Script, scripted_server

CHAT = "/v1/chat/completions"
HI = [{"role": "user", "content": "How warm is it in 波士顿?"}]
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["波士顿", "Rome"]}, "days": {"enum": [1, 2]}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER = {"name": "get_weather", "description": "Weather of a city", "parameters": PARAMETERS}
CLOCK = {"name": "clock", "parameters": {"type": "object", "properties": {}, "additionalProperties": False}}
TOOLS = [{"type": "function", "function": WEATHER}, {"type": "function", "function": CLOCK}]
ARGUMENTS = '{"city": "波士顿", "days": 1}'
CALL = f" I look it up. 🙂\nAction: get_weather\nAction Input: {ARGUMENTS}\nObservation: 99 degrees"
FINAL = "Thought: I now know the final answer.\nFinal Answer: It is 22 degrees. 🙂"
MARKERS = ("Thought:", "Action:", "Action Input:", "Observation", "Final Answer:", "get_weather\n")


@pytest.fixture(scope="module")
def server() -> Iterator[Script]:
    with scripted_server("hello", max_length=2048) as script:
        yield script


@pytest.fixture(autouse=True)
def _fresh(server: Script) -> None:
    server.fresh("Thought:" + CALL)


def streamed(server: Script, **body: Any) -> tuple[dict[str, Any], list[Any]]:
    """The message that a client puts together as the official one does, and the chunks."""
    chunks = server.events(CHAT, {"messages": HI, "tools": TOOLS, **body})
    message: dict[str, Any] = {"content": ""}
    for chunk in chunks:
        [choice] = chunk["choices"]
        delta = choice["delta"]
        message["content"] += delta.get("content") or ""
        for call in delta.get("tool_calls", ()):
            calls = message.setdefault("tool_calls", [])
            if "id" in call:
                assert call["index"] == len(calls), "a new call has the next index"
                assert call["type"] == "function" and call["function"]["arguments"] == ""
                calls.append({**call, "function": dict(call["function"])})
            else:
                assert set(call) == {"index", "function"} and set(call["function"]) == {"arguments"}
                calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
        message["finish_reason"] = choice["finish_reason"]
    return message, chunks


def test_whole_call(server: Script) -> None:
    choice = server.chat(messages=HI, tools=TOOLS)["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    message = choice["message"]
    assert message["content"] == "I look it up. 🙂" and message["refusal"] is None
    [call] = message["tool_calls"]
    assert call["id"].startswith("call_") and call["type"] == "function"
    assert call["function"] == {"name": "get_weather", "arguments": ARGUMENTS}


def test_streamed_call(server: Script) -> None:
    message, chunks = streamed(server)
    assert message["content"] == "I look it up. 🙂" and message["finish_reason"] == "tool_calls"
    [call] = message["tool_calls"]
    assert call["function"] == {"name": "get_weather", "arguments": ARGUMENTS}
    text = json.dumps(chunks, ensure_ascii=False)
    assert not [marker for marker in MARKERS if marker in text] and "degrees" not in text
    pieces = [c["choices"][0]["delta"] for c in chunks if "tool_calls" in c["choices"][0]["delta"]]
    assert len(pieces) > 3, "arguments come as they are written"


def test_call_without_a_thought_has_no_content(server: Script) -> None:
    server.lm.reply = "Action: clock\nAction Input: {}"
    message = server.chat(messages=HI, tools=TOOLS)["choices"][0]["message"]
    assert message["content"] is None and message["tool_calls"][0]["function"]["arguments"] == "{}"


@pytest.mark.parametrize("reply", [FINAL, "It is 22 degrees. 🙂"])
def test_final_answer(server: Script, reply: str) -> None:
    server.lm.reply = reply
    choice = server.chat(messages=HI, tools=TOOLS)["choices"][0]
    assert choice["finish_reason"] == "stop" and "tool_calls" not in choice["message"]
    assert choice["message"]["content"] == "It is 22 degrees. 🙂"
    message, _ = streamed(server)
    assert (message["content"], message["finish_reason"]) == ("It is 22 degrees. 🙂", "stop")


def test_the_model_sees_tools_and_stops_at_observations(server: Script) -> None:
    server.chat(messages=HI, tools=TOOLS, stop=["mine"])
    ids, params = server.asked[0]
    text = server.lm.tokenizer.decode(ids)
    assert "get_weather: Call this tool" in text and "should be one of [get_weather, clock]" in text
    assert params.stop[0] == "mine" and "Observation:" in params.stop


def test_none_hides_the_tools(server: Script) -> None:
    server.lm.reply = "plain"
    message = server.chat(messages=HI, tools=TOOLS, tool_choice="none")["choices"][0]["message"]
    assert message["content"] == "plain" and "tool_calls" not in message
    assert "get_weather" not in server.lm.tokenizer.decode(server.asked[0][0])


@pytest.mark.parametrize("unwilling", ["I would rather talk.", "", FINAL])
@pytest.mark.parametrize("stream", [False, True])
def test_a_named_tool_is_called_whatever_the_model_wants(
    server: Script, unwilling: str, stream: bool
) -> None:
    server.lm.reply = unwilling
    choice = {"type": "function", "function": {"name": "get_weather"}}
    body: dict[str, Any] = {"tool_choice": choice, "max_tokens": 200, "temperature": 0}
    if stream:
        message, _ = streamed(server, **body)
        reason = message["finish_reason"]
    else:
        whole = server.chat(messages=HI, tools=TOOLS, **body)["choices"][0]
        message, reason = whole["message"], whole["finish_reason"]
    [call] = message["tool_calls"]
    arguments = json.loads(call["function"]["arguments"])
    assert reason == "tool_calls" and call["function"]["name"] == "get_weather"
    assert arguments["city"] in ("波士顿", "Rome") and arguments["days"] in (1, 2)


def test_a_required_call(server: Script) -> None:
    server.lm.reply = CALL.split("\nObservation")[0]
    message = server.chat(messages=HI, tools=TOOLS, tool_choice="required")["choices"][0]["message"]
    assert message["content"] == "I look it up. 🙂"
    assert message["tool_calls"][0]["function"] == {"name": "get_weather", "arguments": ARGUMENTS}
    text = server.lm.tokenizer.decode(server.asked[0][0])
    assert text.endswith("<|im_start|>assistant\nThought:")


def test_several_choices_have_calls_of_their_own(server: Script) -> None:
    choices = server.chat(
        messages=HI, tools=TOOLS, n=3, tool_choice="required", temperature=0, max_tokens=300
    )
    calls = [choice["message"]["tool_calls"][0] for choice in choices["choices"]]
    assert len({call["id"] for call in calls}) == 3
    assert {call["function"]["name"] for call in calls} <= {"get_weather", "clock"}


def test_results_go_back_as_observations(server: Script) -> None:
    server.lm.reply = " I now know the final answer.\nFinal Answer: 22 and 9."
    calls = [
        {"id": name, "type": "function", "function": {"name": "get_weather", "arguments": arguments}}
        for name, arguments in (("a", '{"city": "Rome"}'), ("b", '{"city": "波士顿"}'))
    ]
    messages = [
        *HI,
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "tool_call_id": "b", "content": "9"},
        {"role": "tool", "tool_call_id": "a", "content": [{"type": "text", "text": "22 <|im_end|>"}]},
    ]
    message = server.chat(messages=messages, tools=TOOLS)["choices"][0]["message"]
    assert message["content"] == "22 and 9."
    ids, _ = server.asked[0]
    text = server.lm.tokenizer.decode(ids)
    assert text.endswith(
        'Action Input: {"city": "Rome"}\nObservation: 22 <|im_end|>\nThought: \nAction: get_weather\n'
        'Action Input: {"city": "波士顿"}\nObservation: 9\nThought:'
    ), text[-300:]
    assert ids.count(server.lm.tokenizer.im_end_id) == 2, "system and user; the assistant's turn is open"


def test_one_call_at_a_time(server: Script) -> None:
    server.lm.reply = "Action: clock\nAction Input: {}\nAction: get_weather\nAction Input: {}"
    both = server.chat(messages=HI, tools=TOOLS)["choices"][0]["message"]["tool_calls"]
    assert [call["function"]["name"] for call in both] == ["clock", "get_weather"]
    message, _ = streamed(server)
    assert [call["index"] for call in message["tool_calls"]] == [0, 1]
    one = server.chat(messages=HI, tools=TOOLS, parallel_tool_calls=False)["choices"][0]["message"]
    assert [call["function"]["name"] for call in one["tool_calls"]] == ["clock"]


def test_arguments_that_are_no_json_pass_as_they_are(server: Script) -> None:
    server.lm.reply = "Action: clock\nAction Input: {'now'"
    message = server.chat(messages=HI, tools=TOOLS)["choices"][0]["message"]
    assert message["tool_calls"][0]["function"]["arguments"] == "{'now'"


def test_a_call_cut_by_its_length(server: Script) -> None:
    count = len(server.lm.tokenizer.encode("Thought:" + CALL.split(": 1}")[0]))
    choice = server.chat(messages=HI, tools=TOOLS, max_tokens=count)["choices"][0]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["tool_calls"][0]["function"]["arguments"].startswith('{"city": "波士顿"')


def test_qwens_own_form_of_tools(server: Script) -> None:
    tool = {
        "name_for_model": "google_search",
        "name_for_human": "谷歌搜索",
        "description_for_model": "Searches.",
        "parameters": [{"name": "q", "description": "query", "required": True, "schema": {"type": "string"}}],
    }
    server.chat(messages=HI, tools=[tool])
    assert "interact with the 谷歌搜索 API" in server.lm.tokenizer.decode(server.asked[0][0])


def test_logprobs_beside_a_call(server: Script) -> None:
    whole = server.chat(messages=HI, tools=TOOLS, logprobs=True)["choices"][0]["logprobs"]["content"]
    _, chunks = streamed(server, logprobs=True)
    parts = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert [entry for part in parts if part for entry in part["content"]] == whole
    said = b"".join(bytes(entry["bytes"]) for entry in whole).decode()
    assert said.startswith("Thought: I look it up.") and ARGUMENTS in said


# ---- the older form ----


def test_function_call(server: Script) -> None:
    choice = server.chat(messages=HI, functions=[WEATHER])["choices"][0]
    assert choice["finish_reason"] == "function_call"
    assert choice["message"] == {
        "role": "assistant",
        "content": "I look it up. 🙂",
        "refusal": None,
        "function_call": {"name": "get_weather", "arguments": ARGUMENTS},
    }


def test_streamed_function_call(server: Script) -> None:
    chunks = server.events(CHAT, {"messages": HI, "functions": [WEATHER], "function_call": "auto"})
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    calls = [delta["function_call"] for delta in deltas if "function_call" in delta]
    assert calls[0] == {"name": "get_weather", "arguments": ""}
    assert all(set(call) == {"arguments"} for call in calls[1:])
    assert "".join(call["arguments"] for call in calls) == ARGUMENTS
    assert chunks[-1]["choices"][0]["finish_reason"] == "function_call"


def test_function_results(server: Script) -> None:
    server.lm.reply = " I now know the final answer.\nFinal Answer: 22."
    messages = [
        *HI,
        {"role": "assistant", "content": None, "function_call": {"name": "get_weather", "arguments": "{}"}},
        {"role": "function", "name": "get_weather", "content": "22"},
    ]
    choice = server.chat(messages=messages, functions=[WEATHER])["choices"][0]
    assert choice["message"]["content"] == "22." and choice["finish_reason"] == "stop"
    assert server.lm.tokenizer.decode(server.asked[0][0]).endswith("Observation: 22\nThought:")


def test_a_named_function(server: Script) -> None:
    server.lm.reply = "no"
    body = {"functions": [WEATHER], "function_call": {"name": "get_weather"}, "temperature": 0}
    choice = server.chat(messages=HI, max_tokens=200, **body)["choices"][0]
    assert choice["finish_reason"] == "function_call"
    assert json.loads(choice["message"]["function_call"]["arguments"])["days"] in (1, 2)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "always"}, "tool_choice"),
        ({"tools": TOOLS, "functions": [WEATHER]}, "messages"),
        ({"tools": [*TOOLS, TOOLS[0]]}, "tools[2]"),
        ({"tools": TOOLS, "response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": TOOLS, "tool_choice": "required", "ignore_eos": True}, "ignore_eos"),
        (
            {
                "tools": [
                    {"type": "function", "function": {"name": "f", "parameters": {"type": "nonsense"}}}
                ],
                "tool_choice": "required",
            },
            "tools",
        ),
    ],
)
def test_refused(server: Script, body: dict[str, Any], param: str) -> None:
    assert server.refusal(CHAT, {"messages": HI, **body})["param"] == param
