"""``merge``: its result is a model like any other; the golden logits; what a quantised base gets told."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from research.qwen.cli import main
from research.qwen.config import QwenConfig
from research.qwen.engine import Engine
from research.qwen.model.quantise import Plan, quantised_source
from research.qwen.weights.adapters import load_adapter
from research.qwen.weights.export import export_qwen2
from research.qwen.weights.readers import open_checkpoint
from tests.fixtures_util import model_folder
from tests.gptq_fixtures import gptq_folder
from tests.lora_fixtures import GOLDEN, golden, saved_adapter
from tests.model.golden import TOLERANCE

pytestmark = pytest.mark.mindspore

QKV = "transformer.h.0.attn.c_attn"


def run(*argv: object) -> None:
    assert main([str(arg) for arg in argv]) == 0


def fails(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    assert main([str(arg) for arg in argv]) == 2
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and not captured.out, captured.err
    return lines[0]


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden model with the golden adapter."""
    folder = tmp_path_factory.mktemp("merged") / "model"
    run("merge", model_folder("finetune"), GOLDEN, folder, "-q")
    return folder


def test_golden_weights(merged: Path) -> None:
    stored = golden()
    got = open_checkpoint(merged).read(f"{QKV}.weight")[:: int(stored["row_stride"])]
    assert np.abs(got - stored["merged_h0_c_attn_weight"]).max() < 1e-6


def test_golden_logits(merged: Path) -> None:
    stored = golden()
    engine = Engine.from_pretrained(merged, kv_dtype="float32", num_blocks=32)
    got = engine.logits(stored["ids"])
    assert np.abs(got[:, :: int(stored["vocab_stride"])] - stored["merged_logits"]).max() <= TOLERANCE
    assert np.array_equal(got.argmax(-1), stored["merged_logits_argmax"])


def test_the_result_converts_quantises_exports_and_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, ids = model_folder("st_new_bf16"), list(range(5, 25))
    adapter = saved_adapter(tmp_path / "adapter", base, modules_to_save=("wte", "lm_head"))
    run("merge", base, adapter, tmp_path / "model", "--dtype", "bfloat16")
    said = capsys.readouterr().out
    assert f"wrote {tmp_path / 'model'}: 19 tensors" in said and "bfloat16" in said
    run("convert", "--torch_ckpt_dir", tmp_path / "model", "--mindspore_ckpt_path", tmp_path / "q.ckpt", "-q")
    run("quantize", tmp_path / "model", tmp_path / "int8", "--dtype", "int8", "-q")
    export_qwen2(tmp_path / "model", tmp_path / "qwen2")
    plain, converted, packed = (
        Engine.from_pretrained(path, num_blocks=32, kv_dtype="float32")
        for path in (tmp_path / "model", tmp_path / "q.ckpt", tmp_path / "int8")
    )
    want = plain.logits(ids)
    assert np.array_equal(converted.logits(ids), want)
    assert np.abs(packed.logits(ids) - want).max() < 0.05 * np.abs(want).max()
    untouched = Engine.from_pretrained(base, num_blocks=32, kv_dtype="float32").logits(ids)
    assert np.abs(untouched - want).max() > 0.2 * np.abs(want).max()  # the adapter does something


def test_a_quantised_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = gptq_folder("int4_desc_act")
    adapter = saved_adapter(tmp_path / "adapter", base)
    message = fails(capsys, "merge", base, adapter, tmp_path / "out")
    assert "quantised" in message and "--dtype float32" in message
    assert "quantised" in fails(capsys, "merge", base, adapter, tmp_path / "out", "--dtype", "float16")
    assert not (tmp_path / "out").exists()
    run("merge", base, adapter, tmp_path / "out", "--dtype", "float32", "-q")
    exact = quantised_source(
        open_checkpoint(base), QwenConfig.from_folder(base), Plan("float32"), progress=False
    )
    update = load_adapter(adapter).updates()[QKV]
    got = open_checkpoint(tmp_path / "out").read(f"{QKV}.weight")
    want = exact.read(f"{QKV}.weight") + update.rows(0, len(got))
    assert got.dtype == np.float32 and np.abs(got - want).max() < 1e-6
    run("quantize", tmp_path / "out", tmp_path / "again", "--dtype", "int4", "-q")


def test_mistakes_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = model_folder("st_new_bf16")
    adapter = saved_adapter(tmp_path / "adapter", base)
    assert "no such checkpoint" in fails(capsys, "merge", tmp_path / "no", adapter, tmp_path / "out")
    assert "no such adapter" in fails(capsys, "merge", base, tmp_path / "no", tmp_path / "out")
    assert "the base model comes first" in fails(capsys, "merge", adapter, base, tmp_path / "out")
    assert "for another model" in fails(capsys, "merge", base, GOLDEN, tmp_path / "out")
    assert "is not a size" in fails(
        capsys, "merge", base, adapter, tmp_path / "out", "--max-shard-size", "huge"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
