"""What the ascend backend does on the host: availability, refused shapes, weights and step tensors."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import mindspore as ms
import numpy as np
import pytest

from research.qwen.errors import CheckpointError, ConfigError, KernelError
from research.qwen.kernels import ascend, ascend_cells, devices
from research.qwen.kernels.api import CacheSpec, load_kernels
from research.qwen.kernels.ascend_ops import mindspore_ops
from tests.kernels.ascend_models import CACHE, MIXED, PREFILL, TINY, RandomWeights, ascend_runtime, view
from tests.kernels.ascend_standins import standins

pytestmark = pytest.mark.mindspore
NO_DEVICE = pytest.mark.skipif(devices.device_available(), reason="this machine has an Ascend device")


@pytest.fixture
def half():
    return ascend.build("float16", require_device=False)


@NO_DEVICE
def test_without_a_device_one_clear_line():
    with pytest.raises(KernelError) as caught:
        load_kernels("ascend")
    message = str(caught.value)
    assert message.startswith("backend ascend asked for, but MindSpore finds no Ascend device: ")
    assert message.endswith("; use device cpu") and "\n" not in message
    assert ms.get_context("device_target") == "CPU"  # asking changed nothing


@NO_DEVICE
def test_asking_for_a_device_is_quiet(repository):
    """No import of MindSpore with the module, no output of MindSpore's with the answer."""
    code = (
        "import sys; from research.qwen.kernels.devices import device_available, ascend_soc\n"
        "assert 'mindspore' not in sys.modules\nassert device_available() is False and ascend_soc() == ''"
    )
    env = {key: value for key, value in os.environ.items() if key != "GLOG_v"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=repository, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "Ascend" not in done.stdout + done.stderr


def test_no_mindspore_is_no_device(monkeypatch):
    monkeypatch.setitem(sys.modules, "mindspore", None)
    assert devices.device_available() is False


def test_a_failing_device_is_one_line(monkeypatch):
    monkeypatch.setattr(ascend, "ascend_problem", lambda: None)
    monkeypatch.setattr(
        ascend.ms, "set_device", lambda *_: raise_(RuntimeError("no such device\nlong trace"))
    )
    with pytest.raises(KernelError, match="^Ascend device 7 cannot be used: no such device$"):
        ascend.build(device_id=7)


def raise_(error):
    raise error


@pytest.mark.parametrize(
    ("soc", "flat"), [("ascend910", True), ("910a", True), ("ascend910b", False), ("ascend910_93", False)]
)
def test_the_chip_decides_the_cache_layout(monkeypatch, soc, flat):
    monkeypatch.setattr(ascend, "_select_device", lambda _: None)
    monkeypatch.setattr(ascend, "ascend_soc", lambda: soc)
    assert ascend.build().flat_cache is flat
    assert ascend.build(flat_cache=not flat).flat_cache is not flat
    if flat:
        with pytest.raises(KernelError, match="no bfloat16; use dtype float16"):
            ascend.build("bfloat16")
    else:
        assert ascend.build("bfloat16").activation_dtype == "bfloat16"


@pytest.mark.parametrize("dtype", ["float32", "float64", "fp16", ""])
def test_unknown_dtype(dtype):
    with pytest.raises(KernelError, match="float16 or bfloat16"):
        ascend.build(dtype, require_device=False)
    if dtype == "float32":
        assert ascend.build(dtype, ops=standins(), require_device=False).activation_dtype == "float32"


@pytest.mark.parametrize(
    ("changes", "block_size", "message"),
    [
        ({"kv_channels": 8, "num_heads": 8}, 16, "head size 8 .* multiple of 16 up to 256"),
        ({"kv_channels": 40, "num_heads": 2, "hidden_size": 80}, 16, "head size 40"),
        ({"kv_channels": 272, "num_heads": 1, "hidden_size": 272}, 16, "head size 272"),
        ({}, 8, "block_size 8 must be one of 16, 32, 64, 128"),
        ({}, 256, "block_size 256"),
        ({"kv_channels": 256, "num_heads": 1, "hidden_size": 256}, 128, "exceeds 16384; use a smaller"),
    ],
)
def test_shapes_the_operators_do_not_take(half, changes, block_size, message):
    with pytest.raises(KernelError, match=message):
        half.attention(dataclasses.replace(TINY, **changes), CacheSpec(4, block_size))


@pytest.mark.parametrize("size", ["1.8B", "7B", "14B", "72B"])
def test_published_heads_fit(size):
    heads = {"1.8B": 16, "7B": 32, "14B": 40, "72B": 64}[size]
    config = dataclasses.replace(TINY, hidden_size=128 * heads, num_heads=heads, kv_channels=128)
    for block_size in ascend.BLOCK_SIZES:
        ascend.check_shapes(config, CacheSpec(4, block_size))


@pytest.mark.parametrize("cell", ["linear", "embedding"])
def test_unknown_formats_are_refused(half, cell):
    arguments = (32, 32, False, "int5") if cell == "linear" else (32, 32, "int5")
    with pytest.raises(ConfigError, match="unknown integer format 'int5'"):
        getattr(half, cell)(*arguments)


@pytest.mark.parametrize("fmt", ["float32", "bfloat16", "int8"])
def test_the_cache_stays_in_the_compute_dtype(half, fmt):
    with pytest.raises(KernelError, match=f"cache in the compute dtype float16, not in {fmt}; leave"):
        half.attention(TINY, CacheSpec(4, 16, fmt))
    for taken in ("auto", "float16"):
        assert half.attention(TINY, CacheSpec(4, 16, taken)).key_cache.dtype == ms.float16


def bits(values):
    """bfloat16 as stored: the upper half of a float32."""
    return (np.asarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)


@pytest.mark.parametrize("fmt", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_become_the_compute_dtype(fmt, dtype):
    kernels = ascend.build(dtype, require_device=False)
    values = np.array([[1.5, -0.25, 3.0], [2.0**-10, -65280.0, 0.0]], np.float32)  # exact in all three
    stored = bits(values) if fmt == "bfloat16" else values.astype(fmt)
    tensor = kernels.parameter(stored, fmt)
    assert tensor.dtype == getattr(ms, dtype) and tensor.shape == values.shape
    np.testing.assert_array_equal(tensor.asnumpy().astype(np.float32), values)


def test_rounding_is_to_nearest():
    value = np.float32(1 + 2**-8 + 2**-9)  # halfway and a bit between two bfloat16
    tensor = ascend.build("bfloat16", require_device=False).parameter(np.array([value]), "float32")
    assert tensor.asnumpy().astype(np.float32)[0] == 1 + 2**-7


def test_weights_stored_in_the_compute_dtype_are_not_copied(half):
    array = np.ones((4, 4), np.float16)
    tensor = half.parameter(array, "float16")
    assert tensor.asnumpy().__array_interface__["data"][0] == array.__array_interface__["data"][0]


def test_conversion_goes_slice_by_slice(half, monkeypatch):
    monkeypatch.setattr(ascend_cells, "ROWS_AT_ONCE", 7)
    values = np.random.default_rng(0).normal(size=(5, 9)).astype(np.float32)
    np.testing.assert_array_equal(half.parameter(values, "float32").asnumpy(), values.astype(np.float16))


@pytest.mark.parametrize("bad", [65536.0, -1e5, 3e38, np.inf, np.nan])
@pytest.mark.parametrize("fmt", ["float32", "bfloat16"])
def test_what_does_not_fit_float16_is_refused(half, bad, fmt):
    values = np.array([0.5, bad], np.float32)
    with pytest.raises(CheckpointError, match="does not fit float16 .*use dtype bfloat16"):
        half.parameter(bits(values) if fmt == "bfloat16" else values, fmt)


def test_the_error_names_the_tensor():
    weights = RandomWeights(TINY)
    weights.tensors["transformer.h.1.mlp.w2.weight"][3, 4] = 1e6
    with pytest.raises(CheckpointError, match=r"^transformer\.h\.1\.mlp\.w2\.weight: weight value 1e\+06"):
        ascend_runtime(dtype="float16", source=weights)


def test_largest_float16_is_kept(half):
    assert half.parameter(np.array([65504.0, -65504.0], np.float32), "float32").asnumpy()[0] == 65504.0


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_step_tensors(dtype):
    kernels = ascend.build(dtype, require_device=False)
    kind = getattr(ms, dtype)
    cos, sin, logn, positions, slots, lengths = kernels.make_step(PREFILL, TINY, CACHE)
    assert [t.dtype for t in (cos, sin, logn)] == [kind] * 3
    assert cos.shape == sin.shape == (8, 16) and logn.shape == (8, 1)
    assert positions.asnumpy().tolist() == [0, 1, 2, 0, 1, 2, 3, 4]
    assert slots.asnumpy().tolist() == [0, 1, 2, 96, 97, 98, 99, 100]
    assert lengths.asnumpy().tolist() == [3, 5]
    step = kernels.make_step(MIXED, TINY, CACHE)
    lengths, tables, mask, q_lens = step[5:]
    assert lengths.asnumpy().tolist() == [5, 6, 12] and q_lens.asnumpy().tolist() == [1, 6, 3]
    assert tables.asnumpy().tolist() == [[0], [6], [12]] and tables.dtype == ms.int32
    allowed = mask.asnumpy().astype(np.float32) == 0
    assert mask.dtype == kind and allowed.shape == (10, 16)
    assert allowed.sum(1).tolist() == [5, 1, 2, 3, 4, 5, 6, 10, 11, 12]
    assert (np.diff(allowed.astype(int), axis=1) <= 0).all()  # keys 0 .. position, nothing after
    assert mask.asnumpy().astype(np.float32).min() <= -9984  # -10000 as bfloat16 has it


def test_logn_and_tables_beyond_seq_length(half):
    step = half.make_step(view([40], [2], alphas=[3.0]), TINY, CACHE)
    want = np.log([41, 42]) / np.log(TINY.seq_length)
    np.testing.assert_allclose(step[2].asnumpy()[:, 0], want, rtol=1e-3)
    plain = half.make_step(view([40], [2]), TINY, CACHE)
    assert not np.array_equal(step[0].asnumpy(), plain[0].asnumpy())  # the NTK factor reaches cos
    assert np.array_equal(step[0].asnumpy()[:, :8], step[0].asnumpy()[:, 8:])


def test_the_operators_are_mindspores():
    names = [type(getattr(mindspore_ops(), name)).__name__ for name in ("RmsNorm", "PagedAttention")]
    assert len(names) == 2
    assert mindspore_ops().FlashAttentionScore(head_num=4, input_layout="TH").name == "FlashAttentionScore"
    assert mindspore_ops().PagedAttention(4, 0.25, 4).name == "PagedAttention"
