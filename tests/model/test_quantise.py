"""A checkpoint in the formats asked for: what is quantised, mapped, converted or refused. Needs no MindSpore."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from research.qwen.config import QwenConfig
from research.qwen.errors import CheckpointError, ConfigError
from research.qwen.model.quantise import Plan, Source, quantised_source
from research.qwen.quant.schemes import Scheme, dequantize, dequantize_packed, pack, quantize
from research.qwen.weights.dtypes import bfloat16_to_float32
from research.qwen.weights.readers import open_checkpoint
from tests.fixtures_util import model_folder
from tests.gptq_fixtures import SCHEMES, VARIANTS, gptq_dequant, gptq_folder, sha256

QKV = "transformer.h.0.attn.c_attn"
TABLE = "transformer.wte"


def opened(folder: Path, *plan: str | None) -> Source:
    return quantised_source(
        open_checkpoint(folder), QwenConfig.from_folder(folder), Plan(*plan), progress=False
    )


def arrays_of(source: Source, name: str) -> dict[str, np.ndarray]:
    parts = [
        tensor for tensor in source.names() if tensor.startswith(name + ".") and not tensor.endswith(".bias")
    ]
    return {tensor.removeprefix(name + "."): source.read(tensor) for tensor in parts}


def test_plain_stays_as_stored() -> None:
    folder = model_folder("st_new_bf16")
    source, checkpoint = opened(folder), open_checkpoint(folder)
    assert sorted(source.names()) == sorted(checkpoint.names())
    assert source.formats == {} and source.format(f"{QKV}.weight") == "bfloat16"
    for name in source.names():
        assert source.dtype(name) == "bfloat16" and source.shape(name) == checkpoint.shape(name)
        assert np.array_equal(source.read(name), checkpoint.read(name))


@pytest.mark.parametrize("text", ["int8", "int4", "int4-g64-asym", "int8-g128"])
@pytest.mark.parametrize("model", ["st_new_bf16", "bin_sharded_fp32"])
def test_quantised_on_the_fly(model: str, text: str) -> None:
    folder, scheme = model_folder(model), Scheme.parse(text)
    source, checkpoint = opened(folder, text), open_checkpoint(folder)
    stored = checkpoint.dtype(f"{QKV}.weight")
    assert source.format(QKV) == source.format(f"{QKV}.weight") == text
    assert source.format("lm_head") == Plan(text).wanted("lm_head", plain=True)
    assert source.format(TABLE) == stored
    assert source.format(f"{QKV}.bias") == stored
    for name in (QKV, "transformer.h.1.mlp.c_proj", "lm_head"):
        weight = checkpoint.read(f"{name}.weight")
        wide = bfloat16_to_float32(weight) if stored == "bfloat16" else weight
        used = Scheme.parse(source.format(name))
        wanted, found = pack(quantize(wide, used), used), arrays_of(source, name)
        assert found.keys() == wanted.keys()
        assert all(np.array_equal(found[part], wanted[part]) for part in wanted)
        for part, array in found.items():
            assert source.shape(f"{name}.{part}") == array.shape
            assert source.dtype(f"{name}.{part}") == array.dtype.name
    assert scheme.zeros == (f"{QKV}.zeros" in source.names())


def test_arrays_can_be_read_twice_and_in_any_order() -> None:
    source = opened(model_folder("st_new_bf16"), "int4-asym")
    first = {part: source.read(f"{QKV}.{part}") for part in ("zeros", "weight", "scales")}
    for part in ("scales", "scales", "weight", "zeros"):
        assert np.array_equal(source.read(f"{QKV}.{part}"), first[part])


def test_floats_are_converted() -> None:
    folder = model_folder("st_new_bf16")
    source, checkpoint = opened(folder, "float32"), open_checkpoint(folder)
    assert {source.format(name) for name in (QKV, TABLE, "lm_head")} == {"float32"}
    name = f"{QKV}.weight"
    assert np.array_equal(source.read(name), bfloat16_to_float32(checkpoint.read(name)))
    mixed = opened(folder, None, "int4", "float16")
    assert (mixed.format(QKV), mixed.format("lm_head"), mixed.format(TABLE)) == (
        "bfloat16",
        "int4",
        "float16",
    )
    assert mixed.read(f"{TABLE}.weight").dtype == np.float16


def test_what_a_plan_means() -> None:
    assert Plan().wanted(QKV, plain=True) is None
    assert Plan("int4-g128").wanted(QKV, plain=True) == "int4"
    assert Plan("int8").wanted("lm_head", plain=True) == "int8"
    assert Plan("int8").wanted("lm_head", plain=False) is None  # whatever it is quantised in
    assert Plan("int4", "bfloat16").wanted("lm_head", plain=True) == "bfloat16"
    assert Plan("int4").wanted(TABLE, plain=True) is None
    assert Plan("float32").wanted(TABLE, plain=True) == "float32"


@pytest.mark.parametrize("plan", [("int5",), (None, "int8-asym-g64"), (None, None, "fp16")])
def test_unknown_formats(plan: tuple[str | None, ...]) -> None:
    with pytest.raises(ConfigError, match="weights|lm_head|embedding"):
        Plan(*plan)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gptq(variant: str) -> None:
    folder = gptq_folder(variant)
    source, config = opened(folder), QwenConfig.from_folder(folder)
    text = SCHEMES[variant]
    assert source.format(QKV) == text and source.format("lm_head") == "float16"
    assert ("transformer.h.0.attn.c_attn.order" in source.names()) == (variant == "int4_desc_act")
    assert not any(name.endswith("c_proj.bias") for name in source.names())  # zero biases of AutoGPTQ
    shapes = {QKV: (3 * config.hidden_size, config.hidden_size)}
    shapes["transformer.h.0.mlp.c_proj"] = (config.hidden_size, config.mlp_width)
    hashes = gptq_dequant(variant)
    assert set(hashes) == set(shapes)
    exact = opened(folder, "float32")
    for name, wanted in hashes.items():
        arrays = arrays_of(source, name)
        assert {part: source.shape(f"{name}.{part}") for part in arrays} == {
            p: a.shape for p, a in arrays.items()
        }
        assert sha256(dequantize_packed(arrays, Scheme.parse(text), *shapes[name])) == wanted
        assert sha256(exact.read(f"{name}.weight")) == wanted
    assert exact.names() == [name for name in exact.names() if name.endswith(("weight", "bias"))]


def test_gptq_with_an_integer_head() -> None:
    source = opened(gptq_folder("int4"), "int4")
    assert source.format("lm_head").startswith("int") and source.format(QKV) == "int4"
    assert source.read("lm_head.weight").dtype == np.uint8
    assert opened(gptq_folder("int4"), None, "int8").format("lm_head") == "int8"


@pytest.mark.parametrize("plan", ["int8", "int4-g64", "bfloat16", "float16"])
def test_no_second_quantisation(plan: str) -> None:
    with pytest.raises(CheckpointError, match="already quantised as int4 .* unquantised checkpoint"):
        opened(gptq_folder("int4"), plan)


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    target = tmp_path / "broken"
    shutil.copytree(gptq_folder("int4"), target)
    return target


def rewrite(folder: Path, change: dict[str, np.ndarray | None]) -> None:
    """Replace tensors (None: drop) of a folder, in one file."""
    from safetensors.numpy import load_file, save_file

    tensors: dict[str, np.ndarray] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
        file.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    tensors |= {name: array for name, array in change.items() if array is not None}
    tensors = {name: array for name, array in tensors.items() if change.get(name, array) is not None}
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"transformer.h.0.mlp.w1.bias": np.ones(384, np.float16)}, "w1.bias is not zero"),
        ({f"{QKV}.g_idx": None}, "g_idx is missing"),
        ({f"{QKV}.scales": np.ones((1, 768), np.float16)}, "scales is float16"),
        ({f"{QKV}.bias": None}, "1 tensor .*c_attn.bias.* missing"),
        ({"transformer.h.7.mlp.w1.qweight": np.zeros((32, 384), np.int32)}, "not one of this model's"),
        ({"lm_head.weight": np.ones((10, 256), np.float16)}, "wrong shape"),
    ],
)
def test_damaged_gptq_checkpoints(broken: Path, change: dict[str, np.ndarray | None], message: str) -> None:
    rewrite(broken, change)
    with pytest.raises(CheckpointError, match=message):
        opened(broken)


def test_a_shuffled_group_index_is_named(broken: Path) -> None:
    rewrite(broken, {f"{QKV}.g_idx": np.zeros(256, np.int32)})
    with pytest.raises(CheckpointError, match=f"{QKV}: g_idx"):
        opened(broken).read(f"{QKV}.weight")


def test_gptq_without_its_description(broken: Path) -> None:
    config = json.loads((broken / "config.json").read_text())
    described = config.pop("quantization_config")
    (broken / "config.json").write_text(json.dumps(config))
    assert opened(broken).format(QKV) == "int4"  # from quantize_config.json
    (broken / "quantize_config.json").unlink()
    with pytest.raises(ConfigError, match="quantize_config.json"):
        opened(broken)
    (broken / "config.json").write_text(
        json.dumps({**config, "quantization_config": {**described, "bits": 3}})
    )
    with pytest.raises(ConfigError, match="3 bits"):
        opened(broken)


def with_value(folder: Path, value: float) -> Path:
    """A float32 model with one weight of QKV replaced."""
    from safetensors.numpy import save_file

    shutil.copytree(gptq_folder("int4"), folder)
    source = opened(folder, "float32")
    tensors = {name: np.array(source.read(name)) for name in source.names()}
    tensors[f"{QKV}.weight"][5, 7] = value
    for file in folder.glob("model*"):
        file.unlink()
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_a_weight_that_is_no_number_is_named(tmp_path: Path) -> None:
    folder = with_value(tmp_path / "model", np.nan)
    with pytest.raises(CheckpointError, match=f"{QKV}: a weight is not a finite number"):
        opened(folder, "int4").read(f"{QKV}.weight")


def test_values_too_large_for_float16(tmp_path: Path) -> None:
    folder = with_value(tmp_path / "model", 1e6)
    with pytest.raises(CheckpointError, match="too large for float16"):
        opened(folder, "float16").read(f"{QKV}.weight")


def test_the_error_of_quantised_layers() -> None:
    folder = model_folder("st_new_bf16")
    source, checkpoint = opened(folder, "int8"), open_checkpoint(folder)
    w = bfloat16_to_float32(checkpoint.read(f"{QKV}.weight"))
    back = dequantize_packed(arrays_of(source, QKV), Scheme(8, 0), *w.shape)
    assert np.array_equal(back, dequantize(quantize(w, Scheme(8, 0))))
    assert 0 < np.abs(back - w).max() <= np.abs(w).max() / 127 * 0.51
