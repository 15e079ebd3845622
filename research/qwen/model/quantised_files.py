"""Writing quantised checkpoints: ours, from plain or AutoGPTQ ones, and AutoGPTQ's folder again. Imports no MindSpore.

Ours is a safetensors file whose header says which matrices are packed in which scheme (``quantization``), and of a
converted official checkpoint also what is needed to write that again (``gptq``).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from research.qwen.config import QwenConfig
from research.qwen.errors import CheckpointError
from research.qwen.model.quantise import Plan, Source, quantised_source
from research.qwen.quant.gptq import GptqFormat, to_gptq
from research.qwen.quant.schemes import Quantiser, Scheme
from research.qwen.weights import companions, quantised
from research.qwen.weights.convert import (
    DEFAULT_NAME,
    MAX_SHARD,
    SLACK,
    ProgressBar,
    Summary,
    filler,
    is_weights_file,
    open_with_config,
    parse_size,
    silent,
    summarise,
    target_file,
    write_shards,
)
from research.qwen.weights.dtypes import BY_NAME, FLOATS
from research.qwen.weights.outputs import OutputSet, new_folder
from research.qwen.weights.readers import Checkpoint, open_checkpoint
from research.qwen.weights.writers import OutputTensor, ckpt_size, safetensors_size


def is_quantised(path: str | Path) -> bool:
    """Whether a checkpoint holds quantised matrices, ours or AutoGPTQ's. Raises what opening it raises."""
    checkpoint = open_checkpoint(path)
    return quantised.is_gptq(checkpoint) or bool(quantised.stored_formats(checkpoint))


def write_quantised(
    source: str | Path,
    target: str | Path,
    plan: Plan,
    force: bool = False,
    bar: ProgressBar = silent,
    quantiser: Quantiser | None = None,
) -> Summary:
    """Write ``source`` in the formats of ``plan`` to ``target``: a .safetensors file, or a folder that gets one.

    config.json, generation_config.json, the vocabulary and a YAML file that runs it lie beside it. Matrices are made
    one at a time and written, so memory beyond the largest stays small. Raises CheckpointError and ConfigError as
    ``quantised_source`` does; CheckpointError: target exists, disk full, quantised weights in a .ckpt.
    """
    checkpoint, config = open_with_config(source)
    path = _file_in(target)
    if any(path.exists() and path.samefile(file) for file in checkpoint.files):
        raise CheckpointError(f"{path} is the checkpoint to read; choose another name")
    view = quantised_source(checkpoint, config, plan, quantiser, progress=False)
    if view.formats and path.suffix != ".safetensors":
        raise CheckpointError(f"{path}: quantised weights are written as .safetensors; change the suffix")
    tensors = output_tensors(view)
    size = ckpt_size(tensors) if path.suffix == ".ckpt" else safetensors_size(tensors) + _header_room(tensors)
    with OutputSet(path.parent, force) as output:
        output.refuse_existing(path.name)
        output.need_space(size + SLACK)
        if not companions.same_model(path.parent / "config.json", config):
            output.write_text("config.json", companions.config_text(config, _float_format(view, config)))
        for name, data in companions.copied_files(checkpoint.folder).items():
            output.write_bytes(name, data)
        yaml = companions.predict_yaml(checkpoint.folder, config, path.name)
        output.write_text(path.with_suffix(".yaml").name, yaml)
        progress = bar(sum(tensor.nbytes for tensor in tensors))
        output.write(path.name, filler(path.suffix, tensors, progress, metadata=_metadata(checkpoint, view)))
    formats = tuple(dict.fromkeys(one.format for one in view.matrices().values()))
    return replace(summarise(path, tensors), dtypes=formats)


def write_gptq(
    source: str | Path,
    target: str | Path,
    force: bool = False,
    bar: ProgressBar = silent,
    max_shard: int | None = None,
    config_file: str | Path | None = None,
) -> Summary:
    """Write a quantised checkpoint as a folder in AutoGPTQ's layout; tensors are those it was converted from, bit for
    bit. CheckpointError if a matrix is in a format that layout does not have."""
    checkpoint, config = open_with_config(source, config_file)
    view = quantised_source(checkpoint, config, Plan(), progress=False)
    described, biases = _gptq_description(checkpoint, view)
    tensors = _gptq_tensors(view, config, GptqFormat.from_dict(described), biases)
    return _write_folder(view, config, tensors, Path(target), force, bar, max_shard, described)


def write_dequantised(
    source: str | Path,
    target: str | Path,
    force: bool = False,
    bar: ProgressBar = silent,
    max_shard: int | None = None,
    config_file: str | Path | None = None,
) -> Summary:
    """Write a quantised checkpoint as a plain Hugging Face folder in float32, which holds its weights exactly."""
    checkpoint, config = open_with_config(source, config_file)
    view = quantised_source(checkpoint, config, Plan("float32"), progress=False)
    return _write_folder(view, config, output_tensors(view), Path(target), force, bar, max_shard, None)


def _write_folder(
    view: Source,
    config: QwenConfig,
    tensors: list[OutputTensor],
    target: Path,
    force: bool,
    bar: ProgressBar,
    max_shard: int | None,
    described: Mapping[str, Any] | None,
) -> Summary:
    """A Hugging Face folder; ``described`` is its quantization_config."""
    with new_folder(target, force, owned=is_weights_file) as output:
        output.need_space(safetensors_size(tensors) + SLACK)
        write_shards(output, tensors, bar, parse_size(MAX_SHARD) if max_shard is None else max_shard)
        for name, data in companions.copied_files(view.checkpoint.folder).items():
            output.write_bytes(name, data)
        config_json = json.loads(companions.config_text(config, _float_format(view, config)))
        if described is not None:
            config_json["quantization_config"] = described
            plain = {key: value for key, value in described.items() if key != "quant_method"}
            output.write_text(quantised.QUANTIZE_CONFIG, companions.json_text(plain))
        output.write_text("config.json", companions.json_text(config_json))
    return summarise(target, tensors)


def output_tensors(view: Source) -> list[OutputTensor]:
    """The tensors of a source, packed weights first: their sizes are multiples of 64, so all start on such an
    address of the file; behind them what has wide numbers comes before what has narrow ones."""
    names = view.names()
    quantised_weights = {f"{name}.weight" for name in view.formats}

    def rank(name: str) -> int:
        if name in quantised_weights:
            return 0
        return (
            1
            if len(view.shape(name)) == 2
            else {"int32": 2, "float32": 2, "uint8": 4}.get(view.dtype(name), 3)
        )

    return [
        OutputTensor(name, view.shape(name), view.dtype(name), partial(view.blocks, name))
        for name in sorted(names, key=rank)
    ]


def _file_in(target: str | Path) -> Path:
    """As the converter's target, but a name without suffix is a folder."""
    path = Path(target)
    return target_file(path / DEFAULT_NAME if not path.suffix and not path.is_file() else target)


def _metadata(checkpoint: Checkpoint, view: Source) -> dict[str, str]:
    """What the header says beside the tensors."""
    if not view.formats:
        return {}
    found = {quantised.QUANTIZATION: json.dumps(view.formats)}
    origin = quantised.gptq_origin(checkpoint)
    if quantised.is_gptq(checkpoint):
        origin = {
            "quantization_config": dict(quantised.gptq_config(checkpoint)),
            "zero_biases": {name: checkpoint.dtype(name) for name in view.zero_biases},
        }
    if origin is not None:
        found[quantised.GPTQ] = json.dumps(origin)
    return found


def _header_room(tensors: list[OutputTensor]) -> int:
    return 128 * len(tensors)


def _float_format(view: Source, config: QwenConfig) -> str:
    """What config.json names as the number format: that of the embedding, or of the biases."""
    for name in ("transformer.wte.weight", "transformer.ln_f.weight"):
        if view.format(name) in FLOATS:
            return view.format(name)
    return config.torch_dtype


def _gptq_description(checkpoint: Checkpoint, view: Source) -> tuple[dict[str, Any], Mapping[str, str]]:
    """quantization_config and the zero biases (name -> number format): as converted, or made for our own scheme."""
    formats = view.formats
    if not formats:
        raise CheckpointError(f"{checkpoint.files[0]} is not quantised")
    for name in ("lm_head", "transformer.wte"):
        if name in formats:
            raise CheckpointError(
                f"{name} is {formats[name]}, which AutoGPTQ's layout does not have: quantise with "
                f"--{'lm-head' if name == 'lm_head' else 'embedding'}-dtype float16"
            )
    schemes = set(formats.values())
    layers = {name for name in view.matrices() if name not in ("lm_head", "transformer.wte")}
    if len(schemes) > 1 or layers != set(formats):
        raise CheckpointError(f"{checkpoint.files[0]}: AutoGPTQ's layout has one format for all layers")
    origin = quantised.gptq_origin(checkpoint)
    if origin is not None:
        return dict(origin["quantization_config"]), origin["zero_biases"]
    scheme = Scheme.parse(schemes.pop())
    described = {"bits": scheme.bits, "group_size": scheme.group, "desc_act": False, "sym": not scheme.zeros}
    return {**described, "quant_method": "gptq"}, {}


def _gptq_tensors(
    view: Source, config: QwenConfig, fmt: GptqFormat, biases: Mapping[str, str]
) -> list[OutputTensor]:
    shapes = quantised.matrices(config)
    made: dict[str, dict[str, NDArray[Any]]] = {}

    def module(name: str, suffix: str) -> Iterator[NDArray[Any]]:
        if suffix not in made.get(name, {}):
            arrays = {part: view.read(f"{name}.{part}") for part in view.matrices()[name].parts}
            try:
                made[name] = to_gptq(arrays, Scheme.parse(view.formats[name]), *shapes[name])
            except CheckpointError as error:
                raise CheckpointError(f"{name}: {error}") from None
        yield made[name].pop(suffix).reshape(-1)

    def zeros(count: int, kind: str) -> Iterator[NDArray[Any]]:
        yield np.zeros(count, BY_NAME[kind].numpy)

    out = []
    for name in view.formats:
        for suffix, (shape, kind) in fmt.shapes(*shapes[name]).items():
            out.append(OutputTensor(f"{name}.{suffix}", shape, kind.name, partial(module, name, suffix)))
    for name, number in biases.items():
        n = shapes[name.removesuffix(".bias")][0]
        out.append(OutputTensor(name, (n,), number, partial(zeros, n, number)))
    packed = {f"{name}.{part}" for name in view.formats for part in view.matrices()[name].parts}
    plain = [name for name in view.names() if name not in packed]
    return out + [OutputTensor(n, view.shape(n), view.dtype(n), partial(view.blocks, n)) for n in plain]
