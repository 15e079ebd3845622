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
    "max_new_tokens": [0, -1, 1.5, True, "512", math.inf],
    "stop": [5, b"x", [""], "", ["a", 1], None, {"a": 1}],
    "stop_token_ids": [7, "7", [-1], [1.0], [True], ["7"], None, {7: 1}],
    "ignore_eos": [0, 1, "true", None],
    "n": [0, -1, 129, 1.0, True, "1", None],
    "logprobs": [-1, 21, True, 1.0, "3"],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, bad) for name, values in BAD_VALUES.items() for bad in values]
)
def test_bad_value_is_refused_with_its_name(name, value):
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{name: value})
    message = str(caught.value)
    shown = value[0] if isinstance(value, list) and name.startswith("stop") and len(value) == 1 else value
    assert message.startswith(f"{name} must ")
    assert "\n" not in message
    if not (isinstance(value, list) and len(value) > 1):
        assert repr(shown) in message


def test_defaults_and_edges_are_accepted():
    params = SamplingParams()
    assert (params.temperature, params.max_new_tokens, params.n, params.logprobs) == (1.0, 512, 1, None)
    assert not params.greedy and not params.penalised
    SamplingParams(
        temperature=0, top_p=1, min_p=1, presence_penalty=-2, frequency_penalty=2, seed=-(2**63), n=128
    )
    SamplingParams(max_new_tokens=None, logprobs=0, seed=2**64 - 1, top_p=1e-9)


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
