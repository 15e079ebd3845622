"""Adapters as files: peft's layout both ways, MindSpore's, what is refused and why; merging block by block."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from research.qwen.config import QwenConfig, with_changes
from research.qwen.errors import CheckpointError, ConfigError, QwenError
from research.qwen.weights import tensors as stored_tensors
from research.qwen.weights.adapter_config import AdapterConfig
from research.qwen.weights.adapters import Adapter, check_fits, load_adapter, save_adapter
from research.qwen.weights.dtypes import convert_block
from research.qwen.weights.merging import merge
from research.qwen.weights.readers import open_checkpoint
from research.qwen.weights.safetensors_file import read_metadata, read_safetensors
from tests.fixtures_util import model_folder
from tests.lora_fixtures import GOLDEN, config_for, random_adapter, random_arrays, saved_adapter
from tests.weights.tools import edit_json, tensors_of, write

BASE = model_folder("st_new_bf16")
QKV = "transformer.h.0.attn.c_attn"


def model() -> QwenConfig:
    """The small model most tests use."""
    return QwenConfig.from_folder(BASE)


def same(left: Adapter, right: Adapter) -> bool:
    first, second = left.arrays(), right.arrays()
    return sorted(first) == sorted(second) and all(
        np.array_equal(array, second[name]) for name, array in first.items()
    )


def refused(path: Path) -> str:
    with pytest.raises(QwenError) as caught:
        load_adapter(path)
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The golden adapter's folder, to damage."""
    return Path(shutil.copytree(GOLDEN, tmp_path / "adapter"))


def test_the_golden_adapter() -> None:
    adapter = load_adapter(GOLDEN)
    assert adapter.config.rank == 8 and not adapter.saved
    updates = adapter.updates()
    assert len(updates) == 10 and {update.scale for update in updates.values()} == {2.0}
    assert updates["transformer.h.1.mlp.c_proj"].a.shape == (8, 128)
    assert updates[QKV].b.shape == (192, 8)


def test_written_as_peft_writes_it(tmp_path: Path) -> None:
    save_adapter(tmp_path / "out", load_adapter(GOLDEN), "some/model")
    ours, theirs = (
        read_safetensors(folder / "adapter_model.safetensors") for folder in (tmp_path / "out", GOLDEN)
    )
    assert sorted(ours) == sorted(theirs) and all(name.startswith("base_model.model.") for name in ours)
    assert all(np.array_equal(ours[name].read(), theirs[name].read()) for name in theirs)
    assert read_metadata(tmp_path / "out" / "adapter_model.safetensors") == {"format": "pt"}
    written, given = (
        json.loads((folder / "adapter_config.json").read_text()) for folder in (tmp_path / "out", GOLDEN)
    )
    assert written["base_model_name_or_path"] == "some/model"
    for key in ("r", "lora_alpha", "lora_dropout", "peft_type", "task_type", "bias", "target_modules"):
        assert written[key] == given[key], key
    assert isinstance(written["lora_alpha"], int)


@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
@pytest.mark.parametrize("saved", [(), ("wte", "lm_head")])
def test_there_and_back(suffix: str, saved: tuple[str, ...], tmp_path: Path) -> None:
    adapter = random_adapter(model(), modules_to_save=saved, rslora=True, alpha=2.5)
    save_adapter(tmp_path / "a", adapter, "base", ckpt=True)
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [
        "adapter_config.json", "adapter_model.ckpt", "adapter_model.safetensors"
    ]  # fmt: skip
    back = load_adapter(tmp_path / "a" / f"adapter_model.{suffix}")
    assert same(back, adapter)
    assert back.config == AdapterConfig(4, 2.5, adapter.config.targets, saved, rslora=True, base="base")
    check_fits(back, model())


def test_a_folder_with_a_ckpt_alone(tmp_path: Path) -> None:
    adapter = random_adapter(model())
    save_adapter(tmp_path / "a", adapter, ckpt=True)
    names = set(open_checkpoint(tmp_path / "a" / "adapter_model.ckpt").names())
    assert f"{QKV}.lora_A.weight" in names  # MindSpore's file has the names of its parameters
    (tmp_path / "a" / "adapter_model.safetensors").unlink()
    assert same(load_adapter(tmp_path / "a"), adapter)


def test_other_formats_of_numbers(tmp_path: Path) -> None:
    adapter = random_adapter(model(), modules_to_save=("wte",))
    for dtype in ("bfloat16", "float16"):
        save_adapter(tmp_path / dtype, adapter, dtype=dtype)
        found = load_adapter(tmp_path / dtype).arrays()
        for name, array in adapter.arrays().items():
            rounded, _ = convert_block(*convert_block(array, "float32", dtype)[:1], dtype, "float32")
            assert np.array_equal(found[name], rounded), name
    with pytest.raises(CheckpointError, match="int8"):
        save_adapter(tmp_path / "x", adapter, dtype="int8")


def test_names_inside_a_model_in_training(copy: Path) -> None:
    stored = tensors_of_file(copy)
    spelt = {name.replace("lora_A.", "lora_A.default."): value for name, value in stored.items()}
    whole = "base_model.model.transformer.wte.modules_to_save.default.weight"
    spelt[whole] = ("float32", np.ones((1000, 64), np.float32))
    write(copy / "adapter_model.safetensors", spelt)
    adapter = load_adapter(copy)
    assert len(adapter.updates()) == 10 and list(adapter.saved) == ["transformer.wte.weight"]
    assert adapter.config.modules_to_save == ("wte",)


def test_scales_follow_pefts_rules() -> None:
    config = config_for(
        rank=8, alpha=16, rslora=True, rank_pattern=(("mlp.c_proj", 2),), alpha_pattern=((r"h\.0\..*", 4.0),)
    )
    assert config.scale("transformer.h.1.attn.c_proj") == pytest.approx(16 / 8**0.5)
    assert config.scale("transformer.h.1.mlp.c_proj") == pytest.approx(16 / 2**0.5)
    assert config.module_rank("transformer.h.0.mlp.c_proj") == 2
    assert config.scale("transformer.h.0.attn.c_proj") == pytest.approx(4 / 8**0.5)
    assert config.is_target("transformer.h.0.mlp.c_proj") and not config.is_target("lm_head")
    assert not config_for(targets=("attn.c_proj",)).is_target("transformer.h.0.mlp.c_proj")
    assert config_for(targets=r".*\.w[12]").is_target("transformer.h.0.mlp.w1")


def test_ranks_that_differ(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"rank_pattern": (("mlp.c_proj", 2),), "alpha_pattern": (("mlp.w1", 1),)}
    saved_adapter(tmp_path / "a", BASE, **changes)
    adapter = load_adapter(tmp_path / "a")
    assert adapter.updates()["transformer.h.0.mlp.c_proj"].rank == 2
    assert adapter.updates()["transformer.h.0.mlp.w1"].scale == 0.25


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_dora", True),
        ("lora_bias", True),
        ("bias", "all"),
        ("fan_in_fan_out", True),
        ("use_qalora", True),
        ("trainable_token_indices", [1, 2]),
        ("layer_replication", [[0, 2]]),
        ("init_lora_weights", "pissa_niter_4"),
        ("peft_type", "IA3"),
        ("modules_to_save", ["ln_f"]),
        ("target_modules", 3),
        ("r", 0),
        ("r", 7),
        ("r", True),
        ("lora_alpha", None),
        ("rank_pattern", {"c_attn": "8"}),
        ("alpha_pattern", {"(": 8}),
        ("soft_gate", 0.5),
    ],
)
def test_fields_that_change_the_maths(copy: Path, field: str, value: Any) -> None:
    edit_json(copy / "adapter_config.json", **{field: value})
    assert {"r": "r", "lora_alpha": "lora_alpha"}.get(field, field) in refused(copy)


def test_fields_without_a_meaning_for_the_sum(copy: Path) -> None:
    fields = {
        "inference_mode": False,
        "peft_version": "0.18.1",
        "eva_config": {"rho": 2},
        "qalora_group_size": 16,
    }
    edit_json(copy / "adapter_config.json", **fields, init_lora_weights="gaussian", new_switch=False)
    assert same(load_adapter(copy), load_adapter(GOLDEN))


def tensors_of_file(folder: Path) -> dict[str, tuple[str, np.ndarray]]:
    return {
        name: (tensor.dtype, tensor.read().copy())
        for name, tensor in read_safetensors(folder / "adapter_model.safetensors").items()
    }


def test_damaged_weights(copy: Path) -> None:
    stored = tensors_of_file(copy)
    first = f"base_model.model.{QKV}.lora_A.weight"

    def message(**changes: Any) -> str:
        changed = {**stored, **changes.get("new", {})}
        for name in changes.get("without", ()):
            del changed[name]
        write(copy / "adapter_model.safetensors", changed)
        return refused(copy)

    assert f"{QKV}.lora_A.weight is missing" in message(without=[first])
    assert "lora_B.weight is missing" in message(without=[first.replace("lora_A", "lora_B")])
    bad = stored[first][1].copy()
    bad[3, 4] = np.nan
    assert "1 of 512 values" in message(new={first: ("float32", bad)}) and "NaN" in refused(copy)
    assert "has rank 4" in message(new={first: ("float32", np.ones((4, 64), np.float32))})
    assert "int32" in message(new={first: ("int32", np.zeros((8, 64), np.int32))})
    strange = "base_model.model.transformer.h.0.attn.c_attn.lora_magnitude_vector"
    assert "lora_magnitude_vector" in message(new={strange: ("float32", np.ones(192, np.float32))})
    assert "holds no tensors" in message(without=list(stored))
    (copy / "adapter_model.safetensors").write_bytes(b"short")
    assert "not a safetensors file" in refused(copy)
    (copy / "adapter_model.safetensors").unlink()
    assert "no weights" in refused(copy)
    (copy / "adapter_config.json").unlink()
    assert "adapter_config.json" in refused(copy)
    assert "a model, not an adapter" in refused(BASE)
    assert "no such adapter" in refused(copy / "nowhere")


def test_a_missing_whole_matrix(tmp_path: Path) -> None:
    config = config_for(modules_to_save=("wte",))
    arrays = random_arrays(model(), config)
    del arrays["transformer.wte.weight"]
    with pytest.raises(CheckpointError, match=r"modules_to_save names transformer\.wte\.weight"):
        Adapter.from_arrays(config, arrays)


def test_an_adapter_for_another_model(tmp_path: Path) -> None:
    adapter = random_adapter(model(), modules_to_save=("lm_head",))
    cases = [
        ({"num_layers": 1}, "no matrix transformer.h.1"),
        ({"num_layers": 3}, "target_modules name transformer.h.2"),
        ({"hidden_size": 128, "num_heads": 8}, "c_attn.lora_A.weight is (4, 64)"),
        ({"intermediate_size": 128}, "mlp"),
        ({"vocab_size": 2000}, "lm_head.weight is (1024, 64)"),
    ]
    for changes, word in cases:
        with pytest.raises(CheckpointError) as caught:
            check_fits(adapter, with_changes(model(), **changes))
        assert word in str(caught.value), str(caught.value)
    with pytest.raises(CheckpointError, match="for another model"):
        merge(BASE, GOLDEN, tmp_path / "out")  # an MLP of another width
    assert not (tmp_path / "out").exists()


def test_some_layers_only(tmp_path: Path) -> None:
    config = config_for(partial=True)
    arrays = {name: a for name, a in random_arrays(model(), config).items() if ".h.1." in name}
    check_fits(Adapter.from_arrays(config, arrays), model())


def direct(adapter: Adapter, name: str, wanted: str) -> np.ndarray:
    """One merged tensor, computed at once."""
    checkpoint = open_checkpoint(BASE)
    wide, _ = convert_block(checkpoint.read(name), checkpoint.dtype(name), "float32")
    module = name.removesuffix(".weight")
    a, b = (adapter.tensors.get(f"{module}.lora_{half}.weight") for half in "AB")
    if name in adapter.saved:
        wide = adapter.saved[name].read()
    if a is not None and b is not None:
        wide = wide + np.float32(adapter.config.scale(module)) * (b @ a)
    return convert_block(wide, "float32", wanted)[0]


@pytest.mark.parametrize("dtype", [None, "float32", "float16"])
def test_merged_values(dtype: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Blocks that end within rows, as those of large matrices do.
    monkeypatch.setattr(stored_tensors, "BLOCK_BYTES", 1000)
    adapter = random_adapter(model(), modules_to_save=("wte",))
    summary = merge(BASE, adapter, tmp_path / "out", dtype, max_shard=100_000)
    assert summary.dtypes == (dtype or "bfloat16",) and not summary.warnings
    merged = tensors_of(tmp_path / "out")
    for name, (kind, array) in merged.items():
        assert kind == (dtype or "bfloat16")
        want = direct(adapter, name, kind)
        # The blocks' products may be summed in another order: an ulp of the format at most.
        got, wide = (convert_block(x, kind, "float32")[0] for x in (array, want))
        assert np.allclose(got, wide, rtol=1e-6 if kind == "float32" else 8e-3, atol=1e-6), name
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()
    for name in ("generation_config.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (BASE / name).read_bytes()
    config = QwenConfig.from_folder(tmp_path / "out")
    assert config == with_changes(model(), torch_dtype=dtype or "bfloat16")


def test_an_untrained_adapter_is_told(tmp_path: Path) -> None:
    config = config_for()
    arrays = random_arrays(model(), config)
    zero = {name: array * (0 if "lora_B" in name else 1) for name, array in arrays.items()}
    summary = merge(BASE, Adapter.from_arrays(config, zero), tmp_path / "out")
    assert "not trained" in summary.warnings[0]
    assert np.array_equal(
        tensors_of(tmp_path / "out")[f"{QKV}.weight"][1], tensors_of(BASE)[f"{QKV}.weight"][1]
    )


def test_merging_mistakes(tmp_path: Path) -> None:
    adapter = saved_adapter(tmp_path / "a", BASE)
    base = Path(shutil.copytree(BASE, tmp_path / "base"))
    with pytest.raises(CheckpointError, match="the base model comes first"):
        merge(adapter, base, tmp_path / "out")
    with pytest.raises(ConfigError, match="a model, not an adapter"):
        merge(base, base, tmp_path / "out")
    with pytest.raises(CheckpointError, match="is the base model"):
        merge(base, adapter, base, force=True)
    with pytest.raises(CheckpointError, match="not empty"):
        merge(base, adapter, adapter)
    huge = saved_adapter(tmp_path / "huge", BASE, size=300.0)
    with pytest.raises(CheckpointError, match=r"too large for float16.*bfloat16"):
        merge(base, huge, tmp_path / "out", "float16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "base", "huge"]


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    adapter = random_adapter(model())
    save_adapter(tmp_path / "a", adapter)
    before = (tmp_path / "a" / "adapter_model.safetensors").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        for target, force in (("a", True), ("b", False)):
            with pytest.raises(CheckpointError, match="disk full"):
                save_adapter(tmp_path / target, random_adapter(model(), 5), force=force)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a" / "adapter_model.safetensors").read_bytes() == before
    with pytest.raises(CheckpointError, match="not empty"):
        save_adapter(tmp_path / "a", adapter)
