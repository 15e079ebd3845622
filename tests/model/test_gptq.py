"""Official Int4 and Int8 checkpoints (AutoGPTQ layout) through the model: golden logits and greedy texts."""

from __future__ import annotations

import numpy as np
import pytest

from research.qwen.decode.params import SamplingParams
from research.qwen.engine import Engine
from tests.gptq_fixtures import VARIANTS, gptq_folder, gptq_golden
from tests.model.golden import TOLERANCE
from tests.model.test_precision import cosine

pytestmark = pytest.mark.mindspore


def columns(golden: dict[str, np.ndarray], logits: np.ndarray) -> np.ndarray:
    """The columns the golden logits hold."""
    return logits[:, golden["kept_ids"]] if "kept_ids" in golden else logits


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_golden(variant, backend):
    """With float32 activations and cache nothing is rounded: the logits of dequantised weights, and the same texts."""
    golden = gptq_golden(variant)
    engine = Engine.from_pretrained(gptq_folder(variant), backend=backend, dtype="float32", num_blocks=64)
    got = columns(golden, engine.logits(golden["ids"].tolist()))
    assert np.abs(got - golden["logits"]).max() <= TOLERANCE
    for key in sorted(key for key in golden if key.startswith("greedy") and key.endswith("_ids")):
        ids, prompt = golden[key].tolist(), int(golden[key.replace("_ids", "_prompt")])
        params = SamplingParams(temperature=0, max_new_tokens=len(ids) - prompt, ignore_eos=True)
        assert engine.generate([ids[:prompt]], params)[0].ids == ids[prompt:], key


@pytest.mark.parametrize("kv", ["bfloat16", "int8"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_integer_activations(variant, kv):
    """As it runs by default: activations rounded to int8, the cache to bfloat16."""
    golden = gptq_golden(variant)
    engine = Engine.from_pretrained(gptq_folder(variant), kv_dtype=kv, num_blocks=64)
    got = columns(golden, engine.logits(golden["ids"].tolist()))
    assert cosine(got, golden["logits"]) >= 0.999
