"""Parts of parameters over a grid of devices: they tile the whole, and add up to it again."""

from __future__ import annotations

import numpy as np
import pytest

from research.qwen.kernels.parallel_layout import ParallelLayout, bands, published_name
from research.qwen.model.ascend_shards import Shards

# Entries as MindSpore's compiler gives them: grid, axes, part, ..., group of the division over copies at place 5.
LAYOUTS = {
    "rows over the model": ((2, 4), (0, -1), False),
    "columns over the model": ((2, 4), (-1, 0), False),
    "whole": ((2, 4), (-1, -1), False),
    "rows over the copies": ((4,), (-1, -1), True),
    "columns over the model, rows over the copies": ((4, 2), (-1, 0), True),
    "rows over both": ((4, 2), (0, -1), True),
    "a vector over the model": ((2, 4), (0,), False),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_parts_add_up_to_the_whole(name):
    grid, axes, over_copies = LAYOUTS[name]
    layout = ParallelLayout(data=grid[0], model=grid[1] if len(grid) > 1 else 1)
    whole = np.random.default_rng(0).normal(size=(16, 24)[: len(axes)]).astype(np.float32)
    entry = (list(grid), list(axes), [], 0, True, "a-group" if over_copies else "", [], [])
    total, sizes = np.zeros_like(whole), set()
    for rank in range(layout.devices):
        shards = Shards(layout, rank)
        shards.found({"w": entry})
        part = shards.own("w", whole)
        sizes.add(part.shape)
        total += shards.spread("w", whole.shape, part)
    assert np.array_equal(total, whole) and len(sizes) == 1
    shares = whole.size // np.prod(sizes.pop())
    divided = np.prod([grid[-1 - axis] for axis in axes if axis >= 0])
    assert shares == (layout.devices if over_copies else divided)


def test_neighbours_in_the_grid():
    """The last axis of the grid counts fastest: devices 0 to 3 hold the four parts of the first copy."""
    rows = np.arange(8)[:, None].astype(np.float32)
    held = []
    for rank in range(8):
        shards = Shards(ParallelLayout(data=2, model=4), rank)
        shards.found({"w": ([2, 4], [0, -1], [], 0, True, "")})
        held.append(shards.own("w", rows).reshape(-1).tolist())
    assert held == [[0, 1], [2, 3], [4, 5], [6, 7]] * 2


def test_a_stage_has_nothing_of_the_others():
    layout = ParallelLayout(model=2, stages=2, micro_batches=2)
    whole, total = np.arange(8, dtype=np.float32).reshape(4, 2), np.zeros((4, 2), np.float32)
    for rank in range(4):
        shards = Shards(layout, rank)
        shards.found({"w": ([1, 2], [0, -1], [], 0, True, "")} if rank >= 2 else {})
        part = shards.own("w", whole)
        assert (part is None) == (rank < 2)
        total += shards.spread("w", whole.shape, part)
    assert np.array_equal(total, whole)


@pytest.mark.parametrize(
    ("name", "published", "band"),
    [
        ("transformer.h.3.attn.c_attn.q.weight", "transformer.h.3.attn.c_attn.weight", 0),
        ("transformer.h.3.attn.c_attn.v.bias", "transformer.h.3.attn.c_attn.bias", 2),
        ("transformer.h.0.attn.c_attn.lora_B.k.weight", "transformer.h.0.attn.c_attn.lora_B.weight", 1),
        ("transformer.h.0.attn.c_attn.lora_A.weight", "transformer.h.0.attn.c_attn.lora_A.weight", None),
        ("transformer.h.0.mlp.w1.weight", "transformer.h.0.mlp.w1.weight", None),
    ],
)
def test_bands_of_published_tensors(name, published, band):
    assert published_name(name) == (published, band)
    assert [part.tolist() for part in bands(np.arange(6))] == [[0, 1], [2, 3], [4, 5]]
