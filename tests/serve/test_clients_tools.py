"""Tool calls that a model decides on by itself, over a scripted one: what openai-python and LangChain make of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from openai import OpenAI

from tests.serve.scripted import Script, scripted_server
from tests.serve.test_tools import ARGUMENTS, CALL, CLOCK, FINAL, HI, TOOLS, WEATHER

pytestmark = pytest.mark.slow
STRICT: Any = [{"type": "function", "function": {**tool, "strict": True}} for tool in (WEATHER, CLOCK)]
TWO = (
    f' Both. 🙂\nAction: get_weather\nAction Input: {ARGUMENTS}\nAction: clock\nAction Input: {{"zone": "世界"}}\n'
    "Observation: 99 degrees"
)


@pytest.fixture(scope="module")
def server() -> Iterator[Script]:
    with scripted_server("hello", max_length=2048) as script:
        yield script


@pytest.fixture
def client(server: Script) -> OpenAI:
    server.fresh("Thought:" + CALL)
    return OpenAI(base_url=f"{server.client.base_url}/v1", api_key="unused", max_retries=0, timeout=20)


def events_of(client: OpenAI) -> tuple[list[Any], Any]:
    wish: Any = {"model": "qwen", "messages": HI, "tools": STRICT}
    with client.chat.completions.stream(**wish) as stream:
        return list(stream), stream.get_final_completion().choices[0]


def test_openai_whole_and_back_again(server: Script, client: OpenAI) -> None:
    wish: Any = {"model": "qwen", "messages": HI, "tools": TOOLS}
    choice = client.chat.completions.create(**wish).choices[0]
    [call] = choice.message.tool_calls or []
    assert choice.finish_reason == "tool_calls" and choice.message.content == "I look it up. 🙂"
    assert call.type == "function" and call.function.arguments == ARGUMENTS
    server.fresh(FINAL.removeprefix("Thought:"))
    result = {"role": "tool", "tool_call_id": call.id, "content": "22 degrees"}
    messages = [*HI, choice.message.to_dict(), result]
    answer = client.chat.completions.create(**{**wish, "messages": messages}).choices[0]
    assert (answer.finish_reason, answer.message.content) == ("stop", "It is 22 degrees. 🙂")
    assert answer.message.tool_calls is None


def test_openai_streamed_with_its_helper(server: Script, client: OpenAI) -> None:
    events, final = events_of(client)
    kinds = [event.type for event in events]
    [call] = final.message.tool_calls
    assert final.finish_reason == "tool_calls" and final.message.content == "I look it up. 🙂"
    assert call.function.parsed_arguments == json.loads(ARGUMENTS)
    pieces = [e.arguments_delta for e in events if e.type == "tool_calls.function.arguments.delta"]
    assert "".join(pieces) == ARGUMENTS and len([piece for piece in pieces if piece]) > 3
    assert "tool_calls.function.arguments.done" in kinds


def test_openai_several_calls_in_a_stream(server: Script, client: OpenAI) -> None:
    server.fresh("Thought:" + TWO)
    wish: Any = {"model": "qwen", "messages": HI, "tools": TOOLS}
    with client.chat.completions.stream(**wish) as stream:
        calls = stream.get_final_completion().choices[0].message.tool_calls or []
    assert [call.function.name for call in calls] == ["get_weather", "clock"]
    assert [call.function.arguments for call in calls] == [ARGUMENTS, '{"zone": "世界"}']
    assert len({call.id for call in calls}) == 2
    one = client.chat.completions.create(**wish, parallel_tool_calls=False).choices[0].message
    assert [call.function.name for call in one.tool_calls or [] if call.type == "function"] == ["get_weather"]


def test_langchain_as_an_agent(server: Script, client: OpenAI) -> None:
    from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
    from langchain_openai import ChatOpenAI

    url: Any = {"base_url": f"{server.client.base_url}/v1", "api_key": "unused"}
    bound = ChatOpenAI(**url, model="qwen", max_retries=0).bind_tools([WEATHER, CLOCK])
    question = HumanMessage("How warm is it in 波士顿?")
    server.fresh("Thought:" + TWO)
    chunks = list(bound.stream([question]))
    pieces = [piece for chunk in chunks for piece in getattr(chunk, "tool_call_chunks", ())]
    assert {piece["index"] for piece in pieces} == {0, 1} and len(pieces) > 6
    whole: Any = chunks[0]
    for chunk in chunks[1:]:
        whole = whole + chunk
    assert whole.content == "Both. 🙂" and not whole.invalid_tool_calls
    assert [call["name"] for call in whole.tool_calls] == ["get_weather", "clock"]
    assert whole.tool_calls[0]["args"] == json.loads(ARGUMENTS)
    results = [
        ToolMessage(f"r{place}", tool_call_id=str(c["id"])) for place, c in enumerate(whole.tool_calls)
    ]
    server.fresh(FINAL.removeprefix("Thought:"))
    said = AIMessage(whole.content, tool_calls=whole.tool_calls)
    answer = bound.invoke([question, said, *results])
    assert answer.content == "It is 22 degrees. 🙂" and not getattr(answer, "tool_calls", None)
    prompt = server.state.tokenizer.decode(server.asked[-1][0])
    assert prompt.index("Observation: r0") < prompt.index("Observation: r1") and prompt.endswith("Thought:")
