"""Parameters without a second copy: MindSpore's Parameter(tensor) copies, set_data on a small one does not."""

from __future__ import annotations

from typing import Any

import numpy as np
from mindspore import Parameter, Tensor


def placeholder(name: str, rank: int, dtype: Any = np.float32) -> Parameter:
    """A parameter of one element whose data is set later; the loader replaces shape and memory."""
    return Parameter(Tensor.from_numpy(np.zeros((1,) * rank, dtype)), name=name, requires_grad=False)


def zero_cache(name: str, shape: tuple[int, ...]) -> Parameter:
    """A float32 KV cache; the system commits its memory only as blocks are first written.

    A Parameter and not a buffer: a buffer becomes a constant of the graph, and equal constants are merged.
    """
    parameter = placeholder(name, len(shape))
    parameter.set_data(Tensor.from_numpy(np.zeros(shape, np.float32)), slice_shape=True)
    return parameter
