"""Which number formats a model runs in: what a user asks for, made into what loader, cache and backend need."""

from __future__ import annotations

from dataclasses import dataclass

from research.qwen.errors import ConfigError, KernelError
from research.qwen.model.quantise import Plan

ACTIVATIONS = ("auto", "int8", "int16", "float32")
FLOATS = ("float32", "bfloat16", "float16")
CACHE_FORMATS = {
    "cpu": ("bfloat16", "float32", "int8"),  # the first is the default
    "reference": ("float32", "bfloat16", "int8", "int8-published"),
    "ascend": ("auto",),
}


@dataclass(frozen=True)
class Precision:
    """Formats by name; None leaves the choice to the checkpoint and the device.

    Args:
        dtype: of the weights: int8, int4, int4-g64-asym, ... (a plain checkpoint is quantised while it loads),
            bfloat16, or float32: weights as stored, and nothing is rounded anywhere (activations and cache float32
            too). On ascend the dtype of the computation, float16 or bfloat16.
        lm_head, embedding: of these two matrices, where they differ.
        kv: of the cache: bfloat16 (default on cpu), float32, int8.
        activations: what integer weights are multiplied with on cpu: auto (default: int16 with 8-bit weights and in
            front of the last matrix of a layer, else int8), int8, int16, or float32.
    """

    dtype: str | None = None
    lm_head: str | None = None
    embedding: str | None = None
    kv: str | None = None
    activations: str | None = None

    def __post_init__(self) -> None:
        Plan(self.dtype, self.lm_head, self.embedding)  # checks the formats
        if self.activations not in (None, *ACTIVATIONS):
            raise ConfigError(
                f"activations must be one of {', '.join(ACTIVATIONS)}, got {self.activations!r}"
            )

    @property
    def exact(self) -> bool:
        """Whether nothing may be rounded beyond what is stored."""
        return self.dtype == "float32"

    def plan(self, backend: str) -> Plan:
        """What becomes of the stored weights."""
        computes = backend == "ascend" and self.dtype in FLOATS
        weights = None if self.exact or computes else self.dtype
        return Plan(weights, self.lm_head, self.embedding)

    def compute_dtype(self, backend: str) -> str:
        """float32 on cpu and reference; float16 (default, 910A) or bfloat16 (910B) on ascend. KernelError."""
        if backend != "ascend":
            if self.dtype == "float16":
                raise KernelError(
                    f"backend {backend} computes in float32; stored float16 weights stay as they are without dtype"
                )
            return "float32"
        if self.dtype == "float32":
            raise KernelError("backend ascend computes in float16 (910A) or bfloat16 (910B), not 'float32'")
        return self.dtype if self.dtype in ("float16", "bfloat16") else "float16"

    def activation_format(self) -> str:
        """One of ACTIVATIONS."""
        return self.activations or ("float32" if self.exact else "auto")

    def cache_format(self, backend: str) -> str:
        """Format of the KV cache; KernelError for one the backend does not have."""
        known = CACHE_FORMATS[backend]
        if self.kv is None:
            return "float32" if self.exact and backend != "ascend" else known[0]
        if self.kv not in known:
            raise KernelError(f"backend {backend} keeps its KV cache as {', '.join(known)}, not {self.kv!r}")
        return self.kv
