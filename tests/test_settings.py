"""RunSettings: defaults, what each key may be, and errors that name file, key path and remedy."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from research.qwen.config import SIZES
from research.qwen.errors import ConfigError
from research.qwen.settings import load_settings, settings_from_mapping, validate
from research.qwen.weights.companions import predict_yaml

MINIMAL: dict[str, Any] = {
    "run_mode": "predict",
    "use_parallel": False,
    "postprocess_use_numpy": True,
    "trainer": {"type": "CausalLanguageModelingTrainer", "model_name": "qwen"},
    "runner_config": {"batch_size": 1},
    "model": {
        "model_config": {
            "type": "LlamaConfig",
            "batch_size": 1,
            "seq_length": 64,
            "hidden_size": 64,
            "num_layers": 2,
            "num_heads": 4,
            "intermediate_size": 128,
            "vocab_size": 520,
            "rms_norm_eps": 1e-6,
            "eos_token_id": 312,
            "pad_token_id": 312,
            "compute_dtype": "float32",
            "param_init_type": "float32",
            "fused_rms_norm": False,
            "use_past": True,
            "max_decode_length": 32,
            "do_sample": False,
        },
        "arch": {"type": "QwenForCausalLM"},
    },
    "processor": {"tokenizer": {"type": "QwenTokenizer", "vocab_file": "./qwen.tiktoken"}},
    "context": {"mode": 0, "device_target": "CPU"},
}


def changed(path: str, value: Any) -> dict[str, Any]:
    """MINIMAL with one value set; the key ``path`` is dotted."""
    mapping = copy.deepcopy(MINIMAL)
    *outer, last = path.split(".")
    section: Any = mapping
    for part in outer:
        section = section[part]
    section[last] = value
    return mapping


def without(path: str) -> dict[str, Any]:
    mapping = changed(path, None)
    section: Any = mapping
    for part in path.split(".")[:-1]:
        section = section[part]
    del section[path.split(".")[-1]]
    return mapping


def test_the_minimal_file_of_mindformers() -> None:
    settings = settings_from_mapping(MINIMAL, "x.yaml")
    assert (settings.model.num_layers, settings.model.intermediate_size, settings.model.kv_channels) == (
        2,
        256,
        16,
    )
    assert settings.eos_token_id == (312,) and settings.eos_ids == (312,)
    assert (settings.pad_token_id, settings.compute_dtype, settings.max_decode_length) == (312, "float32", 32)
    assert settings.device_target == "CPU"
    assert settings.vocab_file == Path("qwen.tiktoken")
    assert settings.raw == MINIMAL
    assert settings.generation_values() == {"do_sample": False, "max_decode_length": 32}


def test_defaults() -> None:
    shape = ("vocab_size", "hidden_size", "num_layers", "num_heads", "intermediate_size")
    model = {key: MINIMAL["model"]["model_config"][key] for key in shape}
    settings = settings_from_mapping({"model": {"model_config": model}}, "x.yaml")
    assert settings.run_mode == "predict" and settings.use_past and not settings.do_sample
    assert (settings.eos_token_id, settings.eos_ids, settings.pad_token_id) == ((), None, 0)
    assert (settings.block_size, settings.num_blocks, settings.batch_size) == (16, 512, 1)
    assert (settings.top_k, settings.top_p, settings.temperature) == (0, 1.0, 1.0)
    assert settings.chat_format == "raw"
    assert settings.device_target is None and settings.load_checkpoint is None and settings.vocab_file is None
    assert settings.generation_values() == {}


def test_padding_is_end_of_text_where_the_vocabulary_has_it() -> None:
    mapping = without("model.model_config.pad_token_id")
    mapping["model"]["model_config"]["vocab_size"] = 151936
    assert settings_from_mapping(mapping, "x.yaml").pad_token_id == 151643


@pytest.mark.parametrize("value", ["auto", None])
def test_device_that_follows_what_is_there(value: str | None) -> None:
    assert settings_from_mapping(changed("context.device_target", value), "x.yaml").device_target is None
    assert settings_from_mapping(without("context.device_target"), "x.yaml").device_target is None
    assert settings_from_mapping(without("context"), "x.yaml").device_target is None


def test_generation_values_are_those_the_file_gives() -> None:
    mapping = changed("model.model_config.top_p", 0.8)
    mapping["model"]["model_config"] |= {"chat_format": "chatml", "temperature": 1, "top_k": None}
    values = settings_from_mapping(mapping, "x.yaml").generation_values()
    assert values == {
        "do_sample": False,
        "top_p": 0.8,
        "temperature": 1.0,
        "max_decode_length": 32,
        "chat_format": "chatml",
    }


def test_several_end_ids() -> None:
    assert settings_from_mapping(changed("model.model_config.eos_token_id", [5, 6]), "x").eos_token_id == (
        5,
        6,
    )


@pytest.mark.parametrize("key", ["rotary_emb_base", "theta"])
def test_both_names_of_the_rotary_base(key: str) -> None:
    assert (
        settings_from_mapping(changed(f"model.model_config.{key}", 1000000), "x").model.rotary_emb_base == 1e6
    )


def test_number_that_yaml_reads_as_text(tmp_path: Path) -> None:
    assert yaml.safe_load("1e-5") == "1e-5"
    settings = settings_from_mapping(changed("model.model_config.rms_norm_eps", "1e-5"), "x.yaml")
    assert settings.model.layer_norm_epsilon == 1e-5


def test_paths_beside_the_file(tmp_path: Path) -> None:
    (tmp_path / "qwen.tiktoken").write_text("")
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(changed("load_checkpoint", "absent.ckpt")), encoding="utf-8")
    settings = load_settings(file)
    assert settings.vocab_file == tmp_path / "qwen.tiktoken"
    assert settings.load_checkpoint == Path("absent.ckpt")


PASSED = {
    "seed": 1,
    "output_dir": "./out",
    "load_ckpt_format": "safetensors",
    "auto_trans_ckpt": False,
    "parallel_config": {"model_parallel": 2, "anything": 1},
    "runner_wrapper": {"type": "MFTrainOneStepCell"},
    "optimizer": {"type": "AdamW"},
    "lr_schedule": {"type": "CosineWithWarmUpLR"},
    "train_dataset": {"data_loader": {"type": "MindDataset"}},
    "callbacks": [{"type": "MFLossMonitor"}],
    "recompute_config": None,
}


@pytest.mark.parametrize("key", PASSED)
def test_sections_of_mindformers_pass(key: str) -> None:
    validate(changed(key, PASSED[key]), "x.yaml")


UNKNOWN = [
    ("use_paralel", "use_paralel (did you mean 'use_parallel'?)"),
    ("trainer.kind", "trainer.kind"),
    ("runner_config.epoch", "runner_config.epoch (did you mean 'epochs'?)"),
    ("model.config", "model.config (did you mean 'model_config'?)"),
    ("model.arch.typ", "model.arch.typ (did you mean 'type'?)"),
    (
        "model.model_config.num_hidden_layers",
        "model.model_config.num_hidden_layers (did you mean 'num_layers'?)",
    ),
    ("model.model_config.n_embd", "model.model_config.n_embd (did you mean 'hidden_size'?)"),
    ("model.model_config.seq_lenght", "model.model_config.seq_lenght (did you mean 'seq_length'?)"),
    ("model.model_config.zzz", "model.model_config.zzz"),
    ("processor.tokeniser", "processor.tokeniser (did you mean 'tokenizer'?)"),
    ("processor.tokenizer.vocab", "processor.tokenizer.vocab (did you mean 'vocab_file'?)"),
    ("context.device", "context.device (did you mean 'device_id'?)"),
]


@pytest.mark.parametrize(("path", "message"), UNKNOWN)
def test_unknown_key(path: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(changed(path, 1), "x.yaml")
    assert str(caught.value) == f"x.yaml: unknown key {message}"


INVALID: list[tuple[str, Any, str]] = [
    ("run_mode", "chat", "run_mode must be one of 'predict', "),
    ("load_checkpoint", 3, "load_checkpoint must be text, got 3"),
    (
        "context.device_target",
        "GPU",
        "context.device_target must be one of 'auto', 'Ascend', 'CPU', got 'GPU'",
    ),
    ("context.device_id", -1, "context.device_id must be an integer of at least 0, got -1"),
    (
        "model.arch.type",
        "LlamaForCausalLM",
        "model.arch.type must be 'QwenForCausalLM', got 'LlamaForCausalLM'",
    ),
    ("model.model_config.type", "GPT2Config", "model.model_config.type must be 'LlamaConfig'"),
    ("model.model_config.num_layers", 0, "num_layers must be an integer of at least 1, got 0"),
    ("model.model_config.num_layers", True, "num_layers must be an integer"),
    ("model.model_config.num_layers", "two", "num_layers must be an integer"),
    ("model.model_config.seq_length", 1, "seq_length must be an integer of at least 2"),
    ("model.model_config.rms_norm_eps", "tiny", "rms_norm_eps must be a number above 0, got 'tiny'"),
    ("model.model_config.rms_norm_eps", False, "rms_norm_eps must be a number above 0"),
    ("model.model_config.top_p", 1.5, "top_p must be a number above 0 and at most 1, got 1.5"),
    ("model.model_config.top_p", 0, "top_p must be a number above 0"),
    ("model.model_config.top_k", -1, "top_k must be an integer of at least 0"),
    ("model.model_config.temperature", -0.5, "temperature must be a number of at least 0"),
    ("model.model_config.temperature", float("nan"), "temperature must be a number of at least 0"),
    ("model.model_config.use_past", "yes", "use_past must be True or False"),
    (
        "model.model_config.compute_dtype",
        "int8",
        "compute_dtype must be one of 'float32', 'float16', 'bfloat16'",
    ),
    ("model.model_config.chat_format", "llama", "chat_format must be one of 'raw', 'chatml'"),
    ("model.model_config.tie_word_embeddings", True, "tie_word_embeddings must be False, got True"),
    ("model.model_config.qkv_has_bias", False, "qkv_has_bias must be True"),
    ("model.model_config.rotary_pct", 0.5, "rotary_pct must be 1, got 0.5"),
    ("model.model_config.n_kv_heads", 2, "n_kv_heads is 2; Qwen has as many as num_heads"),
    ("model.model_config.eos_token_id", [], "eos_token_id must be a token id or a list of them, got []"),
    ("model.model_config.eos_token_id", [1, "2"], "eos_token_id must be a token id or a list"),
    ("model.model_config.eos_token_id", [1, 520], "eos_token_id: 520 is outside vocab_size 520"),
    ("model.model_config.pad_token_id", 151643, "pad_token_id: 151643 is outside vocab_size 520"),
    ("model", None, "model.model_config must be a mapping of keys to values, found nothing"),
    ("model", "LlamaConfig", "model must be a mapping of keys to values, found str"),
    ("model.model_config", [], "model.model_config must be a mapping of keys to values, found list"),
    ("context", 0, "context must be a mapping of keys to values, found int"),
]


@pytest.mark.parametrize(("path", "value", "message"), INVALID, ids=[f"{one[0]}={one[1]}" for one in INVALID])
def test_invalid_value(path: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(changed(path, value), "x.yaml")
    assert str(caught.value).startswith("x.yaml: ")
    assert message in str(caught.value)


def test_shape_errors_name_the_file() -> None:
    with pytest.raises(ConfigError, match=r"x.yaml: model.model_config: num_heads 5 x kv_channels 12"):
        settings_from_mapping(changed("model.model_config.num_heads", 5), "x.yaml")
    with pytest.raises(ConfigError, match=r"x.yaml: model.model_config: .*lacks num_layers"):
        settings_from_mapping(without("model.model_config.num_layers"), "x.yaml")


def _directory(path: Path) -> None:
    path.mkdir()


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda path: None, "not found"),
        (_directory, "cannot be read"),
        (lambda path: path.write_bytes(b"\xff\xfe\x00"), "cannot be read"),
        (lambda path: path.write_text("a: [1\nb: 2"), "is not YAML"),
        (
            lambda path: path.write_text("just text"),
            "the file must be a mapping of keys to values, found str",
        ),
        (lambda path: path.write_text(""), "the file must be a mapping of keys to values, found nothing"),
    ],
)
def test_unreadable_file(tmp_path: Path, prepare: Callable[[Path], Any], message: str) -> None:
    path = tmp_path / "run.yaml"
    prepare(path)
    with pytest.raises(ConfigError) as caught:
        load_settings(path)
    assert str(path) in str(caught.value) and message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", SIZES)
def test_the_file_the_converter_writes(name: str, tmp_path: Path, published_vocab: Path) -> None:
    (tmp_path / "qwen.tiktoken").symlink_to(published_vocab)
    written = yaml.safe_load(predict_yaml(tmp_path, SIZES[name], "qwen.ckpt"))
    settings = settings_from_mapping(written, "x.yaml", tmp_path)
    assert settings.model == SIZES[name]
    assert settings.vocab_file == tmp_path / "qwen.tiktoken"
    assert settings.load_checkpoint == Path("qwen.ckpt")
    assert settings.eos_ids == (151643,)


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
    return path


def test_a_file_inherits_from_others(tmp_path: Path) -> None:
    """Key by key from a base, whole sections from a second one, which wins; a base may have a base itself."""
    write(tmp_path / "base" / "model.yaml", MINIMAL)
    write(tmp_path / "base" / "more.yaml", {"base_config": "most.yaml", "runner_config": {"epochs": 3}})
    write(tmp_path / "base" / "most.yaml", {"seed": 5, "runner_config": {"batch_size": 7}})
    path = write(
        tmp_path / "run.yaml",
        {
            "base_config": ["base/model.yaml", "base/more.yaml"],
            "model": {"model_config": {"num_layers": 5, "eos_token_id": [1, 2]}},
        },
    )
    settings = load_settings(path)
    assert (settings.model.num_layers, settings.model.num_heads, settings.eos_token_id) == (5, 4, (1, 2))
    assert settings.raw["runner_config"] == {"epochs": 3, "batch_size": 7} and settings.raw["seed"] == 5
    assert "base_config" not in settings.raw


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("nowhere.yaml", r"nowhere.yaml not found \(base_config of .*run.yaml\)"),
        ("run.yaml", "run.yaml leads back to a file that inherits from it"),
        ([], "base_config must be a file name or a list of them, got \\[\\]"),
        (["list.yaml"], "list.yaml: the file must be a mapping"),
    ],
)
def test_bad_inheritance(tmp_path: Path, base: Any, message: str) -> None:
    write(tmp_path / "list.yaml", "[1]")
    path = write(tmp_path / "run.yaml", {**MINIMAL, "base_config": base})
    with pytest.raises(ConfigError, match=message):
        load_settings(path)
