"""QwenConfig: both published spellings, MindFormers' spelling, the table of sizes, and every refusal."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from research.qwen.config import SIZES, QwenConfig, read_json, suggest, with_changes
from research.qwen.errors import ConfigError, QwenError

NEW: dict[str, Any] = {
    "model_type": "qwen",
    "vocab_size": 1000,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 352,
    "kv_channels": 16,
    "seq_length": 2048,
    "max_position_embeddings": 8192,
    "rotary_emb_base": 10000,
    "layer_norm_epsilon": 1e-6,
    "use_dynamic_ntk": True,
    "use_logn_attn": False,
    "no_bias": True,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
}
# The same model as the first release wrote it; vocab_size there is the number of tokens, not of rows.
OLD: dict[str, Any] = {
    "model_type": "qwen",
    "vocab_size": 990,
    "padded_vocab_size": 1000,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "ffn_hidden_size": 352,
    "kv_channels": 16,
    "seq_length": 2048,
    "n_positions": 8192,
    "rotary_emb_base": 10000,
    "layer_norm_epsilon": 1e-6,
    "use_dynamic_ntk": True,
    "use_logn_attn": False,
    "pos_emb": "rotary",
    "apply_residual_connection_post_layernorm": False,
    "torch_dtype": "float16",
}
WANTED = QwenConfig(
    vocab_size=1000,
    hidden_size=64,
    num_layers=2,
    num_heads=4,
    intermediate_size=352,
    kv_channels=16,
    seq_length=2048,
    max_position_embeddings=8192,
    use_logn_attn=False,
    torch_dtype="float16",
)


@pytest.mark.parametrize("raw", [NEW, OLD], ids=["new", "old"])
def test_both_namings_give_the_same_config(raw: dict[str, Any]) -> None:
    assert QwenConfig.from_hf_dict(raw) == WANTED


def test_padded_rows_win_in_any_order_of_keys() -> None:
    assert QwenConfig.from_hf_dict(dict(reversed(OLD.items()))).vocab_size == 1000


def test_derived_numbers() -> None:
    assert (WANTED.head_dim, WANTED.mlp_width, WANTED.max_length) == (16, 176, 8192)
    assert replace(WANTED, seq_length=10000).max_length == 10000


def test_defaults_of_keys_a_file_may_leave_out() -> None:
    required = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
    config = QwenConfig.from_hf_dict({key: NEW[key] for key in (*required, "intermediate_size")})
    assert (config.kv_channels, config.rotary_emb_base, config.seq_length) == (16, 10000.0, 8192)
    assert config.use_dynamic_ntk and config.use_logn_attn


@pytest.mark.parametrize("name", SIZES)
def test_round_trips_of_the_published_sizes(name: str) -> None:
    config = SIZES[name]
    assert QwenConfig.from_hf_dict(config.to_hf_dict()) == config
    assert QwenConfig.from_hf_dict(json.loads(json.dumps(config.to_hf_dict()))) == config
    assert QwenConfig.from_llama_dict(config.to_llama_dict()) == config


def test_table_of_sizes() -> None:
    rows = {
        name: (
            one.hidden_size,
            one.num_layers,
            one.num_heads,
            one.intermediate_size,
            one.vocab_size,
            one.rotary_emb_base,
            one.seq_length,
            one.use_dynamic_ntk,
            one.use_logn_attn,
        )
        for name, one in SIZES.items()
    }
    assert rows == {
        "1.8b": (2048, 24, 16, 11008, 151936, 1e4, 8192, True, True),
        "7b": (4096, 32, 32, 22016, 151936, 1e4, 8192, True, True),
        "14b": (5120, 40, 40, 27392, 152064, 1e4, 2048, True, True),
        "72b": (8192, 80, 64, 49152, 152064, 1e6, 32768, False, False),
    }


def test_llama_names_give_the_mlp_width() -> None:
    assert SIZES["7b"].to_llama_dict()["intermediate_size"] == 11008


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "qwen2"}, "'qwen2'"),
    ({"model_type": None}, "model_type is None"),
    ({"num_hidden_layer": 3}, "unknown key 'num_hidden_layer' (did you mean 'num_hidden_layers'?)"),
    ({"hidden_size": None}, "lacks hidden_size (new naming)"),
    ({"tie_word_embeddings": True}, "tie_word_embeddings = True"),
    ({"no_bias": False}, "no_bias = False"),
    ({"rotary_pct": 0.5}, "rotary_pct = 0.5"),
    ({"kv_channels": 32}, "num_heads 4 x kv_channels 32 is not hidden_size 64"),
    ({"num_attention_heads": 0}, "num_heads"),
    ({"num_hidden_layers": True}, "num_layers must be a positive integer"),
    ({"num_hidden_layers": 2.5}, "num_layers must be a positive integer, got 2.5"),
    ({"intermediate_size": 351}, "must be even"),
    ({"intermediate_size": 352.0}, "intermediate_size must be a positive integer, got 352.0"),
    ({"max_position_embeddings": "8192"}, "max_position_embeddings must be a positive integer"),
    ({"use_dynamic_ntk": "false"}, "use_dynamic_ntk must be true or false, got 'false'"),
    ({"hidden_size": "wide", "kv_channels": None}, "wrong type"),
    ({"rotary_emb_base": "x"}, "wrong type"),
    ({"layer_norm_epsilon": "x"}, "wrong type"),
    ({"seq_length": 1}, "seq_length"),
    ({"layer_norm_epsilon": 0}, "layer_norm_epsilon"),
    ({"rotary_emb_base": 1}, "rotary_emb_base"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        QwenConfig.from_hf_dict({**NEW, **change})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["num_heads", "intermediate_size"])
def test_llama_dict_names_what_is_missing(key: str) -> None:
    raw = {name: value for name, value in WANTED.to_llama_dict().items() if name != key}
    with pytest.raises(ConfigError, match=key):
        QwenConfig.from_llama_dict(raw)


def test_old_naming_is_named_in_the_error() -> None:
    with pytest.raises(ConfigError, match=r"lacks num_hidden_layers \(old naming\)"):
        QwenConfig.from_hf_dict({key: value for key, value in OLD.items() if key != "n_layer"})


def test_from_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="config.json not found"):
        QwenConfig.from_folder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(NEW), encoding="utf-8")
    assert QwenConfig.from_folder(tmp_path) == WANTED


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[1]"])
def test_read_json_refuses_what_is_no_object(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match="config.json"):
        read_json(tmp_path / "config.json")


def test_errors_are_one_family() -> None:
    assert issubclass(ConfigError, QwenError) and issubclass(ConfigError, ValueError)


def test_suggest_and_with_changes() -> None:
    assert suggest("seq_lenght", ["seq_length", "vocab_size"]) == " (did you mean 'seq_length'?)"
    assert suggest("zzz", ["seq_length"]) == ""
    assert with_changes(WANTED, num_layers=3) == replace(WANTED, num_layers=3)
    with pytest.raises(ConfigError):
        with_changes(WANTED, num_layers=0)
