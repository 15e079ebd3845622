"""SamplingParams: what is refused, how it says so, and what is normalised."""

import math
from decimal import Decimal

import numpy as np
import pytest

from research.qwen.decode.params import SamplingParams
from research.qwen.errors import RequestError

BAD_VALUES = {
    "temperature": [-0.1, math.nan, math.inf, -math.inf, True, "1", None, [1], 10**400, Decimal(1), 1j],
    "top_k": [-1, 1.0, True, "5", None, math.nan],
    "top_p": [0, 0.0, -0.5, 1.0001, math.nan, math.inf, False, "0.8", None],
    "min_p": [-0.1, 1.1, math.nan, True, "0", None],
    "repetition_penalty": [0, -1, math.nan, math.inf, True, "1.1", None],
    "presence_penalty": [-2.1, 2.1, math.nan, True, "0", None],
    "frequency_penalty": [-2.1, 2.1, math.nan, True, "0", None],
    "seed": [1.0, True, "7", 2**64, -(2**63) - 1, math.nan],
    "max_new_tokens": [-1, 1.5, True, "512", math.inf],
    "stop": [5, b"x", [""], "", ["a", 1], None, {"a": 1}],
    "stop_token_ids": [7, "7", [-1], [1.0], [True], ["7"], None, {7: 1}],
    "ignore_eos": [0, 1, "true", None],
    "n": [0, -1, 129, 1.0, True, "1", None],
    "logprobs": [-1, 21, True, 1.0, "3"],
    "prompt_logprobs": [-1, 21, True, 1.0, "3"],
    "min_new_tokens": [-1, 1.0, True, "3", None],
    "allowed_token_ids": [7, "7", [-1], [1.0], [True], ["7"], {7: 1}, []],
    "bad_words_ids": [7, "7", None, {7: 1}, [7], [[-1]], [["a"]], [[]]],
    "logit_bias": [
        7,
        None,
        [7],
        {"x": 1},
        {-1: 1},
        {True: 1},
        {"²": 1},
        {"9" * 5000: 1},
        {1: 100.5},
        {1: "1"},
        {1: math.nan},
    ],
    "include_stop_str_in_output": [0, 1, "true", None],
    "skip_special_tokens": [0, 1, "true", None],
}


def innermost(value):
    yield value
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if isinstance(value, list):
        for item in value:
            yield from innermost(item)


@pytest.mark.parametrize(
    ("name", "value"), [(name, bad) for name, values in BAD_VALUES.items() for bad in values]
)
def test_bad_value_is_refused_with_its_name(name, value):
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{name: value})
    message = str(caught.value)
    assert message.startswith(f"{name} must ")
    assert "\n" not in message
    # The value itself, or the first bad thing in a list or mapping.
    assert any(repr(shown) in message for shown in innermost(value))


def test_defaults_and_edges_are_accepted():
    params = SamplingParams()
    assert (params.temperature, params.max_new_tokens, params.n, params.logprobs) == (1.0, 512, 1, None)
    assert not params.greedy and not params.penalised
    SamplingParams(
        temperature=0, top_p=1, min_p=1, presence_penalty=-2, frequency_penalty=2, seed=-(2**63), n=128
    )
    assert (params.prompt_logprobs, params.min_new_tokens, params.allowed_token_ids) == (None, 0, None)
    assert (params.logit_bias, params.bad_words_ids) == ({}, ())
    assert not params.include_stop_str_in_output and params.skip_special_tokens
    SamplingParams(max_new_tokens=0, prompt_logprobs=20)
    SamplingParams(max_new_tokens=None, logprobs=0, min_new_tokens=9, seed=2**64 - 1, top_p=1e-9)


def test_values_are_normalised():
    params = SamplingParams(
        temperature=np.float32(0.5),
        top_k=np.int64(3),
        stop="ab",
        stop_token_ids=[np.int32(5), 5, 2],
        seed=np.uint64(2**64 - 1),
    )
    assert params.stop == ("ab",) and params.stop_token_ids == (5, 2)
    assert type(params.top_k) is int and type(params.temperature) is float and params.seed == 2**64 - 1
    assert SamplingParams(stop=["b", "a", "b"]).stop == ("b", "a")
    assert hash(params) == hash(SamplingParams(0.5, 3, stop=["ab"], stop_token_ids=(5, 2), seed=2**64 - 1))


def test_caller_lists_are_not_shared():
    ids = [1, 2]
    params = SamplingParams(stop_token_ids=ids)
    ids.append(3)
    assert params.stop_token_ids == (1, 2)


def test_from_mapping():
    assert SamplingParams.from_mapping({"top_p": 0.8, "seed": 1}) == SamplingParams(top_p=0.8, seed=1)
    with pytest.raises(RequestError, match=r"'temprature' \(did you mean 'temperature'\?\)"):
        SamplingParams.from_mapping({"temprature": 1})
    with pytest.raises(RequestError, match="unknown sampling parameter 'zzz'$"):
        SamplingParams.from_mapping({"zzz": 1})


def test_greedy():
    assert SamplingParams(temperature=0).greedy
    assert SamplingParams(top_k=1).greedy
    assert not SamplingParams(top_k=2, temperature=1e-9).greedy
    assert SamplingParams(frequency_penalty=0.1).penalised


def test_ids_of_the_vocabulary():
    params = SamplingParams(
        logit_bias={"7": 1, np.int64(3): -100},
        allowed_token_ids=[4, 4, 2],
        bad_words_ids=[[1, 1], (5,), [1, 1]],
    )
    assert params.logit_bias == {7: 1.0, 3: -100.0}
    assert params.allowed_token_ids == (4, 2) and params.bad_words_ids == ((1, 1), (5,))
    assert hash(params) == hash(SamplingParams(allowed_token_ids=(4, 2), bad_words_ids=[[1, 1], [5]]))
    params.check_vocabulary(8)
    with pytest.raises(RequestError, match="logit_bias names token id 7; the vocabulary has 7 rows"):
        params.check_vocabulary(7)
    with pytest.raises(RequestError, match="allowed_token_ids names token id 9"):
        SamplingParams(allowed_token_ids=[1, 9]).check_vocabulary(9)
    with pytest.raises(RequestError, match="bad_words_ids names token id 9"):
        SamplingParams(bad_words_ids=[[1], [2, 9]]).check_vocabulary(9)
    SamplingParams(stop_token_ids=[10**6]).check_vocabulary(9)


def test_the_least_is_not_above_the_most():
    with pytest.raises(RequestError, match=r"min_new_tokens must be at most max_new_tokens \(4\), got 5"):
        SamplingParams(min_new_tokens=5, max_new_tokens=4)
    SamplingParams(min_new_tokens=4, max_new_tokens=4)
