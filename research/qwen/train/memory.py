"""How much memory a run needs, from the shapes alone, before anything is loaded.

Counted in bytes per device, the largest of its devices where a model is split. With H the hidden size, F the width of
the MLP, L layers, V rows of the vocabulary, T = batch_size x max_length tokens of a micro batch:

    weights       trained ones float32; frozen ones as stored (cpu: one layer at a time and lm_head also in float32), on
                  ascend quantised (scales float32), in the computing dtype, or float32 beside modules_to_save, and the
                  layer at work once more
    gradients     float32, of what is trained
    optimizer     AdamW's two averages, float32, of what is trained
    activations   what each layer keeps for its backward pass (with recompute: H per token), on ascend for all micro
                  batches of a step; and the layer at work, with a quantised matrix twice in float32
    logits        a chunk of rows at a time, V values each, on ascend with their gradients
    runtime       the interpreter, MindSpore and its compiled graphs

On CPU fitted to the peak of the process over models of 1 to 8 layers (within a fifth; see tests); on NPUs not measured.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from math import ceil, prod
from pathlib import Path

from research.qwen.config import QwenConfig
from research.qwen.errors import ConfigError
from research.qwen.model.training_specs import AS_STORED
from research.qwen.quant.schemes import Scheme
from research.qwen.train.recipe import Recipe

BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
LOGIT_ROWS = 512  # rows of logits computed at once
WORKING = 3  # times what a layer keeps: the inner values and gradients of the layer at work, measured on cpu
RUNTIME = {"cpu": 520 << 20, "ascend": 2 << 30}


@dataclass(frozen=True)
class Estimate:
    """Bytes on the device that needs most, by purpose; ``parameters`` and ``trainable`` count the whole model."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    runtime: int
    parameters: int
    trainable: int

    @property
    def total(self) -> int:
        """All bytes."""
        return sum(getattr(self, name) for name in PURPOSES)


PURPOSES = tuple(one.name for one in fields(Estimate) if one.name not in ("parameters", "trainable"))


def matrices(config: QwenConfig) -> dict[str, tuple[int, int]]:
    """The matrices of one layer, (n_out, n_in)."""
    hidden, inner = config.hidden_size, config.mlp_width
    return {
        "attn.c_attn": (3 * hidden, hidden),
        "attn.c_proj": (hidden, hidden),
        "mlp.w1": (inner, hidden),
        "mlp.w2": (inner, hidden),
        "mlp.c_proj": (hidden, inner),
    }


def vectors(config: QwenConfig) -> int:
    """Values of one layer's bias and norms."""
    return 5 * config.hidden_size


def parameters(config: QwenConfig) -> int:
    """Weights of a model."""
    layer = sum(prod(shape) for shape in matrices(config).values()) + vectors(config)
    return config.num_layers * layer + config.hidden_size + 2 * config.vocab_size * config.hidden_size


def lora_matrices(recipe: Recipe) -> tuple[str, ...]:
    """The matrices of a layer that get LoRA, in the order of the computation."""
    return recipe.method_spec().matrices()


def trainable(config: QwenConfig, recipe: Recipe) -> int:
    """Values that are trained."""
    if recipe.method == "full":
        return parameters(config)
    shapes = matrices(config)
    lora = sum(recipe.lora_rank * sum(shapes[name]) for name in lora_matrices(recipe))
    return config.num_layers * lora + _saved(config, recipe)


def _saved(config: QwenConfig, recipe: Recipe) -> int:
    table = config.vocab_size * config.hidden_size
    sizes = {"wte": table, "lm_head": table}
    return sum(sizes[name] for name in set(recipe.modules_to_save))


def matrix_bytes(fmt: str, rows: int, columns: int) -> int:
    """Bytes of a matrix in a format: a float type, or a quantisation scheme with its scales and zero points."""
    if fmt in BYTES:
        return rows * columns * BYTES[fmt]
    scheme = Scheme.parse(fmt)
    padded_rows, padded_columns = scheme.padded(rows, columns)
    groups = scheme.groups(columns) * padded_rows
    scale = 2 if scheme.group else 4
    return padded_rows * padded_columns * scheme.bits // 8 + groups * (scale + int(scheme.zeros))


def kept_values(config: QwenConfig, recipe: Recipe, device: str) -> int:
    """Numbers per token that one layer keeps for its backward pass.

    cpu: block input, q, k, v, attention, its sum with the input (6 H), w1 and w2 (2 F). ascend, where the graph keeps
    what its operators want: also both norms (8 H), silu and product (4 F), and the attention's weights, heads x length
    twice, where it is not the fused operator.
    """
    if device == "cpu":
        return 6 * config.hidden_size + 2 * config.mlp_width
    weights = 0 if recipe.flash_attention else 2 * config.num_heads * recipe.max_length
    return 8 * config.hidden_size + 4 * config.mlp_width + weights


def working_values(config: QwenConfig, recipe: Recipe) -> int:
    """Numbers per token while one layer is computed backwards; LoRA adds its own inputs, thinned out by dropout."""
    values = 8 * config.hidden_size + 4 * config.mlp_width
    if recipe.method != "full":
        values += sum(matrices(config)[name][1] for name in lora_matrices(recipe))
    return WORKING * values


def estimate(config: QwenConfig, recipe: Recipe, device: str = "cpu", stored: str = "bfloat16") -> Estimate:
    """Peak memory of a run on ``device`` (cpu, ascend) from a checkpoint whose matrices are ``stored`` so.

    ``recipe.model_parallel`` divides matrices and most activations, ``pipeline_stage`` the layers (the first stage also
    holds the embedding, the last the head: the larger counts), ``optimizer_parallel`` what is trained.
    """
    width = BYTES[recipe.compute_dtype] if device == "ascend" else 4
    layers, parts = ceil(config.num_layers / recipe.pipeline_stage), recipe.model_parallel
    full = recipe.method == "full"
    ends = 2 if recipe.pipeline_stage == 1 else 1
    table = config.vocab_size * config.hidden_size
    saved = _saved(config, recipe) * ends // 2 if not full else 0
    learned = (
        layers * (parameters(config) - 2 * table) // config.num_layers + ends * table
        if full
        else layers * sum(recipe.lora_rank * sum(matrices(config)[name]) for name in lora_matrices(recipe))
        + saved
    )
    learned //= parts
    frozen = 0 if full else _frozen(config, recipe, device, stored, layers, ends) // parts
    if recipe.vocab_emb_dp and parts > 1:  # the embedding is not split
        whole = full or "wte" in recipe.modules_to_save
        learned += (table - table // parts) * whole
        frozen += width * (table - table // parts) * (not whole)
    learned //= recipe.data_parallel if recipe.optimizer_parallel else 1
    activations = _activations(config, recipe, device, width, layers)
    if device == "ascend":  # the layer at work in the computing dtype, and a quantised matrix being widened
        if recipe.base_dtype != AS_STORED or stored not in BYTES:
            activations += 8 * max(prod(shape) for shape in matrices(config).values())
        frozen += width * sum(prod(shape) for shape in matrices(config).values()) // parts
    return Estimate(
        weights=frozen + 4 * learned,
        gradients=4 * learned,
        optimizer=8 * learned,
        activations=activations,
        logits=_logits(config, recipe, device, width),
        runtime=RUNTIME[device],
        parameters=parameters(config),
        trainable=trainable(config, recipe),
    )


def _frozen(config: QwenConfig, recipe: Recipe, device: str, stored: str, layers: int, ends: int) -> int:
    """Bytes of the weights that are not trained: all but modules_to_save."""
    plain = stored
    if device == "ascend" and stored in BYTES:
        plain = "float32" if recipe.modules_to_save else recipe.compute_dtype
    fmt = plain if recipe.base_dtype == AS_STORED else recipe.base_dtype
    layer = sum(matrix_bytes(fmt, *shape) for shape in matrices(config).values()) + 4 * vectors(config)
    if device == "ascend" and fmt not in BYTES:  # there scales and offsets are float32
        scheme = Scheme.parse(fmt)
        more = 2 * (scheme.group > 0) + 3 * scheme.zeros
        layer += more * sum(n * scheme.groups(k) for n, k in matrices(config).values())
    tables = [name for name in ("lm_head", "wte") if name not in recipe.modules_to_save][:ends]
    float_fmt = plain if plain in BYTES else "float16"
    table = config.vocab_size * config.hidden_size
    total = layers * layer + len(tables) * table * BYTES[float_fmt]
    if device == "cpu" and "lm_head" in tables and float_fmt != "float32":
        total += 4 * table
    if device == "cpu" and fmt != "float32":
        total += 4 * sum(prod(shape) for shape in matrices(config).values())
    return total


def _activations(config: QwenConfig, recipe: Recipe, device: str, width: int, layers: int) -> int:
    rows, waiting = recipe.batch_size, 1
    if device == "ascend" and recipe.pipeline_stage > 1:  # micro batches on their way through the stages
        rows = ceil(rows * recipe.accumulation / recipe.micro_batch_num)
        waiting = min(recipe.pipeline_stage, recipe.micro_batch_num)
    elif device == "ascend":  # one graph of all micro batches
        waiting = recipe.accumulation
    tokens = rows * recipe.max_length
    border = tokens * config.hidden_size * width
    layer = tokens * kept_values(config, recipe, device) * width // recipe.model_parallel
    kept = layers * (border if recipe.recompute else layer) * waiting
    return kept + tokens * working_values(config, recipe) * width // recipe.model_parallel


def _logits(config: QwenConfig, recipe: Recipe, device: str, width: int) -> int:
    rows = min(LOGIT_ROWS, recipe.batch_size * recipe.max_length)
    split = rows * config.vocab_size * 4 * (1 if device == "cpu" else 2)
    return (
        split // recipe.model_parallel
        + 2 * recipe.batch_size * recipe.max_length * config.hidden_size * width
    )


def device_memory(device: str, limit: str | None = None) -> int | None:
    """Bytes this run may use: ``limit`` such as "58GB"; on CPU no more than what is free (and the container allows).

    None if nobody knows: on ascend without a limit. Raises ConfigError for a limit that is no size.
    """
    found = [] if limit is None else [parse_size(limit)]
    if device == "cpu":
        found += [size for size in _free_on_cpu() if size is not None]
    return min(found) if found else None


def parse_size(given: str) -> int:
    """``58GB``, ``800 MB``, ``2.5GiB`` in bytes; units are powers of 1024, as for MindSpore's max_device_memory."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)i?B?\s*", given, re.IGNORECASE)
    if match is None:
        raise ConfigError(f"{given!r} is no size; write 58GB or 800MB")
    return int(float(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " "))


def _free_on_cpu() -> Iterator[int | None]:
    yield _field("/proc/meminfo", r"MemAvailable:\s+(\d+) kB", 1024)
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        most, now = _field(limit, r"(\d+)", 1), _field(used, r"(\d+)", 1)
        if most is not None and now is not None and most < 1 << 60:
            cached = _field(
                os.path.join(os.path.dirname(limit), "memory.stat"), r"(?m)^inactive_file (\d+)", 1
            )
            yield max(most - now + (cached or 0), 0)


def _field(path: str, pattern: str, unit: int) -> int | None:
    try:
        match = re.search(pattern, Path(path).read_text(encoding="ascii"))
    except (OSError, UnicodeDecodeError):
        return None
    return int(match[1]) * unit if match else None


def shown(size: float) -> str:
    """Bytes for people: ``6.5 GiB``, ``820 MiB``."""
    return f"{size / (1 << 30):.1f} GiB" if size >= 1 << 30 else f"{size / (1 << 20):.0f} MiB"
