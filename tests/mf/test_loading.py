"""Building, loading, saving, and the model as a cell: with MindSpore's and MindFormers' own functions."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml

from research.qwen.errors import CheckpointError, ConfigError, KernelError, PromptError, RequestError
from tests.fixtures_util import model_folder

pytestmark = pytest.mark.mindspore


@pytest.fixture(scope="module")
def saved(small: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    small.model.save_pretrained(folder, "q")
    return folder


def is_golden(model: Any, small: SimpleNamespace) -> bool:
    (row,) = model.generate(small.prompts[1], max_new_tokens=64, eos_token_id=[], do_sample=False)
    return row.tolist() == small.golden["greedy1_ids"].tolist()


def zero(model: Any) -> bool:
    return all(not parameter.asnumpy().any() for parameter in model.get_parameters())


def test_published_snippet_then_mindspore_loads(mf: Any, small: SimpleNamespace, saved: Path) -> None:
    import mindspore as ms
    from mindformers import LlamaConfig

    config = LlamaConfig.from_pretrained(str(saved / "q.yaml"))
    model = mf.QwenForCausalLM(config)
    assert zero(model) and len(list(model.get_parameters())) == 19  # right shapes, nothing in them
    stored = ms.load_checkpoint(str(saved / "q.ckpt"))
    assert {name: tuple(p.shape) for name, p in stored.items()} == {
        p.name: tuple(p.shape) for p in model.get_parameters()
    }
    assert ms.load_param_into_net(model, stored) == (
        [],
        [],
    )  # bfloat16 into float32 or float16: widened or cast
    assert len(model.generate(small.prompts[1], max_new_tokens=4)[0]) == len(small.prompts[1]) + 4
    config.param_init_type = ms.float32
    model = mf.QwenForCausalLM(config)
    ms.load_param_into_net(model, stored)
    assert is_golden(model, small)


def test_mindformers_loads_through_the_hook(mf: Any, small: SimpleNamespace, saved: Path) -> None:
    import mindspore as ms
    from mindformers import LlamaConfig

    config = LlamaConfig.from_pretrained(str(saved / "q.yaml"))
    model = mf.QwenForCausalLM(config)
    parameters = model.fuse_weight_from_ckpt(ms.load_checkpoint(str(saved / "q.ckpt")))
    assert ms.load_param_into_net(model, parameters) == ([], [])
    assert is_golden(model, small)
    wrapped = {f"model.{k}": v for k, v in ms.load_checkpoint(str(saved / "q.ckpt")).items()}
    wrapped["global_step"] = ms.Parameter(ms.Tensor(3), name="global_step")
    wrapped["adam_m.model.lm_head.weight"] = wrapped["model.lm_head.weight"]
    model.fuse_weight_from_ckpt(wrapped)
    assert is_golden(model, small)


def test_missing_and_misshapen_weights_are_errors(mf: Any, small: SimpleNamespace, saved: Path) -> None:
    import mindspore as ms

    stored = ms.load_checkpoint(str(saved / "q.ckpt"))
    broken = dict(stored)
    del broken["transformer.h.1.mlp.w2.weight"]
    with pytest.raises(CheckpointError, match=r"1 tensor \(transformer.h.1.mlp.w2.weight\) missing"):
        small.model.fuse_weight_from_ckpt(broken)
    broken = {**stored, "transformer.ln_f.weight": stored["lm_head.weight"]}
    with pytest.raises(CheckpointError, match=r"transformer.ln_f.weight is \(1024, 64\)"):
        small.model.fuse_weight_from_ckpt(broken)
    with pytest.raises(CheckpointError, match="unexpected"):
        small.model.fuse_weight_from_ckpt({**stored, "lm_head.bias": stored["transformer.ln_f.weight"]})
    assert is_golden(small.model, small)  # a refused checkpoint changes nothing


def test_checkpoint_name_or_path(mf: Any, small: SimpleNamespace, saved: Path) -> None:
    from mindformers import LlamaConfig

    for path in (saved / "q.ckpt", model_folder("st_new_bf16")):
        config = LlamaConfig.from_pretrained(str(saved / "q.yaml"), checkpoint_name_or_path=str(path))
        assert is_golden(mf.QwenForCausalLM(config), small)
    config = LlamaConfig.from_pretrained(str(saved / "q.yaml"), checkpoint_name_or_path="nowhere.ckpt")
    with pytest.raises(CheckpointError, match="no such checkpoint: nowhere.ckpt"):
        mf.QwenForCausalLM(config)


def test_warnings_of_a_model_that_is_not_what_it_seems(
    mf: Any, saved: Path, small: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    from mindformers import LlamaConfig

    empty = mf.QwenForCausalLM(LlamaConfig.from_pretrained(str(saved / "q.yaml")))
    for _ in range(2):
        empty.generate([1, 2], max_new_tokens=2, eos_token_id=[])
    assert [r.getMessage() for r in caplog.records if "weights are zero" in r.getMessage()] == [
        "no checkpoint was loaded: all weights are zero, and so is the meaning of the answer"
    ]
    small.model.generate([1, 2], max_new_tokens=1)
    config = LlamaConfig.from_pretrained(str(saved / "q.yaml"), seq_length=4096)
    config.checkpoint_name_or_path = str(model_folder("st_new_bf16"))
    caplog.clear()
    mf.QwenForCausalLM(config)
    assert "config.json beside it says otherwise: seq_length 8192 (not 4096)" in caplog.text


def test_save_and_load_a_folder(mf: Any, small: SimpleNamespace, saved: Path, tmp_path: Path) -> None:
    assert sorted(file.name for file in saved.iterdir()) == ["q.ckpt", "q.yaml"]
    assert is_golden(mf.QwenForCausalLM.from_pretrained(saved), small)
    assert is_golden(mf.QwenForCausalLM.from_pretrained(saved / "q.ckpt", backend="reference"), small)
    small.model.save_pretrained(tmp_path / "hf", save_json=True)
    assert sorted(file.name for file in (tmp_path / "hf").iterdir()) == ["config.json", "model.safetensors"]
    again = mf.QwenForCausalLM.from_pretrained(tmp_path / "hf", use_past=False)
    assert not again.use_past and is_golden(again, small)
    text = yaml.safe_load((saved / "q.yaml").read_text(encoding="utf-8"))
    assert text["model"]["model_config"]["rotary_emb_base"] == 10000


def test_saved_weights_are_bit_identical(small: SimpleNamespace, saved: Path) -> None:
    from research.qwen.weights.readers import open_checkpoint

    ours, source = open_checkpoint(saved / "q.ckpt"), open_checkpoint(model_folder("st_new_bf16"))
    assert sorted(ours.names()) == sorted(source.names())
    for name in source.names():
        if ours.dtype(name) == source.dtype(name):
            assert np.array_equal(ours.read(name), source.read(name))
        else:  # biases and norms are kept in float32
            assert ours.dtype(name) == "float32"
            wide = (source.read(name).astype(np.uint32) << 16).view(np.float32)
            assert np.array_equal(ours.read(name), wide)


def test_caches_are_not_saved(small: SimpleNamespace, tmp_path: Path) -> None:
    import mindspore as ms

    ms.save_checkpoint(small.model, str(tmp_path / "x.ckpt"))
    stored = ms.load_checkpoint(str(tmp_path / "x.ckpt"))
    assert len(stored) == 19 and not [name for name in stored if "cache" in name]
    small.model.fuse_weight_from_ckpt(stored)
    assert is_golden(small.model, small)


def test_folders_that_say_too_little_or_too_much(mf: Any, saved: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        mf.QwenForCausalLM.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"config.json not found"):
        mf.QwenForCausalLM.from_pretrained(tmp_path)
    for name in ("a", "b"):
        shutil.copy(saved / "q.yaml", tmp_path / f"{name}.yaml")
    with pytest.raises(ConfigError, match="several models"):
        mf.QwenForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_hidden_layers": 3}, "num_hidden_layers.*'num_layers'"),
        ({"use_dynamic_ntx": True}, "use_dynamic_ntx.*'use_dynamic_ntk'"),
        ({"n_kv_heads": 2}, "n_kv_heads"),
        ({"top_p": 1.5}, "top_p"),
        ({"intermediate_size": None}, "intermediate_size"),
        ({"kv_channels": 8}, "kv_channels 8"),
        ({"pet_config": {"pet_type": "lora"}}, "pet_config is not supported"),
        ({"eos_token_id": [5, 4000]}, "eos_token_id"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
    ],
)
def test_bad_configs(mf: Any, saved: Path, change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        mf.QwenForCausalLM.from_pretrained(saved, **change)


def test_defaults_of_another_vocabulary_are_replaced(mf: Any) -> None:
    from mindformers import LlamaConfig

    from research.qwen.mf.config import read_config

    sizes = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "intermediate_size": 8, "seq_length": 64}
    real = read_config(LlamaConfig(vocab_size=151936, **sizes))
    assert (real.generation["eos_token_id"], real.generation["pad_token_id"]) == ([151643], 151643)
    own = read_config(LlamaConfig(vocab_size=300, eos_token_id=2, top_k=5, do_sample=True, **sizes))
    assert (own.generation["top_k"], own.generation["do_sample"]) == (5, True)
    assert (
        read_config(LlamaConfig(vocab_size=151936, theta=20000.0, **sizes)).shape.rotary_emb_base == 20000.0
    )


def test_unknown_backend_and_absent_device(mf: Any, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from research.qwen.kernels.devices import device_available
    from research.qwen.mf.trainer import use_device

    with pytest.raises(KernelError, match="abacus"):
        mf.QwenForCausalLM.from_pretrained(saved, backend="abacus")
    monkeypatch.setenv("QWEN_BACKEND", "reference")
    assert mf.QwenForCausalLM.from_pretrained(saved).kernels.name == "reference"
    with pytest.raises(KernelError, match="GPU.*choose CPU, Ascend"):
        use_device("GPU")
    if not device_available():
        with pytest.raises(KernelError, match="Ascend is not available here"):
            use_device("Ascend")


# ---- the model as a cell ----


def test_call_gives_golden_logits_in_both_modes(small: SimpleNamespace) -> None:
    import mindspore as ms

    before, stride = ms.get_context("mode"), int(small.golden["vocab_stride"])
    ids = small.prompts[1]
    try:
        for mode in (ms.GRAPH_MODE, ms.PYNATIVE_MODE):
            ms.set_context(mode=mode)
            logits = small.model(ms.Tensor([ids, ids], ms.int32)).asnumpy()
            assert logits.shape == (2, len(ids), 1024)
            assert np.abs(logits[1][:, ::stride] - small.golden["prompt1_logits"]).max() < 3e-4
            last = small.model(ms.Tensor([ids], ms.int32), batch_valid_length=ms.Tensor([[5]], ms.int32))
            assert np.abs(last.asnumpy()[0] - logits[0, 4]).max() < 1e-5
    finally:
        ms.set_context(mode=before)


def test_paged_arguments(small: SimpleNamespace) -> None:
    """Prefill of two rows, a decoding step, and a run of new tokens by q_seq_lens, in blocks of the caller."""
    import mindspore as ms

    def tensor(value: Any) -> Any:
        return ms.Tensor(np.asarray(value, np.int32))

    a, b = small.prompts[0], small.prompts[1]
    width = max(len(a), len(b))
    padded = [row + [0] * (width - len(row)) for row in (a, b)]
    tables = tensor([[7, 3, 9, -1], [30, 2, 5, 6]])
    whole = small.model(tensor([a + [8, 9, 10]])).asnumpy()[0]
    first = small.model(tensor(padded), batch_valid_length=tensor([len(a), len(b)]), block_tables=tables)
    assert np.abs(first.asnumpy()[0] - whole[len(a) - 1]).max() < 1e-4
    step = small.model(
        tensor([[8], [8]]),
        batch_valid_length=tensor([[len(a) + 1, len(b) + 1]]),
        block_tables=tables,
        slot_mapping=tensor([0, 0]),
    )
    assert step.shape == (2, 1024) and np.abs(step.asnumpy()[0] - whole[len(a)]).max() < 1e-4
    run = small.model(
        tensor([[9, 10, 9]]),
        batch_valid_length=tensor([len(a) + 3, len(b) + 2]),
        q_seq_lens=tensor([2, 1]),
        block_tables=tables,
    )
    assert np.abs(run.asnumpy()[0] - whole[len(a) + 2]).max() < 1e-4
    with pytest.raises(RequestError, match="block table"):
        small.model(tensor([[8]]), batch_valid_length=tensor([99]), block_tables=tensor([[1, -1]]))
    with pytest.raises(RequestError, match="needs block_tables"):
        small.model(tensor([[8]]), batch_valid_length=tensor([9]))
    with pytest.raises(RequestError, match="labels"):
        small.model(tensor([a]), labels=tensor([a]))
    with pytest.raises(PromptError, match="outside the vocabulary"):
        small.model(tensor([[5000]]))


@pytest.mark.parametrize("use_past", [True, False])
def test_mindformers_own_loop_can_drive_it(mf: Any, small: SimpleNamespace, use_past: bool) -> None:
    from mindformers.generation.text_generator import GenerationMixin
    from mindspore import ops

    options = {"seq_length": 128, "do_sample": False, "use_past": use_past}
    model = mf.QwenForCausalLM.from_pretrained(model_folder("st_new_bf16"), **options)
    model.argmax = lambda logits, dim=-1: ops.argmax(logits, dim)  # theirs has no CPU kernel
    rows, width = small.prompts[:2], max(map(len, small.prompts[:2]))
    padded = [row + [1023] * (width - len(row)) for row in rows]
    theirs = GenerationMixin.generate(model, padded, max_new_tokens=12, eos_token_id=[1023])
    ours = model.generate(padded, max_new_tokens=12, eos_token_id=[1023])
    assert [row.tolist() for row in theirs] == [row.tolist() for row in ours]
