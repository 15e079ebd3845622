"""Quantised matrices on ascend: what the operator gets, its graphs, and the model on its stand-in."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

from research.qwen.errors import CheckpointError, KernelError
from research.qwen.kernels import ascend, ascend_quant
from research.qwen.kernels.ascend_ops import mindspore_ops
from research.qwen.quant.schemes import Codes, Scheme, dequantize_packed, pack
from tests.kernels.ascend_frontend import front_end_only, operators, tensor
from tests.kernels.ascend_models import (
    MIXED,
    PREFILL,
    TINY,
    QuantWeights,
    ascend_runtime,
    graph_inputs,
    linear_cosines,
    packed,
    reference_runtime,
    run_script,
)
from tests.kernels.ascend_standins import standins

pytestmark = pytest.mark.mindspore
SCHEMES = [
    "int8",
    "int4",
    "int4-g64",
    "int4-asym",
    "int4-g64-asym",
    "int8-g128",
    "int8-g64",
    "int8-g128-asym",
    "int8-g64-asym",
]
FORMATS = SCHEMES + [f"{scheme}-order" for scheme in SCHEMES]
SIZES = [(48, 256), (72, 200), (16, 64), (30, 160)]  # also padded rows and inputs, and a single group
# Several groups in every matrix, and a last one that is not full (192 = 128 + 64, 160 = 2 * 64 + 32).
CONFIG = dataclasses.replace(TINY, hidden_size=192, kv_channels=48, intermediate_size=320)
LAYERS = CONFIG.num_layers


def random_matrix(n, k, seed=0):
    return np.random.default_rng(seed).normal(0, 0.05, (n, k)).astype(np.float32)


def loaded(kernels, arrays, fmt, n, k, bias=None) -> nn.Cell:
    """The linear cell with its parameters set as the loader does it; every parameter is set, and nothing else."""
    cell = kernels.linear(k, n, bias is not None, fmt)
    tensors = kernels.quantised_parameters(arrays, fmt, n, k)
    parameters = {name: p for name, p in cell.parameters_and_names() if name != "bias"}
    assert set(tensors) == set(parameters)
    for name, value in tensors.items():
        assert value.dtype == parameters[name].dtype and value.ndim == parameters[name].ndim
        parameters[name].set_data(value, slice_shape=True)
    if bias is not None:
        cell.bias.set_data(kernels.parameter(bias, "float32"), slice_shape=True)
    return cell


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


class TestFrontEnd:
    """MindSpore's own operator: types, shapes, and which operators a graph holds."""

    @pytest.fixture(autouse=True)
    def only_the_front_end(self, monkeypatch, tmp_path):
        front_end_only(monkeypatch, tmp_path)

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    @pytest.mark.parametrize("fmt", FORMATS)
    def test_cell(self, fmt, dtype):
        n, k = 48, 256
        kernels = ascend.build(dtype, require_device=False)
        kind = getattr(ms, dtype)
        for bias in (None, np.zeros(n, np.float32)):
            cell = loaded(kernels, packed(random_matrix(n, k), fmt), fmt, n, k, bias)
            expected = {"WeightQuantBatchMatmul": 1}
            expected |= {"Add": 1} if bias is not None else {}
            expected |= {"Gather": 1} if fmt.endswith("-order") else {}
            assert operators(cell, tensor((5, k), kind)) == expected  # static: the inner sizes are compared
            cell.set_inputs(Tensor(shape=[None, k], dtype=kind))
            assert operators(cell, tensor((5, k), kind)) == expected

    @pytest.mark.parametrize("fmt", ["int8", "int4", "int8-g64-asym"])
    def test_the_result_is_as_wide_as_the_matrix(self, fmt):
        """An int4 weight has half as many columns as outputs: the front end knows."""
        cell = loaded(
            ascend.build("float16", require_device=False), packed(random_matrix(48, 256), fmt), fmt, 48, 256
        )

        class Net(nn.Cell):
            def __init__(self):
                super().__init__()
                self.cell = cell

            def construct(self, x, y):
                return self.cell(x) + y

        Net().compile(tensor((5, 256), ms.float16), tensor((5, 48), ms.float16))
        with pytest.raises((ValueError, RuntimeError), match="shape|broadcast"):
            Net().compile(tensor((5, 256), ms.float16), tensor((5, 24), ms.float16))

    @pytest.mark.parametrize("key", ["prefill", "paged"])
    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    def test_whole_model(self, key, dtype):
        source = QuantWeights(
            CONFIG, {"c_attn.weight": "int4-asym-order", "w1.weight": "int8", "c_proj.weight": "int4-g64"}
        )
        runtime = ascend_runtime(CONFIG, dtype, source=source)
        view = {"prefill": PREFILL, "paged": MIXED}[key]
        runtime._select(key)
        found = operators(runtime.model, *graph_inputs(runtime, view))
        assert found["WeightQuantBatchMatmul"] == 4 * LAYERS
        assert found["MatMul"] == LAYERS + 1  # w2, lm_head
        assert found["Gather"] == LAYERS + 2  # the order of c_attn; embedding, output rows
        assert found["Add"] == 3 * LAYERS

    @pytest.mark.parametrize("fmt", SCHEMES)
    def test_whole_model_in_one_format(self, fmt):
        source = QuantWeights(CONFIG, {"lm_head.weight": "int8", "weight": fmt})
        runtime = ascend_runtime(CONFIG, "float16", source=source)
        for key, view in (("prefill", PREFILL), ("paged", MIXED)):
            runtime._select(key)
            found = operators(runtime.model, *graph_inputs(runtime, view))
            assert found["WeightQuantBatchMatmul"] == 5 * LAYERS + 1 and "MatMul" not in found

    def test_wrong_operands_are_refused(self):
        """What the front end catches; a wrong number of scales is not among it."""
        kernels = ascend.build("bfloat16", require_device=False)
        n, k = 48, 256

        def cell():
            return loaded(kernels, packed(random_matrix(n, k), "int4-asym"), "int4-asym", n, k)

        x = tensor((5, k), ms.bfloat16)
        with pytest.raises(ValueError, match="WeightQuantBatchMatmul"):
            cell().compile(tensor((5, k // 2), ms.bfloat16))
        with pytest.raises(TypeError, match="f16/bf16"):
            cell().compile(tensor((5, k), ms.float32))
        for name, value in [
            ("weight", Tensor(np.zeros((k, n // 2), np.uint8))),
            ("scales", tensor((2, n), ms.float32)),
            ("offsets", tensor((2, n), ms.float16)),
        ]:
            broken = cell()
            setattr(broken, name, ms.Parameter(value, name=name, requires_grad=False))
            with pytest.raises(TypeError, match="WeightQuantBatchMatmul"):
                broken.compile(x)

    def test_why_the_bias_is_added_outside(self):
        """The kernel's description wants a float32 bias with bfloat16 inputs, the front end refuses it."""
        matmul = mindspore_ops().WeightQuantBatchMatmul(False, True, 0)

        class Net(nn.Cell):
            def construct(self, x, weight, scale, bias):
                return matmul(x, weight, scale, None, None, None, bias)

        x, weight, scale = tensor((5, 64), ms.bfloat16), tensor((32, 64), ms.int8), tensor((32,), ms.bfloat16)
        with pytest.raises(TypeError, match="must be same"):
            Net().compile(x, weight, scale, tensor((32,), ms.float32))


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
IDS = {name: [(7 * i + 13 * n) % CONFIG.vocab_size for i in range(60)] for n, name in enumerate("ab")}
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
    source = QuantWeights(CONFIG, MIXES[mix])
    assert source.formats
    ours = run_script(ascend_runtime(CONFIG, source=source), IDS, SCRIPT)
    theirs = run_script(reference_runtime(CONFIG, source=source.plain()), IDS, SCRIPT)
    for got, want in zip(ours, theirs, strict=True):
        difference = np.abs(got - want).max()
        assert difference <= 3e-4 * max(1.0, np.abs(want).max()), difference


@pytest.mark.parametrize("mix", ["int4", "GPTQ int4, act-order"])
def test_whole_model_in_float16(mix):
    source = QuantWeights(CONFIG, MIXES[mix])
    runtime = ascend_runtime(CONFIG, "float16", standins("float16"), source)
    ours = run_script(runtime, IDS, SCRIPT)
    theirs = run_script(reference_runtime(CONFIG, source=source.plain()), IDS, SCRIPT)
    for got, want in zip(ours, theirs, strict=True):
        for row, judge in zip(got, want, strict=True):
            cosine = row @ judge / (np.linalg.norm(row) * np.linalg.norm(judge))
            assert cosine >= 0.9999, cosine


RUN_FOR_REAL = """
import mindspore as ms, numpy as np
from research.qwen.kernels import ascend
from tests.kernels.ascend_models import packed
from tests.kernels.test_ascend_quant import loaded
ms.set_context(mode=ms.GRAPH_MODE)
kernels = ascend.build("float16", require_device=False)
for fmt in ("int8", "int4-asym-order"):
    arrays = packed(np.ones((48, 256), np.float32), fmt)
    try:
        loaded(kernels, arrays, fmt, 48, 256)(ms.Tensor(np.ones((3, 256), np.float16)))
    except Exception as error:
        print(fmt, " ".join(str(error).split()))
"""


def test_running_stops_at_kernel_selection(repository, tmp_path):
    """A subprocess: MindSpore may not recover from a graph that failed behind the front end."""
    env = {**os.environ, "PYTHONPATH": str(repository)}
    env.pop("MS_DEV_PRECOMPILE_ONLY", None)
    done = subprocess.run(
        [sys.executable, "-c", RUN_FOR_REAL],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        check=True,
    )
    lines = done.stdout.strip().splitlines()
    assert [line.split()[0] for line in lines] == ["int8", "int4-asym-order"]
    for line in lines:
        assert "Unsupported op [WeightQuantBatchMatmul] on CPU" in line
