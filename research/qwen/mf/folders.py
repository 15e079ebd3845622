"""Model folders of this surface: which config a folder means, and how a model is written into one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import yaml
from mindformers.models import LlamaConfig
from numpy.typing import NDArray

from research.qwen.config import QwenConfig, read_json
from research.qwen.errors import CheckpointError, ConfigError
from research.qwen.kernels.api import CacheSpec
from research.qwen.model.loading import weight_parameters
from research.qwen.model.qwen import QwenModel
from research.qwen.settings import load_settings
from research.qwen.weights.companions import config_text, end_ids
from research.qwen.weights.outputs import OutputSet
from research.qwen.weights.writers import OutputTensor, write_ckpt, write_safetensors


class Savable(Protocol):
    """What is needed of a QwenForCausalLM to write it down."""

    model: QwenModel
    shape: QwenConfig
    cache: CacheSpec
    config: LlamaConfig
    defaults: Mapping[str, Any]
    use_past: bool
    chat_format: str


_GENERATION = (
    "do_sample",
    "top_k",
    "top_p",
    "temperature",
    "repetition_penalty",
    "max_new_tokens",
    "chat_format",
)


def open_config(path: Path, overrides: Mapping[str, Any]) -> LlamaConfig:
    """The LlamaConfig of a folder or weights file, with ``checkpoint_name_or_path`` set to its weights.

    A YAML file with a model section comes first, else config.json in the published layout.
    Raises ConfigError or CheckpointError if there is neither, or more than one YAML file.
    """
    if not path.exists():
        raise CheckpointError(f"no such checkpoint: {path}")
    folder = path if path.is_dir() else path.parent
    found = [path.with_suffix(".yaml")] if path.is_file() else sorted(folder.glob("*.yaml"))
    described = [file for file in found if file.is_file() and _describes_a_model(file)]
    if len(described) > 1:
        names = ", ".join(file.name for file in described)
        raise ConfigError(f"{folder} holds several models ({names}); give the path of one weights file")
    values = _from_yaml(described[0]) if described else _from_json(folder)
    weights = values.pop("checkpoint_name_or_path", None) if path.is_dir() else None
    return LlamaConfig(**{**values, "checkpoint_name_or_path": str(weights or path), **overrides})


def save(model: Savable, folder: Path, name: str, hugging_face: bool) -> None:
    """Write weights and description of a model; an interrupted write leaves the folder as it was."""
    tensors = [_output(key, parameter.asnumpy()) for key, parameter in weight_parameters(model.model).items()]
    with OutputSet(folder, force=True) as outputs:
        if hugging_face:
            outputs.write(
                "model.safetensors", lambda f: write_safetensors(f, tensors, {"format": "pt"}, _no_progress)
            )
            dtype = next(tensor.dtype for tensor in tensors if tensor.name == "lm_head.weight")
            outputs.write_text("config.json", config_text(model.shape, dtype))
        else:
            outputs.write(f"{name}.ckpt", lambda f: write_ckpt(f, tensors, _no_progress))
            outputs.write_text(f"{name}.yaml", _yaml_text(model, folder / f"{name}.yaml", f"{name}.ckpt"))


def _no_progress(_count: int) -> None:
    pass


def _describes_a_model(file: Path) -> bool:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{file} cannot be read as YAML: {' '.join(str(error).split())}") from None
    model = content.get("model") if isinstance(content, Mapping) else None
    return isinstance(model, Mapping) and isinstance(model.get("model_config"), Mapping)


def _from_yaml(file: Path) -> dict[str, Any]:
    settings = load_settings(file)
    values = {key: v for key, v in settings.raw["model"]["model_config"].items() if key != "type"}
    if settings.load_checkpoint is not None and settings.load_checkpoint.exists():
        values["checkpoint_name_or_path"] = settings.load_checkpoint
    elif file.with_suffix(".ckpt").exists():
        values["checkpoint_name_or_path"] = file.with_suffix(".ckpt")
    return values


def _from_json(folder: Path) -> dict[str, Any]:
    shape = QwenConfig.from_folder(folder)
    file = folder / "generation_config.json"
    stored = read_json(file) if file.exists() else {}
    values = {key: stored[key] for key in _GENERATION if stored.get(key) is not None}
    ends = end_ids(folder, shape)
    if ends:
        values["eos_token_id"] = ends
        values["pad_token_id"] = int(stored.get("pad_token_id") or ends[-1])
    values.setdefault("do_sample", False)
    return {**shape.to_llama_dict(), "use_past": True, "max_decode_length": shape.max_length, **values}


def _yaml_text(model: Savable, existing: Path, weights: str) -> str:
    """A YAML file that predicts with the weights beside it; a processor section that is there already stays."""
    values: dict[str, Any] = {"type": "LlamaConfig", "batch_size": 1, **model.shape.to_llama_dict()}
    dtype = {key: str(getattr(model.config, key)).lower() for key in ("compute_dtype", "param_init_type")}
    values |= {**dtype, "use_past": model.use_past, "chat_format": model.chat_format, **model.defaults}
    values |= {"block_size": model.cache.block_size, "num_blocks": model.cache.num_blocks}
    held = yaml.safe_load(existing.read_text(encoding="utf-8")) if existing.exists() else None
    content = {
        "run_mode": "predict",
        "use_parallel": False,
        "load_checkpoint": f"./{weights}",
        "trainer": {"type": "CausalLanguageModelingTrainer", "model_name": "qwen"},
        "runner_config": {"batch_size": 1},
        "processor": {"tokenizer": {"type": "QwenTokenizer"}},
        "context": {"mode": 0, "device_target": "auto"},
        **(held or {}),
        "model": {"model_config": values, "arch": {"type": "QwenForCausalLM"}},
    }
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def _output(name: str, array: NDArray[Any]) -> OutputTensor:
    """bfloat16 is kept as uint16 bits on CPU, as MindSpore's own type on Ascend."""
    bits = array.dtype == np.uint16 or array.dtype.name == "bfloat16"

    def blocks() -> Iterator[NDArray[Any]]:
        flat = np.ascontiguousarray(array).reshape(-1)
        yield flat.view(np.uint16) if bits else flat

    return OutputTensor(name, tuple(array.shape), "bfloat16" if bits else array.dtype.name, blocks)
