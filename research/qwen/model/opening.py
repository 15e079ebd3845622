"""From a path to a running model: which config, which checkpoint, which backend, how large a cache."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from research.qwen.config import QwenConfig, read_json
from research.qwen.errors import CheckpointError, ConfigError, KernelError
from research.qwen.kernels.api import BACKENDS, CacheSpec, load_kernels
from research.qwen.kernels.devices import resolve_device
from research.qwen.kernels.lora import Updates
from research.qwen.model.precision import Precision
from research.qwen.model.quantise import native_quantiser, quantised_source
from research.qwen.model.runtime import Runtime
from research.qwen.settings import RunSettings, load_settings
from research.qwen.weights.adapters import check_fits, is_adapter, load_adapter
from research.qwen.weights.readers import open_checkpoint

DEVICES = ("cpu", "ascend", "auto")
MEMORY_SHARE = 0.4  # of the free memory, for a KV cache whose size nobody gave
CACHE_BYTES = {"bfloat16": 2, "int8": 1}  # of one number; the scales of int8 are left out
REFERENCE_TOKENS = 4096  # plain operators copy the whole cache at every step: keep it small

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Opened:
    """A loaded model and what its folder says about generation."""

    runtime: Runtime
    folder: Path
    generation: dict[str, Any]
    eos_ids: tuple[int, ...] | None
    vocab_file: Path | None


def open_model(
    path: str | Path,
    device: str = "cpu",
    backend: str | None = None,
    config: str | Path | None = None,
    precision: Precision | None = None,
    num_blocks: int | None = None,
    block_size: int = 16,
    threads: int | None = None,
    adapters: Mapping[str, str | Path] | None = None,
) -> Opened:
    """Load a Hugging Face folder, a converted or quantised one, or a .ckpt / .safetensors file with its YAML beside
    it. ``precision`` None: everything as stored, and the device's defaults. ``adapters``: folders by name."""
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"no such checkpoint: {path}")
    if is_adapter(path) and not ((path if path.is_dir() else path.parent) / "config.json").exists():
        raise CheckpointError(
            f"{path} is a LoRA adapter and no model: give its base as the model and this one with --lora (adapters=), "
            "or merge the two"
        )
    name = resolve_backend(device, backend)
    settings = find_settings(path, config)
    folder = path if path.is_dir() else path.parent
    shape = settings.model if settings is not None else QwenConfig.from_folder(folder)
    wanted = precision or Precision()
    updates = adapter_updates(adapters or {}, shape)
    source = quantised_source(
        open_checkpoint(path), shape, wanted.plan(name), native_quantiser(name, threads)
    )
    kernels = load_kernels(name, **backend_options(name, wanted, threads))
    cache = cache_spec(shape, name, num_blocks, block_size, wanted.cache_format(name))
    runtime = Runtime.load(shape, source, kernels, cache, updates)
    generation = generation_defaults(folder, settings)
    eos = settings.eos_ids if settings is not None else None
    return Opened(runtime, folder, generation, eos, settings.vocab_file if settings is not None else None)


def adapter_updates(adapters: Mapping[str, str | Path], config: QwenConfig) -> dict[str, Updates]:
    """What each adapter adds to the layers' matrices. ConfigError for a bad name; CheckpointError for an adapter that
    is damaged, for another model, or changes more than the layers, which cannot be shared."""
    found: dict[str, Updates] = {}
    for name, path in adapters.items():
        if not name or name != name.strip():
            raise ConfigError(f"an adapter needs a name without spaces around it, got {name!r} for {path}")
        adapter = load_adapter(path)
        check_fits(adapter, config)
        whole = [tensor.removesuffix(".weight") for tensor in adapter.saved]
        outside = whole + [module for module in adapter.updates() if not module.startswith("transformer.h.")]
        if outside:
            raise CheckpointError(
                f"{path} changes {' and '.join(outside)}, which adapters over one base share: merge it into a model of "
                f"its own (python -m research.qwen.cli merge BASE {path} OUT) and use that"
            )
        found[name] = adapter.updates()
    return found


def resolve_backend(device: str, backend: str | None) -> str:
    """The backend of a device; KernelError for an unknown name or an unfit pair."""
    if device not in DEVICES:
        raise KernelError(f"unknown device {device!r}; choose one of {', '.join(DEVICES)}")
    if backend is not None and backend not in BACKENDS:
        raise KernelError(f"unknown backend {backend!r}; choose one of {', '.join(BACKENDS)}")
    return backend or resolve_device(device)


def backend_options(name: str, precision: Precision, threads: int | None) -> dict[str, Any]:
    """Keyword arguments of a backend's build(); KernelError for a computation dtype it does not have."""
    if name == "ascend":
        return {"dtype": precision.compute_dtype(name)}
    precision.compute_dtype(name)
    if name == "cpu":
        return {"threads": threads, "activations": precision.activation_format()}
    return {}


def find_settings(path: Path, config: str | Path | None) -> RunSettings | None:
    """The YAML that describes a checkpoint: the one given, or the one named like a weights file, or none."""
    if config is not None:
        return load_settings(config)
    if path.is_file():
        beside = path.with_suffix(".yaml")
        if beside.exists():
            return load_settings(beside)
        if not (path.parent / "config.json").exists():
            raise ConfigError(
                f"{path}: neither {beside.name} nor config.json beside it says which model this is"
            )
    return None


def generation_defaults(folder: Path, settings: RunSettings | None) -> dict[str, Any]:
    """generation_config.json of the folder, overlaid by the YAML's generation values."""
    file = folder / "generation_config.json"
    values: dict[str, Any] = read_json(file) if file.exists() else {}
    if settings is not None:
        values.update(settings.generation_values())
    return values


def cache_spec(
    config: QwenConfig, backend: str, num_blocks: int | None, block_size: int, fmt: str = "auto"
) -> CacheSpec:
    """The cache asked for, or one that holds the longest context as far as free memory allows.

    Pages are touched only when used, so a large cache costs nothing until long texts run.
    """
    if block_size < 1 or (num_blocks is not None and num_blocks < 1):
        raise ConfigError(f"block_size {block_size} and num_blocks {num_blocks} must be positive")
    if num_blocks is not None:
        return CacheSpec(num_blocks, block_size, fmt)
    if backend == "ascend":  # free device memory is not known here: one full context of the trained length
        return CacheSpec(-(-config.seq_length // block_size), block_size, fmt)
    per_token = 2 * config.num_layers * config.hidden_size * CACHE_BYTES.get(fmt, 4)
    tokens = max(2 * config.max_length, 4096)
    tokens = min(tokens, max(int(_free_memory() * MEMORY_SHARE) // per_token, 1024))
    if backend == "reference":
        tokens = min(tokens, REFERENCE_TOKENS)
    return CacheSpec(max(tokens // block_size, 1), block_size, fmt)


def _free_memory() -> int:
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return 8 << 30
