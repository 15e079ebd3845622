"""Every YAML of configs/: it loads, has the published sizes, stops where it should and holds its context."""

from pathlib import Path

import pytest
import yaml

from research.qwen.config import SIZES
from research.qwen.errors import ConfigError
from research.qwen.settings import load_settings

FOLDER = Path(__file__).resolve().parent.parent / "configs"
SLUGS = {"1_8b": "1.8b", "7b": "7b", "14b": "14b", "72b": "72b"}
CONTEXT = {"1_8b": 8192, "7b": 8192, "14b": 8192, "72b": 32768}
CASES = [(slug, chat) for slug in SLUGS for chat in (False, True)]


def config_path(slug: str, chat: bool) -> Path:
    return FOLDER / f"run_qwen_{slug}{'_chat' if chat else ''}.yaml"


def test_the_folder_holds_these_files() -> None:
    """Those of fine-tuning are tested in train/test_recipe_configs.py."""
    found = set(FOLDER.rglob("*.yaml")) - set((FOLDER / "finetune").rglob("*.yaml"))
    assert found == {config_path(slug, chat) for slug, chat in CASES}


@pytest.mark.parametrize(("slug", "chat"), CASES)
def test_config(slug: str, chat: bool) -> None:
    settings = load_settings(config_path(slug, chat))
    assert settings.model == SIZES[SLUGS[slug]]
    assert settings.run_mode == "predict"
    assert settings.eos_token_id == ((151645, 151644, 151643) if chat else (151643,))
    assert settings.pad_token_id == 151643
    assert settings.chat_format == ("chatml" if chat else "raw")
    assert settings.num_blocks * settings.block_size >= CONTEXT[slug] >= settings.model.seq_length
    assert settings.device_target is None
    assert settings.vocab_file is None and settings.load_checkpoint is None
    assert settings.use_past


def test_the_pool_holds_what_the_generation_limit_allows() -> None:
    for slug, chat in CASES:
        settings = load_settings(config_path(slug, chat))
        assert settings.max_decode_length == settings.num_blocks * settings.block_size
        assert settings.max_decode_length <= settings.model.max_length


@pytest.mark.parametrize(("slug", "chat"), CASES)
def test_a_misspelt_key_is_refused(slug: str, chat: bool, tmp_path: Path) -> None:
    text = config_path(slug, chat).read_text(encoding="utf-8")
    broken = tmp_path / "broken.yaml"
    broken.write_text(text.replace("num_layers:", "num_hidden_layers:"), encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_settings(broken)
    assert str(caught.value) == (
        f"{broken}: unknown key model.model_config.num_hidden_layers (did you mean 'num_layers'?)"
    )


def test_base_and_chat_differ_only_where_they_must() -> None:
    for slug in SLUGS:
        base, chat = (yaml.safe_load(config_path(slug, kind).read_text("utf-8")) for kind in (False, True))
        for one in (base, chat):
            del one["trainer"]["model_name"]
            del one["model"]["model_config"]["eos_token_id"]
            del one["model"]["model_config"]["chat_format"]
        assert base == chat
