"""``python tests/serve/clients_openai.py URL``: what openai-python sees of a server with the demo model.

Written for every version of the package from 1.x on. Prints its version and, for each check, null or the error as JSON;
test_clients_openai.py runs the same checks in its own process with the newest.
"""

from __future__ import annotations

import asyncio
import base64
import json
import sys
import traceback
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, Literal

import numpy as np
import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel

MODEL = "qwen-demo"
DIALOGUES = json.loads(
    (Path(__file__).resolve().parents[2] / "research/qwen/demo/dialogues.json").read_text(encoding="utf-8")
)["dialogues"]
FACES, CAPITAL = ("发几个表情给我", "好的：😀🎉👍🏽🐼"), ("中国的首都是哪里？", "中国的首都是北京。")
WEATHER = {
    "name": "get_weather",
    "description": "Weather of a city",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "enum": ["北京", "Rome"]}, "days": {"enum": [1, 2]}},
        "required": ["city", "days"],
        "additionalProperties": False,
    },
}
TOOLS: Any = [{"type": "function", "function": WEATHER}]
NAMED: Any = {"type": "function", "function": {"name": "get_weather"}}


class City(BaseModel):
    """A form for the answer."""

    name: Literal["北京", "Rome"]
    capital: bool


CITY: Any = {
    "type": "json_schema",
    "json_schema": {
        "name": "city",
        "strict": True,
        "schema": {
            "type": "object",
            "properties": {"name": {"enum": ["北京", "Rome"]}, "capital": {"type": "boolean"}},
            "required": ["name", "capital"],
            "additionalProperties": False,
        },
    },
}


def client(url: str, **options: Any) -> OpenAI:
    """A client that tries once, so that no failure is hidden."""
    return OpenAI(base_url=f"{url}/v1", api_key="unused", **{"max_retries": 0, "timeout": 60, **options})


def asked(question: str, **body: Any) -> Any:
    """A chat request, greedy unless the body says otherwise."""
    messages = [{"role": "user", "content": question}]
    return {"model": MODEL, "messages": messages, "temperature": 0, **body}


def running(url: str, work: Callable[[AsyncOpenAI], Coroutine[Any, Any, Any]]) -> Any:
    """The result of ``work`` with an asynchronous client."""

    async def main() -> Any:
        async with AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0, timeout=60) as client:
            return await work(client)

    return asyncio.run(main())


def check_chat(url: str) -> None:
    question, expected = CAPITAL
    answer = client(url).chat.completions.create(**asked(question))
    [choice] = answer.choices
    assert (choice.message.content, choice.finish_reason) == (expected, "stop")
    assert choice.message.role == "assistant" and choice.message.tool_calls is None
    assert answer.id.startswith("chatcmpl-") and answer.model == MODEL
    usage = answer.usage
    assert usage is not None and usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens_details is not None and usage.prompt_tokens_details.cached_tokens is not None


def check_chat_knows_all_dialogues_at_once(url: str) -> None:
    turns = [dialogue["turns"][0] for dialogue in DIALOGUES]

    async def work(client: AsyncOpenAI) -> Any:
        requests = [client.chat.completions.create(**asked(question)) for question, _ in turns]
        return await asyncio.gather(*requests)

    answers = [answer.choices[0].message.content for answer in running(url, work)]
    assert answers == [expected for _, expected in turns]


def check_chat_stream(url: str) -> None:
    question, expected = FACES
    with client(url).chat.completions.create(
        **asked(question, stream=True, stream_options={"include_usage": True})
    ) as stream:
        chunks = list(stream)
    first, *middle, last, counts = chunks
    assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
    pieces = [chunk.choices[0].delta.content for chunk in middle]
    assert "".join(pieces) == expected and len(pieces) > 3
    assert not any("\ufffd" in piece for piece in pieces)
    assert last.choices[0].finish_reason == "stop" and last.choices[0].delta.content is None
    assert counts.choices == [] and counts.usage.completion_tokens > 3
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1


def check_async_streams_at_once(url: str) -> None:
    turns = [dialogue["turns"][0] for dialogue in DIALOGUES[:6]]

    async def said(client: AsyncOpenAI, question: str) -> str:
        stream = await client.chat.completions.create(**asked(question, stream=True))
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def work(client: AsyncOpenAI) -> Any:
        return await asyncio.gather(*[said(client, question) for question, _ in turns])

    assert running(url, work) == [expected for _, expected in turns]


def check_choices_seed_and_stop(url: str) -> None:
    wish = asked("hm", n=3, seed=5, temperature=2, top_p=1, max_completion_tokens=12)
    first, second = (client(url).chat.completions.create(**wish) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2] and len(set(texts)) > 1
    assert [choice.message.content for choice in second.choices] == texts
    question, expected = CAPITAL
    stopped = client(url).chat.completions.create(**asked(question, stop=["北京", "never"])).choices[0]
    assert (stopped.message.content, stopped.finish_reason) == (expected.split("北京")[0], "stop")
    cut = client(url).chat.completions.create(**asked(question, max_tokens=4)).choices[0]
    assert cut.finish_reason == "length" and expected.startswith(cut.message.content or "?")


def check_seeds_alone_and_in_company(url: str) -> None:
    """What else the model computes at the same time changes neither a text nor a single logprob."""
    wishes = [
        asked(question, seed=seed, temperature=1.8, top_p=1, max_tokens=20, logprobs=True, top_logprobs=2)
        for seed, question in enumerate(("hm", "你好", "tell me more", "再说一遍", "hm", "深度学习" * 20))
    ]

    async def work(client: AsyncOpenAI) -> Any:
        return await asyncio.gather(*[client.chat.completions.create(**wish) for wish in wishes])

    together = [answer.choices[0] for answer in running(url, work)]
    alone = [client(url).chat.completions.create(**wish).choices[0] for wish in wishes]
    assert [choice.to_dict() for choice in together] == [choice.to_dict() for choice in alone]
    assert len({choice.message.content for choice in alone}) == len(wishes)


def check_chat_logprobs(url: str) -> None:
    question, expected = FACES
    answer = client(url).chat.completions.create(**asked(question, logprobs=True, top_logprobs=3))
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    raw = b"".join(bytes(entry.bytes or ()) for entry in logprobs.content)
    assert raw.decode("utf-8") == expected
    for entry in logprobs.content:
        assert len(entry.top_logprobs) == 3 and entry.logprob == entry.top_logprobs[0].logprob <= 0


def check_completions(url: str) -> None:
    ids = [3, 14, 15]
    wish: Any = {"model": MODEL, "temperature": 0, "max_tokens": 5, "logprobs": 2, "echo": True}
    alone = client(url).completions.create(prompt=ids, **wish)
    both = client(url).completions.create(prompt=[ids, [9, 2, 6, 5]], **wish)
    assert [choice.index for choice in both.choices] == [0, 1]
    assert both.choices[0].logprobs == alone.choices[0].logprobs
    listed = alone.choices[0].logprobs
    assert listed is not None and listed.tokens is not None and listed.token_logprobs is not None
    assert len(listed.tokens) == 8 and listed.token_logprobs[0] is None
    text = client(url).completions.create(model=MODEL, prompt="静夜思", max_tokens=4, temperature=0)
    assert text.object == "text_completion" and text.choices[0].finish_reason in ("length", "stop")
    with client(url).completions.create(**wish, prompt=ids, stream=True) as stream:
        assert "".join(chunk.choices[0].text for chunk in stream) == alone.choices[0].text


def check_async_completions(url: str) -> None:
    async def work(client: AsyncOpenAI) -> Any:
        wish: Any = {"model": MODEL, "prompt": ["你好", "hello"], "max_tokens": 6, "temperature": 0}
        whole = await client.completions.create(**wish)
        stream = await client.completions.create(**wish, stream=True)
        texts = ["", ""]
        async for chunk in stream:
            texts[chunk.choices[0].index] += chunk.choices[0].text
        return [choice.text for choice in whole.choices], texts

    whole, streamed = running(url, work)
    assert whole == streamed


def check_embeddings(url: str) -> None:
    texts = ["深度学习", "hello"]
    silent = client(url).embeddings.create(model=MODEL, input=texts)  # asks for base64 and decodes it
    spelled = client(url).embeddings.create(model=MODEL, input=texts, encoding_format="float")
    packed = client(url).embeddings.create(model=MODEL, input=texts[0], encoding_format="base64")
    vectors = [item.embedding for item in silent.data]
    assert [item.index for item in silent.data] == [0, 1] and isinstance(vectors[0], list)
    expected = np.asarray([item.embedding for item in spelled.data], np.float32)
    np.testing.assert_array_equal(np.asarray(vectors, np.float32), expected)
    raw: Any = packed.data[0].embedding
    np.testing.assert_array_equal(np.frombuffer(base64.b64decode(raw), "<f4"), expected[0])
    assert silent.usage.prompt_tokens == silent.usage.total_tokens > 0


def check_async_embeddings_and_models(url: str) -> None:
    async def work(client: AsyncOpenAI) -> Any:
        names = [model.id async for model in client.models.list()]
        return names, await client.embeddings.create(model=MODEL, input=[[1, 2, 3], [4]])

    names, vectors = running(url, work)
    assert names == [MODEL] and [len(item.embedding) for item in vectors.data] == [128, 128]


def check_models(url: str) -> None:
    [card] = client(url).models.list()
    assert (card.id, card.object) == (MODEL, "model")
    assert client(url).models.retrieve(MODEL).created == card.created


def check_named_tool(url: str) -> None:
    wish = asked("北京天气如何？", tools=TOOLS, tool_choice=NAMED)
    choice = client(url).chat.completions.create(**wish).choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    [call] = choice.message.tool_calls or []
    assert call.id.startswith("call_") and call.type == "function" and call.function.name == "get_weather"
    given = json.loads(call.function.arguments)
    assert given["city"] in ("北京", "Rome") and given["days"] in (1, 2)
    history = [*wish["messages"], choice.message.to_dict(), *_results([call.id])]
    final = client(url).chat.completions.create(
        model=MODEL, messages=history, tools=TOOLS, tool_choice="none", max_tokens=8, temperature=0
    )
    assert final.choices[0].message.tool_calls is None


def _results(ids: list[str]) -> list[Any]:
    return [{"role": "tool", "tool_call_id": name, "content": "22 度"} for name in ids]


def check_streamed_tool(url: str) -> None:
    wish = asked("北京天气如何？", tools=TOOLS, tool_choice="required", stream=True, max_tokens=200)
    name, given, reasons = "", "", []
    for chunk in client(url).chat.completions.create(**wish):
        [choice] = chunk.choices
        for call in choice.delta.tool_calls or ():
            assert call.index == 0 and call.function is not None
            assert (call.id is None) == (call.function.name is None) == bool(name), "named once"
            name += call.function.name or ""
            given += call.function.arguments or ""
        reasons.append(choice.finish_reason)
        assert "Action" not in (choice.delta.content or "")
    assert name == "get_weather" and json.loads(given)["days"] in (1, 2)
    assert reasons[-1] == "tool_calls" and not any(reasons[:-1])


def check_parse_helpers(url: str) -> None:
    tool = openai.pydantic_function_tool(City, name="city")
    wish = {**asked("北京?"), "max_tokens": 120}
    answer = client(url).chat.completions.parse(
        **wish, tools=[tool], tool_choice={"type": "function", "function": {"name": "city"}}
    )
    [call] = answer.choices[0].message.tool_calls or []
    assert isinstance(call.function.parsed_arguments, City)
    formed = client(url).chat.completions.parse(**wish, response_format=City)
    assert isinstance(formed.choices[0].message.parsed, City)

    async def work(client: AsyncOpenAI) -> Any:
        async with client.chat.completions.stream(**wish, response_format=City) as stream:
            return await stream.get_final_completion()

    assert running(url, work).choices[0].message.parsed == formed.choices[0].message.parsed


def check_structured_answers(url: str) -> None:
    answer = client(url).chat.completions.create(**asked("首都?", response_format=CITY))
    given = json.loads(answer.choices[0].message.content or "")
    assert given["name"] in ("北京", "Rome") and isinstance(given["capital"], bool)
    with client(url).chat.completions.stream(**asked("首都?", response_format=CITY)) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    assert final.choices[0].message.content == answer.choices[0].message.content
    assert kinds.count("content.delta") > 1 and kinds[-1] == "content.done"


def check_stream_helper_with_tools(url: str) -> None:
    with client(url).chat.completions.stream(**asked("天气?", tools=TOOLS, tool_choice=NAMED)) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    [call] = final.choices[0].message.tool_calls or []
    parsed: Any = call.function.parsed_arguments
    assert parsed["days"] in (1, 2) and final.choices[0].finish_reason == "tool_calls"
    assert "tool_calls.function.arguments.delta" in kinds and "tool_calls.function.arguments.done" in kinds


def check_legacy_functions(url: str) -> None:
    function = {name: WEATHER[name] for name in ("name", "description", "parameters")}
    wish = asked("天气?", functions=[function], function_call={"name": "get_weather"})
    choice = client(url).chat.completions.create(**wish).choices[0]
    called = choice.message.function_call
    assert choice.finish_reason == "function_call" and called is not None
    assert called.name == "get_weather" and json.loads(called.arguments)["days"] in (1, 2)


def check_request_ids(url: str) -> None:
    answer = client(url).chat.completions.create(**asked("你好", max_tokens=1))
    assert answer._request_id
    raw = client(url).chat.completions.with_raw_response.create(
        **asked("你好", max_tokens=1), extra_headers={"X-Request-Id": "mine-7"}
    )
    assert raw.headers["x-request-id"] == "mine-7" and raw.parse()._request_id == "mine-7"
    with client(url).chat.completions.with_streaming_response.create(
        **asked("你好", max_tokens=1, stream=True)
    ) as streamed:
        assert streamed.headers["content-type"].startswith("text/event-stream")
        assert streamed.headers["x-request-id"]
        streamed.read()


def check_extras(url: str) -> None:
    extra = {"top_k": 1, "repetition_penalty": 1.0, "return_token_ids": True, "cache_salt": "mine"}
    answer: Any = client(url).chat.completions.create(
        **asked("你好", max_tokens=3, temperature=1.0, store=False, metadata={"a": "b"}), extra_body=extra
    )
    assert len(answer.choices[0].token_ids) == 3 and answer.prompt_token_ids


def check_errors_have_their_classes(url: str) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client(url).chat.completions.create(**asked("你好", model="gpt-4"))
    assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
    assert unknown.value.request_id
    with pytest.raises(openai.NotFoundError):
        client(url).models.retrieve("gpt-4")
    with pytest.raises(openai.NotFoundError):
        client(url).moderations.create(input="x")  # no such route here
    with pytest.raises(openai.BadRequestError) as wrong:
        client(url).chat.completions.create(**asked("你好", temperature=-1))
    assert wrong.value.param == "temperature" and wrong.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError) as long:
        client(url).chat.completions.create(**asked("深" * 3000))
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError):
        client(url).chat.completions.create(**asked("你好", stream=True, top_logprobs=99, logprobs=True))


CHECKS = {
    name.removeprefix("check_"): check for name, check in globals().items() if name.startswith("check_")
}


def main(url: str) -> None:
    """Run all checks against the server; their results as JSON on standard output."""
    results: dict[str, str | None] = {}
    for name, check in CHECKS.items():
        try:
            check(url)
            results[name] = None
        except BaseException:
            results[name] = traceback.format_exc()
    print(json.dumps({"version": openai.__version__, "results": results}))


if __name__ == "__main__":
    main(sys.argv[1])
