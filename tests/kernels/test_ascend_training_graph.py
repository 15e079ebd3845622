"""The Ascend training graph in MindSpore's front end: fused operators and their gradients, on one device and many."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

import pytest

from research.qwen.errors import ConfigError
from research.qwen.kernels.ascend_train_graph import StepGraph, TrainingModel
from research.qwen.kernels.ascend_training import Spec
from research.qwen.kernels.packing import packing
from research.qwen.kernels.parallel_layout import ParallelLayout
from tests.kernels.ascend_frontend import front_end_only, operators
from tests.kernels.parallel_graphs import CASES, LAYERS, TINY, inputs

pytestmark = [pytest.mark.mindspore, pytest.mark.slow]
MATRICES, VECTORS = 5 * LAYERS + 2, 3 * LAYERS + 1  # of a whole model: c_attn has a bias, layers two norms


class TestOneDevice:
    @pytest.fixture(autouse=True)
    def only_the_front_end(self, monkeypatch, tmp_path):
        front_end_only(monkeypatch, tmp_path)

    @pytest.mark.parametrize(
        "settings",
        [
            {"compute": "float16"},
            {"compute": "bfloat16", "packed": True, "recompute": True},
            {
                "compute": "bfloat16",
                "trained": False,
                "rank": 4,
                "targets": ("attn.c_attn", "mlp.w1"),
                "dropout": 0.05,
            },
        ],
        ids=["full float16", "full bfloat16 packed recompute", "lora bfloat16"],
    )
    def test_fused_operators_and_their_gradients(self, settings):
        model = TrainingModel(Spec(TINY, **settings))
        graph = StepGraph(model, model.spec, (0.1,) * len(model.trainable_params()), 1.0)
        found = operators(graph, *inputs())
        again = 2 if settings.get("recompute") else 1
        assert found["FlashAttentionScore"] == again * LAYERS and found["FlashAttentionScoreGrad"] == LAYERS
        assert found["Swiglu"] == again * LAYERS and found["SwigluGrad"] == LAYERS
        assert found["RmsNorm"] == again * 2 * LAYERS + 1
        # With frozen weights nothing is to be known in front of the first adapter.
        assert found["RmsNormGrad"] == 2 * LAYERS + 1 - (not settings.get("trained", True))
        assert len(graph.weights) == (MATRICES + VECTORS if settings.get("trained", True) else 4 * LAYERS)

    @pytest.mark.parametrize("compute", ["float16", "bfloat16"])
    @pytest.mark.parametrize("recompute", [False, True])
    def test_quantised_matrices_are_widened_in_each_pass(self, compute, recompute):
        """And not kept in between, which would cost the memory that packing saves."""
        names = ("attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2", "mlp.c_proj")
        formats = {
            f"transformer.h.0.{name}": packing(text)
            for name, text in zip(
                names, ("int4", "int4-g64-asym-order", "int4", "int4-order", "int4"), strict=True
            )
        }
        spec = Spec(
            dataclasses.replace(TINY, num_layers=2),
            compute=compute,
            recompute=recompute,
            stored=compute,
            trained=False,
            rank=4,
            targets=("attn.c_attn", "mlp.w1"),
            formats={name.replace("h.0", f"h.{i}"): one for name, one in formats.items() for i in range(2)},
        )
        model = TrainingModel(spec)
        graph = StepGraph(model, spec, (0.1,) * len(model.trainable_params()), 1.0)
        found = operators(graph, *inputs())
        # In front of the first layer's adapters nothing is to be known, but a layer is computed again as a whole.
        assert found["Floor"] == 2 * 10 - (not recompute)


@pytest.fixture(scope="module")
def graphs(repository, tmp_path_factory):
    """Every case of parallel_graphs; processes of their own, in which MindSpore takes itself to be on Ascend."""
    env = {**os.environ, "PYTHONPATH": str(repository), "GLOG_v": "3"}
    names = ["refusal", *CASES]
    started = []
    for i in range(2):  # one for each core
        command = [sys.executable, "-m", "tests.kernels.parallel_graphs", *names[i::2]]
        folder = tmp_path_factory.mktemp("graphs")
        with (folder / "errors").open("w") as errors:
            started.append(
                (
                    folder,
                    subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=errors),
                )
            )
    found = {}
    try:
        for folder, process in started:
            lines = process.communicate(timeout=500)[0].decode().splitlines()
            assert process.returncode == 0, (folder / "errors").read_text()[-3000:]
            found |= {one["case"]: one for one in map(json.loads, lines)}
    finally:
        for _, process in started:
            process.kill()
    return found


# Sums in a graph with model_parallel beside those of gradients: two in each layer, forward and backward; the loss has
# three over the vocabulary and one over the rows, behind it come two backward; one is that of the norm.
MODEL_SUMS = 4 * LAYERS + 4 + 2 + 1


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("data", {"AllReduce": MATRICES + VECTORS + 2}),  # every gradient, loss and norm
        (
            "model",
            {"AllReduce": MATRICES + VECTORS + 4 * LAYERS + MODEL_SUMS},
        ),  # bands: 4 more gradients a layer
        ("optimizer", {"AllGather": MATRICES, "ReduceScatter": MATRICES, "AllReduce": VECTORS + 2}),
    ],
)
def test_communication(graphs, case, expected):
    assert graphs[case]["communication"] == expected


def test_model_parallel_divides_matrices(graphs):
    """Four devices: heads of q, rows of w1, columns of the MLP's c_proj, rows of the head; moments as the weights."""
    shapes, layer = graphs["model"]["shapes"], "transformer.h.0."
    assert shapes[layer + "attn.c_attn.q.weight"] == [32, 128] and shapes[layer + "attn.c_attn.q.bias"] == [
        32
    ]
    assert shapes[layer + "mlp.w1.weight"] == [32, 128] and shapes[layer + "mlp.c_proj.weight"] == [128, 32]
    assert shapes["lm_head.weight"] == [32, 128] and shapes[layer + "ln_1.weight"] == [128]
    for name, shape in shapes.items():
        if name.startswith("adam_m."):
            assert shape == shapes[name.removeprefix("adam_m.")], name


def test_optimizer_parallel_divides_weights_over_the_copies(graphs):
    shapes = graphs["optimizer"]["shapes"]
    assert shapes["transformer.h.0.attn.c_attn.weight"] == [96, 128] == [384 // 4, 128]
    assert shapes["adam_m.transformer.h.0.attn.c_attn.weight"] == [96, 128]
    both = graphs["all three"]["shapes"]
    # Columns over the model, rows over the copies.
    assert both["transformer.h.0.mlp.c_proj.weight"] == [64, 64]
    assert both["transformer.h.0.ln_1.weight"] == [128]


def test_accumulated_gradients_are_summed_once(graphs):
    """Two micro batches in one graph: over the devices go sums of both."""
    found = graphs["accumulated"]["communication"]
    gradients = MATRICES + VECTORS + 4 * LAYERS
    assert gradients < found["AllReduce"] <= gradients + 2


@pytest.mark.parametrize("case", ["first stage", "last stage"])
def test_a_stage_holds_its_layers_and_talks_to_its_neighbour(graphs, case):
    """Two micro batches: as many activations one way, and gradients the other; nothing else goes between stages."""
    found, shapes = graphs[case]["communication"], graphs[case]["shapes"]
    assert found["Send"] == found["Receive"] == 2
    own, other = ([64, 128], [128, 128]) if case == "first stage" else ([128, 128], [64, 128])
    assert shapes["transformer.h.0.attn.c_attn.q.weight"] == own  # divided in the stage that has it
    assert shapes["lm_head.weight"] == other


def test_adapters_are_divided_as_their_matrices(graphs):
    shapes, layer = graphs["adapters"]["shapes"], "transformer.h.0."
    assert shapes[layer + "attn.c_attn.lora_A.weight"] == [4, 128]
    assert shapes[layer + "attn.c_attn.lora_B.q.weight"] == [32, 4]
    assert shapes[layer + "mlp.c_proj.lora_A.weight"] == [4, 32]
    assert shapes[layer + "mlp.c_proj.lora_B.weight"] == [128, 4]
    assert not any(name.startswith("adam_m.") and "lora" not in name for name in shapes)


@pytest.mark.parametrize("case", CASES)
def test_the_parts_that_are_loaded_are_those_of_the_graph(graphs, case):
    """What model.ascend_shards cuts out of whole weights has the shapes MindSpore gave the parameters."""
    owned, shapes = graphs[case]["owned"], graphs[case]["shapes"]
    assert owned
    assert owned == {name: shapes[name] for name in owned}


def test_a_cpu_refuses_what_is_pretended_here(graphs):
    """Why the graphs need a device that is pretended: the refusal is about its name alone."""
    assert "backend: CPU" in graphs["refusal"]["message"]


@pytest.mark.parametrize(
    ("layout", "devices", "rows", "message"),
    [
        (ParallelLayout(data=2, model=2), 8, 8, "2 x model_parallel 2 x pipeline_stage 1 = 4 devices, but 8"),
        (ParallelLayout(model=3), 3, 8, "model_parallel 3 does not divide num_heads 8"),
        (ParallelLayout(model=16), 16, 8, "model_parallel 16 does not divide num_heads 8"),
        (ParallelLayout(stages=3, micro_batches=3), 3, 9, "pipeline_stage 3 exceeds the 2 layers"),
        (ParallelLayout(stages=2), 2, 8, "micro_batch_num 1 is below pipeline_stage 2"),
        (ParallelLayout(data=3), 3, 8, "8 rows cannot be divided into data_parallel 3"),
        (ParallelLayout(model=2, optimizer=True), 2, 8, "needs data_parallel above 1"),
    ],
)
def test_layouts_that_do_not_fit_are_refused(layout, devices, rows, message):
    with pytest.raises(ConfigError, match=message):
        layout.check(dataclasses.replace(TINY, num_layers=2), devices, rows)


def test_layouts_that_fit():
    ParallelLayout(data=2, model=4, optimizer=True).check(TINY, 8, 8)
    layout = ParallelLayout(data=2, model=2, stages=3, micro_batches=3)
    assert [layout.stage_of(i, 8) for i in range(8)] == [0, 0, 0, 1, 1, 1, 2, 2]
    assert [layout.data_rank(rank) for rank in range(8)] == [0, 0, 1, 1, 0, 0, 1, 1]
