"""The small files beside the weights: configs, vocabulary, and the predict YAML of a converted checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from research.qwen.config import QwenConfig, read_json, with_changes
from research.qwen.errors import CheckpointError, ConfigError

VOCABULARY = "qwen.tiktoken"
COPIED = ("generation_config.json", VOCABULARY, "tokenizer_config.json")
PUBLISHED_RANKS = 151643
BLOCK_SIZE = 16
MAX_BLOCKS = 2048


def json_text(value: Mapping[str, Any]) -> str:
    """A JSON file's text as Hugging Face writes it."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def config_text(config: QwenConfig, dtype: str) -> str:
    """config.json in the new naming, with the number format of the weights."""
    return json_text(with_changes(config, torch_dtype=dtype).to_hf_dict())


def same_model(path: Path, config: QwenConfig) -> bool:
    """Whether a config.json describes this model, the number format aside; False if it is missing or
    unreadable."""
    try:
        there = QwenConfig.from_hf_dict(read_json(path))
    except ConfigError:
        return False
    return with_changes(there, torch_dtype=config.torch_dtype) == config


def copied_files(folder: Path) -> dict[str, bytes]:
    """Name -> contents of the files that travel with the weights unchanged, as far as the folder has them."""
    try:
        return {name: (folder / name).read_bytes() for name in COPIED if (folder / name).is_file()}
    except OSError as error:
        raise CheckpointError(f"{error.filename} cannot be read: {error.strerror}") from None


def generation_config(folder: Path) -> dict[str, Any]:
    """generation_config.json of a folder, empty if there is none."""
    path = folder / "generation_config.json"
    return read_json(path) if path.exists() else {}


def control_ids(folder: Path, config: QwenConfig) -> tuple[int, int, int] | None:
    """Ids of <|endoftext|>, <|im_start|>, <|im_end|>: they follow the ranks of the vocabulary.

    None if the folder has no vocabulary and the model is too small for the published one.
    """
    path = folder / VOCABULARY
    ranks = PUBLISHED_RANKS
    if path.is_file():
        with path.open("rb") as lines:
            ranks = sum(1 for line in lines if line.strip())
    if ranks + 3 > config.vocab_size:
        return None
    return ranks, ranks + 1, ranks + 2


def end_ids(folder: Path, config: QwenConfig) -> list[int]:
    """Ids that end an answer: generation_config's, and for a chat model the ends of a turn."""
    given = generation_config(folder)
    eos = given.get("eos_token_id")
    ids = [i for i in (eos if isinstance(eos, list) else [eos]) if isinstance(i, int)]
    control = control_ids(folder, config)
    if control is not None:
        end_of_text, im_start, im_end = control
        ids = (
            [im_end, im_start, *ids, end_of_text]
            if given.get("chat_format") == "chatml"
            else [*ids, end_of_text]
        )
    return [i for i in dict.fromkeys(ids) if i < config.vocab_size]


def predict_yaml(folder: Path, config: QwenConfig, weights: str) -> str:
    """A YAML file that runs ``weights`` (a name beside it) in MindFormers' layout; ``folder`` is the
    source's."""
    given = generation_config(folder)
    ends = end_ids(folder, config)
    pad = given.get("pad_token_id", ends[-1] if ends else 0)
    blocks = min(-(-config.max_length // BLOCK_SIZE), MAX_BLOCKS)
    model: dict[str, Any] = {"type": "LlamaConfig", "batch_size": 1, **config.to_llama_dict()}
    if ends:
        model["eos_token_id"] = ends
    model |= {
        "pad_token_id": pad,
        "chat_format": "chatml" if given.get("chat_format") == "chatml" else "raw",
        "compute_dtype": "float32",
        "param_init_type": "float32",
        "use_past": True,
        "block_size": BLOCK_SIZE,
        "num_blocks": blocks,
        "max_decode_length": config.max_length,
        "max_new_tokens": given.get("max_new_tokens", 512),
        "do_sample": given.get("do_sample", False),
    }
    model |= {
        key: given[key] for key in ("top_k", "top_p", "temperature", "repetition_penalty") if key in given
    }
    lines = [f"    {key}: {_scalar(value)}{_COMMENTS.get(key, '')}" for key, value in model.items()]
    tokenizer = ["    type: QwenTokenizer"]
    if (folder / VOCABULARY).is_file():
        tokenizer.append(f"    vocab_file: {_scalar('./' + VOCABULARY)}")
    load = "safetensors" if weights.endswith(".safetensors") else "ckpt"
    return _YAML.format(
        weights=_scalar(f"./{weights}"), load=load, model="\n".join(lines), tokenizer="\n".join(tokenizer)
    )


_COMMENTS = {
    "intermediate_size": "  # width of w1 and w2: half of the published number",
    "eos_token_id": "  # each of them ends the answer",
    "max_decode_length": "  # prompt and answer together",
}
_YAML = """\
# Written by convert_weight.py. Paths are relative to this file.
run_mode: 'predict'
use_parallel: False
load_checkpoint: {weights}
load_ckpt_format: '{load}'
postprocess_use_numpy: True
trainer:
  type: CausalLanguageModelingTrainer
  model_name: 'qwen'
runner_config:
  batch_size: 1
model:
  model_config:
{model}
  arch:
    type: QwenForCausalLM
processor:
  tokenizer:
{tokenizer}
context:
  mode: 0  # GRAPH_MODE
  device_target: 'CPU'  # or 'Ascend'
"""


def _scalar(value: Any) -> str:
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, float):
        text = repr(value)
        # YAML 1.1 reads 1e-06 as text: a mantissa with a point makes it a number.
        return text.replace("e", ".0e") if "e" in text and "." not in text else text
    return json.dumps(value, ensure_ascii=False)
