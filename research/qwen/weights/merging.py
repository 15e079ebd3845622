"""Merge a LoRA adapter into its base: W' = W + scale * B A, written as a Hugging Face folder, block by block."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from research.qwen.config import QwenConfig
from research.qwen.errors import CheckpointError
from research.qwen.weights import companions
from research.qwen.weights.adapters import Adapter, LowRank, check_fits, is_adapter, load_adapter
from research.qwen.weights.convert import (
    MAX_SHARD,
    SLACK,
    ProgressBar,
    Summary,
    is_weights_file,
    main_dtype,
    open_with_config,
    parse_size,
    planned,
    silent,
    summarise,
    write_shards,
)
from research.qwen.weights.dtypes import convert_block
from research.qwen.weights.outputs import new_folder
from research.qwen.weights.quantised import is_gptq, stored_formats
from research.qwen.weights.writers import OutputTensor, safetensors_size

Blocks = Callable[[], Iterator[NDArray[Any]]]


def merge(
    source: str | Path,
    adapter: str | Path | Adapter,
    target: str | Path,
    dtype: str | None = None,
    force: bool = False,
    bar: ProgressBar = silent,
    max_shard: int | None = None,
) -> Summary:
    """Write base ``source`` with ``adapter`` added to the new Hugging Face folder ``target``.

    ``dtype`` None keeps every tensor's format; sums are float32 and rounded once. Memory above the interpreter's is the
    adapter and a few blocks of 8 MB. Raises CheckpointError: a quantised base, an adapter for another model, target
    exists, no space, a number too large for ``dtype``; ConfigError as ``load_adapter`` does.
    """
    if is_adapter(source):
        raise CheckpointError(f"{source} is an adapter; the base model comes first: merge BASE ADAPTER OUT")
    checkpoint, config = open_with_config(source)
    if is_gptq(checkpoint) or stored_formats(checkpoint):
        raise CheckpointError(
            f"{source} is quantised, and an adapter cannot be added to integers: merge into the original model and "
            "quantise the result, or write the base's exact values with --dtype float32"
        )
    tensors = planned(checkpoint, config, None, lambda published: published)
    return write_merged(checkpoint.folder, config, tensors, adapter, target, dtype, force, bar, max_shard)


def write_merged(
    folder: Path,
    config: QwenConfig,
    tensors: Sequence[OutputTensor],
    adapter: str | Path | Adapter,
    target: str | Path,
    dtype: str | None = None,
    force: bool = False,
    bar: ProgressBar = silent,
    max_shard: int | None = None,
) -> Summary:
    """As ``merge``, for the tensors of a base in plain formats whose small files lie in ``folder``."""
    loaded = adapter if isinstance(adapter, Adapter) else load_adapter(adapter)
    check_fits(loaded, config)
    place = Path(os.path.abspath(target))
    if place.is_dir() and place.samefile(folder):
        raise CheckpointError(f"{target} is the base model; choose another folder")
    merged = merged_tensors(tensors, loaded, dtype)
    with new_folder(place, force, owned=is_weights_file) as output:
        output.need_space(safetensors_size(merged) + SLACK)
        write_shards(output, merged, bar, parse_size(MAX_SHARD) if max_shard is None else max_shard)
        for name, data in companions.copied_files(folder).items():
            output.write_bytes(name, data)
        output.write_text("config.json", companions.config_text(config, main_dtype(merged)))
    return summarise(Path(target), merged, _warnings(loaded))


def merged_tensors(
    tensors: Sequence[OutputTensor], adapter: Adapter, dtype: str | None = None
) -> list[OutputTensor]:
    """The tensors of a base with the adapter added, in format ``dtype`` or each in its own."""
    updates = adapter.updates()
    out = []
    for tensor in tensors:
        blocks, stored = tensor.blocks, tensor.dtype
        if tensor.name in adapter.saved:
            blocks, stored = adapter.saved[tensor.name].blocks, adapter.saved[tensor.name].dtype
        update = updates.get(tensor.name.removesuffix(".weight"))
        wanted = dtype or tensor.dtype
        stream = partial(_stream, tensor, blocks, stored, wanted, update)
        out.append(OutputTensor(tensor.name, tensor.shape, wanted, stream))
    return out


def _stream(
    tensor: OutputTensor, blocks: Blocks, stored: str, wanted: str, update: LowRank | None
) -> Iterator[NDArray[Any]]:
    """One tensor's numbers in format ``wanted``; CheckpointError if some of them are too large for it."""
    lost = 0
    source, kind = blocks(), stored
    if update is not None:
        source, kind = _updated(blocks(), stored, tensor.shape[1], update), "float32"
    for block in source:
        changed, infinite = convert_block(block, kind, wanted)
        lost += infinite
        yield changed
    if lost:
        raise CheckpointError(
            f"{tensor.name}: {lost} values are too large for {wanted}: they would become infinite; use --dtype "
            f"{'float32' if wanted == 'bfloat16' else 'bfloat16 or float32'}"
        )


def _updated(
    blocks: Iterator[NDArray[Any]], stored: str, width: int, update: LowRank
) -> Iterator[NDArray[np.float32]]:
    """float32 blocks of whole rows with the update added."""
    start = 0
    rest: NDArray[Any] | None = None  # the beginning of a row at the end of a block
    for block in blocks:
        flat = block if rest is None or not rest.size else np.concatenate((rest, block))
        count = flat.size // width
        rest = flat[count * width :]
        if count:
            rows = convert_block(flat[: count * width], stored, "float32")[0].reshape(count, width)
            yield (rows + update.rows(start, start + count)).reshape(-1)
            start += count


def _warnings(adapter: Adapter) -> tuple[str, ...]:
    if adapter.saved or any(np.any(update.b) for update in adapter.updates().values()):
        return ()
    return (
        f"{adapter.where}: every lora_B is zero, the adapter was not trained; the result equals its base",
    )
