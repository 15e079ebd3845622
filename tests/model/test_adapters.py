"""LoRA adapters beside shared weights: golden numbers, and rows that do not know of each other's adapters."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from research.qwen.cli import main
from research.qwen.config import QwenConfig
from research.qwen.decode.loop import Chunk
from research.qwen.decode.params import SamplingParams
from research.qwen.engine import Engine
from research.qwen.errors import CheckpointError, ConfigError, RequestError
from research.qwen.weights.adapters import save_adapter
from research.qwen.weights.merging import merge
from tests.fixtures_util import model_folder
from tests.lora_fixtures import GOLDEN, golden, random_adapter, saved_adapter
from tests.model.golden import BACKENDS, TOLERANCE

pytestmark = pytest.mark.mindspore
BASE = model_folder("st_new_bf16")
GREEDY = SamplingParams(temperature=0, max_new_tokens=12, ignore_eos=True)
# Two prompts of one length and one of another; the first two begin alike, for longer than a block.
PROMPTS = [list(range(3, 43)), [*range(3, 38), 900, 901, 902, 903, 904], [7, 8, 9, 500]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters for BASE: a plain one, and one of other ranks at some matrices only."""
    root = tmp_path_factory.mktemp("adapters")
    odd = random_adapter(
        QwenConfig.from_folder(BASE), 2, targets=("w1", "attn.c_proj"), rank=3, rank_pattern=(("w1", 9),)
    )
    save_adapter(root / "odd", odd)
    return {"plain": saved_adapter(root / "plain", BASE, 1), "odd": root / "odd"}


@pytest.fixture(scope="module", params=BACKENDS)
def golden_engine(request: pytest.FixtureRequest) -> Engine:
    return Engine.from_pretrained(
        model_folder("finetune"),
        backend=request.param,
        kv_dtype="float32",
        num_blocks=64,
        adapters={"one": GOLDEN},
    )


def test_golden_logits(golden_engine: Engine) -> None:
    stored, stride = golden(), int(golden()["vocab_stride"])
    for adapter, key in (("one", "unmerged_logits"), ("", "base_logits")):
        got = golden_engine.logits(stored["ids"], adapter)
        assert np.abs(got[:, ::stride] - stored[key]).max() <= TOLERANCE
        assert np.array_equal(got.argmax(-1), stored[f"{key}_argmax"])


def test_golden_texts(golden_engine: Engine) -> None:
    stored = golden()
    count = int(stored["greedy_prompt"])
    wanted = stored["greedy_ids"].tolist()
    params = SamplingParams(temperature=0, max_new_tokens=len(wanted) - count, ignore_eos=True)
    both = golden_engine.generate([wanted[:count]] * 2, params, ["one", ""])
    assert both[0].ids == wanted[count:]
    assert both[1].ids != both[0].ids


MIXES = {
    "stored": {},
    "int8": {"dtype": "int8"},
    "int4": {"dtype": "int4"},
    "int4-asym": {"dtype": "int4-g64-asym"},
    "exact": {"dtype": "int4", "activations": "float32"},
    "float32": {"dtype": "float32"},
}


@pytest.mark.parametrize("mix", MIXES)
def test_a_row_of_a_batch_equals_the_row_alone(mix: str, folders: dict[str, Path]) -> None:
    options = {"backend": "cpu", "num_blocks": 64, **MIXES[mix]}
    engine = Engine.from_pretrained(BASE, adapters=folders, **options)
    plain = Engine.from_pretrained(BASE, **options)
    names = ["plain", "", "odd"]
    blocks = [list(range(3 * n, 3 * n + 3)) for n in range(3)]

    def chunks(start: int, stop: int, shown: int) -> list[Chunk]:
        return [
            Chunk((PROMPTS[n] * 10)[start:stop], start, blocks[n], 1.0, shown, names[n]) for n in range(3)
        ]

    for parts in (chunks(0, 17, 5), chunks(17, 18, 1), chunks(18, 40, 22)):
        together = engine.lm.forward(parts)
        alone = [engine.lm.forward([part]) for part in parts]
        assert np.array_equal(together, np.concatenate(alone))
        # Nobody's adapter is seen by the base model's rows, nor that there are any.
        assert np.array_equal(alone[1], plain.lm.forward([parts[1]]))
        assert np.abs(alone[0] - alone[1][: len(alone[0])]).max() > 1e-3


@pytest.mark.parametrize("dtype", [None, "int8"])
def test_beside_the_weights_or_inside(dtype: str | None, folders: dict[str, Path], tmp_path: Path) -> None:
    """The same numbers as a merged float32 model; over int8, as those weights with the update added."""
    base, ids = BASE, PROMPTS[0]
    if dtype is not None:
        command = ["quantize", str(BASE), str(tmp_path / "q"), "--dtype", dtype, "-q"]
        assert main([*command, "--lm-head-dtype", "bfloat16"]) == 0
        base = tmp_path / "q"
    exact = {"backend": "cpu", "num_blocks": 16, "dtype": "float32"}
    shared = Engine.from_pretrained(base, adapters=folders, **exact)
    for name in folders if dtype is None else ("odd",):
        command = ["merge", str(base), str(folders[name]), str(tmp_path / name), "--dtype", "float32", "-q"]
        assert main(command) == 0
        merged = Engine.from_pretrained(tmp_path / name, **exact)
        want = merged.logits(ids)
        assert np.abs(shared.logits(ids, name) - want).max() <= 2e-5 * np.abs(want).max() + 1e-5
        vectors = shared.embed([ids], name), merged.embed([ids])
        assert np.abs(vectors[0] - vectors[1]).max() < 1e-5
        assert abs(shared.score(ids, adapter=name).total - merged.score(ids).total) < 1e-2


def test_requests_with_their_own_adapters(folders: dict[str, Path]) -> None:
    """Answers in one batch, with shared prefixes and too little cache, are those of each request alone."""
    roomy = Engine.from_pretrained(BASE, adapters=folders, num_blocks=128)
    tight = Engine.from_pretrained(BASE, adapters=folders, num_blocks=11, prefill_chunk=16)
    prompts = PROMPTS[:2] * 3
    names = ["plain", "plain", "odd", "odd", "", ""]
    alone = [
        Engine.generate(roomy, [ids], GREEDY, name)[0].ids for ids, name in zip(prompts, names, strict=True)
    ]
    assert len({tuple(ids) for ids in alone[::2]}) == 3
    for engine in (roomy, tight):
        for _ in range(2):  # the second time every prefix is known
            assert [result.ids for result in engine.generate(prompts, GREEDY, names)] == alone
    assert tight.requests.loop.counters.preemptions > 0
    assert roomy.requests.loop.counters.prefix_hits > 0
    assert "".join(delta.text for delta in roomy.stream(prompts[0], GREEDY, "odd")) == ""  # no vocabulary
    streamed = [i for delta in roomy.stream(prompts[0], GREEDY, "odd") for i in delta.ids]
    assert streamed == alone[2]


def test_mistakes(folders: dict[str, Path], tmp_path: Path) -> None:
    def refused(kind: type[Exception], word: str, **adapters: Path) -> None:
        with pytest.raises(kind, match=word):
            Engine.from_pretrained(BASE, num_blocks=8, adapters=adapters)

    refused(CheckpointError, "for another model", a=GOLDEN)
    refused(CheckpointError, "no such adapter", a=tmp_path / "nowhere")
    whole = saved_adapter(tmp_path / "whole", BASE, modules_to_save=("wte", "lm_head"))
    refused(CheckpointError, r"lm_head and transformer\.wte.*merge", a=folders["plain"], b=whole)
    head = saved_adapter(tmp_path / "head", BASE, targets=("c_attn", "lm_head"))
    refused(CheckpointError, "changes lm_head.*merge", a=head)
    with pytest.raises(ConfigError, match="needs a name"):
        Engine.from_pretrained(BASE, num_blocks=8, adapters={" ": folders["plain"]})
    engine = Engine.from_pretrained(BASE, num_blocks=8, adapters=folders)
    assert engine.adapters == ("plain", "odd")
    for ask in (
        lambda: engine.generate([PROMPTS[2]], GREEDY, "other"),
        lambda: next(iter(engine.stream(PROMPTS[2], GREEDY, "other"))),
        lambda: engine.logits(PROMPTS[2], "other"),
    ):
        with pytest.raises(RequestError, match="no adapter 'other'; loaded: plain, odd"):
            ask()
    with pytest.raises(RequestError, match="2 adapters for 1 prompts"):
        engine.generate([PROMPTS[2]], GREEDY, ["plain", "odd"])
    assert merge(BASE, whole, tmp_path / "way out").tensors == 19  # what the message advises
