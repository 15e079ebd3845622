"""YAML files of a run: MindFormers' layout in, a frozen RunSettings out; an unknown key is an error.

MindFormers accepts any key and ignores those it does not know, so that a misspelt ``num_layers`` silently
gives another model. Here every key of the sections we read is known by name and its value is checked;
sections for training are read by train/recipe_file.py, those only MindFormers reads pass through as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import yaml

from research.qwen.checks import (
    Check,
    anything,
    boolean,
    check_key,
    check_value,
    integer,
    named,
    number,
    one_of,
    text,
    token_ids,
)
from research.qwen.config import QwenConfig
from research.qwen.errors import ConfigError

ChatFormat = Literal["raw", "chatml"]
END_OF_TEXT = 151643
BASE = "base_config"

_DTYPE = one_of("float32", "float16", "bfloat16")
_TOP = {
    **named(text, "load_checkpoint"),
    "run_mode": one_of("predict", "train", "finetune", "eval", "predict_with_train_model"),
    # MindFormers' own business, passed through.
    **named(
        anything,
        "seed output_dir use_parallel resume_training print_separate_loss load_ckpt_format auto_trans_ckpt "
        "transform_process_num src_strategy_path_or_dir only_save_strategy load_ckpt_async use_legacy "
        "use_legacy_format pretrained_model_dir balanced_load reshard_worker_num do_eval "
        "eval_step_interval eval_epoch_interval ignore_data_skip data_skip_steps profile "
        "profile_communication profile_memory init_start_profile profile_start_step profile_stop_step "
        "profile_rank_ids profile_pipeline profile_level profiler_level mstx layer_scale layer_decay "
        "lr_scale lr_scale_factor micro_batch_interleave_num remote_save_url save_file input_data "
        "predict_batch_size adapter_id exclude_cann_cpu train_precision_sync infer_precision_sync "
        "postprocess_use_numpy parallel parallel_config recompute_config swap_config moe_config "
        "runner_wrapper optimizer lr_schedule grouped_lr_schedule train_dataset train_dataset_task "
        "eval_dataset eval_dataset_task callbacks eval_callbacks metric monitor_config generation_config "
        "remove_redundancy auto_tune autotune_per_step filepath_prefix runner_config trainer model "
        "processor context finetune",
    ),
}
_MODEL_CONFIG = {
    "type": one_of("LlamaConfig"),
    **named(
        integer(1),
        "vocab_size hidden_size num_layers num_heads n_kv_heads kv_channels max_position_embedding",
    ),
    **named(integer(2), "seq_length"),
    **named(integer(1), "intermediate_size batch_size block_size num_blocks"),
    **named(integer(1), "max_decode_length max_length max_new_tokens"),
    **named(number(1, open_low=True), "rotary_emb_base theta"),
    **named(number(0, open_low=True), "rms_norm_eps repetition_penalty"),
    **named(boolean, "use_dynamic_ntk use_logn_attn use_past do_sample"),
    "top_k": integer(0),
    "top_p": number(0, 1, open_low=True),
    "temperature": number(0),
    "eos_token_id": token_ids,
    "pad_token_id": integer(0),
    **named(_DTYPE, "compute_dtype param_init_type"),
    "chat_format": one_of("raw", "chatml"),
    # These change the computation and have one value in every Qwen.
    **named(one_of(True), "qkv_has_bias"),
    **named(one_of(False), "attn_proj_has_bias tie_word_embeddings"),
    **named(one_of(1), "rotary_pct scaling_factor"),
    "extend_method": one_of("None"),
    # How MindFormers' own layers compute; ours give the same result whatever these say.
    **named(
        anything,
        "multiple_of ffn_dim_multiplier bos_token_id ignore_token_id layernorm_compute_type "
        "softmax_compute_type rotary_dtype residual_dtype embedding_init_type qkv_concat parallel_config "
        "moe_config is_dynamic use_rope_slice use_flash_attention use_ring_attention "
        "use_attn_mask_compression use_eod_attn_mask_compression parallel_optimizer fine_grain_interleave "
        "pp_interleave_num offset init_method_std checkpoint_name_or_path llm_backend fused_rms_norm "
        "input_sliced_sig rmsnorm_compute_2d chunk_prefill calculate_per_token_loss pipeline_stage "
        "return_hidden_states emb_dropout_prob no_bias pet_config",
    ),
}
# Key path of a section -> the keys it may hold.
_KNOWN: dict[str, dict[str, Check]] = {
    "": _TOP,
    "trainer": named(anything, "type model_name"),
    "runner_config": named(
        anything, "batch_size epochs sink_mode sink_size gradient_accumulation_steps num_classes stop_step"
    ),
    "model": named(anything, "model_config arch"),
    "model.model_config": _MODEL_CONFIG,
    "model.arch": {"type": one_of("QwenForCausalLM")},
    "processor": named(anything, "type return_tensors tokenizer"),
    "processor.tokenizer": {
        "type": one_of("QwenTokenizer"),
        **named(text, "vocab_file extra_vocab_file"),
        **named(
            anything,
            "errors unk_token bos_token eos_token pad_token model_max_length padding_side truncation_side "
            "chat_template add_bos_token add_eos_token auto_register",
        ),
    },
    "context": {
        "device_target": one_of("auto", "Ascend", "CPU"),
        "device_id": integer(0),
        **named(
            anything,
            "mode max_device_memory max_call_depth memory_optimize_level mempool_block_size save_graphs "
            "save_graphs_path enable_graph_kernel graph_kernel_flags jit_level jit_config infer_boost "
            "ascend_config affinity_cpu_list affinity_config deterministic runtime_num_threads "
            "inter_op_parallel_num enable_compile_cache compile_cache_path op_timeout "
            "variable_memory_max_size use_graceful_exit",
        ),
    },
}
TOP_KEYS = frozenset(_TOP)
# Where people come from: the published config.json and other ports spell these differently.
_OTHER_SPELLINGS = {
    "num_hidden_layers": "num_layers",
    "n_layer": "num_layers",
    "num_attention_heads": "num_heads",
    "n_head": "num_heads",
    "n_embd": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "max_position_embeddings": "max_position_embedding",
    "layer_norm_epsilon": "rms_norm_eps",
    "rope_theta": "rotary_emb_base",
    "padded_vocab_size": "vocab_size",
    "torch_dtype": "param_init_type",
}


_FLOATS = frozenset(
    ("rotary_emb_base", "theta", "rms_norm_eps", "top_p", "temperature", "repetition_penalty")
)
_GENERATION = (
    "do_sample",
    "top_k",
    "top_p",
    "temperature",
    "repetition_penalty",
    "max_decode_length",
    "max_length",
    "max_new_tokens",
    "chat_format",
)


@dataclass(frozen=True)
class RunSettings:
    """What a YAML file says, with the defaults filled in.

    ``device_target`` None means: follow what is there, Ascend if MindSpore finds one, else CPU. A relative
    path that exists beside the YAML file is taken from there, another is left as written. ``eos_token_id`` is
    a tuple even for one id, and empty if the file names none. ``max_decode_length`` and ``max_length`` count
    prompt and answer, ``max_new_tokens`` the answer. ``raw`` is the file as read.
    """

    model: QwenConfig
    run_mode: str = "predict"
    load_checkpoint: Path | None = None
    use_past: bool = True
    batch_size: int = 1
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int = 0
    compute_dtype: str = "float16"
    param_init_type: str = "float16"
    block_size: int = 16
    num_blocks: int = 512
    do_sample: bool = False
    top_k: int = 0
    top_p: float = 1.0
    temperature: float = 1.0
    repetition_penalty: float = 1.0
    max_decode_length: int | None = None
    max_length: int | None = None
    max_new_tokens: int | None = None
    chat_format: ChatFormat = "raw"
    vocab_file: Path | None = None
    device_target: str | None = None
    device_id: int = 0
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def eos_ids(self) -> tuple[int, ...] | None:
        """The ids that end an answer, or None: follow the vocabulary and the chat format."""
        return self.eos_token_id or None

    def generation_values(self) -> dict[str, Any]:
        """The generation values the file itself gives, under the names of generation_config.json."""
        given = _section(self.raw, "model.model_config")
        return {key: getattr(self, key) for key in _GENERATION if given.get(key) is not None}


def read_yaml(path: Path, heirs: tuple[Path, ...] = ()) -> Any:
    """What a YAML file says, merged over the files it names as ``base_config``, as MindFormers merges them.

    Mappings are merged key by key, everything else replaces what it inherits. Of several bases a later one replaces
    whole sections of an earlier one. ``heirs`` are the files that lead here. ConfigError names the file.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        named_by = f" (base_config of {heirs[-1]})" if heirs else ""
        raise ConfigError(
            f"{path} not found{named_by}; give the path of a YAML file, for example one of configs/"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict) or BASE not in raw:
        return raw
    names = raw.pop(BASE)
    names = names if isinstance(names, list) else [names]
    if not names or not all(isinstance(name, str) and name for name in names):
        raise ConfigError(f"{path}: {BASE} must be a file name or a list of them, got {names!r}")
    inherited: dict[str, Any] = {}
    for name in names:
        base = path.parent / name
        if base.resolve() in (heir.resolve() for heir in (*heirs, path)):
            raise ConfigError(f"{path}: {BASE} {name} leads back to a file that inherits from it")
        below = read_yaml(base, (*heirs, path))
        if not isinstance(below, dict):
            raise ConfigError(f"{base}: the file must be a mapping of keys to values")
        inherited.update(below)
    return _merged(raw, inherited)


def _merged(over: Mapping[str, Any], under: Mapping[str, Any]) -> dict[str, Any]:
    both = dict(under)
    for key, value in over.items():
        below = both.get(key)
        both[key] = _merged(value, below) if isinstance(value, dict) and isinstance(below, dict) else value
    return both


def load_settings(path: str | Path) -> RunSettings:
    """Read and check a YAML file; ConfigError names the file, the key path and what to write instead."""
    path = Path(path)
    raw = read_yaml(path)
    return settings_from_mapping(raw, str(path), path.parent)


def settings_from_mapping(raw: Any, where: str, folder: Path | None = None) -> RunSettings:
    """RunSettings of a mapping in the YAML layout; ``where`` opens every error, ``folder`` resolves paths."""
    validate(raw, where)
    model = {key: value for key, value in raw["model"]["model_config"].items() if value is not None}
    numbers = {key: float(value) for key, value in model.items() if key in _FLOATS}
    try:
        config = QwenConfig.from_llama_dict({**model, **numbers})
    except ConfigError as error:
        raise ConfigError(f"{where}: model.model_config: {error}") from None
    values = {key: {**model, **numbers}[key] for key in _FIELDS & model.keys()}
    # A model with a small vocabulary of its own has no <|endoftext|> at the published id.
    values.setdefault("pad_token_id", END_OF_TEXT if config.vocab_size > END_OF_TEXT else 0)
    eos = model.get("eos_token_id", [])
    values["eos_token_id"] = tuple(eos) if isinstance(eos, list) else (eos,)
    context, tokenizer = _section(raw, "context"), _section(raw, "processor.tokenizer")
    target = context.get("device_target")
    return RunSettings(
        model=config,
        run_mode=raw.get("run_mode") or "predict",
        load_checkpoint=resolve(raw.get("load_checkpoint"), folder),
        vocab_file=resolve(tokenizer.get("vocab_file"), folder),
        device_target=None if target == "auto" else target,
        device_id=context.get("device_id") or 0,
        raw=raw,
        **values,
    )


_FIELDS = frozenset(one.name for one in fields(RunSettings)) & frozenset(_MODEL_CONFIG)


def validate(mapping: Any, where: str) -> None:
    """Check keys and values of a mapping in the YAML layout; ConfigError on the first thing wrong."""
    for path, known in _KNOWN.items():
        section = _get(mapping, path)
        if section is None and path not in ("", "model.model_config"):
            continue
        if not isinstance(section, Mapping):
            found = "nothing" if section is None else type(section).__name__
            raise ConfigError(
                f"{where}: {path or 'the file'} must be a mapping of keys to values, found {found}"
            )
        for key, value in section.items():
            _check(f"{path}.{key}" if path else str(key), str(key), value, known, where)
    model = mapping["model"]["model_config"]
    if model.get("n_kv_heads") not in (None, model.get("num_heads")):
        raise ConfigError(
            f"{where}: model.model_config.n_kv_heads is {model['n_kv_heads']}; Qwen has as many as num_heads"
        )
    _check_ids_fit(model, where)


def _check(path: str, key: str, value: Any, known: Mapping[str, Check], where: str) -> None:
    check_key(path, key, known, where, _OTHER_SPELLINGS)
    check_value(path, value, known[key], where)


def _check_ids_fit(model: Mapping[str, Any], where: str) -> None:
    for key in ("eos_token_id", "pad_token_id"):
        value = model.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        rows = model.get("vocab_size")
        if rows is not None and ids and max(ids) >= rows:
            raise ConfigError(f"{where}: model.model_config.{key}: {max(ids)} is outside vocab_size {rows}")


def _get(mapping: Any, path: str) -> Any:
    for part in path.split(".") if path else ():
        if not isinstance(mapping, Mapping):
            return None
        mapping = mapping.get(part)
    return mapping


def _section(mapping: Mapping[str, Any], path: str) -> Mapping[str, Any]:
    return _get(mapping, path) or {}


def resolve(given: str | None, folder: Path | None) -> Path | None:
    """A path of a YAML file: beside the file if it exists there, else as written; None for an empty one."""
    if not given:
        return None
    path = Path(given).expanduser()
    beside = path if folder is None else folder / path
    return beside if beside.exists() else path
