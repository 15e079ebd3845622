"""A checkpoint as the loader sees it: matrices in the formats asked for, quantised or unpacked one at a time.

Three kinds of checkpoints come in: plain ones, which are quantised on the fly; ours, whose packed arrays are mapped;
and the official Int4 and Int8 ones in AutoGPTQ's layout. Imports no MindSpore.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from research.qwen.config import QwenConfig
from research.qwen.errors import CheckpointError, ConfigError, KernelError
from research.qwen.model.matrices import Matrix, Packed, Plain, packed_matrix, plain_matrix
from research.qwen.quant.gptq import GptqFormat
from research.qwen.quant.schemes import Arrays, Quantiser, Scheme, quantize_rows
from research.qwen.weights import quantised
from research.qwen.weights.dtypes import FLOATS
from research.qwen.weights.names import check, expected
from research.qwen.weights.readers import Checkpoint

HEAD, TABLE = "lm_head", "transformer.wte"
# Bits of the layers -> format of lm_head, which is a fifth of what a token of the 1.8B model reads. Its error goes
# straight into the logits: hence the finer groups.
HEAD_DEFAULTS = {8: "int8", 4: "int4-g64"}


@dataclass(frozen=True)
class Plan:
    """Formats asked for: float32, float16, bfloat16 or the text of a scheme; None is as stored.

    ``weights``: the matrices of the layers, and the other two where they say nothing and this is a float.
    ``lm_head``: None with integer ``weights`` is int8 beside int8, int4-g64 beside int4.
    Raises ConfigError for an unknown format.
    """

    weights: str | None = None
    lm_head: str | None = None
    embedding: str | None = None

    def __post_init__(self) -> None:
        for field in ("weights", "lm_head", "embedding"):
            value = getattr(self, field)
            if value is not None and value not in FLOATS:
                try:
                    Scheme.parse(value)
                except ConfigError as error:
                    raise ConfigError(f"{field}: {value!r} is none of {', '.join(FLOATS)}; {error}") from None

    def wanted(self, name: str, plain: bool) -> str | None:
        """The format for a matrix; ``plain``: it is stored as floats."""
        own = {HEAD: self.lm_head, TABLE: self.embedding}.get(name)
        if own is None and (name not in (HEAD, TABLE) or self.weights in FLOATS):
            own = self.weights
        if own is None and name == HEAD and self.weights is not None and plain:
            own = HEAD_DEFAULTS[Scheme.parse(self.weights).bits]
        return own if own is None or own in FLOATS else str(Scheme.parse(own))


class Source:
    """Tensors under the published names; a quantised matrix X as ``X.weight``, ``X.scales`` [, ``X.zeros``]
    [, ``X.order``] in the layout of quant.schemes.

    ``formats`` is matrix -> format for those that are quantised. The arrays of a matrix are made together when the
    first of them is read, and each is handed out once: reading one again makes them again. ``zero_biases`` are tensors
    of AutoGPTQ that the model does not have.
    """

    def __init__(
        self, checkpoint: Checkpoint, built: Mapping[str, Matrix], vectors: list[str], zero_biases: list[str]
    ) -> None:
        self.checkpoint, self.zero_biases = checkpoint, zero_biases
        self._built, self._vectors = dict(built), vectors
        self._owner = {f"{name}.{part}": name for name, one in built.items() for part in one.parts}
        self._ready: dict[str, Arrays] = {}

    @property
    def formats(self) -> dict[str, str]:
        """Matrix -> scheme, of the quantised ones."""
        return {name: one.format for name, one in self._built.items() if one.format not in FLOATS}

    def names(self) -> list[str]:
        """Names of all tensors."""
        return [*self._owner, *self._vectors]

    def matrices(self) -> Mapping[str, Matrix]:
        """The matrices by name without ``.weight``."""
        return self._built

    def format(self, name: str) -> str:
        """float32, float16, bfloat16 or a scheme's text, of a matrix (with or without ``.weight``) or a vector."""
        found = self._built.get(name.removesuffix(".weight"))
        return found.format if found is not None else self.checkpoint.dtype(name)

    def dtype(self, name: str) -> str:
        """Number format of a tensor: uint8, int32 and others for the parts of a quantised matrix."""
        owner = self._owner.get(name)
        if owner is None:
            return self.checkpoint.dtype(name)
        return self._built[owner].parts[name.removeprefix(owner + ".")][1]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor as ``read`` returns it."""
        owner = self._owner.get(name)
        if owner is None:
            return self.checkpoint.shape(name)
        return self._built[owner].parts[name.removeprefix(owner + ".")][0]

    def read(self, name: str) -> NDArray[Any]:
        """The array; bfloat16 as uint16 bits. CheckpointError, naming the matrix, if it cannot be quantised."""
        owner = self._owner.get(name)
        if owner is None:
            return self.checkpoint.read(name)
        part = name.removeprefix(owner + ".")
        if part not in self._ready.get(owner, ()):
            try:
                self._ready[owner] = dict(self._built[owner].load())
            except CheckpointError as error:
                raise CheckpointError(f"{owner}: {error}") from None
        array = self._ready[owner].pop(part)
        if not self._ready[owner]:
            del self._ready[owner]
        return array

    def blocks(self, name: str) -> Iterator[NDArray[Any]]:
        """The array's numbers in C order; in blocks of some MB, not mapped, where they are used as stored."""
        owner = self._owner.get(name)
        if owner is None or not self._built[owner].work:
            return self.checkpoint.blocks(name)
        return iter([self.read(name).reshape(-1)])


def quantised_source(
    checkpoint: Checkpoint,
    config: QwenConfig,
    plan: Plan,
    quantiser: Quantiser | None = None,
    progress: bool = True,
) -> Source:
    """Check a checkpoint against its config and see it in the formats of a plan.

    ``quantiser`` None is NumPy's. ``progress``: a line on standard error if quantising takes longer than 2 s. Raises
    CheckpointError: tensors missing, unexpected, of wrong shape; a quantised matrix asked for in another format;
    ConfigError: a quantisation that is not supported.
    """
    stored = _stored(checkpoint, config)
    checked = _Logical(checkpoint, config, stored)
    check(checked, config)
    built: dict[str, Matrix] = {}
    for name, (n, k) in quantised.matrices(config).items():
        found = stored.get(name)
        wanted = plan.wanted(name, plain=found is None)
        if found is not None:
            built[name] = packed_matrix(found, _allowed(name, found.format, wanted))
        else:
            built[name] = plain_matrix(Plain(checkpoint, name, n, k), wanted, quantiser)
    if progress:
        _watch(built)
    return Source(checkpoint, built, checked.vectors(), checked.zero_biases)


def native_quantiser(backend: str, threads: int | None) -> Quantiser:
    """The C++ quantiser on ``threads`` threads (None: as many as the kernels use then); NumPy's where the kernels
    cannot be built and ``backend`` does not need them. KernelError if it does."""
    from research.qwen.kernels.native_quantize import NativeQuantiser

    try:
        return NativeQuantiser(threads)
    except KernelError:
        if backend == "cpu":
            raise
        return quantize_rows


def _stored(checkpoint: Checkpoint, config: QwenConfig) -> dict[str, Packed]:
    """The matrices that are stored quantised."""
    shapes = quantised.matrices(config)
    formats = quantised.stored_formats(checkpoint)
    strange = [name for name in formats if name not in shapes]
    if strange:
        raise CheckpointError(
            f"{checkpoint.files[0]}: quantised matrix {strange[0]} is not one of this model's"
        )
    if formats:
        return {
            name: Packed.ours(checkpoint, name, Scheme.parse(formats[name]), *shapes[name])
            for name in formats
        }
    if not quantised.is_gptq(checkpoint):
        return {}
    fmt = GptqFormat.from_dict(quantised.gptq_config(checkpoint))
    names = [name.removesuffix(".qweight") for name in checkpoint.names() if name.endswith(".qweight")]
    strange = [name for name in names if name not in shapes]
    if strange:
        raise CheckpointError(
            f"{checkpoint.files[0]}: quantised matrix {strange[0]} is not one of this model's"
        )
    zeros = not all(fmt.is_symmetric(checkpoint.read(f"{name}.qzeros")) for name in names)
    return {name: Packed.gptq(checkpoint, name, fmt, zeros, *shapes[name]) for name in names}


def _allowed(name: str, stored: str, wanted: str | None) -> str:
    """The format a quantised matrix is handed out in: as it is stored, or float32, which is exact."""
    if wanted not in (None, stored, "float32"):
        raise CheckpointError(
            f"{name} is already quantised as {stored} and cannot become {wanted}: leave the format out to use it as it "
            "is, or start from the unquantised checkpoint"
        )
    return wanted or stored


class _Logical:
    """A checkpoint with its quantised matrices in the place of plain ones, for ``names.check``."""

    def __init__(self, checkpoint: Checkpoint, config: QwenConfig, stored: Mapping[str, Packed]) -> None:
        self._checkpoint, self._stored = checkpoint, stored
        hidden = {tensor for one in stored.values() for tensor in one.tensors}
        known = {f"{name}.weight" for name in stored}
        wanted = set(expected(config))
        self._names = [f"{name}.weight" for name in stored]
        self.zero_biases: list[str] = []
        for name in checkpoint.names():
            if name in hidden or name in known:
                continue
            if name not in wanted and name.endswith(".bias") and name.removesuffix(".bias") in stored:
                if np.any(checkpoint.read(name)):  # AutoGPTQ gives every module a bias
                    raise CheckpointError(f"{name} is not zero, but this model family has no bias there")
                self.zero_biases.append(name)
                continue
            self._names.append(name)

    def names(self) -> list[str]:
        return self._names

    def vectors(self) -> list[str]:
        """Names of what is no matrix: biases and norms."""
        return [name for name in self._names if len(self.shape(name)) == 1]

    def shape(self, name: str) -> tuple[int, ...]:
        found = self._stored.get(name.removesuffix(".weight"))
        return (
            (found.n, found.k)
            if found is not None and name.endswith(".weight")
            else self._checkpoint.shape(name)
        )

    def dtype(self, name: str) -> str:
        found = name.removesuffix(".weight") in self._stored and name.endswith(".weight")
        return "float16" if found else self._checkpoint.dtype(name)


def _watch(built: Mapping[str, Matrix]) -> None:
    """Show progress over everything that has to be computed."""
    work = [one for one in built.values() if one.work]
    total = sum(one.work for one in work)
    if not total:
        return
    try:
        from tqdm import tqdm
    except ImportError:
        return
    bar: list[Any] = []
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        if not bar:  # the clock starts with the work
            bar.append(tqdm(total=total, unit="B", unit_scale=True, desc="preparing weights", delay=2))
        bar[0].update(count)
        done += count
        if done >= total:
            bar[0].close()

    for one in work:
        one.progress = advance
