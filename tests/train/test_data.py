"""Data files as datasets: every form, every way to be wrong, what is counted, and how little is held in memory."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from research.qwen.errors import DataError
from research.qwen.text.tokenizer import QwenTokenizer
from research.qwen.train.data import DataOptions, Dataset, open_dataset
from tests.train.data_files import golden, talk, write_array, write_lines


def opened(path: Path, tokenizer: QwenTokenizer, skip_bad: bool = False, **options: Any) -> Dataset:
    return open_dataset(path, tokenizer, DataOptions(**options), skip_bad)


def test_golden_conversations_through_a_file(tokenizer: QwenTokenizer, tmp_path: Path) -> None:
    cases = [case for case in golden()[:32] if len(case["conversations"]) > 1 and case["max_len"] == 64]
    cases = [
        case
        for case in cases
        if [t["from"] for t in case["conversations"]][:3] != ["user", "user", "assistant"]
    ]
    assert len(cases) == 18
    records = [{"id": str(n), "conversations": case["conversations"]} for n, case in enumerate(cases)]
    for path in (
        write_array(tmp_path / "a.json", records, indent=1),
        write_lines(tmp_path / "b.jsonl", records),
    ):
        dataset = opened(path, tokenizer, max_length=64)
        assert len(dataset) == len(cases)
        for case, number in zip(cases, range(len(dataset)), strict=True):
            sample = dataset[number]
            size = len(sample.ids)
            assert sample.ids == case["input_ids"][:size] and sample.labels == case["labels"][:size]
            assert set(case["input_ids"][size:]) <= {151643}


def test_the_three_forms_of_one_conversation_are_one_sample(tokenizer: QwenTokenizer, tmp_path: Path) -> None:
    forms = [
        talk("Ask\nthis", "Answer"),
        {"instruction": "Ask", "input": "this", "output": "Answer"},
        {"instruction": "Ask\nthis", "output": "Answer", "history": []},
        {"messages": [{"role": "user", "content": "Ask\nthis"}, {"role": "assistant", "content": "Answer"}]},
        {
            "messages": [
                {"role": "developer", "content": "S"},
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "Ask"}, {"type": "text", "text": "this"}],
                },
                {"role": "assistant", "content": "Answer"},
            ]
        },
        {**talk("Ask\nthis", "Answer"), "system": "S"},
        {"instruction": "Ask\nthis", "input": "", "output": "Answer", "system": "S"},
    ]
    dataset = opened(write_lines(tmp_path / "mixed.jsonl", forms), tokenizer, system="S")
    assert [dataset[n] for n in range(len(forms))] == [dataset[0]] * len(forms)


def test_alpaca_history_comes_first(tokenizer: QwenTokenizer, tmp_path: Path) -> None:
    records = [
        {"instruction": "c", "output": "d", "history": [["a", "b"]]},
        talk("a", "b", "c", "d"),
    ]
    dataset = opened(write_array(tmp_path / "x.json", records), tokenizer)
    assert dataset[0] == dataset[1]


def test_a_greeting_of_the_assistant_is_left_out(tokenizer: QwenTokenizer, tmp_path: Path) -> None:
    greeting = {"from": "assistant", "value": "Welcome"}
    record = {"conversations": [greeting, *talk("a", "b")["conversations"]]}
    dataset = opened(write_array(tmp_path / "x.json", [record, talk("a", "b")]), tokenizer)
    assert dataset[0] == dataset[1]


def message(role: Any, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


ASK = message("user", "q")
BAD: list[tuple[Any, str]] = [
    (7, "expected an object, got a number"),
    ({}, "unknown form: expected the key conversations"),
    ({"text": "x", "n": 1}, "its keys are: text, n"),
    ({"conversations": "x"}, "conversations: expected a list, got a text"),
    ({"conversations": []}, "conversations: the list is empty, so there is nothing to learn"),
    ({"conversations": [1]}, "conversations[0]: expected an object with from and value, got a number"),
    ({"conversations": [{"from": "human", "value": "x"}]}, "unknown role 'human'; it is called 'user' here"),
    (
        {"conversations": [{"from": "system", "value": "x"}]},
        "unknown role 'system'; a system message stands beside",
    ),
    ({"conversations": [{"from": "judge", "value": "x"}]}, "unknown role 'judge'; known are user, assistant"),
    ({"conversations": [{"from": ["user"], "value": "x"}]}, "unknown role ['user']"),
    (
        {"conversations": [{"from": "user", "value": 3}]},
        "conversations[0].value: expected a text, got a number",
    ),
    ({"conversations": [{"from": "user"}]}, "conversations[0].value: expected a text, got nothing"),
    (talk("only a question"), "there is no answer of the assistant, so there is nothing to learn"),
    (
        {"conversations": [{"from": "user", "value": "a"}, *talk("b", "c")["conversations"]]},
        "conversations[1]: two user turns in a row; user and assistant must alternate",
    ),
    (
        {"conversations": [*talk("a", "b")["conversations"], {"from": "assistant", "value": "c"}]},
        "conversations[2]: two assistant turns in a row",
    ),
    (
        {"conversations": [{"from": "assistant", "value": "c"}] * 2},
        "conversations[1]: the first turn is the assistant's",
    ),
    ({**talk("a", "b"), "system": 5}, "system: expected a text, got a number"),
    ({"instruction": "x"}, "output: is missing"),
    ({"instruction": "", "input": "", "output": "x"}, "instruction: is empty, and so is input"),
    ({"instruction": ["x"], "output": "x"}, "instruction: expected a text, got a list"),
    ({"instruction": "x", "output": "x", "history": [["a"]]}, "history[0]: expected a pair of texts"),
    ({"instruction": "x", "output": "x", "history": "a"}, "history: expected a list of pairs, got a text"),
    ({"messages": {}}, "messages: expected a list, got an object"),
    ({"messages": ["x"]}, "messages[0]: expected an object with role and content, got a text"),
    (
        {"messages": [message("robot", "x")]},
        "messages[0].role: unknown role 'robot'; known are system, developer",
    ),
    (
        {"messages": [message("gpt", "x")]},
        "messages[0].role: unknown role 'gpt'; it is called 'assistant' here",
    ),
    ({"messages": [message(None, "x")]}, "messages[0].role: unknown role None"),
    ({"messages": [ASK]}, "there is no answer of the assistant"),
    ({"messages": [message("system", "x")]}, "there is no answer of the assistant"),
    ({"messages": [ASK, ASK, message("assistant", "x")]}, "messages[1]: two user turns in a row"),
    ({"messages": [message("assistant", "x"), ASK]}, "messages[0]: the first turn is the assistant's"),
    (
        {"messages": [message("user", None), message("assistant", "x")]},
        "messages[0].content: expected a text, got nothing",
    ),
    ({"messages": [ASK, message("assistant", None)]}, "messages[1].content: expected a text, got nothing"),
    (
        {"messages": [message("user", [{"type": "image_url"}])]},
        "messages[0].content[0]: expected a text part",
    ),
    (
        {"messages": [ASK, message("assistant", "x", weight=0)]},
        "messages[1].weight: answers that are not to be",
    ),
    (
        {"messages": [ASK, message("assistant", "", tool_calls="x")]},
        "messages[1].tool_calls: expected a list",
    ),
    (
        {"messages": [ASK, message("assistant", "", tool_calls=[{}])]},
        "messages[1].tool_calls[0]: expected an object",
    ),
    (
        {"messages": [message("user", "q", function_call={"name": "f"})]},
        "belong to messages of the assistant only",
    ),
    (
        {"messages": [ASK, message("assistant", "", function_call={"name": ""})]},
        "messages[1].function_call.function.name: expected a text that is not empty",
    ),
    (
        {"messages": [ASK, message("assistant", "", function_call={"name": "f", "arguments": 1})]},
        "messages[1].function_call.function.arguments: expected JSON as a text",
    ),
    (
        {"messages": [ASK, message("assistant", "x")], "tools": {"a": 1}},
        "tools: expected a list, got an object",
    ),
    ({"messages": [ASK, message("assistant", "x")], "tools": "[{"}, "tools: broken JSON in the text"),
    (
        {"messages": [ASK, message("assistant", "x")], "tools": [{"type": "x"}]},
        "tools[0].type: 'x' is not supported",
    ),
]


@pytest.mark.parametrize(("record", "reason"), BAD)
def test_a_bad_record_is_named_with_file_line_and_reason(
    record: Any, reason: str, tokenizer: QwenTokenizer, tmp_path: Path
) -> None:
    path = write_lines(tmp_path / "x.jsonl", [talk("a", "b"), "", record, talk("c", "d")])
    with pytest.raises(DataError) as caught:
        opened(path, tokenizer)
    assert str(caught.value).startswith(f"{path}:3: ") and reason in str(caught.value)
    assert "\n" not in str(caught.value)
    dataset = opened(path, tokenizer, skip_bad=True)
    assert (len(dataset), dataset.skipped, dataset.problems[0].line) == (2, 1, 3)
    assert dataset.survey().warnings(dataset.options) == ["bad records left out: 1"]


def test_many_bad_records_are_listed_up_to_a_number(tokenizer: QwenTokenizer, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.jsonl", [talk("a", "b"), *[talk("a")] * 30])
    with pytest.raises(DataError) as caught:
        opened(path, tokenizer)
    lines = str(caught.value).splitlines()
    assert lines[0] == "30 of 31 records cannot be used"
    assert lines[1].startswith(f"{path}:2: ") and lines[20].startswith(f"{path}:21: ")
    assert lines[21:] == ["... and 10 more"]
    assert opened(path, tokenizer, skip_bad=True).skipped == 30


def test_nothing_but_bad_records_is_an_error_even_if_they_are_skipped(
    tokenizer: QwenTokenizer, tmp_path: Path
) -> None:
    path = write_lines(tmp_path / "x.jsonl", [talk("a")] * 2)
    with pytest.raises(DataError, match="no record can be used: 2 of 2 records"):
        opened(path, tokenizer, skip_bad=True)


@pytest.mark.parametrize("text", ["", " \n\n", "[]", "[\n ]", "\ufeff"])
def test_files_without_a_record(text: str, tokenizer: QwenTokenizer, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=r"x\.json is empty: it holds no conversation"):
        opened(path, tokenizer, skip_bad=True)


GOOD = json.dumps(talk("a", "b"))


@pytest.mark.parametrize(
    ("text", "line", "reason", "whole"),
    [
        (f"[{GOOD},\n{GOOD[:-8]}", 2, "the file ends inside the record that begins here; it is cut off", 1),
        (f"[{GOOD},\n{GOOD},\n]", 2, "a comma before the closing ]", 2),
        (f"[{GOOD},\n{GOOD[:-1]},}},\n{GOOD}]", 2, "broken JSON: ", 2),
        (f"{GOOD}\n{GOOD[:-8]}\n{GOOD}\n", 2, "broken JSON: ", 2),
        (f"{GOOD}\n{GOOD[:-1]},}}\n", 2, "broken JSON: ", 1),
        (f"{GOOD}\nhello\n", 2, "broken JSON: Expecting value at character 0 of the record, near 'hello'", 1),
        (f"{GOOD}\n" + "[" * 100_000, 2, "broken JSON: ", 1),
        (f"{GOOD}\n" + '{"a": ' + "1" * 5000 + "}", 2, "broken JSON: ", 1),
    ],
)  # fmt: skip
def test_broken_json(
    text: str, line: int, reason: str, whole: int, tokenizer: QwenTokenizer, tmp_path: Path
) -> None:
    path = tmp_path / "x.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        opened(path, tokenizer)
    assert str(caught.value).startswith(f"{path}:{line}: ") and reason in str(caught.value)
    dataset = opened(path, tokenizer, skip_bad=True)
    assert (len(dataset), dataset.skipped) == (whole, 1)


def test_bytes_that_are_not_utf8(tokenizer: QwenTokenizer, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(GOOD.encode() + b"\n" + json.dumps(talk("a", "XX")).encode().replace(b"XX", b"\xff\xfe"))
    with pytest.raises(DataError, match=r"x\.jsonl:2: not UTF-8: byte 0xff at byte \d+ of the record"):
        opened(path, tokenizer)
    path.write_bytes(GOOD.encode("utf-16"))
    with pytest.raises(DataError, match=r"x\.jsonl:1: the file is UTF-16; save it as UTF-8"):
        opened(path, tokenizer)


def test_missing_file(tokenizer: QwenTokenizer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read the data file"):
        opened(tmp_path / "none.json", tokenizer)


def test_survey_counts_and_warns(tokenizer: QwenTokenizer, tmp_path: Path) -> None:
    path = write_array(tmp_path / "x.json", [talk("a", "b"), talk("a", "b " * 90), talk("a " * 90, "b")])
    dataset = opened(path, tokenizer, max_length=40)
    told: list[tuple[int, int]] = []
    survey = dataset.survey(lambda done, total: told.append((done, total)))
    samples = [dataset[n] for n in range(3)]
    assert survey.lengths.tolist() == [len(sample.ids) for sample in samples] == [23, 40, 40]
    assert survey.lengths.dtype == np.int32 and dataset.lengths() is survey.lengths
    assert survey.trained.tolist() == [sample.trained for sample in samples]
    assert (survey.tokens, survey.cut, survey.silent, survey.longest) == (
        103,
        2,
        1,
        max(s.full for s in samples),
    )
    assert told == [(3, 3)]
    cut, silent = survey.warnings(dataset.options)
    assert (
        cut
        == f"2 of 3 samples have more than 40 tokens (the longest {survey.longest}); each is cut at its end"
    )
    assert silent.startswith("in 1 of these nothing of an answer is left: raise max_length")


@pytest.mark.parametrize("truncation", ["published", "turns"])
def test_a_sample_of_which_nothing_is_left_to_learn(
    truncation: Any, tokenizer: QwenTokenizer, tmp_path: Path
) -> None:
    path = write_lines(tmp_path / "x.jsonl", [talk("a", "b"), talk("long " * 90, "b"), talk("c", "d")])
    options = {"max_length": 40, "truncation": truncation, "mask": "assistant"}
    dataset = opened(path, tokenizer, **options)
    with pytest.raises(DataError, match=r"x\.jsonl:2: nothing .* it has 1\d\d tokens, and none of the 40"):
        dataset.lengths()
    dataset = opened(path, tokenizer, skip_bad=True, **options)
    assert dataset.lengths().tolist() == [23, 23] and len(dataset) == 2 and dataset.skipped == 1
    assert "c" in tokenizer.decode(dataset[1].ids) and dataset.line(1) == 3
    assert dataset.survey().warnings(dataset.options) == ["bad records left out: 1"]


def test_a_window_in_which_nothing_can_be_learned(tokenizer: QwenTokenizer, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.jsonl", [talk("a", "b")])
    for skip_bad in (False, True):
        with pytest.raises(DataError, match="nothing to learn in this sample"):
            opened(path, tokenizer, skip_bad=skip_bad, max_length=8).lengths()


def test_a_file_that_changes_in_use_is_noticed(tokenizer: QwenTokenizer, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.jsonl", [talk("a", "b")])
    dataset = opened(path, tokenizer)
    with path.open("a") as file:
        file.write("\n")
    with pytest.raises(DataError, match=r"x\.jsonl was changed while it was in use"):
        dataset[0]


@pytest.mark.slow
@pytest.mark.parametrize("lines", [False, True])
def test_a_large_file_is_not_held_in_memory(lines: bool, tokenizer: QwenTokenizer, tmp_path: Path) -> None:
    records = [talk("q" * 5000, "a" * 15_000)] * 750  # 15 MB
    path = (write_lines if lines else write_array)(tmp_path / "x.json", records)
    size = path.stat().st_size
    assert size > 15e6
    tracemalloc.start()
    try:
        dataset = opened(path, tokenizer)
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(dataset) == 750 and peak < size / 2 and held < 1e6
