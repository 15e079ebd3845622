"""MindSpore's front end alone: type and shape inference of an Ascend graph on a machine without one."""

from __future__ import annotations

import collections

import numpy as np
from mindspore import Tensor, nn
from mindspore.common.api import _cell_graph_executor
from mindspore.train import anf_ir_pb2

BOOKKEEPING = {"Load", "UpdateState", "Depend", "MakeTuple", "TupleGetItem", "Return"}


def front_end_only(monkeypatch, tmp_path) -> None:
    """Parsing, type and shape inference, optimisation, no kernels; dumps of failed graphs go to tmp_path."""
    monkeypatch.setenv("MS_DEV_PRECOMPILE_ONLY", "1")
    monkeypatch.chdir(tmp_path)


def operators(cell: nn.Cell, *inputs) -> dict[str, int]:
    """Compile the front end of a cell; how often each operator occurs in its graph."""
    cell.compile(*inputs)
    raw = _cell_graph_executor._get_func_graph_proto(cell, cell.compile_phase, "anf_ir")
    graph = anf_ir_pb2.ModelProto()
    graph.ParseFromString(raw if isinstance(raw, bytes) else raw.encode("latin1"))
    found = collections.Counter(node.op_type for node in graph.graph.node)
    return {name: count for name, count in found.items() if name not in BOOKKEEPING}


def tensor(shape, dtype) -> Tensor:
    """Zeros."""
    return Tensor(np.zeros(shape, np.float32), dtype)
