"""The shape of a model: frozen QwenConfig, the table of published sizes, and its three spellings
(published config.json in old and new naming, MindFormers' LlamaConfig, the table)."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from research.qwen.errors import ConfigError

_POSITIVE = (
    "vocab_size",
    "hidden_size",
    "num_layers",
    "num_heads",
    "intermediate_size",
    "kv_channels",
    "seq_length",
    "max_position_embeddings",
)


@dataclass(frozen=True)
class QwenConfig:
    """Everything the computation depends on; nothing about devices or decoding.

    ``intermediate_size`` is the published number, twice the width of ``w1`` and ``w2`` (see ``mlp_width``).
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    kv_channels: int = 128
    seq_length: int = 8192
    max_position_embeddings: int = 32768
    rotary_emb_base: float = 10000.0
    layer_norm_epsilon: float = 1e-6
    use_dynamic_ntk: bool = True
    use_logn_attn: bool = True
    torch_dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} must be a positive integer, got {value!r}")
        for name in ("use_dynamic_ntk", "use_logn_attn"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be true or false, got {getattr(self, name)!r}")
        if self.intermediate_size < 2 or self.intermediate_size % 2:
            raise ConfigError(
                f"intermediate_size is twice the MLP width and must be even, got {self.intermediate_size}"
            )
        if self.num_heads * self.kv_channels != self.hidden_size:
            raise ConfigError(
                f"num_heads {self.num_heads} x kv_channels {self.kv_channels} "
                f"is not hidden_size {self.hidden_size}"
            )
        if self.kv_channels % 2:
            raise ConfigError(f"kv_channels must be even for rotary embedding, got {self.kv_channels}")
        if self.seq_length < 2:
            raise ConfigError(f"seq_length must be at least 2, got {self.seq_length}")
        if self.rotary_emb_base <= 1 or self.layer_norm_epsilon <= 0:
            raise ConfigError("rotary_emb_base must be above 1 and layer_norm_epsilon above 0")

    @property
    def head_dim(self) -> int:
        """Width of one attention head (published name: kv_channels)."""
        return self.kv_channels

    @property
    def mlp_width(self) -> int:
        """Width of w1 and w2: half of the published intermediate_size."""
        return self.intermediate_size // 2

    @property
    def max_length(self) -> int:
        """Longest sequence (prompt and answer) in tokens; beyond seq_length it rests on NTK and log-n."""
        return max(self.seq_length, self.max_position_embeddings)

    @classmethod
    def from_hf_dict(cls, raw: Mapping[str, Any]) -> QwenConfig:
        """Read a published config.json, old naming (n_embd, ...) or new (hidden_size, ...).

        Raises ConfigError for another model, a missing or unknown key, or a value this family never had.
        """
        return _from_hf_dict(cls, raw)

    @classmethod
    def from_folder(cls, folder: str | Path) -> QwenConfig:
        """Read ``folder/config.json``; ConfigError if it is missing or not JSON."""
        return cls.from_hf_dict(read_json(Path(folder) / "config.json"))

    def to_hf_dict(self) -> dict[str, Any]:
        """The published config.json in the new naming."""
        return {
            "architectures": ["QWenLMHeadModel"],
            "auto_map": {
                "AutoConfig": "configuration_qwen.QWenConfig",
                "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
            },
            "model_type": "qwen",
            "tokenizer_class": "QWenTokenizer",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "intermediate_size": self.intermediate_size,
            "kv_channels": self.kv_channels,
            "seq_length": self.seq_length,
            "max_position_embeddings": self.max_position_embeddings,
            "rotary_emb_base": _plain_number(self.rotary_emb_base),
            "rotary_pct": 1.0,
            "layer_norm_epsilon": self.layer_norm_epsilon,
            "use_dynamic_ntk": self.use_dynamic_ntk,
            "use_logn_attn": self.use_logn_attn,
            "no_bias": True,
            "tie_word_embeddings": False,
            "scale_attn_weights": True,
            "use_cache": True,
            "torch_dtype": self.torch_dtype,
        }

    def to_llama_dict(self) -> dict[str, Any]:
        """The same model in the names of MindFormers' LlamaConfig (intermediate_size is the MLP width)."""
        return {
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "num_layers": self.num_layers,
            "num_heads": self.num_heads,
            "intermediate_size": self.mlp_width,
            "kv_channels": self.kv_channels,
            "seq_length": self.seq_length,
            "max_position_embedding": self.max_position_embeddings,
            "rotary_emb_base": _plain_number(self.rotary_emb_base),
            "rms_norm_eps": self.layer_norm_epsilon,
            "use_dynamic_ntk": self.use_dynamic_ntk,
            "use_logn_attn": self.use_logn_attn,
        }

    @classmethod
    def from_llama_dict(cls, raw: Mapping[str, Any]) -> QwenConfig:
        """Read the keys to_llama_dict writes; others may be there too. ConfigError names a missing one."""
        required = ("vocab_size", "hidden_size", "num_layers", "num_heads")
        missing = [key for key in required if raw.get(key) is None]
        if missing:
            raise ConfigError(f"model_config lacks {', '.join(missing)}")
        if raw.get("intermediate_size") is None:
            raise ConfigError("model_config lacks intermediate_size (the MLP width: 11008 for 7B)")
        heads, hidden = int(raw["num_heads"]), int(raw["hidden_size"])
        optional = {
            "seq_length": "seq_length",
            "max_position_embeddings": "max_position_embedding",
            "layer_norm_epsilon": "rms_norm_eps",
            "use_dynamic_ntk": "use_dynamic_ntk",
            "use_logn_attn": "use_logn_attn",
        }
        values = {field: raw[key] for field, key in optional.items() if raw.get(key) is not None}
        base = raw.get("rotary_emb_base") or raw.get("theta") or 10000.0
        return cls(
            vocab_size=int(raw["vocab_size"]),
            hidden_size=hidden,
            num_layers=int(raw["num_layers"]),
            num_heads=heads,
            intermediate_size=2 * int(raw["intermediate_size"]),
            kv_channels=int(raw.get("kv_channels") or hidden // heads),
            rotary_emb_base=float(base),
            **values,
        )


def _size(
    hidden: int, layers: int, inner: int, vocab: int, base: float, seq_length: int, stretch: bool
) -> QwenConfig:
    return QwenConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=hidden // 128,
        intermediate_size=inner,
        seq_length=seq_length,
        max_position_embeddings=32768 if seq_length > 2048 else 8192,
        rotary_emb_base=base,
        use_dynamic_ntk=stretch,
        use_logn_attn=stretch,
    )


SIZES: dict[str, QwenConfig] = {
    "1.8b": _size(2048, 24, 11008, 151936, 1e4, 8192, True),
    "7b": _size(4096, 32, 22016, 151936, 1e4, 8192, True),
    "14b": _size(5120, 40, 27392, 152064, 1e4, 2048, True),
    "72b": _size(8192, 80, 49152, 152064, 1e6, 32768, False),
}

# Old name -> new name, as the first release spelled them.
_OLD_NAMES = {
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "n_layer": "num_hidden_layers",
    "ffn_hidden_size": "intermediate_size",
    "n_positions": "max_position_embeddings",
    "padded_vocab_size": "vocab_size",
}
_REQUIRED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
# Keys without influence on inference: training, bookkeeping, generation defaults, switches of the other code.
_IGNORED = frozenset(
    "activation architectures attn_dropout_prob attn_pdrop auto_map bf16 bias_dropout_fusion bos_token_id "
    "embd_pdrop emb_dropout_prob eos_token_id fp16 fp32 initializer_range n_inner onnx_safe pad_token_id "
    "params_dtype resid_pdrop resid_dropout_prob softmax_in_fp32 tokenizer_class tokenizer_type "
    "transformers_version use_cache use_cache_kernel use_cache_quantization use_flash_attn model_type "
    "_name_or_path quantization_config chat_format max_new_tokens top_k top_p do_sample temperature "
    "repetition_penalty stop_words_ids return_dict output_attentions output_hidden_states is_decoder "
    "_attn_implementation".split()
)
# Keys that change the computation and had one value only in every published model.
_FIXED = {
    "no_bias": True,
    "tie_word_embeddings": False,
    "scale_attn_weights": True,
    "rotary_pct": 1.0,
    "pos_emb": "rotary",
    "apply_residual_connection_post_layernorm": False,
}
_PLAIN = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "intermediate_size": "intermediate_size",
    "kv_channels": "kv_channels",
    "seq_length": "seq_length",
    "max_position_embeddings": "max_position_embeddings",
    "rotary_emb_base": "rotary_emb_base",
    "layer_norm_epsilon": "layer_norm_epsilon",
    "use_dynamic_ntk": "use_dynamic_ntk",
    "use_logn_attn": "use_logn_attn",
    "torch_dtype": "torch_dtype",
}


def _from_hf_dict(cls: type[QwenConfig], raw: Mapping[str, Any]) -> QwenConfig:
    model_type = raw.get("model_type")
    if model_type != "qwen":
        raise ConfigError(
            f"config.json: model_type is {model_type!r}, expected 'qwen' (first generation; Qwen1.5, Qwen2 "
            "and others are different models)"
        )
    old = "n_embd" in raw
    known: dict[str, Any] = {}
    for key, value in raw.items():
        if key == "vocab_size" and "padded_vocab_size" in raw:
            continue  # old files hold both; the padded number is the number of rows
        name = _OLD_NAMES.get(key, key)
        if name in _PLAIN:
            if value is not None:
                known[name] = value
        elif name in _FIXED:
            if value is not None and value != _FIXED[name]:
                raise ConfigError(
                    f"config.json: {key} = {value!r} is not supported; Qwen has {_FIXED[name]!r}"
                )
        elif name not in _IGNORED:
            raise ConfigError(f"config.json: unknown key {key!r}{suggest(key, [*_PLAIN, *_OLD_NAMES])}")
    missing = [name for name in _REQUIRED if name not in known]
    if missing:
        raise ConfigError(f"config.json lacks {', '.join(missing)} ({'old' if old else 'new'} naming)")
    fields = {_PLAIN[name]: value for name, value in known.items()}
    try:
        fields.setdefault("kv_channels", int(fields["hidden_size"]) // max(int(fields["num_heads"]), 1))
        fields["rotary_emb_base"] = float(fields.get("rotary_emb_base", 10000.0))
        fields["torch_dtype"] = str(fields.get("torch_dtype", "bfloat16")).removeprefix("torch.")
        return cls(**fields)
    except ConfigError as error:
        raise ConfigError(f"config.json: {error}") from None
    except (TypeError, ValueError) as error:
        raise ConfigError(f"config.json holds a value of the wrong type: {error}") from None


def read_json(path: str | Path) -> dict[str, Any]:
    """A JSON object from a file; ConfigError if it is missing, unreadable or not an object."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} not found; a model folder holds config.json beside its weights") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path} must hold a JSON object, found {type(value).__name__}")
    return value


def suggest(word: str, known: list[str]) -> str:
    """`` (did you mean 'x'?)`` or an empty string, for errors about unknown names."""
    close = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _plain_number(value: float) -> float | int:
    return int(value) if float(value).is_integer() else value


def with_changes(config: QwenConfig, **changes: Any) -> QwenConfig:
    """A copy with some fields replaced."""
    return replace(config, **changes)


# These change the numbers and cannot be seen in the shapes of the weights.
_UNSEEN = (
    "num_heads",
    "seq_length",
    "rotary_emb_base",
    "layer_norm_epsilon",
    "use_dynamic_ntk",
    "use_logn_attn",
)


def disagreement(stored: QwenConfig, other: QwenConfig) -> str:
    """Where two descriptions of the same weights would compute differently: ``seq_length 2048 (not 8192), ...``."""
    names = [name for name in _UNSEEN if getattr(stored, name) != getattr(other, name)]
    return ", ".join(f"{name} {getattr(stored, name)} (not {getattr(other, name)})" for name in names)
