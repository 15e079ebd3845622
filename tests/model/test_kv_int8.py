"""The int8 KV cache: the published scheme against its golden run, ours against the cache that keeps everything."""

from __future__ import annotations

import numpy as np
import pytest

from research.qwen.decode.loop import Chunk
from research.qwen.decode.params import SamplingParams
from research.qwen.engine import Engine
from research.qwen.quant.kv import dequantize_cache, quantize_cache
from tests.gptq_fixtures import kv_int8_folder, kv_int8_golden

pytestmark = pytest.mark.mindspore
MEAN, WORST = 0.03, 0.2  # of logits: truncation turns rounding noise into steps of one (golden README)
BLOCKS = list(range(8))


@pytest.fixture(scope="module")
def golden():
    return kv_int8_golden()


def engine(backend, kv):
    return Engine.from_pretrained(kv_int8_folder(), backend=backend, kv_dtype=kv, num_blocks=48)


@pytest.fixture(scope="module")
def published():
    return engine("reference", "int8-published")


def by_steps(lm, ids, prefill):
    """Logits (T, V) of a prefill and then one token at a time."""
    alpha = lm.rope_alpha(prefill)
    rows = [lm.forward([Chunk(ids[:prefill], 0, BLOCKS, alpha, prefill)])]
    rows += [lm.forward([Chunk(ids[i : i + 1], i, BLOCKS, alpha, 1)]) for i in range(prefill, len(ids))]
    return np.concatenate(rows)


def assert_close(golden, got, want):
    difference = np.abs(got[..., golden["kept_ids"]] - want)
    assert difference.mean() <= MEAN, f"mean {difference.mean():.4f}"
    assert difference.max() <= WORST, f"max {difference.max():.4f}"


def test_prefill_then_single_steps(published, golden):
    got = by_steps(published.lm, golden["ids"], int(golden["prefill"]))
    assert_close(golden, got, golden["step_logits"])


def test_one_pass(published, golden):
    got = published.lm.forward([Chunk(golden["ids"], 0, BLOCKS, 1.0, len(golden["ids"]))])
    assert_close(golden, got, golden["full_logits"])


def test_beyond_the_trained_length(published, golden):
    got = by_steps(published.lm, golden["long_ids"], int(golden["long_prefill"]))
    assert_close(golden, got[-len(golden["long_last_logits"]) :], golden["long_last_logits"])


def test_the_cache_after_prefill_and_steps(published, golden):
    """Layer 0, where nothing has been rounded before: the stored numbers, to within one code."""
    ids, prefill = golden["ids"], int(golden["prefill"])
    by_steps(published.lm, ids, prefill)
    cached = published.lm.model.transformer.h[0].attn.core.read_cache()
    for part, got in zip(("key", "value"), cached, strict=True):
        codes, scale, zero = (golden[f"final_h0_{part}_{name}"][0] for name in ("q", "scale", "zero"))
        want = dequantize_cache(codes, scale, zero).swapaxes(0, 1)
        step = scale.swapaxes(0, 1)
        off = np.abs(got[: len(ids)] - want) / step
        assert off.max() <= 1.01
        assert (off > 0.01).mean() <= 0.01  # codes differ only where rounding noise crosses a step


def test_the_scheme_equals_the_one_in_numpy(published, golden):
    """Two sequences of different lengths in one pass: each has its own ranges. Layer 0 against quant.kv."""
    plain = engine("reference", "float32").lm
    ids = golden["ids"]
    runs = [Chunk(ids[:20], 0, [0, 1], 1.0, 1), Chunk(ids[20:27], 0, [2], 1.0, 1)]
    for lm in (plain, published.lm):
        lm.forward(runs)
    whole, cut = (lm.model.transformer.h[0].attn.core.read_cache() for lm in (plain, published.lm))
    for x, got in zip(whole, cut, strict=True):
        for rows in (slice(0, 20), slice(32, 39)):
            want = dequantize_cache(*quantize_cache(x[rows].swapaxes(0, 1))).swapaxes(0, 1)
            np.testing.assert_allclose(got[rows], want, rtol=0, atol=2e-6)


def test_greedy_where_the_margin_is_beyond_the_noise(published, golden):
    compared = 0
    for i in range(2):
        ids, prompt = golden[f"greedy{i}_ids"], int(golden[f"greedy{i}_prompt"])
        params = SamplingParams(temperature=0, max_new_tokens=len(ids) - prompt, ignore_eos=True)
        got = published.generate([list(ids[:prompt])], params)[0].ids
        narrow = np.flatnonzero(golden[f"greedy{i}_margin"] < WORST)
        sure = int(narrow[0]) if narrow.size else len(got)
        np.testing.assert_array_equal(got[:sure], ids[prompt : prompt + sure])
        compared += sure
    assert compared > 0


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_scale_per_token_is_closer_to_the_unquantised_model(published, golden, backend):
    """One scale per token and head, rounded to nearest, against the published scheme, both by steps."""
    ids, prefill = golden["ids"], int(golden["prefill"])
    exact = by_steps(engine(backend, "float32").lm, ids, prefill)
    ours = np.abs(by_steps(engine(backend, "int8").lm, ids, prefill) - exact).mean()
    theirs = np.abs(by_steps(published.lm, ids, prefill) - exact).mean()
    assert np.abs(exact[:, golden["kept_ids"]] - golden["plain_full_logits"]).max() <= 3e-4
    assert ours < theirs / 2, f"ours {ours:.4f}, published {theirs:.4f}"


@pytest.mark.parametrize("kv", ["bfloat16", "int8"])
def test_cpu_and_reference_keep_the_same(golden, kv):
    """The judge rounds as the kernels do; logits differ by rounding noise that may flip a code now and then."""
    ids, prefill = golden["ids"], int(golden["prefill"])
    cpu, judge = engine("cpu", kv).lm, engine("reference", kv).lm
    a, b = by_steps(cpu, ids, prefill), by_steps(judge, ids, prefill)
    assert np.abs(a - b).mean() <= 2e-3
    caches = [lm.model.transformer.h[0].attn.core.read_cache() for lm in (cpu, judge)]
    for mine, want in zip(*caches, strict=True):
        off = np.abs(mine[: len(ids)] - want[: len(ids)])
        assert (off > 1e-5).mean() <= 0.01
        assert off.max() <= np.abs(want).max() / 100
