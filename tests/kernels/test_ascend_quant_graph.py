"""Quantised matrices on ascend: MindSpore's own operator passes the front end, and running stops at its kernel."""

from __future__ import annotations

import os
import subprocess
import sys

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

from research.qwen.kernels import ascend
from research.qwen.kernels.ascend_ops import mindspore_ops
from tests.kernels.ascend_frontend import front_end_only, operators, tensor
from tests.kernels.ascend_models import (
    FORMATS,
    GROUPED,
    MIXED,
    PREFILL,
    SCHEMES,
    QuantWeights,
    ascend_runtime,
    graph_inputs,
    loaded,
    packed,
    random_matrix,
)

pytestmark = pytest.mark.mindspore
LAYERS = GROUPED.num_layers


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
        expected = {"WeightQuantBatchMatmul": 1} | ({"Gather": 1} if fmt.endswith("-order") else {})
        cell = loaded(kernels, packed(random_matrix(n, k), fmt), fmt, n, k)
        assert operators(cell, tensor((5, k), kind)) == expected  # static: the inner sizes are compared
        cell = loaded(kernels, packed(random_matrix(n, k), fmt), fmt, n, k, np.zeros(n, np.float32))
        cell.set_inputs(Tensor(shape=[None, k], dtype=kind))
        assert operators(cell, tensor((5, k), kind)) == expected | {"Add": 1}

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
            GROUPED, {"c_attn.weight": "int4-asym-order", "w1.weight": "int8", "c_proj.weight": "int4-g64"}
        )
        runtime = ascend_runtime(GROUPED, dtype, source=source)
        view = {"prefill": PREFILL, "paged": MIXED}[key]
        runtime.graph.declare(key)
        found = operators(runtime.model, *graph_inputs(runtime, view))
        assert found["WeightQuantBatchMatmul"] == 4 * LAYERS
        assert found["MatMul"] == LAYERS + 1  # w2, lm_head
        assert found["Gather"] == LAYERS + 2  # the order of c_attn; embedding, output rows
        assert found["Add"] == 3 * LAYERS

    @pytest.mark.parametrize("fmt", SCHEMES)
    def test_whole_model_in_one_format(self, fmt):
        source = QuantWeights(GROUPED, {"lm_head.weight": "int8", "weight": fmt})
        runtime = ascend_runtime(GROUPED, "float16", source=source)
        for key, view in (("prefill", PREFILL), ("paged", MIXED)):
            runtime.graph.declare(key)
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


RUN_FOR_REAL = """
import mindspore as ms, numpy as np
from research.qwen.kernels import ascend
from tests.kernels.ascend_models import loaded, packed
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
