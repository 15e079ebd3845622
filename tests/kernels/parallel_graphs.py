"""Compiles the training graph for several layouts of devices: ``parallel_graphs.py CASE ...``, one line of JSON each.

A line: how often each communication operator occurs, and the shapes of a few parameters on the device asked for.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import tempfile
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Tensor

from research.qwen.config import QwenConfig
from research.qwen.kernels.ascend_train_graph import StepGraph, TrainingModel, model_for
from research.qwen.kernels.ascend_training import Spec
from research.qwen.kernels.parallel_layout import ParallelLayout
from research.qwen.model.ascend_shards import Shards
from tests.kernels.ascend_frontend import operators
from tests.kernels.pretend_ascend import devices, pretend

LAYERS = 1  # a stage of a pipeline
TINY = QwenConfig(
    vocab_size=128, hidden_size=128, num_layers=LAYERS, num_heads=8, intermediate_size=256, kv_channels=16
)
ROWS, LENGTH = 4, 32  # of one copy of the model
COMMUNICATION = ("AllReduce", "AllGather", "ReduceScatter", "Send", "Receive")
# name -> layout, device of the graph, more of the Spec
CASES = {
    "data": (ParallelLayout(data=2), 0, {}),
    "model": (ParallelLayout(data=2, model=4), 0, {}),
    "optimizer": (ParallelLayout(data=4, optimizer=True), 1, {}),
    "all three": (
        ParallelLayout(data=2, model=2, optimizer=True, whole_embedding=False),
        0,
        {"recompute": True},
    ),
    "adapters": (
        ParallelLayout(model=4),
        3,
        {
            "compute": "bfloat16",
            "packed": True,
            "trained": False,
            "rank": 4,
            "targets": ("attn.c_attn", "mlp.c_proj"),
            "dropout": 0.05,
        },
    ),
    "accumulated": (ParallelLayout(data=2, model=2, micro_batches=2), 0, {}),
    "first stage": (ParallelLayout(data=2, model=2, stages=2, micro_batches=2), 0, {}),
    "last stage": (ParallelLayout(data=2, model=2, stages=2, micro_batches=2), 7, {}),
}
SHOWN = (
    "wte.weight",
    "c_attn.q.weight",
    "c_attn.weight",
    "c_attn.q.bias",
    "mlp.w1.weight",
    "mlp.c_proj.weight",
)
SHOWN += ("ln_1.weight", "lm_head.weight", "lora_A.weight", "lora_B.q.weight", "lora_B.weight")


def inputs() -> list[Tensor]:
    """What one device is given."""
    tokens, dim = ROWS * LENGTH, TINY.head_dim
    table = np.zeros((ROWS, LENGTH, dim), np.float32)
    mask = np.zeros((ROWS, LENGTH, LENGTH), np.uint8)
    flat = [np.zeros(tokens, kind) for kind in (np.int32, np.int32, np.float32)]
    return [Tensor(array) for array in (*flat, table, table, mask, np.zeros((tokens, 4), np.int32))]


def compiled(name: str) -> dict[str, object]:
    """The graph of a case."""
    layout, rank, more = CASES[name]
    devices(layout.devices, rank, **layout.settings())
    config = dataclasses.replace(TINY, num_layers=LAYERS * layout.stages)
    spec = Spec(config, layout=layout, **{"compute": "float16", **more})
    model = model_for(spec)
    graph = StepGraph(model, spec, (0.1,) * len(model.trainable_params()), 1.0)
    found = operators(graph, *inputs())
    parts = {
        p.name: list(p.shape)
        for p in graph.get_parameters()
        if p.name.endswith(SHOWN) and (".h.0." in p.name or ".h." not in p.name) and "adam_v" not in p.name
    }
    shards = Shards(layout, rank)
    shards.found(graph.parameter_layout_dict)
    whole = {p.name: tuple(p.shape) for p in TrainingModel(spec).get_parameters()}
    owned = {p: shards.own(p, np.zeros(whole[p])) for p in whole if p in parts}
    return {
        "case": name,
        "owned": {p: list(part.shape) for p, part in owned.items() if part is not None},
        "communication": {key: found[key] for key in COMMUNICATION if key in found},
        "shapes": parts,
    }


def refusal() -> str:
    """What MindSpore says on a CPU that is not pretended to be something else."""
    layout = ParallelLayout(data=2)
    devices(2, 0, **layout.settings())
    spec = Spec(TINY, layout=layout)
    model = TrainingModel(spec)
    try:
        StepGraph(model, spec, (0.1,) * len(model.trainable_params()), 1.0).compile(*inputs())
    except RuntimeError as error:
        return str(error)
    return ""


def main() -> None:
    """See the module."""
    os.environ["MS_DEV_PRECOMPILE_ONLY"] = "1"
    if sys.argv[1] == "refusal":
        print(json.dumps({"case": "refusal", "message": refusal()}))
        del sys.argv[1]
    with tempfile.TemporaryDirectory() as folder:
        pretend(Path(folder))
        for name in sys.argv[1:]:
            print(json.dumps(compiled(name)), flush=True)
    ms.reset_auto_parallel_context()


if __name__ == "__main__":
    main()
