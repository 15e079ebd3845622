"""The Ascend graphs pass the front end on CPU, hold exactly the fused operators, and stop at the kernels."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import mindspore as ms
import pytest
from mindspore import Tensor, nn

from research.qwen.kernels import ascend
from research.qwen.kernels.ascend_ops import mindspore_ops
from tests.kernels.ascend_frontend import front_end_only, operators, tensor
from tests.kernels.ascend_models import MIXED, PREFILL, TINY, ascend_runtime, graph_inputs, view

pytestmark = pytest.mark.mindspore
LAYERS = TINY.num_layers
# Operators with a kernel of their own; the rest of a graph is bookkeeping (Load, Depend, MakeTuple, ...).
SHARED = {
    "RmsNorm": 2 * LAYERS + 1,
    "ApplyRotaryPosEmb": LAYERS,
    "ReshapeAndCache": LAYERS,
    "Swiglu": LAYERS,
    "MatMul": 5 * LAYERS + 1,
    "Split": LAYERS,
    "Concat": LAYERS,
    "Add": 3 * LAYERS,  # the bias and two residuals
    "Mul": LAYERS,  # log-n
    "Gather": 2,  # embedding, output rows
}
GRAPHS = {
    "prefill": (PREFILL, {**SHARED, "FlashAttentionScore": LAYERS, "Cast": 1, "TensorToTuple": 1}),
    "paged": (MIXED, {**SHARED, "PagedAttention": LAYERS}),
}


@pytest.fixture(autouse=True)
def only_the_front_end(monkeypatch, tmp_path):
    front_end_only(monkeypatch, tmp_path)


@pytest.mark.parametrize("flat_cache", [False, True], ids=["cache4d", "cache3d"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("key", GRAPHS)
def test_whole_model(key, dtype, flat_cache):
    step_view, expected = GRAPHS[key]
    runtime = ascend_runtime(dtype=dtype, flat_cache=flat_cache)
    assert runtime.kernels.graph_key(step_view) == key
    runtime.graph.declare(key)
    assert operators(runtime.model, *graph_inputs(runtime, step_view)) == expected


def test_two_graphs_serve_every_shape():
    runtime = ascend_runtime(dtype="float16")
    decode = view([30, 2, 5, 7], [1, 1, 1, 1])
    for step_view in (PREFILL, MIXED, view([0], [9]), decode, view([16], [70])):
        runtime.graph.declare(runtime.kernels.graph_key(step_view))
        runtime.model.compile(*graph_inputs(runtime, step_view))
    assert runtime.compilations == 2


def test_without_logn_the_queries_are_not_multiplied():
    runtime = ascend_runtime(dataclasses.replace(TINY, use_logn_attn=False), dtype="float16")
    runtime.graph.declare("paged")
    assert "Mul" not in operators(runtime.model, *graph_inputs(runtime, MIXED))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_cell_alone(dtype):
    kernels = ascend.build(dtype, require_device=False)
    kind, width = getattr(ms, dtype), TINY.hidden_size
    dynamic = Tensor(shape=[None, width], dtype=kind)
    x = tensor((7, width), kind)
    linear = kernels.linear(width, 32, True, "float16")
    linear.weight.set_data(tensor((32, width), kind), slice_shape=True)
    linear.bias.set_data(tensor((32,), kind), slice_shape=True)
    norm = kernels.rms_norm(width, 1e-6)
    norm.weight.set_data(tensor((width,), kind), slice_shape=True)
    embedding = kernels.embedding(11, width, "float32")
    embedding.weight.set_data(tensor((11, width), kind), slice_shape=True)
    for cell, signature, inputs, expected in [
        (linear, [dynamic], [x], {"MatMul": 1, "Add": 1}),
        (norm, [dynamic], [x], {"RmsNorm": 1}),
        (kernels.swiglu(), [dynamic, dynamic], [x, x], {"Concat": 1, "Swiglu": 1}),
        (embedding, [Tensor(shape=[None], dtype=ms.int32)], [tensor((3,), ms.int32)], {"Gather": 1}),
    ]:
        cell.set_inputs(*signature)
        assert operators(cell, *inputs) == expected


@pytest.mark.parametrize(
    ("place", "wrong", "message"),
    [
        (0, lambda step: step[0].astype(ms.int32), "ApplyRotaryPosEmb"),  # cos of another kind
        (4, lambda step: step[4][:-1], "slot mapping"),  # a slot is missing
        (4, lambda step: step[4].astype(ms.float32), "ReshapeAndCache"),
        (5, lambda step: step[5].astype(ms.float16), "PagedAttention"),
    ],
    ids=["cos int32", "slots too few", "slots float", "lengths float"],
)
def test_front_end_refuses_a_wrong_step(place, wrong, message):
    """The errors this check exists for do stop the front end."""
    runtime = ascend_runtime(dtype="float16")
    ids, rows, *step = graph_inputs(runtime, MIXED)
    step[place] = wrong(step)
    runtime.model.set_inputs(
        ids, rows, *step
    )  # static shapes: what is wrong is known when the graph is compiled
    with pytest.raises((TypeError, ValueError, RuntimeError), match=message):
        runtime.model.compile(ids, rows, *step)


def test_front_end_refuses_float32_rotary():
    rotate = mindspore_ops().ApplyRotaryPosEmb(2)

    class Net(nn.Cell):
        def construct(self, q, cos, positions):
            return rotate(q, q, cos, cos, positions)

    inputs = tensor((5, 64), ms.float32), tensor((5, 16), ms.float32), tensor((5,), ms.int32)
    with pytest.raises(TypeError, match="ApplyRotaryPosEmb"):
        Net().compile(*inputs)


RUN_FOR_REAL = """
from research.qwen.decode.loop import Chunk
from tests.kernels.ascend_models import ascend_runtime
runtime = ascend_runtime(dtype="float16")
for start in (0, 4):
    try:
        runtime.forward([Chunk([1, 2, 3], start, [0, 1], 1.0, 1)])
    except Exception as error:
        print(start, " ".join(str(error).split()))
"""


def test_running_stops_at_kernel_selection(repository, tmp_path):
    """A subprocess: MindSpore may not recover from a graph that failed behind the front end."""
    env = {**os.environ, "PYTHONPATH": str(repository)}
    env.pop("MS_DEV_PRECOMPILE_ONLY")
    done = subprocess.run(
        [sys.executable, "-c", RUN_FOR_REAL],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        check=True,
    )
    lines = done.stdout.strip().splitlines()
    assert [line[0] for line in lines] == ["0", "4"]
    for line in lines:
        assert "Kernel select failed" in line and "Unsupported op [" in line and "] on CPU" in line
        assert line.split("[")[1].split("]")[0] in GRAPHS["prefill"][1] | GRAPHS["paged"][1]
