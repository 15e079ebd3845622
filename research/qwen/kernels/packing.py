"""How a matrix is stored, as the text that travels from the loader to the cells. Imports no MindSpore."""

from __future__ import annotations

from dataclasses import dataclass

from research.qwen.quant.schemes import Scheme

ORDERED = "-order"  # the inputs are permuted (act-order of AutoGPTQ)
FLOATS = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Packing:
    """A quantised format: the scheme, and whether the inputs come in an order of their own."""

    scheme: Scheme
    ordered: bool

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the packed arrays, in the order of the kernels' inputs."""
        zeros = ("zeros",) if self.scheme.zeros else ()
        return ("weight", "scales", *zeros, *(("order",) if self.ordered else ()))


def packing(fmt: str) -> Packing | None:
    """What a format text means; None for the plain number formats. ConfigError for an unknown text."""
    if fmt in FLOATS:
        return None
    return Packing(Scheme.parse(fmt.removesuffix(ORDERED)), fmt.endswith(ORDERED))
