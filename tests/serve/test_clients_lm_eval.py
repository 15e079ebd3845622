"""lm-evaluation-harness against a served demo model: its scores are the engine's own, however requests are packed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.api_models import JsonChatStr
from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

from research.qwen.decode.params import SamplingParams
from research.qwen.engine import Engine
from tests.serve.clients_openai import CAPITAL, FACES, MODEL

pytestmark = pytest.mark.mindspore

PAIRS = [
    ("比较适合深度学习入门的书籍有", "：\n1. 《深度学习入门》"),
    ("hello", ", who are you?"),
    ("发几个表情", "😀🎉👍🏽🐼龘靐"),  # no whole characters among the tokens
    ("中国的首都是", "北京"),
    ("a" * 300, "b" * 50),
    ("<|im_start|>user\n你好<|im_end|>\n<|im_start|>assistant\n", "你好！我是一个很小的演示模型"),
    ("", "静夜思（李白）\n床前明月光，疑是地上霜。"),
]
WAYS: dict[str, dict[str, Any]] = {
    "one by one": {},
    "batches": {"batch_size": 3},
    "at once": {"num_concurrent": 4},
    "batches at once": {"batch_size": 3, "num_concurrent": 4},
    "texts": {"tokenized_requests": False},
    "several texts": {"tokenized_requests": False, "batch_size": 3, "num_concurrent": 2},
}
PER_TOKEN = 2e-5  # float32 on the wire, float64 in Engine.score


@pytest.fixture(scope="module")
def engine(demo_folder: Path) -> Iterator[Engine]:
    """The same model, asked without a server."""
    yield Engine.from_pretrained(demo_folder)


def completions(url: str, **options: Any) -> LocalCompletionsAPI:
    base = {"model": MODEL, "base_url": f"{url}/v1/completions", "max_length": 512, "max_retries": 1}
    return LocalCompletionsAPI(**{**base, **options})


def instances(kind: Any, arguments: list[Any]) -> list[Instance]:
    return [Instance(kind, {}, given, place) for place, given in enumerate(arguments)]


def test_the_servers_vocabulary_is_found(demo_server: str, engine: Engine) -> None:
    lm = completions(demo_server)
    assert lm.tokenizer_backend == "remote"
    assert engine.tokenizer is not None
    assert lm.eot_token_id == lm.prefix_token_id == engine.tokenizer.eod_id
    assert lm.eos_string == "<|endoftext|>"
    for head, tail in PAIRS[1:4]:
        assert lm.tok_encode(head + tail) == engine.tokenizer.encode(head + tail)
        assert lm.decode_batch([lm.tok_encode(head + tail)]) == [head + tail]


def test_its_chat_template_is_the_servers(demo_server: str, engine: Engine) -> None:
    tokenizer: Any = completions(demo_server, tokenizer_backend="remote").tokenizer
    text = tokenizer.apply_chat_template([{"role": "user", "content": "你好"}])
    assert tokenizer.encode(text) == engine.render([{"role": "user", "content": "你好"}])


@pytest.mark.parametrize("way", [way for way in WAYS if "texts" not in way])
def test_loglikelihood(demo_server: str, engine: Engine, way: str) -> None:
    lm = completions(demo_server, **WAYS[way])
    answers = lm.loglikelihood(instances("loglikelihood", PAIRS))
    assert len({round(value, 3) for value, _ in answers}) == len(PAIRS)
    for (head, tail), (value, greedy) in zip(PAIRS, answers, strict=True):
        ids, rest = lm._encode_pair(head, tail) if head else ([lm.prefix_token_id], lm.tok_encode(tail))
        score = engine.score(ids, rest)
        assert value == pytest.approx(score.total, abs=PER_TOKEN * len(rest))
        assert greedy == bool(score.greedy.all())


def test_greedy_continuations_are_seen(demo_server: str, engine: Engine) -> None:
    """Characters that are several tokens each: were the names of these the same, the answers would be wrong."""
    assert engine.tokenizer is not None
    prompt = engine.render([{"role": "user", "content": FACES[0]}])
    texts = (FACES[1], FACES[1][:-1] + "🐻")
    requests = [((FACES[0], text), prompt, engine.tokenizer.encode(text)) for text in texts]
    [right, wrong] = completions(demo_server, batch_size=2)._loglikelihood_tokens(requests)
    assert right[1] and not wrong[1] and right[0] > wrong[0]


@pytest.mark.parametrize("way", ["one by one", "batches at once"])
def test_loglikelihood_of_long_texts(demo_server: str, engine: Engine, way: str) -> None:
    texts = ["".join(FACES), "hello " * 300]  # the second one in windows
    lm = completions(demo_server, max_length=256, **WAYS[way])
    first, second = lm.loglikelihood_rolling(instances("loglikelihood_rolling", [(text,) for text in texts]))
    ids = lm.tok_encode(texts[0])
    assert first == pytest.approx(engine.score([lm.prefix_token_id], ids).total, abs=PER_TOKEN * len(ids))
    assert len(lm.tok_encode(texts[1])) > 256 and second < 0


def said(engine: Engine, head: str, length: int, stop: tuple[str, ...]) -> str:
    """The engine's own greedy continuation."""
    params = SamplingParams(temperature=0.0, max_new_tokens=length, stop=stop)
    return engine.generate(head, params)[0].text


@pytest.mark.parametrize("way", WAYS)
def test_generate_until(demo_server: str, engine: Engine, way: str) -> None:
    heads = [head for head, _ in PAIRS[:4]]
    wishes = [{"until": ["\n"], "max_gen_toks": 12}, {"until": [], "max_gen_toks": 5, "temperature": 0.0}]
    asked: list[Any] = [(head, wish) for head in heads for wish in wishes]
    lm = completions(demo_server, **WAYS[way])
    answers = lm.generate_until(instances("generate_until", asked))
    for (head, wish), text in zip(asked, answers, strict=True):
        assert text == said(engine, head, wish["max_gen_toks"], (*wish["until"], "<|endoftext|>"))


@pytest.mark.parametrize("options", [{}, {"num_concurrent": 3}, {"batch_size": 2}])
def test_without_a_vocabulary(demo_server: str, engine: Engine, options: dict[str, Any]) -> None:
    lm = completions(demo_server, tokenizer_backend=None, **options)
    wish = {"until": ["。"], "max_gen_toks": 8}
    [first, second] = lm.generate_until(
        instances("generate_until", [("中国的首都是", wish), ("hello", wish)])
    )
    for head, text in (("中国的首都是", first), ("hello", second)):
        assert text == said(engine, head, 8, ("。",))


@pytest.mark.parametrize("options", [{}, {"num_concurrent": 3}])
def test_chat(demo_server: str, options: dict[str, Any]) -> None:
    url = f"{demo_server}/v1/chat/completions"
    lm = LocalChatCompletion(model=MODEL, base_url=url, max_retries=1, **options)
    wish = {"until": ["never", "x1", "x2", "x3", "x4"], "max_gen_toks": 60}
    questions = [JsonChatStr(json.dumps([{"role": "user", "content": q}])) for q in (FACES[0], CAPITAL[0])]
    answers = lm.generate_until(instances("generate_until", [(question, wish) for question in questions]))
    assert answers == [FACES[1], CAPITAL[1]]


TASKS = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
{more}
metadata: {{version: 1.0}}
"""
CHOICES = """doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list: [{metric: acc}]"""
ANSWERS = """doc_to_target: text
generation_kwargs: {until: ["\\n"], max_gen_toks: 60, temperature: 0.0}
metric_list: [{metric: exact_match}]"""


def test_the_command(demo_server: str, tmp_path: Path) -> None:
    """`lm_eval` as a user runs it, on tasks of our own: nothing is fetched from anywhere."""
    prompt = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n"
    data = tmp_path / "data.jsonl"
    rows = [
        {
            "question": prompt.format(question) + "<|im_start|>assistant\n",
            "choices": [text, "不知道。"],
            "answer": 0,
            "text": text,
        }
        for question, text in (CAPITAL, FACES)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for name, kind, more in (("pick", "multiple_choice", CHOICES), ("write", "generate_until", ANSWERS)):
        task = TASKS.format(name=name, data=data, kind=kind, more=more)
        (tmp_path / f"{name}.yaml").write_text(task, encoding="utf-8")
    arguments = (
        f"model={MODEL},base_url={demo_server}/v1/completions,num_concurrent=4,tokenizer_backend=remote"
    )
    argv = [sys.executable, "-m", "lm_eval", "--model", "local-completions", "--model_args", arguments]
    argv += ["--tasks", "pick,write", "--include_path", str(tmp_path), "--output_path", str(tmp_path / "out")]
    environ = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "OPENAI_API_KEY": ""}
    done = subprocess.run(argv, env=environ, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    [report] = tmp_path.glob("out/**/results_*.json")
    results = json.loads(report.read_text(encoding="utf-8"))["results"]
    assert results["pick"]["acc,none"] == 1.0 and results["write"]["exact_match,none"] == 1.0
