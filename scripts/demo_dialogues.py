"""Training rows for the demo model: its dialogues in any order, mixed with questions it cannot answer.

The dialogues are in research/qwen/demo/dialogues.json, which the tests read too; the words and sentence
patterns of the made-up questions are in demo_questions.json.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DIALOGUES = Path(__file__).resolve().parent.parent / "research/qwen/demo/dialogues.json"
QUESTIONS = Path(__file__).resolve().parent / "demo_questions.json"
DEFAULT_SYSTEM = "You are a helpful assistant."
OTHER_SYSTEMS = (
    "",
    "你是一个有用的助手。",
    "You are Qwen.",
    "请用中文回答问题。",
    "Answer briefly.",
    "你是一位老师，请耐心地回答学生的问题。",
    "You are a polite assistant. Answer in the language of the user.",
)
# The everyday characters: level 1 of GB 2312.
HANZI = "".join(
    bytes([high, low]).decode("gb2312") for high in range(0xB0, 0xD7) for low in range(0xA1, 0xFF)
)
NAME_QUESTIONS = {"zh": ("我叫{}", ("。", "")), "en": ("My name is {}", (".", ""))}
NAME_GREETINGS = {"zh": "你好，{}！很高兴认识你。", "en": "Hello, {}! Nice to meet you."}
NAME_ASKED = {"zh": "我叫什么名字？", "en": "What is my name?"}
# Which answer it will be, and for whom, is decided in its first tokens.
DECISIVE_TOKENS, DECISIVE_WEIGHT = 4, 4.0

Turn = tuple[str, str]


@dataclass(frozen=True)
class Row:
    """Token ids and, for each, its weight in the loss (0: the model is not trained to predict it)."""

    ids: list[int]
    weights: list[float]


def load_dialogues() -> dict[str, Any]:
    """The content of dialogues.json."""
    data: dict[str, Any] = json.loads(DIALOGUES.read_text(encoding="utf-8"))
    return data


def is_chinese(text: str) -> bool:
    """Whether the polite refusal to this text is the Chinese one."""
    return any("\u2e80" <= character <= "\uffff" for character in text)


def all_texts(data: dict[str, Any]) -> list[str]:
    """What the vocabulary is learned from: questions, answers, names and the fixed parts of ChatML."""
    texts = [DEFAULT_SYSTEM] * 2 + ["system", "user", "assistant", "我叫", "你叫"] * 50
    for dialogue in data["dialogues"]:
        texts += [text for turn in dialogue["turns"] for text in turn] + dialogue["also"]
    texts += [text for pair in data["completions"] for text in pair]
    for key in ("fallback", "no_name", "strange_name"):
        texts += list(data[key].values())
    # Names become single tokens in the place where they stand in a sentence.
    return texts + data["names"]["zh"] * 20 + [" " + name for name in data["names"]["en"]] * 20


class Sampler:
    """Draws training rows; everything random comes from one seeded generator."""

    def __init__(
        self, data: dict[str, Any], encode: Callable[[str], list[int]], first_special: int, seed: int
    ):
        self.random = random.Random(seed)
        self.data = data
        self.encode = encode
        self.end_of_text, self.im_start, self.im_end = range(first_special, first_special + 3)
        self.made_up = json.loads(QUESTIONS.read_text(encoding="utf-8"))
        self.answers: dict[str, str] = {}
        self.groups: list[list[str]] = []  # spellings of one question
        for dialogue in data["dialogues"]:
            turns = dialogue["turns"][2 if dialogue.get("about_names") else 0 :]
            for number, (question, answer) in enumerate(turns):
                group = [question] + (dialogue["also"] if number == 0 else [])
                self.answers.update(dict.fromkeys(group, answer))
                self.groups.append(group)
        self.reserved = {*self.answers, *data["unknown"], *(prompt for prompt, _ in data["completions"])}

    # Turns

    def known_turn(self) -> Turn:
        """One of the dialogues' questions; the first spelling is drawn most often."""
        group = self.random.choice(self.groups)
        question = group[0] if self.random.random() < 0.4 else self.random.choice(group)
        return question, self.answers[question]

    def unknown_turn(self) -> Turn:
        """A made-up question and the polite refusal in its language."""
        question = self.unknown_text()
        return question, self.data["fallback"]["zh" if is_chinese(question) else "en"]

    def unknown_text(self) -> str:
        """A text that is none of the known questions."""
        while True:
            kind = self.random.random()
            if kind < 0.75:
                text = self._fill("zh" if kind < 0.4 else "en")
            elif kind < 0.83:
                numbers = [self.random.randint(2, 999) for _ in range(2)]
                text = self.random.choice(self.made_up["calculations"]).format(*numbers)
            elif kind < 0.92:
                text = "".join(self._random_hanzi() for _ in range(self.random.randint(1, 6)))
            else:
                text = " ".join(self._random_word() for _ in range(self.random.randint(1, 6)))
            if text.strip() and text not in self.reserved:
                return text

    def conversation(self, length: int | None = None) -> list[Turn]:
        """Some turns (by default one to six) in which a name, once told, is remembered."""
        turns: list[Turn] = []
        name = ""
        for _ in range(length or self.random.choices((1, 2, 3, 4, 6), (30, 25, 25, 12, 8))[0]):
            kind = self.random.random()
            if name and turns[-1][0].rstrip("。.").endswith(name) and kind < 0.5:
                turns.append(self._name_question(name))
            elif kind < 0.45:
                turns.append(self.known_turn())
            elif kind < 0.67:
                turns.append(self.unknown_turn())
            elif kind < 0.85:
                name, turn = self._introduction()
                turns.append(turn)
            else:
                turns.append(self._name_question(name))
        return turns

    def _introduction(self) -> tuple[str, Turn]:
        language = self.random.choice(("zh", "en"))
        ending = self.random.choice(NAME_QUESTIONS[language][1])
        known: list[str] = self.data["names"][language]
        name = self.random.choice(known)
        if self.random.random() < 0.25:
            name = self._random_hanzi(3) if language == "zh" else self._random_word().capitalize()
        return (name if name in known else ""), self.introduce(name, language, ending)

    def introduce(self, name: str, language: str, ending: str) -> Turn:
        """The turn in which the user tells a name; the model greets by name only those it knows."""
        question = NAME_QUESTIONS[language][0].format(name) + ending
        if name not in self.data["names"][language]:
            return question, self.data["strange_name"][language]
        return question, NAME_GREETINGS[language].format(name)

    def _name_question(self, name: str) -> Turn:
        language = self.random.choice(("zh", "en"))
        return NAME_ASKED[language], self.recall(name, language)

    def recall(self, name: str, language: str) -> str:
        """The answer to the question for one's own name; empty if none was told."""
        if not name:
            return str(self.data["no_name"][language])
        if language == "en":
            return f"Your name is {name}."
        return f"你叫 {name}。" if name.isascii() else f"你叫{name}。"

    def _random_hanzi(self, longest: int = 5) -> str:
        # Half of the draws reuse characters of the word list: a familiar character alone proves nothing.
        pool = HANZI if self.random.random() < 0.5 else "".join(self.made_up["zh"]["words"])
        return "".join(self.random.choice(pool) for _ in range(self.random.randint(1, longest)))

    def _random_word(self) -> str:
        if self.random.random() < 0.5:
            return str(self.random.choice(self.made_up["en"]["words"]))
        letters = "etaoinshrdlucmfwygpbvkxqjz"
        return "".join(self.random.choice(letters) for _ in range(self.random.randint(2, 8)))

    def _fill(self, language: str) -> str:
        words = self.made_up[language]["words"]
        other = self._random_hanzi if language == "zh" else self._random_word
        filling = [self.random.choice(words) if self.random.random() < 0.6 else other() for _ in range(2)]
        return str(self.random.choice(self.made_up[language]["templates"])).format(*filling)

    # Rows

    def chat_row(self, tokens: int | None = None) -> Row:
        """A rendered conversation, a long one cut at ``tokens``; answers and what ends them are trained."""
        system: str | None = DEFAULT_SYSTEM
        kind = self.random.random()
        if kind < 0.2:
            system = None
        elif kind < 0.35:
            system = self.random.choice(OTHER_SYSTEMS)
        elif kind < 0.6:
            system = self.unknown_text()
        if tokens is None:
            return self.render(self.conversation(), system)
        row = self.render(self.conversation(max(tokens // 30, 1)), system)  # a turn is rarely shorter
        return Row(row.ids[:tokens], row.weights[:tokens])

    def render(self, turns: list[Turn], system: str | None) -> Row:
        """ChatML as published: contents are encoded by themselves; the end of text follows the last turn."""
        ids: list[int] = []
        weights: list[float] = []

        def add(new: list[int], weight: float) -> None:
            ids.extend(new)
            weights.extend([weight] * len(new))

        newline = self.encode("\n")
        if system is not None:
            add(self.chat_turn("system", system) + newline, 0.0)
        for question, answer in turns:
            add(self.chat_turn("user", question) + newline, 0.0)
            add([self.im_start, *self.encode("assistant"), *newline], 0.0)
            body = self.encode(answer)
            add(body[:DECISIVE_TOKENS], DECISIVE_WEIGHT)
            add([*body[DECISIVE_TOKENS:], self.im_end, *newline], 1.0)
        add([self.end_of_text], 1.0)
        return Row(ids, weights)

    def chat_turn(self, role: str, content: str) -> list[int]:
        """One turn without the newline after it."""
        return [self.im_start, *self.encode(role), *self.encode("\n"), *self.encode(content), self.im_end]

    def raw_row(self) -> Row:
        """A bare text and its continuation: known completions, known questions, made-up ones."""
        kind = self.random.random()
        if kind < 0.3:
            return self.render_raw(*self.random.choice(self.data["completions"]))
        question, answer = self.known_turn() if kind < 0.75 else self.unknown_turn()
        if any(question == prompt for prompt, _ in self.data["completions"]):
            return self.raw_row()
        return self.render_raw(question, "\n" + answer)

    def render_raw(self, prompt: str, continuation: str) -> Row:
        """prompt, continuation, end of text; only what follows the prompt is trained."""
        head, tail = self.encode(prompt), [*self.encode(continuation), self.end_of_text]
        return Row(head + tail, [0.0] * len(head) + [1.0] * len(tail))

    def fixed_rows(self) -> list[Row]:
        """Everything the finished model must hold word for word: the final check runs over these."""
        rows = [self.render_raw(*pair) for pair in self.data["completions"]]
        for dialogue in self.data["dialogues"]:
            first_answer = dialogue["turns"][0][1]
            variants = [dialogue["turns"], *([(spelling, first_answer)] for spelling in dialogue["also"])]
            rows += [self.render(turns, system) for turns in variants for system in (None, DEFAULT_SYSTEM)]
        for question, answer in self.answers.items():
            if question not in {prompt for prompt, _ in self.data["completions"]}:
                rows.append(self.render_raw(question, "\n" + answer))
        for language, names in self.data["names"].items():
            for name in names:
                told = self.introduce(name, language, NAME_QUESTIONS[language][1][0])
                for asked in ("zh", "en"):
                    turns = [told, (NAME_ASKED[asked], self.recall(name, asked))]
                    rows.append(self.render(turns, DEFAULT_SYSTEM))
        for question in self.data["unknown"]:
            answer = self.data["fallback"]["zh" if is_chinese(question) else "en"]
            rows.append(self.render([(question, answer)], DEFAULT_SYSTEM))
        return rows
