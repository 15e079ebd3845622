"""Log-probabilities on the wire: floats that agree, tokens that are no whole characters, what is shown of a stream."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from research.qwen.messages import Delta, TokenLogprob
from research.qwen.serve.logprobs import LEAST, LegacyLogprobs, ShownTokens, TokenNames, chat_entry
from tests.serve.running import demo_tokenizer
from tests.serve.scripted import Script, scripted_server

TEXT = "Hi 你好 龘🙂!"


@pytest.fixture(scope="module")
def server() -> Iterator[Script]:
    with scripted_server("hello") as script:
        yield script


@pytest.fixture(autouse=True)
def _fresh(server: Script) -> None:
    server.fresh(TEXT)


def log_softmax(row: np.ndarray) -> np.ndarray:
    """The definition, in float64."""
    wide = row.astype(np.float64)
    return np.asarray(wide - np.log(np.exp(wide - wide.max()).sum()) - wide.max())


# ---- chat ----


def test_chat_entries(server: Script) -> None:
    choice = server.chat(logprobs=True, top_logprobs=3)["choices"][0]
    entries = choice["logprobs"]["content"]
    tokenizer = server.lm.tokenizer
    assert choice["logprobs"]["refusal"] is None
    assert [bytes(entry["bytes"]) for entry in entries] == [
        tokenizer.token_bytes(i) for i in tokenizer.encode(TEXT)
    ], "the tokens of the content, without the one that ends it"
    assert b"".join(bytes(entry["bytes"]) for entry in entries).decode() == choice["message"]["content"]
    for entry in entries:
        assert set(entry) == {"token", "logprob", "bytes", "top_logprobs"}
        assert len(entry["top_logprobs"]) == 3
        values = [top["logprob"] for top in entry["top_logprobs"]]
        assert values == sorted(values, reverse=True)
        assert entry["token"] == entry["top_logprobs"][0]["token"]
        assert entry["logprob"] == values[0] and entry["bytes"] == entry["top_logprobs"][0]["bytes"]


def test_values_are_those_of_the_unmodified_logits(server: Script) -> None:
    plain = server.chat(logprobs=True, top_logprobs=2)["choices"][0]["logprobs"]
    changed = server.chat(
        logprobs=True,
        top_logprobs=2,
        temperature=0.2,
        repetition_penalty=1.01,
        presence_penalty=0.1,
        top_k=2,
        logit_bias={"3": 1},
    )
    assert changed["choices"][0]["logprobs"] == plain
    ids, _ = server.asked[0]
    row = log_softmax(server.lm._row(ids))
    assert math.isclose(plain["content"][0]["logprob"], row.max(), abs_tol=1e-5)


def test_without_top_logprobs_there_are_none(server: Script) -> None:
    entries = server.chat(logprobs=True)["choices"][0]["logprobs"]["content"]
    assert entries and all(entry["top_logprobs"] == [] for entry in entries)
    assert server.chat(logprobs=False)["choices"][0]["logprobs"] is None


def test_tokens_of_a_stop_string_are_no_content(server: Script) -> None:
    server.lm.reply = "ab STOP cd"
    choice = server.chat(logprobs=True, stop=["STOP"])["choices"][0]
    shown = b"".join(bytes(entry["bytes"]) for entry in choice["logprobs"]["content"]).decode()
    assert choice["message"]["content"] == "ab " and shown.startswith("ab ") and "TOP" not in shown


def test_an_answer_cut_by_its_length_lists_all_tokens(server: Script) -> None:
    count = len(server.lm.tokenizer.encode("Hi 你好 龘")) - 1
    choice = server.chat(logprobs=True, max_tokens=count)["choices"][0]
    assert len(choice["logprobs"]["content"]) == count
    assert choice["message"]["content"].endswith("\ufffd")


def test_empty_answer(server: Script) -> None:
    server.lm.reply = ""
    assert server.chat(logprobs=True)["choices"][0]["logprobs"] == {"content": [], "refusal": None}


def test_ids_for_names(server: Script) -> None:
    choice = server.chat(logprobs=True, top_logprobs=1, return_tokens_as_token_ids=True)["choices"][0]
    names = [entry["token"] for entry in choice["logprobs"]["content"]]
    assert names == [f"token_id:{i}" for i in server.lm.tokenizer.encode(TEXT)]


def test_prompt_logprobs_of_chat(server: Script) -> None:
    body = server.chat(prompt_logprobs=2)
    ids, _ = server.asked[0]
    listed = body["prompt_logprobs"]
    assert len(listed) == len(ids) and listed[0] is None
    for token, entry in zip(ids[1:], listed[1:], strict=True):
        assert str(token) in entry and len(entry) in (2, 3)
        assert [found["rank"] for found in entry.values() if found["rank"]] == [1, 2]


# ---- completions ----


def score(server: Script, **body: Any) -> Any:
    return server.complete(**{"echo": True, "logprobs": 2, "max_tokens": 1, **body})["choices"][0]


def test_what_lm_eval_sums_and_checks(server: Script) -> None:
    """It sums token_logprobs[ctxlen:-1], and calls an answer greedy if each value equals the largest of its dict."""
    tokenizer = server.lm.tokenizer
    prompts = [tokenizer.encode(text) for text in ("The cat sat.", "你好，龘", "🙂👍 x")]
    body = server.complete(prompt=prompts, echo=True, logprobs=1, max_tokens=1, temperature=0)
    for ids, choice in zip(prompts, body["choices"], strict=True):
        found = choice["logprobs"]
        assert {len(values) for values in found.values()} == {len(ids) + 1}
        assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
        for place, (value, top, key) in enumerate(
            zip(found["token_logprobs"], found["top_logprobs"], found["tokens"], strict=True)
        ):
            if place == 0:
                continue
            assert top[key] == value, "the same float"
            row = server.lm._row(ids[:place])
            actual = (ids + [0])[place] if place < len(ids) else int(row.argmax())
            assert (value == max(top.values())) == (int(row.argmax()) == actual)
            assert math.isclose(value, log_softmax(row)[actual], abs_tol=1e-4)


def test_the_same_in_a_batch_and_alone(server: Script) -> None:
    prompts = [[5, 6, 7], [8, 9], [1, 2, 3, 4, 5, 6]]
    together = server.complete(prompt=prompts, echo=True, logprobs=3, max_tokens=1)["choices"]
    for ids, choice in zip(prompts, together, strict=True):
        assert score(server, prompt=ids, logprobs=3)["logprobs"] == choice["logprobs"]


def test_pieces_of_characters_have_keys_of_their_own(server: Script) -> None:
    tokenizer = server.lm.tokenizer
    ids = tokenizer.encode("龘")
    choice = score(server, prompt=ids, logprobs=20)
    assert choice["logprobs"]["tokens"][: len(ids)] == [
        "bytes:" + "".join(f"\\x{byte:02x}" for byte in tokenizer.token_bytes(i)) for i in ids
    ]
    assert all(len(top) in (20, 21) for top in choice["logprobs"]["top_logprobs"][1:])


def test_keys_of_all_tokens_differ() -> None:
    tokenizer = demo_tokenizer()
    names = TokenNames(tokenizer)
    keys = [names.key(i) for i in range(len(tokenizer) + 5)]
    assert len(set(keys)) == len(keys)
    assert names.key(len(tokenizer)) == f"token_id:{len(tokenizer)}", "a row of the model that is no token"


def test_keys_by_id(server: Script) -> None:
    choice = score(server, prompt=[5, 6], return_tokens_as_token_ids=True)
    assert choice["logprobs"]["tokens"][:2] == ["token_id:5", "token_id:6"]
    assert all(key.startswith("token_id:") for key in choice["logprobs"]["top_logprobs"][1])


def test_offsets_are_places_in_the_text(server: Script) -> None:
    prompt = "ab 你好 龘🙂"
    choice = score(server, prompt=prompt, max_tokens=100)
    text, found = choice["text"], choice["logprobs"]
    assert text == prompt + TEXT
    for key, place in zip(found["tokens"], found["text_offset"], strict=True):
        if not key.startswith("bytes:") and key != "<|im_end|>":
            assert text[place : place + len(key)] == key
    assert found["tokens"][-1] == "<|im_end|>" and found["text_offset"][-1] == len(text)


def test_without_echo_only_the_answer(server: Script) -> None:
    choice = score(server, echo=False, max_tokens=100)
    assert len(choice["logprobs"]["tokens"]) == len(server.lm.tokenizer.encode(TEXT)) + 1
    assert choice["logprobs"]["text_offset"][0] == 0


def test_zero_rivals_leave_the_token_itself(server: Script) -> None:
    found = score(server, logprobs=0)["logprobs"]
    assert all(
        list(top.values()) == [value]
        for top, value in zip(found["top_logprobs"][1:], found["token_logprobs"][1:], strict=True)
    )


def test_prompt_alone(server: Script) -> None:
    choice = score(server, prompt=[5, 6, 7], max_tokens=0)
    assert choice["finish_reason"] == "length" and len(choice["logprobs"]["tokens"]) == 3


@pytest.mark.parametrize("n", [1, 3])
def test_streamed_scores_equal_the_whole(server: Script, n: int) -> None:
    body = {"prompt": "ab 你龘", "echo": True, "logprobs": 2, "max_tokens": 50, "n": n, "prompt_logprobs": 1}
    whole = server.post("/v1/completions", body)["choices"]
    parts: list[list[Any]] = [[] for _ in range(n)]
    for chunk in server.events("/v1/completions", body):
        parts[chunk["choices"][0]["index"]].append(chunk["choices"][0])
    for choice, pieces in zip(whole, parts, strict=True):
        assert "".join(piece["text"] for piece in pieces) == choice["text"]
        for field, values in choice["logprobs"].items():
            assert [value for piece in pieces for value in piece["logprobs"][field]] == values
        assert pieces[0]["prompt_logprobs"] == choice["prompt_logprobs"]
        assert "prompt_logprobs" not in pieces[-1]


# ---- parts ----


def test_banned_tokens_are_finite_in_json() -> None:
    tokenizer = demo_tokenizer()
    entry = TokenLogprob(3, -math.inf, ((4, 0.0), (3, -math.inf)))
    assert chat_entry(entry, TokenNames(tokenizer), 2)["logprob"] == LEAST
    part = LegacyLogprobs(TokenNames(tokenizer), tokenizer, 2).answer([entry])
    assert part["token_logprobs"] == [LEAST]


def test_shown_tokens_wait_for_their_character() -> None:
    tokenizer = demo_tokenizer()
    ids = tokenizer.encode("龘")
    shown = ShownTokens(tokenizer)
    entries = [TokenLogprob(i, -1.0) for i in ids]
    for entry in entries[:-1]:
        assert shown.add(Delta("", (entry.id,), logprobs=(entry,))) == []
    assert shown.add(Delta("龘", (ids[-1],), logprobs=(entries[-1],))) == entries


def test_shown_tokens_without_a_vocabulary() -> None:
    entry = TokenLogprob(3, -1.0)
    assert ShownTokens(None).add(Delta("", (3,), 0, "length", (entry,))) == [entry]
    assert TokenNames(None).text(3) == TokenNames(None).key(3) == "token_id:3"
