"""langchain-openai against a served demo model: invoke, stream, tools, structured output, embeddings."""

from __future__ import annotations

import asyncio
import json
from typing import Any, Literal

import numpy as np
import openai
import pytest
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from pydantic import BaseModel, Field

from tests.serve.clients_openai import CAPITAL, FACES, MODEL

pytestmark = pytest.mark.mindspore


class Weather(BaseModel, extra="forbid"):
    """Weather of a city."""

    city: Literal["北京", "Rome"] = Field(description="where")
    days: Literal[1, 2]


class Clock(BaseModel, extra="forbid"):
    """The time."""

    zone: Literal["UTC", "CET"]


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is reported anywhere, and the shell's proxy or key does not matter."""
    for name in ("LANGSMITH_TRACING", "LANGCHAIN_TRACING_V2"):
        monkeypatch.setenv(name, "false")
    for name in ("OPENAI_API_KEY", "OPENAI_API_BASE", "OPENAI_BASE_URL", "OPENAI_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def options(demo_server: str) -> dict[str, Any]:
    return {"base_url": f"{demo_server}/v1", "api_key": "unused", "model": MODEL, "max_retries": 0}


@pytest.fixture
def chat(options: dict[str, Any]) -> ChatOpenAI:
    return ChatOpenAI(**options, temperature=0)


def gathered(chunks: list[Any]) -> AIMessageChunk:
    """The message that the chunks add up to."""
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole = whole + chunk
    assert isinstance(whole, AIMessageChunk)
    return whole


def test_invoke(chat: ChatOpenAI) -> None:
    question, expected = CAPITAL
    answer = chat.invoke([("system", "You are a helpful assistant."), ("human", question)])
    assert answer.content == expected and answer.response_metadata["finish_reason"] == "stop"
    assert answer.usage_metadata is not None and answer.usage_metadata["output_tokens"] > 3


def test_the_renamed_length_is_obeyed(options: dict[str, Any]) -> None:
    chat = ChatOpenAI(
        **options, temperature=0, max_completion_tokens=2
    )  # its name for max_tokens on the wire
    answer = chat.invoke("请背诵《静夜思》")
    assert answer.response_metadata["finish_reason"] == "length"
    assert answer.usage_metadata is not None and answer.usage_metadata["output_tokens"] == 2


def test_batch_and_conversation(chat: ChatOpenAI) -> None:
    answers = chat.batch([FACES[0], CAPITAL[0], "一加一等于几？"])
    assert [answer.content for answer in answers] == [FACES[1], CAPITAL[1], "一加一等于二。"]
    history = [
        HumanMessage("我叫小明。"),
        AIMessage("你好，小明！很高兴认识你。"),
        HumanMessage("我叫什么名字？"),
    ]
    assert chat.invoke(history).content == "你叫小明。"


def test_stream(chat: ChatOpenAI) -> None:
    chunks = list(chat.stream(FACES[0], stream_usage=True))  # it is off by default for servers of others
    whole = gathered(chunks)
    assert whole.content == FACES[1] and len(chunks) > 3
    assert not any("\ufffd" in str(chunk.content) for chunk in chunks)
    assert whole.usage_metadata is not None and whole.response_metadata["finish_reason"] == "stop"


def test_asynchronous_streams_at_once(chat: ChatOpenAI) -> None:
    async def said(question: str) -> str:
        return "".join([str(chunk.content) async for chunk in chat.astream(question)])

    async def both() -> tuple[str, ...]:
        return tuple(await asyncio.gather(said(FACES[0]), said(CAPITAL[0])))

    assert asyncio.run(both()) == (FACES[1], CAPITAL[1])


def test_logprobs(options: dict[str, Any]) -> None:
    chat = ChatOpenAI(**options, temperature=0, logprobs=True, top_logprobs=2)
    entries = chat.invoke(FACES[0]).response_metadata["logprobs"]["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in entries).decode() == FACES[1]


def test_bound_tools(chat: ChatOpenAI) -> None:
    bound = chat.bind_tools([Weather, Clock], tool_choice="Weather")
    answer = bound.invoke("北京天气如何？")
    [call] = answer.tool_calls
    assert call["name"] == "Weather" and not answer.invalid_tool_calls
    Weather.model_validate(call["args"])
    history = [HumanMessage("北京天气如何？"), answer, ToolMessage("22 度", tool_call_id=str(call["id"]))]
    final = chat.bind_tools([Weather, Clock], tool_choice="none").bind(max_tokens=8).invoke(history)
    assert isinstance(final, AIMessage) and not final.tool_calls


def test_streamed_tool_calls(chat: ChatOpenAI) -> None:
    bound = chat.bind_tools([Weather, Clock], tool_choice="any").bind(max_tokens=200)
    chunks = list(bound.stream("北京天气如何？"))
    pieces = [piece for chunk in chunks for piece in getattr(chunk, "tool_call_chunks", ())]
    assert len(pieces) > 2 and {piece["index"] for piece in pieces} == {0}
    assert [piece["name"] for piece in pieces if piece["name"]] in (["Weather"], ["Clock"])
    [call] = gathered(chunks).tool_calls
    (Weather if call["name"] == "Weather" else Clock).model_validate(call["args"])
    assert call["id"] and call["args"] == json.loads("".join(piece["args"] or "" for piece in pieces))


@pytest.mark.parametrize("method", ["function_calling", "json_schema"])
def test_structured_output(chat: ChatOpenAI, method: Literal["function_calling", "json_schema"]) -> None:
    answer = chat.with_structured_output(Weather, method=method).invoke("北京天气如何？")
    assert isinstance(answer, Weather)


def test_completions(options: dict[str, Any]) -> None:
    llm = OpenAI(**options, temperature=0, max_tokens=6)
    assert llm.invoke("静夜思") == "".join(llm.stream("静夜思"))
    both = llm.generate(["静夜思", "hello"])
    assert [listed[0].text for listed in both.generations] == [llm.invoke("静夜思"), llm.invoke("hello")]


def test_embeddings(options: dict[str, Any]) -> None:
    embeddings = OpenAIEmbeddings(**options, check_embedding_ctx_length=False)
    listed = np.asarray(embeddings.embed_documents(["深度学习", "hello"]))
    assert listed.shape == (2, 128)
    np.testing.assert_array_equal(np.asarray(embeddings.embed_query("hello")), listed[1])


def test_errors(options: dict[str, Any]) -> None:
    with pytest.raises(openai.NotFoundError):
        ChatOpenAI(**{**options, "model": "gpt-4"}).invoke("hello")
    with pytest.raises(openai.BadRequestError):
        list(ChatOpenAI(**options).stream("深" * 3000))
