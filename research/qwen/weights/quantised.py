"""What a checkpoint says about its own quantisation: ours in the safetensors header, AutoGPTQ's in JSON files.

The numbers themselves are the business of quant/; this module only finds and names them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from research.qwen.config import QwenConfig, read_json
from research.qwen.errors import CheckpointError, ConfigError
from research.qwen.weights.names import expected
from research.qwen.weights.readers import Checkpoint

QUANTIZATION = "quantization"  # header key: JSON {"transformer.h.0.attn.c_attn": "int4", ...}
GPTQ = "gptq"  # header key: JSON, what is needed to write AutoGPTQ's folder again
QUANTIZE_CONFIG = "quantize_config.json"
PARTS = ("weight", "scales", "zeros", "order")


def matrices(config: QwenConfig) -> dict[str, tuple[int, int]]:
    """Name without ``.weight`` -> (outputs, inputs) of every matrix of a model, in the order of the computation."""
    return {
        name.removesuffix(".weight"): (shape[0], shape[1])
        for name, shape in expected(config).items()
        if len(shape) == 2
    }


def stored_formats(checkpoint: Checkpoint) -> dict[str, str]:
    """Matrix -> text of its scheme, of a checkpoint quantised by us; empty for any other."""
    text = checkpoint.metadata(QUANTIZATION)
    if text is None:
        return {}
    return {name: str(fmt) for name, fmt in _object(checkpoint, QUANTIZATION, text).items()}


def gptq_origin(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """What the header of a checkpoint converted from AutoGPTQ's layout keeps of it; None for any other."""
    text = checkpoint.metadata(GPTQ)
    return None if text is None else _object(checkpoint, GPTQ, text)


def is_gptq(checkpoint: Checkpoint) -> bool:
    """Whether the tensors lie in AutoGPTQ's layout."""
    return any(name.endswith(".qweight") for name in checkpoint.names())


def gptq_config(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """The quantisation's description beside a checkpoint in AutoGPTQ's layout; ConfigError if there is none."""
    file = checkpoint.folder / "config.json"
    found = read_json(file).get("quantization_config") if file.exists() else None
    if found is None and (checkpoint.folder / QUANTIZE_CONFIG).exists():
        found = read_json(checkpoint.folder / QUANTIZE_CONFIG)
    if not isinstance(found, dict):
        raise ConfigError(
            f"{checkpoint.folder}: the weights are quantised (qweight), but neither quantization_config in config.json "
            f"nor {QUANTIZE_CONFIG} says how; download that file too"
        )
    return found


def _object(checkpoint: Checkpoint, key: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise CheckpointError(f"{checkpoint.files[0]}: {key!r} in the header is damaged (not a JSON object)")
    return value
