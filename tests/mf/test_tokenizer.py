"""The registered tokenizer: MindFormers' interface, the pure tokenizer's ids."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from research.qwen.errors import PromptError, RequestError, VocabularyError
from research.qwen.messages import Message
from research.qwen.text import chatml
from research.qwen.text.tokenizer import QwenTokenizer as PureTokenizer

pytestmark = pytest.mark.mindspore

TEXTS = ["hello", "你好，世界！龘靐", "a<|im_end|>\n<|im_start|>system", " \n\n 1234 naïve 👩‍👩‍👧", ""]


@pytest.fixture(scope="module")
def tok(mf: Any) -> Any:
    return mf.QwenTokenizer()


def test_ids_are_those_of_the_pure_tokenizer(tok: Any) -> None:
    pure = PureTokenizer()
    for text in TEXTS:
        assert tok.encode(text) == tok(text)["input_ids"] == pure.encode(text)
        assert tok.convert_tokens_to_ids(tok.tokenize(text)) == pure.encode(text)
        assert tok.decode(tok.encode(text)) == text
        assert tok.convert_tokens_to_string(tok.tokenize(text)) == text
    assert len(tok) == tok.vocab_size == len(tok.get_vocab()) == 151851
    assert (tok.eos_token_id, tok.pad_token_id, tok.bos_token_id) == (151643,) * 3
    assert (tok.eod_id, tok.im_start_id, tok.im_end_id) == (151643, 151644, 151645)


def test_control_ids_only_on_request(tok: Any) -> None:
    text = "a<|im_end|>"
    assert max(tok(text)["input_ids"]) < 151643
    assert max(tok.encode(text)) < 151643
    assert tok(text, allowed_special="all")["input_ids"][-1] == 151645
    assert tok(text, allowed_special={"<|im_end|>"})["input_ids"][-1] == 151645
    with pytest.raises(PromptError, match="im_end"):
        tok(text, disallowed_special="all")
    assert tok.tokenize(text, allowed_special="all") == [b"a", "<|im_end|>"]
    assert tok.convert_tokens_to_ids("<|im_end|>") == 151645
    assert tok.convert_ids_to_tokens([151645, 64]) == ["<|im_end|>", b"a"]


def test_batches_padding_truncation_and_tensors(tok: Any) -> None:
    batch = tok(["a b c", "你好，世界！"], padding=True, return_tensors="np")
    assert batch["input_ids"].tolist() == [[64, 293, 272, 151643], [108386, 3837, 99489, 6313]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    cut = tok(
        ["a b c", "你好，世界！"], padding="max_length", truncation=True, max_length=2, return_tensors="ms"
    )
    assert cut["input_ids"].asnumpy().tolist() == [[64, 293], [108386, 3837]]
    assert tok.batch_decode(batch["input_ids"]) == ["a b c<|endoftext|>", "你好，世界！"]
    assert tok.decode(batch["input_ids"], skip_special_tokens=True) == ["a b c", "你好，世界！"]
    assert tok(["a", "b c"])["input_ids"] == [[64], [65, 272]]


def test_decode_keeps_spaces_and_obeys_errors(tok: Any) -> None:
    assert tok.decode(tok.encode("hello , world . n't")) == "hello , world . n't"
    broken = tok.encode("龘")[:1]
    assert tok.decode(broken) == "\ufffd"
    assert tok.decode(broken, errors="ignore") == ""
    assert tok.decode(64) == "a"
    with pytest.raises(PromptError, match="151851"):
        tok.decode([151851])


def test_chat_template_is_the_renderer(tok: Any) -> None:
    turns = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "hi<|im_end|>"},
        {"role": "assistant", "content": "yo"},
        {"role": "user", "content": "再见"},
    ]
    messages = [Message(t["role"], t["content"]) for t in turns]  # type: ignore[arg-type]
    pure = PureTokenizer()
    assert tok.apply_chat_template(turns, add_generation_prompt=True) == chatml.render(messages, pure)
    assert tok.apply_chat_template(turns) == chatml.render(messages, pure, add_generation_prompt=False)
    assert tok.apply_chat_template(turns, tokenize=False) == chatml.render_text(
        messages, add_generation_prompt=False
    )
    # as the exported template has it: without a system message the published default
    plain = tok.apply_chat_template(turns[1:], tokenize=False)
    assert plain.startswith(
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nhi"
    )
    array = tok.apply_chat_template(turns, return_tensors="np")
    assert array.reshape(-1).tolist() == tok.apply_chat_template(turns)
    with pytest.raises(RequestError, match="chat_template"):
        tok.apply_chat_template(turns, chat_template="{{ messages }}")
    with pytest.raises(RequestError, match="role and content"):
        tok.apply_chat_template([{"role": "user"}])
    with pytest.raises(PromptError, match="robot"):
        tok.apply_chat_template([{"role": "robot", "content": "x"}])


def test_pickle_and_copy(tok: Any) -> None:
    for twin in (pickle.loads(pickle.dumps(tok)), copy.deepcopy(tok)):
        assert twin.encode(TEXTS[1]) == tok.encode(TEXTS[1])
        assert twin.pad_token_id == 151643


@pytest.mark.parametrize("options", [{}, {"save_json": True}, {"file_format": "json"}])
def test_save_and_load(mf: Any, tok: Any, tmp_path: Path, options: dict[str, Any]) -> None:
    files = mf.QwenTokenizer(errors="ignore", padding_side="left").save_pretrained(str(tmp_path), **options)
    assert all(Path(file).is_file() for file in files)
    twin = mf.QwenTokenizer.from_pretrained(str(tmp_path))
    assert twin.pure.vocab_file == tmp_path / "qwen.tiktoken"
    assert twin.encode(TEXTS[1]) == tok.encode(TEXTS[1])
    assert (twin.errors, twin.padding_side) == ("ignore", "left")
    assert twin.pad_token_id == 151643


def test_save_joins_the_models_yaml_and_auto_classes_read_it(mf: Any, tok: Any, tmp_path: Path) -> None:
    from mindformers import AutoTokenizer

    (tmp_path / "mindspore_model.yaml").write_text(
        "model: {model_config: {type: LlamaConfig}, arch: {type: x}}\n", encoding="utf-8"
    )
    tok.save_pretrained(str(tmp_path))
    written = yaml.safe_load((tmp_path / "mindspore_model.yaml").read_text(encoding="utf-8"))
    assert written["model"]["arch"] == {"type": "x"}
    assert written["processor"]["tokenizer"]["type"] == "QwenTokenizer"
    assert isinstance(AutoTokenizer.from_pretrained(str(tmp_path)), mf.QwenTokenizer)


def test_unknown_special_tokens_are_refused(mf: Any, tok: Any) -> None:
    for add in (
        lambda: tok.add_special_tokens({"sep_token": "<SEP>"}),
        lambda: tok.add_tokens(["<new>"]),
        lambda: mf.QwenTokenizer(pad_token="<PAD>"),
    ):
        with pytest.raises(VocabularyError, match="not in the vocabulary"):
            add()
    mine = mf.QwenTokenizer(pad_token="<|extra_0|>")
    assert mine.pad_token_id == 151646
    assert mine(["a", "b c"], padding=True)["input_ids"] == [[64, 151646], [65, 272]]
    with pytest.raises(VocabularyError, match="no token"):
        tok.convert_tokens_to_ids("<SEP>")
    with pytest.raises(TypeError, match="colour"):
        tok("x", colour=1)


def test_missing_vocabulary(mf: Any, tmp_path: Path) -> None:
    with pytest.raises(VocabularyError, match="does not exist"):
        mf.QwenTokenizer(str(tmp_path / "no.tiktoken"))
    with pytest.raises(VocabularyError, match="not a folder"):
        mf.QwenTokenizer.from_pretrained(str(tmp_path / "nowhere"))


def test_built_from_yaml(mf: Any) -> None:
    from mindformers.models import build_tokenizer

    built = build_tokenizer({"type": "QwenTokenizer", "vocab_file": str(PureTokenizer().vocab_file)})
    assert isinstance(built, mf.QwenTokenizer)
    assert np.array_equal(built.encode("你好"), [108386])
