"""Export to Qwen2's layout, for engines that never learnt the first generation: transformers, vLLM, llama.cpp
and others.

Qwen2 computes the same layers: q, k, v apart instead of fused, and the MLP spelt ``down(silu(gate(x)) *
up(x))``. What it cannot express is how Qwen stretches beyond seq_length (dynamic NTK, log-n attention), so
the export stops there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from research.qwen.config import QwenConfig
from research.qwen.errors import CheckpointError
from research.qwen.weights import companions, hf_tokenizer
from research.qwen.weights.convert import (
    MAX_SHARD,
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
from research.qwen.weights.outputs import new_folder
from research.qwen.weights.writers import OutputTensor, safetensors_size

# Qwen2's name -> the published one, for a layer; {n} is its number.
LAYER = {
    "input_layernorm.weight": "ln_1.weight",
    "self_attn.o_proj.weight": "attn.c_proj.weight",
    "post_attention_layernorm.weight": "ln_2.weight",
    "mlp.gate_proj.weight": "mlp.w2.weight",  # the activation is on w2
    "mlp.up_proj.weight": "mlp.w1.weight",
    "mlp.down_proj.weight": "mlp.c_proj.weight",
}
OUTER = {
    "model.embed_tokens.weight": "transformer.wte.weight",
    "model.norm.weight": "transformer.ln_f.weight",
    "lm_head.weight": "lm_head.weight",
}
ROOM_FOR_TOKENIZER = 32 << 20
# Keys of generation_config.json that every engine understands.
GENERATION = ("do_sample", "top_k", "top_p", "temperature", "repetition_penalty", "max_new_tokens")


def export_qwen2(
    source: str | Path,
    target: str | Path,
    dtype: str | None = None,
    force: bool = False,
    bar: ProgressBar = silent,
    max_shard: int | None = None,
) -> Summary:
    """Write the checkpoint ``source`` as a folder that plain ``transformers.Qwen2ForCausalLM`` loads.

    The summary carries warnings: lengths beyond seq_length, and a missing vocabulary (then no tokenizer is
    written). Raises CheckpointError and ConfigError as ``convert`` does, VocabularyError for a damaged
    vocabulary.
    """
    checkpoint, config = open_with_config(source)
    folder = checkpoint.folder
    tensors = _qwen2_tensors(
        {t.name: t for t in planned(checkpoint, config, dtype, lambda name: name)}, config
    )
    warnings = []
    if config.use_dynamic_ntk or config.use_logn_attn:
        warnings.append(
            f"the exported model is exact up to {config.seq_length} tokens (max_position_embeddings); beyond "
            "that, Qwen's dynamic NTK and log-n attention cannot be expressed in Qwen2's layout"
        )
    chat = companions.generation_config(folder).get("chat_format") == "chatml"
    texts = {
        "config.json": companions.json_text(qwen2_config(folder, config, main_dtype(tensors))),
        "generation_config.json": companions.json_text(qwen2_generation(folder, config)),
    }
    vocabulary = folder / companions.VOCABULARY
    if vocabulary.is_file():
        tokens = hf_tokenizer.read_ranks(vocabulary)
        if len(tokens) + len(hf_tokenizer.CONTROL) > config.vocab_size:
            raise CheckpointError(
                f"{vocabulary} has more tokens than the model has rows ({config.vocab_size})"
            )
        texts |= hf_tokenizer.tokenizer_files(tokens, chat, config.seq_length)
    else:
        warnings.append(f"{folder} has no {companions.VOCABULARY}: no tokenizer was written")
    with new_folder(Path(target), force, owned=is_weights_file) as output:
        output.need_space(safetensors_size(tensors) + ROOM_FOR_TOKENIZER)
        write_shards(output, tensors, bar, parse_size(MAX_SHARD) if max_shard is None else max_shard)
        for name, text in texts.items():
            output.write_text(name, text)
    return summarise(Path(target), tensors, tuple(warnings))


def qwen2_config(folder: Path, config: QwenConfig, dtype: str) -> dict[str, Any]:
    """config.json of the export."""
    ends = _end_ids(folder, config)
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_heads,
        "hidden_act": "silu",
        "max_position_embeddings": config.seq_length,
        "rms_norm_eps": config.layer_norm_epsilon,
        "rope_theta": config.rotary_emb_base,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "torch_dtype": dtype,
    } | ({"bos_token_id": ends[-1], "eos_token_id": ends[0], "pad_token_id": ends[-1]} if ends else {})


def qwen2_generation(folder: Path, config: QwenConfig) -> dict[str, Any]:
    """generation_config.json of the export: the published sampling values and every id that ends an
    answer."""
    given = companions.generation_config(folder)
    ends = _end_ids(folder, config)
    ids = {"bos_token_id": ends[-1], "eos_token_id": ends, "pad_token_id": ends[-1]} if ends else {}
    return ids | {key: given[key] for key in GENERATION if key in given}


def _end_ids(folder: Path, config: QwenConfig) -> list[int]:
    """<|im_end|> and <|endoftext|> of a chat model; <|endoftext|>, or what generation_config says, of a base
    model."""
    ends = companions.end_ids(folder, config)
    control = companions.control_ids(folder, config)
    return [i for i in ends if i != control[1]] if control is not None else ends


def _qwen2_tensors(tensors: dict[str, OutputTensor], config: QwenConfig) -> list[OutputTensor]:
    def renamed(name: str, published: str) -> OutputTensor:
        found = tensors[published]
        return OutputTensor(name, found.shape, found.dtype, found.blocks)

    out = [renamed("model.embed_tokens.weight", OUTER["model.embed_tokens.weight"])]
    for n in range(config.num_layers):
        for kind in ("weight", "bias"):
            fused = tensors[f"transformer.h.{n}.attn.c_attn.{kind}"]
            out += [
                _third(fused, i, f"model.layers.{n}.self_attn.{part}_proj.{kind}")
                for i, part in enumerate("qkv")
            ]
        out += [renamed(f"model.layers.{n}.{new}", f"transformer.h.{n}.{old}") for new, old in LAYER.items()]
    return out + [renamed(name, OUTER[name]) for name in ("model.norm.weight", "lm_head.weight")]


def _third(fused: OutputTensor, index: int, name: str) -> OutputTensor:
    rows = fused.shape[0] // 3
    size = rows * (fused.shape[1] if len(fused.shape) > 1 else 1)
    blocks = _cut(fused.blocks, index * size, (index + 1) * size)
    return OutputTensor(name, (rows, *fused.shape[1:]), fused.dtype, blocks)


def _cut(
    blocks: Callable[[], Iterator[NDArray[Any]]], start: int, stop: int
) -> Callable[[], Iterator[NDArray[Any]]]:
    """The numbers ``start`` to ``stop`` of a stream of blocks."""

    def run() -> Iterator[NDArray[Any]]:
        at = 0
        for block in blocks():
            part = block[max(start - at, 0) : max(stop - at, 0)]
            if part.size:
                yield part
            at += block.size

    return run
