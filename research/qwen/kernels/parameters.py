"""Parameters without a second copy: MindSpore's Parameter(tensor) copies, set_data on a small one does not."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from mindspore import Parameter, Tensor

PAGE = 4096


def placeholder(name: str, rank: int, dtype: Any = np.float32) -> Parameter:
    """A parameter of one element whose data is set later; the loader replaces shape and memory."""
    return Parameter(Tensor.from_numpy(np.zeros((1,) * rank, dtype)), name=name, requires_grad=False)


def zero_cache(name: str, shape: tuple[int, ...], dtype: Any = np.float32) -> Parameter:
    """A KV cache; the system commits its memory only as blocks are first written.

    A Parameter and not a buffer: a buffer becomes a constant of the graph, and equal constants are merged.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.zeros(size + PAGE, np.uint8)  # room to start with a cache line, and with a page
    first = -raw.ctypes.data % PAGE
    parameter = placeholder(name, len(shape), dtype)
    array = raw[first : first + size].view(dtype).reshape(shape)
    parameter.set_data(Tensor.from_numpy(array), slice_shape=True)
    return parameter
