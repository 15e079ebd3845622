"""Quantised matrices on ascend: what the operator gets, what it does not take, and the model on its stand-in."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from research.qwen.errors import CheckpointError, KernelError
from research.qwen.kernels import ascend, ascend_quant
from research.qwen.quant.schemes import Codes, Scheme, dequantize_packed, pack
from tests.kernels.ascend_models import (
    FORMATS,
    GROUPED,
    QuantWeights,
    ascend_runtime,
    linear_cosines,
    loaded,
    packed,
    random_matrix,
    reference_runtime,
    run_script,
)
from tests.kernels.ascend_standins import standins

pytestmark = pytest.mark.mindspore
SIZES = [(48, 256), (72, 200), (16, 64), (30, 160)]  # also padded rows and inputs, and a single group


@pytest.fixture
def wide():
    return ascend.build("float32", ops=standins(), require_device=False)


class TestValues:
    """Through the stand-in, in float32: the product with the dequantised matrix of quant.schemes."""

    @pytest.mark.parametrize("size", SIZES, ids=str)
    @pytest.mark.parametrize("fmt", FORMATS)
    def test_equals_the_dequantised_matrix(self, wide, fmt, size):
        n, k = size
        arrays = packed(random_matrix(n, k), fmt)
        matrix = dequantize_packed(arrays, Scheme.parse(fmt.removesuffix("-order")), n, k)
        bias = np.linspace(-1, 1, n, dtype=np.float32)
        x = np.random.default_rng(1).normal(size=(5, k)).astype(np.float32)
        got = loaded(wide, arrays, fmt, n, k, bias)(Tensor(x)).asnumpy()
        np.testing.assert_allclose(got, x @ matrix.T + bias, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("fmt", ["int8", "int4-asym-order", "int8-g64-asym"])
    def test_blocks_of_rows_make_no_difference(self, wide, fmt, monkeypatch):
        n, k = 72, 200
        arrays = packed(random_matrix(n, k), fmt)
        whole = wide.quantised_parameters(arrays, fmt, n, k)
        table = wide.quantised_parameters(arrays, fmt, n, k, table=True)
        monkeypatch.setattr(ascend_quant, "ROWS_AT_ONCE", 32)
        for name, value in wide.quantised_parameters(arrays, fmt, n, k).items():
            np.testing.assert_array_equal(value.asnumpy(), whole[name].asnumpy())
        again = wide.quantised_parameters(arrays, fmt, n, k, table=True)
        np.testing.assert_array_equal(again["weight"].asnumpy(), table["weight"].asnumpy())

    @pytest.mark.parametrize("fmt", ["int8", "int4-g64-asym"])
    def test_arrays_may_be_mapped_from_a_file(self, wide, fmt, tmp_path):
        n, k = 48, 256
        arrays = packed(random_matrix(n, k), fmt)
        mapped = {}
        for name, array in arrays.items():
            np.save(tmp_path / f"{name}.npy", array)
            mapped[name] = np.load(tmp_path / f"{name}.npy", mmap_mode="r")
        want = wide.quantised_parameters(arrays, fmt, n, k)
        for name, value in wide.quantised_parameters(mapped, fmt, n, k).items():
            np.testing.assert_array_equal(value.asnumpy(), want[name].asnumpy())


class TestLayout:
    """Bytes, shapes and dtypes the operator's description asks for, written out."""

    def test_int4_bytes(self):
        """(k, n / 2): the even output in the low half, two's complement; offset = 8 - zero."""
        codes = np.zeros((2, 128), np.uint8) + 8
        codes[:, 0], codes[:, 1], codes[:, 127] = (0, 15), (9, 8), (7, 1)  # levels -8, 7; 1, 0; -1, -7
        zeros, scales = np.array([[3], [16]], np.uint8), np.array([[0.5], [0.25]], np.float16)
        scheme = Scheme.parse("int4-asym")
        arrays = pack(Codes(codes, scales, zeros, scheme), scheme)
        found = ascend_quant.operands(arrays, ascend_quant.Operator(scheme, 2, 128), "float16")
        assert found["weight"].shape == (128, 1) and found["weight"].dtype == np.int8
        assert found["weight"][[0, 1, 127, 2], 0].view(np.uint8).tolist() == [0x78, 0x01, 0x9F, 0x00]
        assert found["scales"].tolist() == [0.5, 0.25] and found["offsets"].tolist() == [5.0, -8.0]

    def test_int8_bytes(self):
        codes = np.array([[0, 128, 255, 127]], np.uint8).repeat(32, axis=1)
        scheme = Scheme.parse("int8")
        arrays = pack(Codes(codes, np.array([[0.5]], np.float32), None, scheme), scheme)
        found = ascend_quant.operands(arrays, ascend_quant.Operator(scheme, 1, 128), "float16")
        assert set(found) == {"weight", "scales"} and found["weight"].shape == (1, 128)
        assert found["weight"][0, [0, 32, 64, 96]].tolist() == [-128, 0, 127, -1]

    @pytest.mark.parametrize(
        ("fmt", "group", "transposed", "weight", "scales"),
        [
            ("int8", 0, True, (48, 256), (48,)),
            ("int4", 128, False, (256, 24), (2, 48)),
            ("int4-g64-asym", 64, False, (256, 24), (4, 48)),
            ("int8-g64", 64, False, (256, 48), (4, 48)),
        ],
    )
    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    def test_shapes_and_dtypes(self, fmt, group, transposed, weight, scales, dtype):
        kernels = ascend.build(dtype, require_device=False)
        operator = ascend_quant.operator_for(Scheme.parse(fmt), 48, 256)
        assert (operator.group, operator.transposed) == (group, transposed)
        tensors = kernels.quantised_parameters(packed(random_matrix(48, 256), fmt), fmt, 48, 256)
        assert tensors["weight"].shape == weight and tensors["scales"].shape == scales
        assert tensors["weight"].dtype == (ms.qint4x2 if "int4" in fmt else ms.int8)
        assert tensors["scales"].dtype == getattr(ms, dtype)
        assert ("offsets" in tensors) is fmt.endswith("-asym")

    def test_a_single_group_is_one_scale_per_row(self):
        """The operator takes groups smaller than k only."""
        for fmt, k in [("int4", 128), ("int4-g64", 64), ("int4", 96), ("int8-g128-asym", 100)]:
            operator = ascend_quant.Operator(Scheme.parse(fmt), 32, k)
            assert operator.group == 0 and operator.scale_shape == (32,)
        assert ascend_quant.Operator(Scheme.parse("int4"), 32, 129).group == 128

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    def test_every_zero_point_is_exact(self, dtype):
        scheme = Scheme.parse("int8-asym")
        zeros = np.arange(256, dtype=np.uint8)[:, None]
        codes = Codes(np.zeros((256, 128), np.uint8), np.ones((256, 1), np.float16), zeros, scheme)
        found = ascend_quant.operands(pack(codes, scheme), ascend_quant.Operator(scheme, 256, 128), dtype)
        np.testing.assert_array_equal(found["offsets"].astype(np.float32), 128 - np.arange(256))

    def test_grouped_scales_are_kept_in_float16_and_rounded_in_bfloat16(self):
        arrays = packed(random_matrix(48, 256), "int4")
        operator = ascend_quant.Operator(Scheme.parse("int4"), 48, 256)
        stored = arrays["scales"].transpose(1, 0, 2).reshape(2, 48)
        np.testing.assert_array_equal(ascend_quant.operands(arrays, operator, "float16")["scales"], stored)
        rounded = ascend_quant.operands(arrays, operator, "bfloat16")["scales"].astype(np.float32)
        np.testing.assert_allclose(rounded, stored.astype(np.float32), rtol=2**-8)


class TestWhatTheOperatorDoesNotTake:
    def test_an_embedding_is_dequantised(self, wide):
        arrays = packed(random_matrix(96, 256), "int4-g64")
        assert set(wide.quantised_parameters(arrays, "int4-g64", 96, 256, table=True)) == {"weight"}
        cell = wide.embedding(96, 256, "int4-g64")
        cell.weight.set_data(
            wide.quantised_parameters(arrays, "int4-g64", 96, 256, table=True)["weight"], slice_shape=True
        )
        rows = cell(Tensor(np.array([5, 95, 5], np.int32))).asnumpy()
        want = dequantize_packed(arrays, Scheme.parse("int4-g64"), 96, 256)
        np.testing.assert_array_equal(rows, want[[5, 95, 5]])

    @pytest.mark.parametrize("fmt", ["int8", "int8-order", "int4"])
    def test_a_matrix_with_too_many_rows_is_dequantised(self, fmt):
        """lm_head: 151936 rows, the operator takes 65535."""
        n, k = 65552, 128
        kernels = ascend.build("float16", require_device=False)
        arrays = packed(random_matrix(n, k), fmt)
        tensors = kernels.quantised_parameters(arrays, fmt, n, k)
        assert isinstance(kernels.linear(k, n, False, fmt), ascend.Linear)
        assert set(tensors) == {"weight"} and tensors["weight"].shape == (n, k)
        want = dequantize_packed(arrays, Scheme.parse(fmt.removesuffix("-order")), n, k)
        np.testing.assert_array_equal(tensors["weight"].asnumpy(), want.astype(np.float16))

    @pytest.mark.parametrize(
        ("scheme", "n", "k", "taken"),
        [
            ("int8", 65535, 65535, True),
            ("int8", 65536, 64, False),
            ("int8", 64, 65536, False),
            ("int4", 63, 256, False),  # two outputs share a byte
            ("int8", 63, 256, True),
        ],
    )
    def test_sizes(self, scheme, n, k, taken):
        assert (ascend_quant.operator_for(Scheme.parse(scheme), n, k) is not None) is taken

    @pytest.mark.parametrize("soc", ["ascend910", "910a", "ascend310b"])
    @pytest.mark.parametrize("fmt", ["int8", "int4-g64-asym"])
    def test_chips_without_the_operator(self, soc, fmt):
        kernels = ascend.build("float16", require_device=False, soc=soc)
        with pytest.raises(KernelError, match=f"{soc} has no operator .*plain checkpoint .*float16"):
            kernels.linear(256, 48, True, fmt)
        kernels.linear(256, 48, True, "float16")  # what the message names works

    def test_the_inference_chip_takes_int8_rows_only(self):
        kernels = ascend.build("float16", require_device=False, soc="ascend310p")
        assert isinstance(kernels.linear(256, 48, True, "int8"), ascend_quant.QuantLinear)
        for fmt in ("int4", "int8-g128", "int4-g64-asym"):
            with pytest.raises(KernelError, match="int8 with one scale per row only.*use int8"):
                kernels.linear(256, 48, True, fmt)

    @pytest.mark.parametrize("soc", ["ascend910b", "ascend910_93"])
    def test_newer_chips_take_all(self, soc):
        kernels = ascend.build("bfloat16", require_device=False, soc=soc)
        for fmt in FORMATS:
            assert isinstance(kernels.linear(256, 48, True, fmt), ascend_quant.QuantLinear)

    def test_a_scale_beyond_float16_is_refused(self):
        scheme = Scheme.parse("int8")
        codes = Codes(np.zeros((16, 128), np.uint8), np.full((16, 1), 1e6, np.float32), None, scheme)
        arrays = pack(codes, scheme)
        kernels = ascend.build("float16", require_device=False)
        with pytest.raises(CheckpointError, match=r"scale 1e\+06 does not fit float16 .*use dtype bfloat16"):
            kernels.quantised_parameters(arrays, "int8", 16, 128)
        ascend.build("bfloat16", require_device=False).quantised_parameters(arrays, "int8", 16, 128)

    def test_wrong_arrays_are_refused(self):
        kernels = ascend.build("float16", require_device=False)
        arrays = packed(random_matrix(48, 256), "int4")
        for broken, message in [
            ({**arrays, "zeros": arrays["scales"]}, "'zeros' is not expected"),
            ({"weight": arrays["weight"]}, "'scales' is missing"),
            ({**arrays, "weight": arrays["weight"][:-1]}, "'weight' is uint8"),
        ]:
            for table in (False, True):
                with pytest.raises(CheckpointError, match=message):
                    kernels.quantised_parameters(broken, "int4", 48, 256, table=table)
        with pytest.raises(CheckpointError, match="float16 is not a quantised format"):
            kernels.quantised_parameters(arrays, "float16", 48, 256)


MIXES = {
    "int4": {"weight": "int4"},
    "int8": {"weight": "int8"},
    "GPTQ int4, act-order": {
        "attn.c_attn.weight": "int4-asym-order",
        "attn.c_proj.weight": "int4-asym",
        "w1.weight": "int4-asym-order",
        "w2.weight": "int4-asym-order",
        "mlp.c_proj.weight": "int4-asym-order",
    },
    "GPTQ int8": {f"{name}.weight": "int8-asym" for name in ("c_attn", "c_proj", "w1", "w2")},
    "groups of 64, lm_head int8": {
        "lm_head.weight": "int8",
        "wte.weight": "int8-g64",
        "c_proj.weight": "int4-g64-asym",
        "w1.weight": "int4-g64",
    },
}
IDS = {name: [(7 * i + 13 * n) % GROUPED.vocab_size for i in range(60)] for n, name in enumerate("ab")}
SCRIPT = [[("a", 9), ("b", 30)], [("a", 1), ("b", 1)], [("b", 5), ("a", 1)]]


def test_the_check_for_a_device_runs_on_standins():
    """What test_ascend_device.py calls on an NPU, in the dtype and with the limit used there."""
    cosines = linear_cosines(ascend.build("float16", ops=standins("float16"), require_device=False), FORMATS)
    assert set(cosines) == set(FORMATS) and min(cosines.values()) >= 0.9999
    old = ascend.build("float16", ops=standins("float16"), require_device=False, soc="ascend310p")
    assert set(linear_cosines(old, FORMATS)) == {"int8", "int8-order"}


@pytest.mark.parametrize("mix", MIXES)
def test_whole_model_equals_reference(mix):
    """The Ascend model on stand-ins against ``reference`` with the dequantised matrices."""
    source = QuantWeights(GROUPED, MIXES[mix])
    assert source.formats
    ours = run_script(ascend_runtime(GROUPED, source=source), IDS, SCRIPT)
    theirs = run_script(reference_runtime(GROUPED, source=source.plain()), IDS, SCRIPT)
    for got, want in zip(ours, theirs, strict=True):
        difference = np.abs(got - want).max()
        assert difference <= 3e-4 * max(1.0, np.abs(want).max()), difference


@pytest.mark.parametrize("mix", ["int4", "GPTQ int4, act-order"])
def test_whole_model_in_float16(mix):
    source = QuantWeights(GROUPED, MIXES[mix])
    runtime = ascend_runtime(GROUPED, "float16", standins("float16"), source)
    ours = run_script(runtime, IDS, SCRIPT)
    theirs = run_script(reference_runtime(GROUPED, source=source.plain()), IDS, SCRIPT)
    for got, want in zip(ours, theirs, strict=True):
        for row, judge in zip(got, want, strict=True):
            cosine = row @ judge / (np.linalg.norm(row) * np.linalg.norm(judge))
            assert cosine >= 0.9999, cosine
