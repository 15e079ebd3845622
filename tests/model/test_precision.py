"""What number formats cost: logits and perplexity against float32, and the fused layer against its parts."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from mindspore import Tensor

from research.qwen.config import QwenConfig
from research.qwen.demo import demo_folder
from research.qwen.engine import Engine
from research.qwen.errors import ConfigError, KernelError
from research.qwen.kernels.api import CacheSpec, load_kernels
from research.qwen.model.precision import Precision
from research.qwen.model.quantise import Plan, quantised_source
from research.qwen.model.runtime import Runtime
from research.qwen.weights.readers import open_checkpoint
from tests.model import golden

pytestmark = pytest.mark.mindspore
SMALL = {"block_size": 16, "num_blocks": 64}
# format -> least cosine of logits with float32, largest relative change of perplexity
BARS = {"bfloat16": (0.9999, 0.01), "int8": (0.999, 0.01)}
INT4 = ("int4", "int4-g64", "int4-asym", "int4-g64-asym")


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Of two arrays of logits, all rows together."""
    x, y = a.ravel().astype(np.float64), b.ravel().astype(np.float64)
    return float(x @ y / np.sqrt((x @ x) * (y @ y)))


def demo_texts() -> list[list[tuple[str, str]]]:
    data = json.loads((demo_folder().parent / "dialogues.json").read_text(encoding="utf-8"))
    return [[tuple(turn) for turn in dialogue["turns"]] for dialogue in data["dialogues"]]


def perplexity(engine: Engine) -> float:
    """Of whole conversations: the questions, which the demo model can only guess, and the answers it has learned."""
    total, count = 0.0, 0
    for turns in demo_texts():
        messages = []
        for question, answer in turns:
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        scored = engine.score(engine.render(messages))
        total -= float(scored.logprobs.sum())
        count += len(scored.logprobs)
    return math.exp(total / count)


def demo(dtype: str | None, **options) -> Engine:
    return Engine.from_pretrained(demo_folder(), dtype=dtype, **SMALL, **options)


@pytest.fixture(scope="module")
def exact() -> Engine:
    return demo("float32")


@pytest.mark.parametrize("dtype", [*BARS, *INT4])
def test_perplexity_of_the_demo_model(exact, dtype):
    want, got = perplexity(exact), perplexity(demo(dtype))
    bar = BARS[dtype][1] if dtype in BARS else 0.03
    change = got / want - 1
    if dtype in INT4[1:]:  # finer than int4, and here better than the original by up to 4 %
        change = max(change, 0)
    assert abs(change) <= bar, f"{dtype}: {want:.4f} -> {got:.4f}"


@pytest.mark.parametrize("name", ["st_new_bf16", "bin_old_fp16", "bin_sharded_fp32"])
@pytest.mark.parametrize("dtype", [*BARS, *INT4])
def test_logits_of_the_golden_models(name, dtype):
    """int4 is measured against its own dequantised weights in float32, the rest against the stored weights."""
    folder, ids = golden.weights_folder(name), golden.load(name)["prompt1_ids"].tolist()
    got = Engine.from_pretrained(folder, dtype=dtype, kv_dtype="bfloat16", **SMALL).logits(ids)
    if dtype in BARS:
        want = Engine.from_pretrained(folder, dtype="float32", **SMALL).logits(ids)
    else:
        want = Engine.from_pretrained(folder, dtype=dtype, backend="reference", **SMALL).logits(ids)
    assert cosine(got, want) >= BARS.get(dtype, (0.999,))[0]


@pytest.mark.parametrize("kv", ["float32", "bfloat16", "int8"])
def test_cache_formats(exact, kv):
    ids = exact.render([{"role": "user", "content": "什么是深度学习？"}])
    assert cosine(demo(None, kv_dtype=kv).logits(ids), exact.logits(ids)) >= 0.9995


@pytest.mark.parametrize("dtype", [None, "int8", "int4-g64-asym"])
@pytest.mark.parametrize("kv", ["float32", "bfloat16", "int8"])
def test_the_fused_layers_are_their_parts(dtype, kv):
    """The same bits, one operator or many, prefill and single steps."""
    config = QwenConfig.from_folder(demo_folder())
    source = quantised_source(open_checkpoint(demo_folder()), config, Plan(dtype, None, None))
    kernels = load_kernels("cpu", threads=2)
    cache = CacheSpec(32, 16, kv)
    fused = Runtime.load(config, source, kernels, cache)
    kernels.fuse = lambda *_: None
    parts = Runtime.load(config, source, kernels, cache)
    assert fused.model.transformer.fused is not None and parts.model.transformer.fused is None
    engines = [Engine(runtime, None) for runtime in (fused, parts)]
    ids = np.random.default_rng(1).integers(0, config.vocab_size, 50).tolist()
    first, second = (engine.logits(ids) for engine in engines)
    np.testing.assert_array_equal(first, second)
    first, second = (engine.generate([ids[:9]])[0].choices[0].ids for engine in engines)
    assert first == second and len(first) > 1


def test_a_weight_that_is_set_anew_is_used():
    """The fused layers hold addresses, not tensors: data set later must not be missed."""
    engine = demo("float32")
    before = engine.logits([1, 2, 3])
    weight = engine.lm.model.transformer.h[1].mlp.c_proj.weight
    kept = weight.asnumpy().copy()
    weight.set_data(Tensor.from_numpy(np.zeros_like(kept)), slice_shape=True)
    assert np.abs(engine.logits([1, 2, 3]) - before).max() > 0.1
    weight.set_data(Tensor.from_numpy(kept), slice_shape=True)
    np.testing.assert_array_equal(engine.logits([1, 2, 3]), before)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_a_row_of_a_batch_is_the_row_alone(dtype):
    engine = demo(dtype)
    prompts = [
        engine.render([{"role": "user", "content": text}]) for text in ("你好", "什么是深度学习？", "Hello")
    ]
    params = engine.default_params(max_new_tokens=12, temperature=0.0, logprobs=0)
    together = engine.generate(prompts, params)
    for prompt, result in zip(prompts, together, strict=True):
        alone = engine.generate([prompt], params)[0]
        assert alone.choices[0].ids == result.choices[0].ids
        assert alone.choices[0].logprobs == result.choices[0].logprobs


@pytest.mark.parametrize(
    "options, message",
    [
        ({"dtype": "int3"}, "int3"),
        ({"lm_head": "int4-g32"}, "lm_head"),
        ({"activations": "float16"}, "activations"),
    ],
)
def test_unknown_formats(options, message):
    with pytest.raises(ConfigError, match=message):
        Precision(**options)


def test_formats_a_backend_does_not_have():
    with pytest.raises(KernelError, match="KV cache"):
        Precision(kv="int4").cache_format("cpu")
    with pytest.raises(KernelError, match="float16"):
        Precision("float32").compute_dtype("ascend")
    assert Precision().cache_format("cpu") == "bfloat16"
    assert Precision("float32").cache_format("cpu") == "float32"
