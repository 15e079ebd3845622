"""Adapters in the backends' own terms: masks, addresses, the Ascend cells against reference, and its graphs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from research.qwen.decode.loop import Chunk
from research.qwen.errors import KernelError
from research.qwen.kernels import ascend, reference
from research.qwen.kernels.api import Kernels, StepView
from research.qwen.kernels.cpu_lora import AdapterTable
from research.qwen.kernels.lora import RankMask, row_adapters
from research.qwen.model.runtime import Runtime
from tests.kernels.ascend_frontend import front_end_only, operators
from tests.kernels.ascend_models import CACHE, MIXED, PREFILL, RandomWeights, graph_inputs
from tests.kernels.ascend_models import TINY as TWO_LAYERS
from tests.kernels.ascend_standins import standins
from tests.lora_fixtures import random_adapter

pytestmark = pytest.mark.mindspore
TINY = replace(TWO_LAYERS, num_layers=1)
ONE = random_adapter(TINY, 1).updates()
TWO = random_adapter(TINY, 2, targets=("w1", "w2"), rank=3).updates()
IDS = {name: [(7 * i + 13 * n) % TINY.vocab_size for i in range(40)] for n, name in enumerate("abc")}


def runtime(kernels: Kernels) -> Runtime:
    """TINY with both adapters."""
    return Runtime.load(TINY, RandomWeights(TINY), kernels, CACHE, {"one": ONE, "two": TWO})


def adapted(view: StepView, *numbers: int) -> StepView:
    return StepView(view.starts, view.q_lens, view.alphas, view.block_tables, numbers)


def test_rows_and_masks() -> None:
    assert row_adapters(PREFILL) is None and row_adapters(adapted(PREFILL, -1, -1)) is None
    of = row_adapters(adapted(PREFILL, 1, -1))
    assert of is not None and of.tolist() == [1, 1, 1, -1, -1, -1, -1, -1]
    mask = RankMask([ONE, TWO])
    assert mask.total == 7 and not mask.rows(PREFILL).any()
    rows = mask.rows(adapted(PREFILL, 1, 0))
    assert rows.sum(axis=1).tolist() == [3] * 3 + [4] * 5
    assert rows[:3, 4:].all() and rows[3:, :4].all()
    assert mask.stacked([ONE, TWO], "lm_head") is None
    name = "transformer.h.0.mlp.w1"
    found = mask.stacked([ONE, TWO], name)
    assert found is not None
    for number, update in enumerate((ONE[name], TWO[name])):
        only = np.zeros(7, np.float32)
        only[mask.starts[number] : mask.starts[number + 1]] = 1
        got = (found[1] * only) @ found[0]
        np.testing.assert_allclose(got, update.rows(0, len(got)), atol=1e-6)


def test_an_adapter_that_is_not_there() -> None:
    table = AdapterTable(2, [ONE])
    assert table.address(None) == 0
    assert table.address(np.array([0, -1], np.int32)) != 0
    with pytest.raises(KernelError, match="no adapter 1"):
        table.address(np.array([1], np.int32))


def chunks(start: int, stop: int, names: tuple[str, ...]) -> list[Chunk]:
    return [
        Chunk(IDS[key][start:stop], start, list(range(6 * n, 6 * n + 6)), 1.0, stop - start, names[n])
        for n, key in enumerate("abc")
    ]


def test_ascend_cells_equal_reference() -> None:
    """On stand-ins for the fused operators, also in a pass without any adapter."""
    ours = runtime(ascend.build("float32", ops=standins(), require_device=False))
    judge = runtime(reference.build())
    for names in (("one", "", "two"), ("", "", "")):
        got, want = (lm.forward(chunks(0, 9, names)) for lm in (ours, judge))
        assert np.abs(got - want).max() < 3e-4 * max(1.0, np.abs(want).max())


LAYERS = TINY.num_layers


@pytest.mark.parametrize(
    ("key", "view", "dtype"), [("prefill", PREFILL, "float16"), ("paged", MIXED, "bfloat16")]
)
def test_the_ascend_graphs_pass_the_front_end(
    key: str, view: StepView, dtype: str, monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:
    front_end_only(monkeypatch, tmp_path)
    lm = runtime(ascend.build(dtype, require_device=False))
    lm.graph.declare(key)
    found = operators(lm.model, *graph_inputs(lm, adapted(view, *range(len(view.starts) - 1), -1)))
    assert found["MatMul"] == (5 + 2 * 5) * LAYERS + 1
    assert found["Mul"] == (1 + 5) * LAYERS and found["Add"] == (3 + 5) * LAYERS
    assert ("PagedAttention" in found) == (key == "paged")
