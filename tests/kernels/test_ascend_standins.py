"""The whole Ascend model on CPU through contract stand-ins: equal to ``reference`` and to the golden data."""

from __future__ import annotations

import dataclasses
import itertools

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from research.qwen.decode.loop import Chunk
from research.qwen.kernels.api import CacheSpec
from research.qwen.kernels.ascend import PAGED, PREFILL
from tests.fixtures_util import model_folder
from tests.kernels.ascend_models import (
    CACHE,
    MIXED,
    TINY,
    ascend_runtime,
    graph_inputs,
    reference_runtime,
    run_script,
    stored,
    view,
)
from tests.kernels.ascend_standins import standins
from tests.model.golden import TOLERANCE, assert_logits, load

pytestmark = pytest.mark.mindspore

IDS = {name: [(7 * i + 13 * n) % TINY.vocab_size for i in range(180)] for n, name in enumerate("abc")}
# Lengths around TINY.seq_length = 24 and around the 128 of the compressed mask.
SCRIPTS = {
    "one prompt, then single tokens": [[("a", 9)], [("a", 1)], [("a", 1)], [("a", 1)]],
    "a prompt of one token": [[("a", 1)], [("a", 1)]],
    "prompts of different lengths at once, then decode": [
        [("a", 5), ("b", 17), ("c", 1)],
        [("a", 1), ("b", 1), ("c", 1)],
        [("c", 1), ("a", 1)],
    ],
    "chunked prefill": [[("a", 16)], [("a", 16)], [("a", 5)], [("a", 1)]],
    "chunk of a prompt beside decoding sequences": [
        [("a", 6)],
        [("a", 1), ("b", 20)],
        [("b", 7), ("a", 1), ("c", 3)],
        [("a", 1), ("b", 1), ("c", 2)],
    ],
    "log-n: across seq_length": [[("a", 22), ("b", 30)], [("a", 1), ("b", 1)], [("a", 4), ("b", 1)]],
    "longer than the compressed mask": [[("a", 140), ("b", 129), ("c", 3)], [("a", 1), ("b", 1), ("c", 1)]],
}


@pytest.fixture(scope="module")
def ascend():
    return ascend_runtime()


@pytest.fixture(scope="module")
def reference():
    return reference_runtime()


def assert_close(got, want, what):
    difference = np.abs(got - want)
    assert difference.max() <= TOLERANCE, f"{what}: max {difference.max():.2e} mean {difference.mean():.2e}"


@pytest.mark.parametrize("name", SCRIPTS)
def test_equals_reference(name, ascend, reference):
    script = SCRIPTS[name]
    alphas = {"a": 1.0, "b": 3.0, "c": 15.0}  # one NTK factor per sequence, whatever their lengths
    for got, want in zip(
        run_script(ascend, IDS, script, alphas), run_script(reference, IDS, script, alphas), strict=True
    ):
        assert_close(got, want, name)


def test_caches_equal_reference(ascend, reference):
    script = SCRIPTS["chunk of a prompt beside decoding sequences"]
    for runtime in (ascend, reference):
        run_script(runtime, IDS, script)
    used = [0, 12, 13, 24]  # blocks of a, b, c
    for ours, theirs in zip(ascend.model.transformer.h, reference.model.transformer.h, strict=True):
        for name in ("key_cache", "value_cache"):
            got, want = (getattr(block.attn.core, name).asnumpy()[used] for block in (ours, theirs))
            assert_close(got[0, :9], want[0, :9], name)
            assert_close(got[1:3].reshape(32, -1)[:28], want[1:3].reshape(32, -1)[:28], name)


def test_flat_cache_equals_reference(reference):
    flat = ascend_runtime(flat_cache=True)
    assert flat.model.transformer.h[0].attn.core.key_cache.shape == (48, 16, 64)
    for name in ("chunked prefill", "chunk of a prompt beside decoding sequences"):
        for got, want in zip(
            run_script(flat, IDS, SCRIPTS[name]), run_script(reference, IDS, SCRIPTS[name]), strict=True
        ):
            assert_close(got, want, name)


def test_scattered_blocks_and_a_stale_cache(ascend, reference):
    """Blocks in no order that are full of other sequences' keys, also beyond the context."""
    for runtime in (ascend, reference):
        run_script(runtime, IDS, SCRIPTS["longer than the compressed mask"])  # dirties blocks 0 .. 32
    blocks = [31, 3, 17, 0]
    for start, count in [(0, 18), (18, 20), (38, 1)]:
        chunk = Chunk(IDS["b"][start : start + count], start, blocks, 3.0, count)
        assert_close(ascend.forward([chunk]), reference.forward([chunk]), f"start {start}")


def test_two_graphs_whatever_came(ascend):
    """Runs after the tests above on the same model; on its own it makes its two graphs itself."""
    for name in SCRIPTS:
        run_script(ascend, IDS, SCRIPTS[name])
    assert ascend.compilations == 2


def test_graph_key(ascend):
    keys = {
        PREFILL: [([0], [1]), ([0, 0, 0], [4, 1, 9])],
        PAGED: [([1], [1]), ([0, 3], [5, 1]), ([16], [16]), ([7, 0], [1, 1])],
    }
    for key, views in keys.items():
        for starts, lengths in views:
            step_view = view(starts, lengths)
            assert ascend.kernels.graph_key(step_view) == key
            step = ascend.kernels.make_step(step_view, TINY, CACHE)
            signature = ascend.kernels.step_signature(TINY, CACHE, key)
            assert [t.dtype for t in step] == [t.dtype for t in signature]
            assert [t.ndim for t in step] == [t.ndim for t in signature]


@pytest.mark.parametrize("name", ["st_new_bf16", "bin_old_fp16"])
def test_golden_logits(name):
    folder, golden = model_folder(name), load(name)
    config, source = stored(folder)
    runtime = ascend_runtime(config, source=source, cache=CacheSpec(16, 16))
    blocks = list(range(16))
    for i in range(3):
        ids = golden[f"prompt{i}_ids"]
        assert_logits(golden, f"prompt{i}_logits", runtime.forward([Chunk(ids, 0, blocks, 1.0, len(ids))]))
    ids, prefill = golden["inc_ids"], int(golden["inc_prefill"])
    parts = [(0, prefill)] + [(i, 1) for i in range(prefill, len(ids))]
    rows = [runtime.forward([Chunk(ids[s : s + n], s, blocks, 1.0, n)]) for s, n in parts]
    assert_logits(golden, "inc_logits", np.concatenate(rows))
    ids = golden["prompt2_ids"]
    rows = [
        runtime.forward([Chunk(ids[i : i + 7], i, blocks, 1.0, len(ids[i : i + 7]))]) for i in range(0, 33, 7)
    ]
    assert_logits(golden, "prompt2_logits", np.concatenate(rows))
    assert runtime.compilations == 2


def test_golden_logits_in_float16():
    """Weights, activations and cache in float16 (stored bfloat16): the tolerance of the golden data."""
    folder, golden = model_folder("st_new_bf16"), load("st_new_bf16")
    config, source = stored(folder)
    runtime = ascend_runtime(config, "float16", standins("float16"), source, CacheSpec(16, 16))
    assert runtime.model.transformer.h[0].attn.core.key_cache.dtype == ms.float16
    ids, blocks = golden["prompt2_ids"], list(range(16))
    want = golden["prompt2_logits"]
    for size in (len(ids), 10):  # one pass, then chunks
        parts = [ids[i : i + size] for i in range(0, len(ids), size)]
        rows = [runtime.forward([Chunk(p, i * size, blocks, 1.0, len(p))]) for i, p in enumerate(parts)]
        difference = np.abs(np.concatenate(rows)[:, :: int(golden["vocab_stride"])] - want)
        assert difference.max() <= 0.03 and difference.mean() <= 0.005, (difference.max(), difference.mean())
        assert difference.max() > 1e-4  # float16 it is


@pytest.fixture(scope="module")
def longctx():
    folder = model_folder("longctx")
    config, source = stored(folder)
    return ascend_runtime(config, source=source, cache=CacheSpec(24, 16))


@pytest.mark.parametrize(("ntk", "logn"), list(itertools.product((0, 1), repeat=2)))
def test_golden_longctx(longctx, ntk, logn):
    """One pass and chunks at every length, and decoding with the alpha of its prefill, across seq_length."""
    golden = load("longctx", f"ntk{ntk}_logn{logn}.npz")
    longctx.config = dataclasses.replace(longctx.config, use_dynamic_ntk=bool(ntk), use_logn_attn=bool(logn))
    blocks = list(range(24))
    for key in (k for k in golden if k.startswith("full") and k.endswith("_pos")):
        length = int(key[4:-4])
        ids, alpha = golden["ids"][:length], longctx.rope_alpha(length)
        got = longctx.forward([Chunk(ids, 0, blocks, alpha, length)])
        assert_logits(golden, f"full{length}_logits", got[golden[key]])
        parts = [(i, min(80, length - i)) for i in range(0, length, 80)]
        got = np.concatenate(
            [longctx.forward([Chunk(ids[s : s + n], s, blocks, alpha, n)]) for s, n in parts]
        )
        assert_logits(golden, f"full{length}_logits", got[golden[key]])
    for start in (64, 100):
        ids = golden["ids"][: int(golden[f"dec{start}_total"])]
        alpha = longctx.rope_alpha(start)
        rows = {start - 1: longctx.forward([Chunk(ids[:start], 0, blocks, alpha, 1)])[0]}
        for i in range(start, len(ids)):
            rows[i] = longctx.forward([Chunk(ids[i : i + 1], i, blocks, alpha, 1)])[0]
        assert_logits(
            golden, f"dec{start}_logits", np.stack([rows[int(p)] for p in golden[f"dec{start}_pos"]])
        )


@pytest.fixture
def pynative():
    ms.set_context(mode=ms.PYNATIVE_MODE)
    yield
    ms.set_context(mode=ms.GRAPH_MODE)


class TestStrict:
    """PYNATIVE, where the stand-ins check every dimension and value of what the Ascend cells pass on."""

    @pytest.fixture
    def runtime(self, pynative):
        return ascend_runtime(ops=standins(eager=True))

    @pytest.mark.parametrize(
        "step_view",
        [view([0], [3]), view([0, 0], [5, 90]), MIXED, view([40, 7], [1, 1])],
        ids=["prompt", "prompts", "mixed", "decode"],
    )
    def test_what_the_cells_pass_keeps_the_contract(self, runtime, step_view):
        out = runtime.model(*graph_inputs(runtime, step_view))
        assert out.shape == (sum(step_view.q_lens), TINY.vocab_size) and np.isfinite(out.asnumpy()).all()

    @pytest.mark.parametrize(
        ("step_view", "place", "wrong", "message"),
        [
            (MIXED, 0, lambda a: a.astype(np.float16), "dtype"),
            (MIXED, 0, lambda a: a[:-1], "cos and sin per token"),
            (MIXED, 1, lambda a: a[:, :8], "cos and sin per token"),
            (MIXED, 3, lambda a: a[:4], "position per token"),
            (MIXED, 3, lambda a: a.astype(np.int64), "dtype"),
            (MIXED, 4, lambda a: a[:-1], "slot per token"),
            (MIXED, 4, lambda a: a * 0, "written twice"),
            (MIXED, 4, lambda a: a + 9999, "slots in the cache"),
            (MIXED, 4, lambda a: a.astype(np.int64), "dtype"),
            (MIXED, 5, lambda a: a[:-1], "one table, context and length"),
            (MIXED, 5, lambda a: a - 5, "count the tokens of this pass"),
            (MIXED, 6, lambda a: a + 48, "block ids"),
            (MIXED, 6, lambda a: a.reshape(-1), "rank"),
            (MIXED, 6, lambda a: a[:, :0], "tables hold every context"),
            (MIXED, 7, lambda a: a[:, :-1], "mask column"),
            (MIXED, 7, lambda a: a[0], "rank"),
            (MIXED, 8, lambda a: a + 1, "q_seq_lens cover"),
            (MIXED, 8, lambda a: a.astype(np.float32), "dtype"),
            (view([0, 0], [4, 3]), 5, lambda a: np.cumsum(a).astype(np.int32), "not their running sum"),
            (view([0, 0], [4, 3]), 5, lambda a: a.astype(np.int64), "dtype"),
        ],
    )
    def test_a_wrong_step_is_refused(self, runtime, step_view, place, wrong, message):
        ids, rows, *step = graph_inputs(runtime, step_view)
        step[place] = Tensor.from_numpy(np.ascontiguousarray(wrong(step[place].asnumpy())))
        with pytest.raises((TypeError, ValueError), match=message):
            runtime.model(ids, rows, *step)


def test_graph_refuses_a_wrong_dtype(tmp_path, monkeypatch):
    """dtypes and ranks are checked in the graph run as well, when it is compiled."""
    monkeypatch.chdir(tmp_path)
    runtime = ascend_runtime()
    ids, rows, *step = graph_inputs(runtime, MIXED)
    step[3] = Tensor.from_numpy(step[3].asnumpy().astype(np.int64))
    runtime.model.set_inputs(ids, rows, *step)
    with pytest.raises(TypeError, match="contract"):
        runtime.model.compile(ids, rows, *step)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("ApplyRotaryPosEmb", {"cos_format": 0}),
        ("FlashAttentionScore", {"head_num": 4, "input_layout": "TND", "next_tokens": 0}),
        ("FlashAttentionScore", {"head_num": 4, "input_layout": "TH"}),
        ("PagedAttention", {"head_num": 4, "scale_value": 0.25, "kv_head_num": 2}),
    ],
)
def test_standins_refuse_other_settings(name, arguments):
    with pytest.raises(ValueError, match="contract"):
        getattr(standins(), name)(**arguments)
