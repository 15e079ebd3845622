"""Conversations with tools: every answer is learned once, under the very prompt the server would send."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research.qwen.errors import QwenError
from research.qwen.messages import Message, ToolCall
from research.qwen.text.react import ToolChoice, build_prompt, tools_from
from research.qwen.text.tokenizer import QwenTokenizer
from research.qwen.train.data import IGNORE, DataOptions, Sample
from research.qwen.train.records import dialogues
from research.qwen.train.rendering import render

TOOLS = [
    {"type": "function", "function": {"name": name, "description": f"About {name}.", "parameters": {}}}
    for name in ("weather", "time")
]
OPTIONS = DataOptions(max_length=100_000, mask="assistant", specials="text")


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def says(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def calls(*names: str, thought: str | None = None) -> dict[str, Any]:
    listed = [
        {"id": name, "type": "function", "function": {"name": name, "arguments": '{"city": "Köln"}'}}
        for name in names
    ]
    return {"role": "assistant", "content": thought, "tool_calls": listed}


def result(name: str, text: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": name, "content": text}


def samples_of(
    record: dict[str, Any], tokenizer: QwenTokenizer, options: DataOptions = OPTIONS
) -> list[Sample]:
    return [render(dialogue, tokenizer, options) for dialogue in dialogues(record, options.system)]


def learned_runs(sample: Sample, tokenizer: QwenTokenizer) -> list[str]:
    runs, open_ = [], False
    for label in sample.labels:
        if label == IGNORE:
            open_ = False
        elif open_:
            runs[-1].append(label)
        else:
            runs.append([label])
            open_ = True
    return [tokenizer.decode(run) for run in runs]


def as_values(messages: list[dict[str, Any]]) -> list[Message]:
    """The messages as the server makes them."""
    return [
        Message(
            m["role"],
            m["content"] or "",
            tuple(
                ToolCall(c["id"], c["function"]["name"], c["function"]["arguments"])
                for c in m.get("tool_calls", ())
            ),
            m.get("tool_call_id"),
        )
        for m in messages
    ]


def prompts(record: dict[str, Any], tokenizer: QwenTokenizer) -> list[list[int]]:
    """What the server would send for each answer of the conversation."""
    messages = as_values(record["messages"])
    tools = tools_from(record.get("tools"))
    choice = ToolChoice("auto" if tools else "none")
    return [
        build_prompt(messages[:n], tools, choice, tokenizer).ids
        for n, message in enumerate(messages)
        if message.role == "assistant"
    ]


def assert_learned_under_their_prompts(record: dict[str, Any], tokenizer: QwenTokenizer) -> None:
    """Each prompt is followed by a learned token in exactly one sample, and nothing else begins to be learned."""
    samples = samples_of(record, tokenizer)
    asked = prompts(record, tokenizer)
    for prompt in asked:
        size = len(prompt)
        found = [s for s in samples if s.ids[:size] == prompt and s.labels[size : size + 1] != [IGNORE]]
        assert len(found) == 1, tokenizer.decode(prompt)
    begun = sum(len(learned_runs(sample, tokenizer)) for sample in samples)
    assert begun <= len(asked)


WEATHER = [
    user("How is Köln?"),
    calls("weather", thought="I look."),
    result("weather", '{"sky": "grey"}'),
    says("It is grey."),
]


def test_one_question_gives_one_sample_without_the_results(tokenizer: QwenTokenizer) -> None:
    record = {"messages": WEATHER, "tools": TOOLS}
    (sample,) = samples_of(record, tokenizer)
    assert learned_runs(sample, tokenizer) == [
        'Thought: I look.\nAction: weather\nAction Input: {"city": "Köln"}\nObservation:',
        " I now know the final answer.\nFinal Answer: It is grey.<|im_end|>",
    ]
    assert_learned_under_their_prompts(record, tokenizer)


def test_published_mask_learns_the_whole_turn(tokenizer: QwenTokenizer) -> None:
    (sample,) = samples_of({"messages": WEATHER, "tools": TOOLS}, tokenizer, DataOptions())
    assert any('Observation: {"sky": "grey"}\nThought:' in run for run in learned_runs(sample, tokenizer))


def test_a_second_question_moves_the_tools_and_so_gives_further_samples(tokenizer: QwenTokenizer) -> None:
    second = [user("And the time?"), calls("time"), result("time", "noon"), says("Noon.")]
    record = {"messages": [*WEATHER, *second], "tools": TOOLS}
    samples = samples_of(record, tokenizer)
    assert len(samples) == 2
    assert_learned_under_their_prompts(record, tokenizer)
    # The call ends the first sample open, where the server stops it.
    assert tokenizer.decode(samples[0].ids).endswith("\nObservation:") and samples[0].labels[-1] != IGNORE
    assert learned_runs(samples[1], tokenizer) == [
        " I now know the final answer.\nFinal Answer: Noon.<|im_end|>"
    ]


def test_parallel_calls_answered_in_another_order(tokenizer: QwenTokenizer) -> None:
    record = {
        "messages": [
            user("Both?"),
            calls("weather", "time"),
            result("time", "noon"),
            result("weather", "grey"),
            says("Grey at noon."),
        ],
        "tools": TOOLS,
    }
    (sample,) = samples_of(record, tokenizer)
    text = tokenizer.decode(sample.ids)
    assert text.index("Observation: grey") < text.index("Observation: noon")
    runs = learned_runs(sample, tokenizer)
    assert len(runs) == 3 and not any("grey\n" in run or "noon\n" in run for run in runs)


def test_a_question_that_was_never_answered_after_its_call(tokenizer: QwenTokenizer) -> None:
    record = {
        "messages": [user("a"), calls("time"), result("time", "noon"), user("b"), says("c")],
        "tools": TOOLS,
    }
    samples = samples_of(record, tokenizer)
    assert not any("noon" in run for sample in samples for run in learned_runs(sample, tokenizer))


def test_calls_without_tools_are_one_sample_without_results(tokenizer: QwenTokenizer) -> None:
    (sample,) = samples_of({"messages": WEATHER}, tokenizer)
    runs = learned_runs(sample, tokenizer)
    assert runs[0].endswith("Observation:") and "It is grey.<|im_end|>" in runs[1] and len(runs) == 2
    (open_,) = samples_of({"messages": WEATHER[:2]}, tokenizer)
    assert tokenizer.decode(open_.ids).endswith("\nObservation:")


def test_plain_messages_are_trimmed_as_the_server_trims_them(tokenizer: QwenTokenizer) -> None:
    record = {"messages": [{"role": "system", "content": "S\n"}, user("\n q "), says("\n a \n")]}
    (sample,) = samples_of(record, tokenizer)
    assert sample.ids[: -len("a") - 2] == prompts(record, tokenizer)[0]
    assert learned_runs(sample, tokenizer) == [" a<|im_end|>"]


def test_functions_and_tools_as_text(tokenizer: QwenTokenizer) -> None:
    old = [user("q"), {"role": "assistant", "function_call": {"name": "time", "arguments": "{}"}}]
    done = [*old, {"role": "function", "name": "time", "content": "noon"}, says("Noon.")]
    (sample,) = samples_of({"messages": done, "functions": [TOOLS[1]["function"]]}, tokenizer)
    assert len(learned_runs(sample, tokenizer)) == 2
    as_text = samples_of({"messages": WEATHER, "tools": json.dumps(TOOLS)}, tokenizer)
    assert as_text == samples_of({"messages": WEATHER, "tools": TOOLS}, tokenizer)


def test_a_result_that_looks_like_a_placeholder(tokenizer: QwenTokenizer) -> None:
    odd = [user("\ue0f1q"), calls("time"), result("time", "\ue0f1\ue0f12\ue0f1"), says("\ue0f1")]
    (sample,) = samples_of({"messages": odd, "tools": TOOLS}, tokenizer)
    assert "Observation: \ue0f1\ue0f12\ue0f1\nThought:" in tokenizer.decode(sample.ids)


TEXT = st.text(alphabet="ab \n:é好", min_size=1, max_size=8).filter(str.strip)


@st.composite
def conversations(draw: st.DrawFn) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    if draw(st.booleans()):
        messages.append({"role": "system", "content": draw(TEXT)})
    for _ in range(draw(st.integers(1, 3))):
        messages.append(user(draw(TEXT)))
        for _ in range(draw(st.integers(0, 2))):
            name = draw(st.sampled_from(["weather", "time"]))
            messages += [calls(name, thought=draw(st.none() | TEXT)), result(name, draw(TEXT))]
        messages.append(says(draw(TEXT)))
    return messages


@given(conversations())
@settings(max_examples=30, deadline=None)
def test_every_answer_is_learned_under_its_prompt(
    tokenizer: QwenTokenizer, messages: list[dict[str, Any]]
) -> None:
    assert_learned_under_their_prompts({"messages": messages, "tools": TOOLS}, tokenizer)


@pytest.mark.parametrize(
    ("messages", "named"),
    [
        ([user("q"), calls("time"), *[result("time", "x")] * 2], r"messages\[3\].*answers no open call"),
        ([user("q"), calls("time"), result("other", "x"), says("a")], r"messages\[2\].*'other'"),
        ([result("time", "x"), says("a")], "must follow a call"),
    ],
)
def test_results_without_a_call(messages: list[dict[str, Any]], named: str) -> None:
    with pytest.raises(QwenError, match=named):
        dialogues({"messages": messages, "tools": TOOLS}, "S")
