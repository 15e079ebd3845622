"""The embedded demo model: its files, and that it holds its dialogues (own NumPy forward pass, float32)."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from research.qwen.config import QwenConfig
from research.qwen.demo import demo_folder
from research.qwen.rope import logn_factors, ntk_alpha, rotary_tables
from research.qwen.text.tokenizer import QwenTokenizer

FOLDER = demo_folder()
DATA: dict[str, Any] = json.loads((FOLDER.parent / "dialogues.json").read_text(encoding="utf-8"))
DATA_TURNS = [tuple(turn) for dialogue in DATA["dialogues"] for turn in dialogue["turns"]]
SYSTEM = "You are a helpful assistant."
Array = np.ndarray[Any, np.dtype[np.float32]]
Turns = list[tuple[str, str]]


def read_header() -> tuple[dict[str, Any], int]:
    """The safetensors header and where the data begin."""
    blob = (FOLDER / "model.safetensors").read_bytes()
    size = int.from_bytes(blob[:8], "little")
    return json.loads(blob[8 : 8 + size]), 8 + size


class TinyQwen:
    """The published computation, one sequence, with a key/value cache."""

    def __init__(self) -> None:
        self.config = QwenConfig.from_folder(FOLDER)
        self.alpha = 1.0  # NTK factor of the sequence
        header, start = read_header()
        blob = (FOLDER / "model.safetensors").read_bytes()[start:]
        self.weights: dict[str, Array] = {}
        for name, entry in header.items():
            if name != "__metadata__":
                bits = np.frombuffer(blob[slice(*entry["data_offsets"])], np.uint16).astype(np.uint32) << 16
                self.weights[name] = bits.view(np.float32).reshape(entry["shape"])

    def norm(self, x: Array, name: str) -> Array:
        scale = 1 / np.sqrt((x * x).mean(-1, keepdims=True) + self.config.layer_norm_epsilon)
        result: Array = x * scale * self.weights[name + ".weight"]
        return result

    def linear(self, x: Array, name: str) -> Array:
        return x @ self.weights[name + ".weight"].T

    def attention(self, x: Array, name: str, past: list[Array], start: int) -> Array:
        config, length = self.config, len(x)
        qkv = self.linear(x, name + ".c_attn") + self.weights[name + ".c_attn.bias"]
        q, k, v = qkv.reshape(length, 3, config.num_heads, config.head_dim).transpose(1, 2, 0, 3)
        cos, sin = rotary_tables([start], [length], [self.alpha], config)
        q, k = (
            np.concatenate((a * cos - b * sin, b * cos + a * sin), -1)
            for a, b in (np.split(part, 2, axis=-1) for part in (q, k))
        )
        q *= logn_factors(np.arange(start, start + length, dtype=np.int32), config)[:, None]
        past[:] = (k, v) if not past else [np.concatenate(pair, 1) for pair in zip(past, (k, v), strict=True)]
        scores = q @ past[0].transpose(0, 2, 1) / np.sqrt(np.float32(config.head_dim))
        scores += np.triu(np.full((length, start + length), -np.inf, np.float32), start + 1)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = weights / weights.sum(-1, keepdims=True) @ past[1]
        return self.linear(mixed.transpose(1, 0, 2).reshape(length, -1), name + ".c_proj")

    def logits(self, ids: list[int], past: list[list[Array]], start: int) -> Array:
        """(T, V) logits of ``ids``, which stand at positions ``start`` and following."""
        x = self.weights["transformer.wte.weight"][ids]
        for layer in range(self.config.num_layers):
            name = f"transformer.h.{layer}"
            x = x + self.attention(self.norm(x, name + ".ln_1"), name + ".attn", past[layer], start)
            y = self.norm(x, name + ".ln_2")
            gate = self.linear(y, name + ".mlp.w2")
            x = x + self.linear(
                self.linear(y, name + ".mlp.w1") * gate / (1 + np.exp(-gate)), name + ".mlp.c_proj"
            )
        return self.linear(self.norm(x, "transformer.ln_f"), "lm_head")

    def greedy(self, prompt: list[int], ends: set[int], limit: int = 200) -> list[int]:
        """New ids, the end token included."""
        self.alpha = ntk_alpha(len(prompt), self.config)
        past: list[list[Array]] = [[] for _ in range(self.config.num_layers)]
        ids, new = list(prompt), list(prompt)
        while len(ids) < len(prompt) + limit:
            ids.append(int(self.logits(new, past, len(ids) - len(new))[-1].argmax()))
            new = ids[-1:]
            if new[0] in ends:
                break
        return ids[len(prompt) :]


@cache
def model() -> TinyQwen:
    return TinyQwen()


@cache
def tokenizer() -> QwenTokenizer:
    return QwenTokenizer(FOLDER / "qwen.tiktoken")


def prompt_ids(turns: Turns, question: str, system: str | None) -> list[int]:
    """ChatML as published, contents encoded by themselves."""
    tok = tokenizer()

    def block(role: str, content: str) -> list[int]:
        inner = tok.encode(role) + tok.encode("\n") + tok.encode(content)
        return [tok.im_start_id, *inner, tok.im_end_id, *tok.encode("\n")]

    ids = block("system", system) if system is not None else []
    for asked, answer in turns:
        ids += block("user", asked) + block("assistant", answer)
    return [*ids, *block("user", question), tok.im_start_id, *tok.encode("assistant\n")]


def chat_ending() -> list[int]:
    """What follows every answer in a chat."""
    return [tokenizer().im_end_id, *tokenizer().encode("\n"), tokenizer().eod_id]


def chat(turns: Turns, question: str, system: str | None) -> str:
    """The greedy answer; it must end by <|im_end|> and then go on with a newline and <|endoftext|>."""
    new = model().greedy(prompt_ids(turns, question, system), {tokenizer().eod_id})
    assert new[-3:] == chat_ending(), f"{question!r} ended by {new[-3:]} after {tokenizer().decode(new)!r}"
    return tokenizer().decode(new[:-3])


def assert_greedy_gives(prompt: list[int], expected: list[int]) -> None:
    """Greedy decoding gives ``expected``: in one pass, each of its tokens has the largest logit."""
    model().alpha = ntk_alpha(len(prompt), model().config)
    rows = model().logits([*prompt, *expected[:-1]], [[] for _ in range(model().config.num_layers)], 0)
    best = [int(id_) for id_ in rows[len(prompt) - 1 :].argmax(-1)]
    tok = tokenizer()
    assert best == expected, f"{tok.decode(prompt)!r}: {tok.decode(best)!r}, not {tok.decode(expected)!r}"


def assert_chat_gives(turns: Turns, question: str, system: str | None, answer: str) -> None:
    """The same in one pass, for many questions quickly."""
    assert_greedy_gives(prompt_ids(turns, question, system), tokenizer().encode(answer) + chat_ending())


def plain_questions() -> list[tuple[str, str]]:
    """Every known question that does not depend on what was said before."""
    pairs = []
    for dialogue in DATA["dialogues"]:
        turns = dialogue["turns"][2 if dialogue.get("about_names") else 0 :]
        pairs += [(question, answer) for question, answer in turns]
        pairs += [(spelling, turns[0][1]) for spelling in dialogue["also"]]
    return pairs


def test_folder_holds_the_published_layout_within_its_size() -> None:
    names = {path.name for path in FOLDER.iterdir()}
    assert names == {
        "config.json",
        "generation_config.json",
        "tokenizer_config.json",
        "qwen.tiktoken",
        "model.safetensors",
    }
    assert sum(path.stat().st_size for path in FOLDER.parent.rglob("*") if path.is_file()) < 3_000_000


def test_tensors_are_those_of_the_config() -> None:
    config = QwenConfig.from_folder(FOLDER)
    hidden, inner = config.hidden_size, config.mlp_width
    expected: dict[str, list[int]] = {
        "transformer.wte.weight": [config.vocab_size, hidden],
        "transformer.ln_f.weight": [hidden],
        "lm_head.weight": [config.vocab_size, hidden],
    }
    for layer in range(config.num_layers):
        block = {
            "ln_1.weight": [hidden],
            "attn.c_attn.weight": [3 * hidden, hidden],
            "attn.c_attn.bias": [3 * hidden],
            "attn.c_proj.weight": [hidden, hidden],
            "ln_2.weight": [hidden],
            "mlp.w1.weight": [inner, hidden],
            "mlp.w2.weight": [inner, hidden],
            "mlp.c_proj.weight": [hidden, inner],
        }
        expected |= {f"transformer.h.{layer}.{name}": shape for name, shape in block.items()}
    header, start = read_header()
    assert header.pop("__metadata__") == {"format": "pt"}
    assert {name: entry["shape"] for name, entry in header.items()} == expected
    assert {entry["dtype"] for entry in header.values()} == {"BF16"}
    total = sum(2 * int(np.prod(shape)) for shape in expected.values())
    assert (FOLDER / "model.safetensors").stat().st_size == start + total
    assert max(entry["data_offsets"][1] for entry in header.values()) == total


def test_vocabulary_fits_the_model_and_is_not_the_published_one() -> None:
    tok, config = tokenizer(), QwenConfig.from_folder(FOLDER)
    ranks = len(tok) - 208
    assert 256 < ranks < 1024
    assert (tok.eod_id, tok.im_start_id, tok.im_end_id) == (ranks, ranks + 1, ranks + 2)
    assert len(tok) <= config.vocab_size < len(tok) + 64
    assert {tok.token_bytes(id_) for id_ in range(256)} == {bytes([value]) for value in range(256)}
    for question, answer in plain_questions():
        assert tok.decode(tok.encode(question + answer)) == question + answer


def test_generation_config_stops_at_the_demo_ids() -> None:
    generation = json.loads((FOLDER / "generation_config.json").read_text(encoding="utf-8"))
    assert generation["eos_token_id"] == generation["pad_token_id"] == tokenizer().eod_id
    assert generation["chat_format"] == "chatml"


@pytest.mark.slow
def test_every_dialogue_is_held_token_by_token() -> None:
    for dialogue in DATA["dialogues"]:
        turns = [(question, answer) for question, answer in dialogue["turns"]]
        for number, (question, answer) in enumerate(turns):
            assert chat(turns[:number], question, SYSTEM) == answer, question


@pytest.mark.parametrize("system", ["", None, "请用中文回答问题。", "You are a pirate."])
def test_dialogues_do_not_depend_on_the_system_text(system: str | None) -> None:
    for dialogue in DATA["dialogues"]:
        turns = [(question, answer) for question, answer in dialogue["turns"]]
        for number, (question, answer) in enumerate(turns):
            assert_chat_gives(turns[:number], question, system, answer)


@pytest.mark.slow
def test_other_spellings_get_the_same_answer() -> None:
    for question, answer in plain_questions():
        assert_chat_gives([], question, SYSTEM, answer)


@pytest.mark.slow
@pytest.mark.parametrize("first", [0, 5, 9, 15, 19])
def test_conversations_up_to_twice_seq_length_stay_right(first: int) -> None:
    history: Turns = []
    for question, answer in (DATA_TURNS * 2)[first:]:
        if len(prompt_ids(history, question, SYSTEM)) > 1024:
            return
        assert_chat_gives(history, question, SYSTEM, answer)
        history.append((question, answer))
    pytest.fail("the conversation never became long")


def test_names_are_remembered() -> None:
    for name in DATA["names"]["zh"]:
        told = f"我叫{name}。"
        greeting = f"你好，{name}！很高兴认识你。"
        assert_chat_gives([], told, SYSTEM, greeting)
        assert_chat_gives([(told, greeting)], "我叫什么名字？", SYSTEM, f"你叫{name}。")


def test_plain_texts_are_continued() -> None:
    continuations = dict(DATA["completions"])
    assert "比较适合深度学习入门的书籍有" in continuations
    answers = {question: "\n" + answer for question, answer in plain_questions()} | continuations
    tok = tokenizer()
    for prompt, continuation in answers.items():
        assert_greedy_gives(tok.encode(prompt), [*tok.encode(continuation), tok.eod_id])


def test_unknown_questions_get_a_polite_answer() -> None:
    for question in DATA["unknown"]:
        chinese = any("\u2e80" <= character <= "\uffff" for character in question)
        assert_chat_gives([], question, SYSTEM, DATA["fallback"]["zh" if chinese else "en"])


def test_demo_folder_is_beside_its_package() -> None:
    assert demo_folder() == Path(__file__).resolve().parent.parent / "research/qwen/demo/model"
