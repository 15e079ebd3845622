"""The device seam: what a backend must offer. Imports no MindSpore.

A backend is a factory of MindSpore cells. The graph is compiled from ``construct``, so the choice is made
when the model is built, ``QwenModel(config, kernels)``, and nothing above this folder mentions a device.
All activations are flattened tokens: T tokens of any number of sequences in one row dimension.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from research.qwen.config import QwenConfig
from research.qwen.errors import KernelError
from research.qwen.weights.adapters import LowRank

if TYPE_CHECKING:
    from mindspore import Tensor, nn

BACKENDS = ("cpu", "reference", "ascend")
ONE_GRAPH = "step"
# Published name of a matrix -> the format it is stored in (see Kernels).
FormatOf = Callable[[str], str]
# Published name of a matrix -> what one adapter adds to it.
Updates = Mapping[str, LowRank]


@dataclass(frozen=True)
class CacheSpec:
    """Size and number format of each layer's paged KV cache of keys and values.

    ``fmt``: float32, bfloat16 or int8 (a scale per token and head), or auto: the backend's ``activation_dtype``.
    """

    num_blocks: int
    block_size: int = 16
    fmt: str = "auto"

    @property
    def tokens(self) -> int:
        """Tokens the cache can hold over all sequences."""
        return self.num_blocks * self.block_size


@dataclass(frozen=True)
class StepView:
    """One forward pass as the scheduler sees it: B runs of consecutive tokens, T in all (host side)."""

    starts: Sequence[int]  # (B,) position of the first token of each run = tokens already cached
    q_lens: Sequence[int]  # (B,) tokens of each run, each at least 1
    alphas: Sequence[float]  # (B,) NTK factor of the sequence, frozen at its prefill
    block_tables: Sequence[Sequence[int]]  # (B, ragged) blocks that hold positions 0 .. start + q_len - 1
    adapters: Sequence[
        int
    ] = ()  # (B,) number of the low-rank adapter of each run, -1 for none; empty: none has one

    def positions(self) -> NDArray[np.int32]:
        """(T,) position of every token in its sequence."""
        runs = [np.arange(s, s + n, dtype=np.int32) for s, n in zip(self.starts, self.q_lens, strict=True)]
        return np.concatenate(runs)

    def kv_lens(self) -> NDArray[np.int32]:
        """(B,) tokens in the cache after this pass."""
        return np.asarray(self.starts, np.int32) + np.asarray(self.q_lens, np.int32)

    def slot_mapping(self, block_size: int) -> NDArray[np.int32]:
        """(T,) cache slot (block * block_size + offset) each token's key and value are written to."""
        slots = []
        for start, length, table in zip(self.starts, self.q_lens, self.block_tables, strict=True):
            position = np.arange(start, start + length)
            slots.append(
                np.asarray(table, np.int32)[position // block_size] * block_size + position % block_size
            )
        return np.concatenate(slots).astype(np.int32)

    def padded_tables(self, block_size: int) -> NDArray[np.int32]:
        """(B, widest) block tables cut to the blocks in use and filled up with 0."""
        used = -(-self.kv_lens() // block_size)
        tables = np.zeros((len(used), int(used.max())), np.int32)
        for row, (count, table) in enumerate(zip(used, self.block_tables, strict=True)):
            tables[row, :count] = table[:count]
        return tables


class Kernels(Protocol):
    """A backend. Cells take and return (T, width) tensors of ``activation_dtype``.

    ``fmt`` names how a weight matrix is stored: float32, bfloat16, float16, or the text of a quantisation scheme
    (quant.schemes), with ``-order`` behind it where the inputs are permuted. Parameters of the cells: linear
    ``weight`` (n_out, n_in) and ``bias`` (n_out,); rms_norm ``weight`` (dim,); embedding ``weight`` (rows, dim);
    of a quantised matrix the backend's own, as ``quantised_parameters`` names them.
    """

    name: str
    activation_dtype: str

    def linear(self, n_in: int, n_out: int, bias: bool, fmt: str) -> nn.Cell:
        """Cell x (T, n_in) -> x W^T + b (T, n_out)."""

    def embedding(self, rows: int, dim: int, fmt: str) -> nn.Cell:
        """Cell ids (T,) int32 -> (T, dim)."""

    def rms_norm(self, dim: int, eps: float) -> nn.Cell:
        """Cell x -> x * rsqrt(mean(x^2) + eps) * weight, statistics in float32."""

    def swiglu(self) -> nn.Cell:
        """Cell (a, b) -> a * silu(b)."""

    def attention(self, config: QwenConfig, cache: CacheSpec) -> nn.Cell:
        """Cell (qkv (T, 3 * hidden), step tuple) -> (T, hidden).

        Rotates queries and keys, scales queries by log-n, writes keys and values into its own paged cache and
        attends causally over each sequence's blocks.
        """

    def layer(self, config: QwenConfig, cache: CacheSpec, prefix: str, fmt: FormatOf) -> nn.Cell:
        """Cell (x (T, hidden), step tuple) -> (T, hidden): a whole pre-norm layer, parameters as in ``layer.Layer``."""

    def fuse(self, config: QwenConfig, cache: CacheSpec, layers: Sequence[nn.Cell]) -> nn.Cell | None:
        """Cell (x, rows (R,), step tuple) -> (R, hidden) that runs all layers at once on their parameters, or None.

        Only the asked token rows of the last layer are returned. Its ``refresh(of)`` is called before every run: what
        is no input of the graph must be looked up there; ``of`` is what lora.row_adapters makes of the view. Its
        ``adapt(adapters)`` does what that of the backend does.
        """

    def adapt(self, layers: Sequence[nn.Cell], adapters: Sequence[Updates]) -> Sequence[nn.Cell]:
        """Layers, not fused, in which a token may have one of these low-rank adapters (``StepView.adapters``).

        The step tuple becomes longer by what says which one. KernelError if the backend cannot.
        """

    def make_step(self, view: StepView, config: QwenConfig, cache: CacheSpec) -> tuple[Tensor, ...]:
        """Host side: the small tuple of tensors that the model hands through to every attention cell."""

    def step_signature(
        self, config: QwenConfig, cache: CacheSpec, key: str = ONE_GRAPH
    ) -> tuple[Tensor, ...]:
        """The same tuple with dynamic shapes (None), for ``Cell.set_inputs``; ``key`` says of which graph."""

    def graph_key(self, view: StepView) -> str:
        """Which compiled graph serves this view; backends with one graph always answer ``ONE_GRAPH``.

        Graphs differ in the length of their step tuple, which is static at compile time: cells branch on it.
        """

    def quantised_parameters(
        self, arrays: Mapping[str, NDArray[Any]], scheme: str, n: int, k: int, table: bool = False
    ) -> dict[str, Tensor]:
        """Parameter name -> tensor for a matrix (n, k) given as the packed arrays of quant.schemes.

        ``table``: the embedding and not the matrix of a linear cell.
        """

    def parameter(self, array: NDArray[Any], fmt: str) -> Tensor:
        """The tensor a parameter of format ``fmt`` is set to, sharing the array's memory where possible."""


def load_kernels(name: str, **options: Any) -> Kernels:
    """Build the backend ``cpu``, ``reference`` or ``ascend``.

    Raises KernelError with the reason if it is unknown or cannot work here; there is no silent fallback.
    """
    if name not in BACKENDS:
        raise KernelError(f"unknown backend {name!r}; choose one of {', '.join(BACKENDS)}")
    module = importlib.import_module(f"research.qwen.kernels.{name}")
    kernels: Kernels = module.build(**options)
    return kernels
