"""Data parallel training: the processes that ``msrun`` started, and sums over them on MindSpore's own engine.

Every process holds the whole model and a share of the rows. What is added up are sums: of gradients, of losses and of
counts of tokens. The division comes after, so two processes make the step that one makes with all the rows, also
when one has more tokens than the other. Overflow agrees by itself: an inf or NaN of one process is in everybody's sum.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from research.qwen.errors import KernelError, TrainingError
from research.qwen.kernels.devices import ascend_problem

BUCKET = 1 << 22  # float32 values sent at once: large enough for few calls, small enough for a small copy
PIECES = 3  # float32 words that hold a float64 exactly


@dataclass(frozen=True)
class World:
    """This process (``rank``) among ``world``: the Exchange of a TrainStep, and what the training loop asks of others.

    ``reduce``: (N,) float32 tensor -> the sum over all processes; None in a process that is alone.
    """

    rank: int = 0
    world: int = 1
    reduce: Any = None

    def total(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Sums of float64 values (N,) over all processes, to the last bit the same in each.

        MindSpore adds float32 only on CPU. Each process therefore writes its values into rows of its own, as three
        float32 words; what is added to them is 0. Values beyond float32's range become inf.
        """
        own = np.ascontiguousarray(values, np.float64)
        if self.reduce is None:
            return own
        table = np.zeros((self.world, PIECES, own.size), np.float32)
        table[self.rank] = _words(own)
        words = self._summed(table.reshape(-1)).reshape(table.shape).astype(np.float64)
        return np.asarray(words.sum(axis=1).sum(axis=0))

    def sums(self, *values: float) -> list[float]:
        """Each value summed over the processes; a point that all of them have to reach."""
        return [float(value) for value in self.total(np.array(values, np.float64))]

    def add(self, gradients: Mapping[str, NDArray[np.float32]]) -> None:
        """Replace every gradient by its sum over all processes, in place. All pass the same names in the same order."""
        if self.reduce is None:
            return
        waiting: list[NDArray[np.float32]] = []
        for name, gradient in gradients.items():
            if gradient.dtype != np.float32 or not gradient.flags.c_contiguous:
                raise TrainingError(f"the gradient of {name} is no contiguous float32 array")
            flat = gradient.reshape(-1)
            for start in range(0, flat.size, BUCKET):
                part = flat[start : start + BUCKET]
                if sum(other.size for other in waiting) + part.size > BUCKET:
                    self._replace(waiting)
                    waiting = []
                waiting.append(part)
        self._replace(waiting)

    def _replace(self, parts: Sequence[NDArray[np.float32]]) -> None:
        if not parts:
            return
        summed = self._summed(np.concatenate(parts))
        start = 0
        for part in parts:
            part[:] = summed[start : start + part.size]
            start += part.size

    def _summed(self, flat: NDArray[np.float32]) -> NDArray[np.float32]:
        from mindspore import Tensor

        result: NDArray[np.float32] = self.reduce(Tensor.from_numpy(flat)).asnumpy()
        return result


def started_by_msrun() -> bool:
    """Whether this process is one of several that ``msrun`` started."""
    return "MS_ROLE" in os.environ and int(os.environ.get("MS_WORKER_NUM", "1")) > 1


def join_world(device: str = "cpu") -> World:
    """The processes that train together, each on a ``device`` (cpu, ascend) of its own; alone without ``msrun``.

    The scheduler process of msrun comes here too and is held until all others have left; it never returns.
    Raises TrainingError if the others do not come in time (``--cluster_time_out``), KernelError without an NPU.
    """
    if not started_by_msrun():
        return World()
    import mindspore as ms
    from mindspore.communication import get_group_size, get_rank, init

    problem = ascend_problem() if device == "ascend" else None
    if problem is not None:
        raise KernelError(f"device ascend asked for, but MindSpore finds no Ascend device: {problem}")
    try:
        # MindSpore wants to know the device before the processes meet; msrun then gives each NPU to one of them.
        ms.set_device("CPU" if device == "cpu" else "Ascend")
        init("mccl" if device == "cpu" else "hccl")
    except RuntimeError as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise TrainingError(
            f"the processes did not find each other: {lines[0]}; check --master_addr, --master_port and that all "
            "of them were started"
        ) from error
    return World(get_rank(), get_group_size(), _reducer())


def _reducer() -> Any:
    """(N,) float32 -> sum over all processes; one graph for every N."""
    import mindspore as ms
    from mindspore import Tensor, nn, ops

    from research.qwen.model.training import Graph

    class Reduce(nn.Cell):
        def __init__(self) -> None:
            super().__init__()
            self.all_reduce = ops.AllReduce()
            self.add_flags(skip_auto_parallel_compile=True)  # its sum is meant as it is written

        def construct(self, flat: Tensor) -> Tensor:
            return self.all_reduce(flat)

    return Graph(Reduce(), [Tensor(shape=[None], dtype=ms.float32)])


def _words(values: NDArray[np.float64]) -> NDArray[np.float32]:
    """(3, N) float32 words whose sum in float64 is the value; (inf or NaN, 0, 0) if it has none."""
    words = np.zeros((PIECES, values.size), np.float32)
    rest = values.copy()
    with np.errstate(over="ignore", invalid="ignore"):
        for word in words:
            word[:] = rest
            rest = np.where(np.isfinite(word), rest - word, 0.0)
    return words
