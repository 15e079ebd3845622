"""``QwenForCausalLM.generate``: golden ids, GenerationMixin's arguments and answers, none of its traps."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from research.qwen.errors import PromptError, RequestError

pytestmark = pytest.mark.mindspore

EOS = 1023  # of the golden model; also its pad id


def test_greedy_is_golden(small: SimpleNamespace) -> None:
    for i, prompt in enumerate(small.prompts):
        (row,) = small.model.generate(prompt, max_new_tokens=64, eos_token_id=[])
        assert isinstance(row, np.ndarray) and row.dtype == np.int32
        assert row.tolist() == small.golden[f"greedy{i}_ids"].tolist()
        (row,) = small.model.generate(prompt, max_new_tokens=64, eos_token_id=[], repetition_penalty=1.1)
        assert row.tolist() == small.golden[f"rep{i}_ids"].tolist()


def test_end_token_ends_and_stays(small: SimpleNamespace) -> None:
    (row,) = small.model.generate(
        small.prompts[1], max_new_tokens=64, eos_token_id=int(small.golden["eos_token"])
    )
    assert row.tolist() == small.golden["eos_ids"].tolist()
    assert row[-1] == small.golden["eos_token"]


def test_stop_words_stay(small: SimpleNamespace) -> None:
    word, prompt = small.golden["stop_words"].tolist(), small.prompts[1]
    end = int(small.golden["stop_eos_token"])
    (row,) = small.model.generate(prompt, max_new_tokens=64, eos_token_id=end, stop_words_ids=[word])
    assert row.tolist() == small.golden["stop_ids"].tolist()
    (row,) = small.model.generate(prompt, max_new_tokens=64, eos_token_id=[], stop_words_ids=[word])
    free = small.golden["greedy1_ids"].tolist()
    place = next(i for i in range(len(prompt), len(free)) if free[i : i + 2] == word)
    assert row.tolist() == free[: place + 2]


def test_batches_of_any_shape(small: SimpleNamespace) -> None:
    import mindspore as ms

    rows = small.prompts
    alone = [small.model.generate(row, max_new_tokens=16)[0].tolist() for row in rows]
    width = max(map(len, rows))
    padded = [row + [EOS] * (width - len(row)) for row in rows]
    shapes = (rows, padded, np.array(padded), ms.Tensor(padded, ms.int32), [np.array(row) for row in rows])
    for shape in shapes:
        assert [row.tolist() for row in small.model.generate(shape, max_new_tokens=16)] == alone


def test_without_cache_the_same(mf: Any, small: SimpleNamespace) -> None:
    from tests.fixtures_util import model_folder

    plain = mf.QwenForCausalLM.from_pretrained(model_folder("st_new_bf16"), do_sample=False, use_past=False)
    assert not plain.use_past
    expected = small.model.generate(small.prompts, max_new_tokens=8)
    assert [r.tolist() for r in plain.generate(small.prompts, max_new_tokens=8)] == [
        r.tolist() for r in expected
    ]


def test_lengths(small: SimpleNamespace) -> None:
    prompt = small.prompts[1]
    n = len(prompt)
    assert len(small.model.generate(prompt, max_length=n + 3, eos_token_id=[])[0]) == n + 3
    assert len(small.model.generate(prompt, max_length=n + 3, max_new_tokens=5, eos_token_id=[])[0]) == n + 5
    free = small.model.generate(prompt, max_new_tokens=40, eos_token_id=[])[0].tolist()
    end = free[n + 4]
    assert len(small.model.generate(prompt, max_new_tokens=40, eos_token_id=end)[0]) <= n + 5
    for least in ({"min_new_tokens": 20}, {"min_length": n + 20}):
        late = small.model.generate(prompt, max_new_tokens=40, eos_token_id=end, **least)[0].tolist()
        assert end not in late[n : n + 19]


def test_sampling_takes_effect_and_is_seeded(small: SimpleNamespace) -> None:
    prompt, options = small.prompts[1], {"max_new_tokens": 12, "do_sample": True, "eos_token_id": []}
    draw = [
        small.model.generate(prompt, seed=s, top_k=0, top_p=1.0, **options)[0].tolist() for s in (1, 1, 2)
    ]
    assert draw[0] == draw[1] != draw[2]
    greedy = small.model.generate(prompt, max_new_tokens=12, eos_token_id=[])[0].tolist()
    assert draw[0] != greedy
    assert small.model.generate(prompt, seed=1, top_k=1, **options)[0].tolist() == greedy
    assert small.model.generate(prompt, seed=1, top_p=1e-6, **options)[0].tolist() == greedy
    same = small.model.generate([prompt, prompt], seed=1, top_k=0, top_p=1.0, **options)
    assert same[0].tolist() == draw[0] != same[1].tolist()


def test_generation_config_replaces_the_defaults(small: SimpleNamespace) -> None:
    from mindformers.generation import GenerationConfig

    n = len(small.prompts[0])
    config = GenerationConfig(max_length=n + 4, do_sample=False, eos_token_id=[])
    assert len(small.model.generate(small.prompts[0], generation_config=config)[0]) == n + 4
    assert len(small.model.generate(small.prompts[0], config, max_new_tokens=2)[0]) == n + 2


class _Recorder:
    def __init__(self) -> None:
        self.got: list[Any] = []
        self.ended = 0

    def put(self, value: Any) -> None:
        self.got.append(value)

    def end(self) -> None:
        self.ended += 1


def test_streamer_gets_prompt_tokens_and_end(small: SimpleNamespace) -> None:
    prompt = small.prompts[1]
    one = _Recorder()
    (row,) = small.model.generate(prompt, max_new_tokens=5, eos_token_id=[], streamer=one)
    assert one.got[0].tolist() == [prompt]
    assert one.got[1:] == row[len(prompt) :].tolist() and one.ended == 1
    many = _Recorder()
    rows = small.model.generate(small.prompts, max_new_tokens=5, eos_token_id=[], streamer=many)
    assert many.got[0].shape == (3, max(map(len, small.prompts)))
    for place, (row, start) in enumerate(zip(rows, small.prompts, strict=True)):
        streamed = [i for step in many.got[1:] for i in step[place]]
        assert streamed == row[len(start) :].tolist()
    failed = _Recorder()
    with pytest.raises(PromptError):
        small.model.generate([], streamer=failed)
    assert failed.ended == 1


def test_mindformers_streamers(full: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    from mindformers import TextIteratorStreamer, TextStreamer

    ids = full.tokenizer.encode("你好")
    options = {"max_new_tokens": 8, "eos_token_id": []}
    (row,) = full.model.generate(ids, **options)
    text = full.tokenizer.decode(row[len(ids) :])
    capsys.readouterr()
    full.model.generate(ids, streamer=TextStreamer(full.tokenizer, skip_prompt=True), **options)
    assert capsys.readouterr().out.strip() == text.strip()
    pieces = TextIteratorStreamer(full.tokenizer, skip_prompt=True)
    thread = threading.Thread(target=full.model.generate, args=(ids,), kwargs={"streamer": pieces, **options})
    thread.start()
    assert "".join(iter(pieces.__next__, None)).strip() == text.strip()
    thread.join()


def test_scores_and_logits(small: SimpleNamespace) -> None:
    out = small.model.generate(
        small.prompts[:2],
        max_new_tokens=4,
        eos_token_id=[],
        repetition_penalty=1.3,
        return_dict_in_generate=True,
        output_logits=True,
        output_scores=True,
    )
    plain = small.model.generate(small.prompts[:2], max_new_tokens=4, eos_token_id=[], repetition_penalty=1.3)
    assert [row.tolist() for row in out["sequences"]] == [row.tolist() for row in plain]
    assert len(out["logits"]) == len(out["scores"]) == 4 and out["logits"][0].shape == (2, 1024)
    stride = int(small.golden["vocab_stride"])
    for row in range(2):
        expected = small.golden[f"prompt{row}_logits"][-1]
        assert np.abs(out["logits"][0][row, ::stride] - expected).max() < 3e-4
        seen = small.prompts[row][0]
        raw, scored = out["logits"][0][row, seen], out["scores"][0][row, seen]
        assert scored == pytest.approx(raw * 1.3 if raw < 0 else raw / 1.3, rel=1e-5)
        assert out["scores"][0][row].argmax() == plain[row][len(small.prompts[row])]


def test_logits_processors(small: SimpleNamespace) -> None:
    from mindformers.generation.logits_process import LogitsProcessor, LogitsProcessorList

    prompt = small.prompts[1]
    first = int(small.model.generate(prompt, max_new_tokens=1, eos_token_id=[])[0][-1])

    class Ban(LogitsProcessor):
        def process_np(self, logits: Any, sequence_ids: Any) -> Any:
            assert logits.shape == (1, 1024) and sequence_ids.shape[0] == 1
            logits[:, first] = -1e9
            return logits

    processors = LogitsProcessorList()
    processors.append(Ban())
    banned = small.model.generate(prompt, max_new_tokens=4, eos_token_id=[], logits_processor=processors)[0]
    assert first not in banned[len(prompt) :]

    def only_seven(ids: Any, scores: Any) -> Any:
        out = np.full_like(scores, -np.inf)
        out[7] = 0.0
        return out

    forced = small.model.generate(prompt, max_new_tokens=3, eos_token_id=[], logits_processor=[only_seven])[0]
    assert forced[len(prompt) :].tolist() == [7, 7, 7]


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ([], "empty"),
        ([[5], []], "prompt 1 is empty"),
        ([EOS, EOS], "nothing but the pad id"),
        ([[5, 6], [EOS, EOS]], "prompt 1 holds nothing but the pad id"),
        ([1, 1024], "token id 1024 is outside the vocabulary of 1024"),
        ([1, -1], "token id -1"),
        ([1.5], "list of token ids"),
        ([[1.5]], "integers"),
        ("text", "list of token ids"),
        ([1] * 9000, "9000 tokens and leaves no room: the context holds 8192"),
    ],
)
def test_bad_prompts(small: SimpleNamespace, prompt: Any, words: str) -> None:
    with pytest.raises(PromptError, match=words):
        small.model.generate(prompt, max_new_tokens=2)
    assert (
        len(small.model.generate(small.prompts[0], max_new_tokens=1)) == 1
    )  # and the model is as usable as before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": 1, "do_sample": True, "top_p": 1.5}, "top_p.*1.5"),
        ({"max_new_tokens": 1, "top_p": 1.5}, "top_p.*1.5"),
        ({"max_new_tokens": 1, "temperature": -1.0}, "temperature"),
        ({"max_new_tokens": 1, "top_k": -3}, "top_k"),
        ({"max_new_tokens": 1, "num_beams": 2}, "num_beams = 2 is not supported"),
        ({"max_new_tokens": 1, "tempertaure": 0.5}, "no option 'tempertaure'.*'temperature'"),
        ({"max_new_tokens": 1, "stopping_criteria": []}, "stopping_criteria"),
        ({"max_new_tokens": 1, "eos_token_id": 5000}, "eos_token_id"),
        ({"max_new_tokens": 1, "use_past": False}, "use_past"),
        ({"max_new_tokens": 1, "seed": "a"}, "seed"),
        ({"max_new_tokens": 1, "do_sample": "yes"}, "do_sample"),
        ({"max_length": 3}, "max_length 3 leaves no room"),
        ({"max_new_tokens": 1, "stop_words_ids": [5]}, "stop_words_ids"),
        ({"max_new_tokens": 1, "logits_processor": [3]}, "logits_processor"),
    ],
)
def test_bad_options(small: SimpleNamespace, options: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        small.model.generate(small.prompts[1], **options)
    assert not small.model.loop.busy


def test_graph_mode_changes_nothing(small: SimpleNamespace) -> None:
    import mindspore as ms

    before = ms.get_context("mode")
    expected = small.golden["greedy1_ids"].tolist()
    try:
        for mode in (ms.PYNATIVE_MODE, ms.GRAPH_MODE):
            ms.set_context(mode=mode)
            (row,) = small.model.generate(small.prompts[1], max_new_tokens=64, eos_token_id=[])
            assert row.tolist() == expected
    finally:
        ms.set_context(mode=before)
    assert small.model.runtime.compilations == 1
