"""The closed table against the golden checkpoints, and what check() says."""

from __future__ import annotations

import numpy as np
import pytest

from research.qwen.config import SIZES, QwenConfig, with_changes
from research.qwen.errors import CheckpointError
from research.qwen.weights import names
from research.qwen.weights.readers import open_checkpoint
from tests.fixtures_util import model_folder

MODELS = ("st_new_bf16", "bin_old_fp16", "bin_sharded_fp32", "full_vocab_bf16", "longctx")


class Listed:
    """A checkpoint that is only a list."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], dtype: str = "float16") -> None:
        self._shapes, self._dtype = shapes, dtype

    def names(self) -> list[str]:
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> str:
        return self._dtype


@pytest.mark.parametrize("model", MODELS)
def test_golden_checkpoints_fit_the_table(model: str) -> None:
    checkpoint = open_checkpoint(model_folder(model))
    config = QwenConfig.from_folder(model_folder(model))
    names.check(checkpoint, config)
    assert set(checkpoint.names()) == set(names.expected(config))


@pytest.mark.parametrize("size", sorted(SIZES))
def test_the_table_is_a_bijection_for_every_size(size: str) -> None:
    wanted = names.expected(SIZES[size])
    there = [names.to_mindspore(name) for name in wanted]
    assert len(set(there)) == len(wanted) == 8 * SIZES[size].num_layers + 3
    assert [names.to_published(name) for name in there] == list(wanted)


def test_parameter_count_of_7b_is_the_published_one() -> None:
    count = sum(int(np.prod(shape)) for shape in names.expected(SIZES["7b"]).values())
    assert count == 7_721_324_544


@pytest.mark.parametrize("name", ["transformer.h.0.attn.q.weight", "transformer.h.01.ln_1.weight", "wte", ""])
def test_strangers_are_refused_in_both_directions(name: str) -> None:
    with pytest.raises(CheckpointError):
        names.to_mindspore(name)
    with pytest.raises(CheckpointError):
        names.to_published(name)


def test_errors_name_what_is_wrong_and_count_it() -> None:
    config = SIZES["1.8b"]
    shapes = names.expected(config)
    del shapes["transformer.h.3.attn.c_attn.weight"], shapes["lm_head.weight"]
    shapes["transformer.h.24.ln_1.weight"] = (2048,)
    shapes["transformer.wte.weight"] = (151851, 2048)
    with pytest.raises(CheckpointError) as caught:
        names.check(Listed(shapes), config)
    text = str(caught.value)
    assert "2 tensors (transformer.h.3.attn.c_attn.weight, lm_head.weight) missing" in text
    assert "1 tensor (transformer.h.24.ln_1.weight) unexpected" in text
    assert "transformer.wte.weight is (151851, 2048), expected (151936, 2048)" in text
    assert "\n" not in text


def test_a_deeper_config_is_refused() -> None:
    with pytest.raises(CheckpointError, match="8 tensors .* missing"):
        names.check(Listed(names.expected(SIZES["7b"])), with_changes(SIZES["7b"], num_layers=33))


def test_integer_tensors_are_refused() -> None:
    with pytest.raises(CheckpointError, match="of type int8"):
        names.check(Listed(names.expected(SIZES["7b"]), "int8"), SIZES["7b"])


def test_quantised_checkpoints_are_called_so() -> None:
    with pytest.raises(CheckpointError, match="GPTQ"):
        names.check(Listed({"transformer.h.0.mlp.w1.qweight": (4, 4)}), SIZES["7b"])


def test_buffers_of_early_releases_are_known() -> None:
    assert names.is_dropped("transformer.h.11.attn.masked_bias")
    assert names.is_dropped("transformer.rotary_emb.inv_freq")
    assert not names.is_dropped("transformer.h.11.attn.c_attn.bias")
