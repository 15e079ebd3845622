"""Dynamic NTK and log-n: one pass, prefill and decode across the limit, batches; golden longctx on every backend."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from research.qwen.decode.loop import Chunk
from research.qwen.decode.params import SamplingParams
from research.qwen.engine import Engine
from tests.model.golden import BACKENDS, TOLERANCE, assert_logits, load, weights_folder

pytestmark = pytest.mark.mindspore
VARIANTS = [(ntk, logn) for ntk in (0, 1) for logn in (0, 1)]
BLOCKS = list(range(40))


@pytest.fixture(scope="module", params=BACKENDS)
def engines(request):
    """One engine a backend; the two switches live in the host-side tables, so they can be turned on one model."""
    return Engine.from_pretrained(
        weights_folder("longctx"), backend=request.param, kv_dtype="float32", num_blocks=80
    )


@pytest.fixture(params=VARIANTS, ids=lambda v: f"ntk{v[0]}-logn{v[1]}")
def case(request, engines):
    ntk, logn = request.param
    saved = engines.lm.config
    engines.lm.config = dataclasses.replace(saved, use_dynamic_ntk=bool(ntk), use_logn_attn=bool(logn))
    engines.forget_prefixes()  # they were computed by another model, and tests write into the cache by themselves
    yield engines, load("longctx", f"ntk{ntk}_logn{logn}.npz")
    engines.lm.config = saved


def test_one_pass(case):
    engine, golden = case
    for key in (k for k in golden if k.startswith("full") and k.endswith("_pos")):
        length = int(key[4:-4])
        assert engine.lm.rope_alpha(length) == golden[f"full{length}_alpha"][0]
        got = engine.logits(golden["ids"][:length])
        assert_logits(golden, f"full{length}_logits", got[golden[key]])


@pytest.mark.parametrize("chunk", [7, 64, 300])
def test_chunked_prefill_keeps_the_alpha_of_the_whole(case, chunk):
    engine, golden = case
    ids = golden["ids"][:257]
    alpha = engine.lm.rope_alpha(len(ids))
    rows = [
        engine.lm.forward([Chunk(ids[i : i + chunk], i, BLOCKS, alpha, len(ids[i : i + chunk]))])
        for i in range(0, len(ids), chunk)
    ]
    assert_logits(golden, "full257_logits", np.concatenate(rows)[golden["full257_pos"]])


def test_decode_keeps_the_alpha_of_its_prefill(case):
    engine, golden = case
    stride = int(golden.get("key_stride", 1))
    starts = sorted(int(k[3:-6]) for k in golden if k.startswith("dec") and k.endswith("_total"))
    assert starts
    for start in starts:
        ids = golden["ids"][: int(golden[f"dec{start}_total"])]
        alpha = engine.lm.rope_alpha(start)
        assert set(golden[f"dec{start}_alpha"]) == {alpha}
        rows = {start - 1: engine.lm.forward([Chunk(ids[:start], 0, BLOCKS, alpha, 1)])[0]}
        for i in range(start, len(ids)):
            rows[i] = engine.lm.forward([Chunk(ids[i : i + 1], i, BLOCKS, alpha, 1)])[0]
        got = np.stack([rows[int(p)] for p in golden[f"dec{start}_pos"]])
        assert_logits(golden, f"dec{start}_logits", got)
        for layer, block in enumerate(engine.lm.model.transformer.h):
            keys, _ = block.attn.core.read_cache()
            want = golden[f"dec{start}_h{layer}_key"]
            assert np.abs(keys[: len(ids)][::stride] - want).max() <= TOLERANCE


def test_greedy_across_the_limit(case):
    engine, golden = case
    for start in (60, 100):
        prompt = [int(i) for i in golden["ids"][:start]]
        result = engine.generate([prompt], SamplingParams(temperature=0, max_new_tokens=64, ignore_eos=True))[
            0
        ]
        np.testing.assert_array_equal(prompt + result.ids, golden[f"greedy{start}_ids"])


@pytest.mark.parametrize("name", ["batch", "short_batch"])
def test_batch_rows_equal_rows_alone(case, name):
    """Rows are not padded here, so each row has its own alpha and log-n, as if alone. The published code scales a
    left-padded row by its padded position and picks one alpha for a short batch; there ours follows the single run."""
    engine, golden = case
    rows = [
        [int(i) for i in ids[mask.astype(bool)]]
        for ids, mask in zip(golden[f"{name}_ids"], golden[f"{name}_mask"], strict=True)
    ]
    used = -(-max(map(len, rows)) // 16)
    together = engine.lm.forward(
        [
            Chunk(row, 0, list(range(used * i, used * i + used)), engine.lm.rope_alpha(len(row)), 1)
            for i, row in enumerate(rows)
        ]
    )
    assert_logits(golden, f"{name}_single_last_logits", together)
    params = SamplingParams(temperature=0, max_new_tokens=40, ignore_eos=True)
    batch = engine.generate(rows, params)
    for row, result in zip(rows, batch, strict=True):
        assert result.ids == engine.generate([row], params)[0].ids
    width = golden[f"{name}_ids"].shape[1]
    full = [i for i, row in enumerate(rows) if len(row) == width]  # unpadded rows: the published batch agrees
    for i in full:
        np.testing.assert_array_equal(batch[i].ids, golden[f"{name}_greedy_ids"][i, width:])
