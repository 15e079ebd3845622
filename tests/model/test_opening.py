"""Every kind of path Engine.from_pretrained takes gives the same model; a wrong one is a clear error."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from research.qwen.decode.params import SamplingParams
from research.qwen.engine import Engine
from research.qwen.errors import CheckpointError, ConfigError
from research.qwen.model.opening import cache_spec
from research.qwen.weights.convert import convert
from tests.fixtures_util import model_folder
from tests.model.golden import load

pytestmark = pytest.mark.mindspore
GREEDY = SamplingParams(temperature=0, max_new_tokens=16, ignore_eos=True)


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A folder for each format: qwen.ckpt and qwen.safetensors with what stands beside them."""
    root = tmp_path_factory.mktemp("converted")
    for suffix in ("ckpt", "safetensors"):
        convert(model_folder("bin_old_fp16"), root / suffix / f"qwen.{suffix}")
    convert(model_folder("bin_old_fp16"), root / "wide" / "qwen.ckpt", dtype="float32")
    return root


@pytest.mark.parametrize(
    "path", ["ckpt/qwen.ckpt", "ckpt", "safetensors/qwen.safetensors", "safetensors", "wide/qwen.ckpt"]
)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_converted_checkpoints_answer_as_the_original(converted, path, backend):
    golden = load("bin_old_fp16")
    engine = Engine.from_pretrained(converted / path, backend=backend, num_blocks=64)
    result = engine.generate([list(golden["prompt1_ids"])], GREEDY)[0]
    np.testing.assert_array_equal(result.prompt_ids + result.ids, golden["greedy1_ids"][: 7 + 16])
    original = Engine.from_pretrained(model_folder("bin_old_fp16"), backend=backend, num_blocks=64)
    assert set(engine.eos_ids) == set(original.eos_ids) == {1535}
    assert engine.default_params() == original.default_params()


def test_a_ckpt_with_its_yaml_alone(converted, tmp_path):
    for name in ("qwen.ckpt", "qwen.yaml"):
        shutil.copy(converted / "ckpt" / name, tmp_path / name)
    golden = load("bin_old_fp16")
    engine = Engine.from_pretrained(tmp_path / "qwen.ckpt", num_blocks=64)
    result = engine.generate([list(golden["prompt1_ids"])], GREEDY)[0]
    np.testing.assert_array_equal(result.prompt_ids + result.ids, golden["greedy1_ids"][: 7 + 16])


def test_a_ckpt_alone_is_not_enough(converted, tmp_path):
    shutil.copy(converted / "ckpt" / "qwen.ckpt", tmp_path / "qwen.ckpt")
    with pytest.raises(ConfigError, match=r"neither qwen\.yaml nor config\.json"):
        Engine.from_pretrained(tmp_path / "qwen.ckpt")


def test_nothing_there(tmp_path):
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        Engine.from_pretrained(tmp_path / "missing")


def test_weights_are_mapped_and_not_copied():
    """On cpu a parameter is the file's own memory."""
    engine = Engine.from_pretrained(model_folder("st_new_bf16"), num_blocks=16)
    maps = Path("/proc/self/maps").read_text()
    ranges = [
        tuple(int(end, 16) for end in line.split()[0].split("-"))
        for line in maps.splitlines()
        if line.endswith(".safetensors")
    ]
    weight = engine.lm.model.lm_head.weight.asnumpy()
    address = weight.__array_interface__["data"][0]
    assert any(low <= address < high for low, high in ranges)


def test_cache_size():
    config = Engine.from_pretrained(model_folder("st_new_bf16"), num_blocks=16).lm.config
    assert cache_spec(config, "cpu", 7, 32).tokens == 7 * 32
    assert cache_spec(config, "cpu", None, 16).tokens >= config.seq_length
    assert cache_spec(config, "ascend", None, 16).tokens >= config.seq_length
    with pytest.raises(ConfigError, match="num_blocks 0"):
        cache_spec(config, "cpu", 0, 16)
