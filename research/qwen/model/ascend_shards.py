"""Which part of a parameter a device holds, after MindSpore has divided a graph; and whole parameters out of the parts.

MindSpore says for every parameter of a compiled graph how the devices of a stage are arranged (``grid``), and which
axis of the grid divides which axis of the tensor. Parameters of other stages are not in that list. Not run on an NPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from research.qwen.kernels.parallel_layout import ParallelLayout

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Division:
    """How one tensor is divided: ``grid`` of devices; for each axis of the tensor the axis of the grid counted from its
    end, -1 for none; and whether what is left is divided once more, by rows over all devices that hold the same."""

    grid: tuple[int, ...]
    axes: tuple[int, ...]
    over_copies: bool

    @classmethod
    def of(cls, layout: Sequence[Any]) -> Division:
        """From an entry of a cell's ``parameter_layout_dict`` (MindSpore 2.9): grid, axes, ..., group at place 5."""
        return cls(tuple(layout[0]), tuple(layout[1]), bool(layout[5]))

    def part(self, shape: tuple[int, ...], place: int) -> tuple[slice, ...]:
        """What the device at ``place`` of the grid (counted row by row) holds of a tensor."""
        at = np.unravel_index(place, self.grid)
        cut = []
        for size, axis in zip(shape, self.axes, strict=True):
            count, index = (1, 0) if axis < 0 else (self.grid[-1 - axis], int(at[-1 - axis]))
            cut.append(slice(size // count * index, size // count * (index + 1)))
        if self.over_copies:
            same = self._same(place)
            rows = (cut[0].stop - cut[0].start) // len(same)
            first = cut[0].start + rows * same.index(place)
            cut[0] = slice(first, first + rows)
        return tuple(cut)

    def speaks(self, place: int) -> bool:
        """Whether the device is the first of those that hold the same part."""
        return self.over_copies or self._same(place)[0] == place

    def _same(self, place: int) -> list[int]:
        """The devices of the grid that hold what this one does, before the division over copies."""
        used = [len(self.grid) - 1 - axis for axis in self.axes if axis >= 0]
        at = np.unravel_index(place, self.grid)
        everyone = [np.unravel_index(other, self.grid) for other in range(int(np.prod(self.grid)))]
        return [i for i, other in enumerate(everyone) if all(other[axis] == at[axis] for axis in used)]


class Shards:
    """The parts of this process, ``rank`` among the devices of ``layout``."""

    def __init__(self, layout: ParallelLayout, rank: int) -> None:
        self.stage_size = layout.data * layout.model
        self.place = rank % self.stage_size
        self.divisions: dict[str, Division] = {}

    def found(self, layouts: Mapping[str, Sequence[Any]]) -> None:
        """Take over what MindSpore says of a compiled graph."""
        self.divisions = {name: Division.of(layout) for name, layout in layouts.items()}

    def own(self, name: str, whole: Array) -> Array | None:
        """This device's part of a parameter; None if the parameter is of another stage."""
        division = self.divisions.get(name)
        return None if division is None else whole[division.part(whole.shape, self.place)]

    def spread(self, name: str, shape: tuple[int, ...], part: Array | None) -> Array:
        """An array like the whole parameter that, summed over all devices, is the parameter."""
        out = np.zeros(shape, np.float32)
        division = self.divisions.get(name)
        if division is not None and part is not None and division.speaks(self.place):
            out[division.part(shape, self.place)] = part
        return out
