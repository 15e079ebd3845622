"""The memory estimate against numbers worked out by hand, and what the machine is said to have."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from research.qwen.config import SIZES, QwenConfig
from research.qwen.errors import ConfigError
from research.qwen.train import memory
from research.qwen.train.recipe import Recipe, changed
from research.qwen.weights.names import expected
from scripts import finetune_memory

ROOT = Path(__file__).resolve().parents[2]
# 10 rows of vocabulary, 2 layers, hidden 8, MLP 6 wide.
TINY = QwenConfig(
    vocab_size=10, hidden_size=8, num_layers=2, num_heads=2, intermediate_size=12, kv_channels=4
)
# Per layer: 24 x 8 + 8 x 8 + 6 x 8 + 6 x 8 + 8 x 6 = 400 in matrices, 24 + 8 + 8 = 40 beside them.
LAYER, SMALL, TABLE, NORM = 400, 40, 80, 8
ALL = 2 * (LAYER + SMALL) + 2 * TABLE + NORM


def recipe(**values: object) -> Recipe:
    base = {
        "batch_size": 1,
        "accumulation": 1,
        "max_length": 16,
        "recompute": False,
        "flash_attention": False,
        "lora_dropout": 0.0,
    }
    return Recipe(**{**base, **values})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", SIZES)
def test_parameters_are_those_of_the_table_of_tensors(name: str) -> None:
    count = 0
    for shape in expected(SIZES[name]).values():
        count += shape[0] * (shape[1] if len(shape) > 1 else 1)
    assert memory.parameters(SIZES[name]) == count


def test_the_published_count_of_trained_parameters() -> None:
    """What the published script prints for Qwen-7B-Chat with LoRA."""
    assert memory.trainable(SIZES["7b"], Recipe()) == 143_130_624


def test_lora_counts_by_target() -> None:
    shapes = {"c_attn": 24 + 8, "attn.c_proj": 8 + 8, "mlp.c_proj": 8 + 6, "w1": 6 + 8, "w2": 6 + 8}
    for target, size in shapes.items():
        assert memory.trainable(TINY, recipe(lora_rank=3, lora_targets=(target,))) == 2 * 3 * size
    for target, size in (("c_proj", 30), ("attention", 48), ("mlp", 42), ("all", 90)):
        assert memory.trainable(TINY, recipe(lora_rank=3, lora_targets=(target,))) == 2 * 3 * size
    both = recipe(lora_rank=3, lora_targets=("w1", "mlp"), modules_to_save=("wte", "lm_head"))
    assert memory.trainable(TINY, both) == 2 * 3 * 42 + 2 * TABLE


# Per token: a layer keeps 6 x 8 + 2 x 6 values on cpu; the one at work holds 3 x (8 x 8 + 4 x 6).
KEPT, WORK, WIDE = 60, 3 * 88, 88


def test_full_on_cpu() -> None:
    """float32: 4 bytes of weight, 4 of gradient, 8 of AdamW a parameter."""
    found = memory.estimate(TINY, recipe(method="full"))
    assert (found.parameters, found.trainable) == (ALL, ALL)
    assert (found.weights, found.gradients, found.optimizer) == (4 * ALL, 4 * ALL, 8 * ALL)
    assert found.activations == 16 * (2 * KEPT + WORK) * 4
    assert found.logits == 16 * 10 * 4 + 2 * 16 * 8 * 4
    assert found.total == sum(
        (found.weights, found.gradients, found.optimizer, found.activations, found.logits, found.runtime)
    )


def test_full_on_ascend_computes_in_half() -> None:
    fused = recipe(method="full", flash_attention=True)
    found = memory.estimate(TINY, fused, "ascend")
    assert (found.weights, found.gradients, found.optimizer) == (4 * ALL + 2 * LAYER, 4 * ALL, 8 * ALL)
    assert found.activations == 16 * (2 * WIDE + WORK) * 2
    three = memory.estimate(TINY, changed(fused, accumulation=3), "ascend")
    assert three.activations - found.activations == 16 * 2 * 2 * WIDE * 2  # one graph holds all micro batches
    staged = changed(fused, batch_size=2, accumulation=6, pipeline_stage=2, micro_batch_num=3)
    pipeline = memory.estimate(TINY, staged, "ascend")
    # 12 rows in 3 parts, 2 of them on their way through stages of one layer.
    assert pipeline.activations == 4 * 16 * (2 * WIDE + WORK) * 2
    plain = memory.estimate(TINY, changed(fused, flash_attention=False), "ascend")
    assert plain.activations - found.activations == 16 * 2 * (2 * 2 * 16) * 2  # two layers, two heads


def test_recompute_keeps_the_input_of_each_layer_only() -> None:
    found = memory.estimate(TINY, recipe(method="full", recompute=True))
    assert found.activations == 16 * (2 * 8 + WORK) * 4


def test_lora() -> None:
    """On cpu one layer and lm_head are there in float32 besides."""
    lora = recipe(lora_rank=3, lora_targets=("all",))
    found = memory.estimate(TINY, lora, stored="bfloat16")
    learned = 2 * 3 * 90
    frozen = 2 * (2 * LAYER + 4 * SMALL) + 2 * 2 * TABLE
    assert found.weights == frozen + 4 * LAYER + 4 * TABLE + 4 * learned
    assert (found.gradients, found.optimizer) == (4 * learned, 8 * learned)
    assert found.activations == 16 * (2 * KEPT + WORK + 3 * (4 * 8 + 6)) * 4
    npu = memory.estimate(TINY, lora, "ascend")
    assert npu.weights == frozen + 2 * LAYER + 4 * learned
    saved = memory.estimate(TINY, changed(lora, modules_to_save=("wte",)), "ascend")
    assert saved.weights == 2 * (4 * LAYER + 4 * SMALL) + 4 * TABLE + 2 * LAYER + 4 * (learned + TABLE)
    wide = memory.estimate(TINY, lora, stored="float32")
    assert wide.weights == 2 * (4 * LAYER + 4 * SMALL) + 2 * 4 * TABLE + 4 * learned


def test_quantised_base() -> None:
    """int4: half a byte, and a float16 scale for 128 inputs; rows padded to 16, inputs to 128."""
    assert memory.matrix_bytes("int4", 4096, 4096) == 4096 * 4096 // 2 + 4096 * 32 * 2
    assert memory.matrix_bytes("int8", 4096, 4096) == 4096 * 4096 + 4096 * 4
    assert memory.matrix_bytes("int4-g64-asym", 10, 100) == 16 * 128 // 2 + 2 * 16 * (2 + 1)
    four, eight, plain = (
        memory.estimate(SIZES["7b"], Recipe(method="qlora", base_dtype=dtype), "ascend").weights
        for dtype in ("int4", "int8", "as stored")
    )
    layers = 32 * LAYERS_7B
    scales = 4 * layers / 128  # float32 in the Ascend graph
    assert plain - eight == pytest.approx(layers, rel=0.01)
    assert eight - four == pytest.approx(layers / 2 - scales, rel=0.01)


LAYERS_7B = 4 * 4096 * 4096 + 3 * 4096 * 11008


def test_what_is_split() -> None:
    whole = memory.estimate(SIZES["7b"], Recipe(method="full"), "ascend")
    in_two = Recipe(method="full", model_parallel=2, vocab_emb_dp=False)
    halves = memory.estimate(SIZES["7b"], in_two, "ascend")
    assert (halves.gradients, halves.optimizer) == (whole.gradients // 2, whole.optimizer // 2)
    table = 151936 * 4096
    copied = memory.estimate(SIZES["7b"], changed(in_two, vocab_emb_dp=True), "ascend")
    assert copied.gradients - halves.gradients == 4 * table // 2
    lora = [
        memory.estimate(SIZES["7b"], Recipe(model_parallel=2, vocab_emb_dp=dp), "ascend")
        for dp in (True, False)
    ]
    assert lora[0].weights - lora[1].weights == 2 * table // 2
    copies = Recipe(method="full", data_parallel=4, optimizer_parallel=True)
    split = memory.estimate(SIZES["7b"], copies, "ascend")
    assert split.optimizer == whole.optimizer // 4 and split.gradients == whole.gradients // 4
    assert split.weights < whole.weights
    stages = memory.estimate(
        SIZES["7b"], Recipe(method="full", pipeline_stage=4, micro_batch_num=4), "ascend"
    )
    ends = SIZES["7b"].vocab_size * 4096
    assert stages.gradients == 4 * (memory.parameters(SIZES["7b"]) - 2 * ends) // 4 + 4 * ends
    assert memory.trainable(SIZES["7b"], copies) == whole.parameters


def test_longer_rows_and_larger_batches_need_more() -> None:
    totals = [
        memory.estimate(SIZES["1.8b"], changed(Recipe(), **more)).total
        for more in ({}, {"max_length": 2048}, {"max_length": 2048, "batch_size": 4}, {"recompute": False})
    ]
    assert totals[0] < totals[1] < totals[2] and totals[0] < totals[3]


def test_sizes() -> None:
    assert memory.parse_size("58GB") == 58 << 30 and memory.parse_size(" 1.5 KiB ") == 1536
    assert memory.parse_size("7") == 7 and memory.parse_size("3m") == 3 << 20
    with pytest.raises(ConfigError, match="'much' is no size; write 58GB"):
        memory.parse_size("much")
    assert (memory.shown(1536 << 20), memory.shown(5 << 20)) == ("1.5 GiB", "5 MiB")


def test_what_the_device_has() -> None:
    assert memory.device_memory("ascend") is None
    assert memory.device_memory("ascend", "2GB") == 2 << 30
    free = memory.device_memory("cpu")
    assert free is None or 0 <= free < 1 << 50
    assert memory.device_memory("cpu", "1KB") == 1024


MEASURE = """
import json, re, sys
from pathlib import Path
from research.qwen.train.preparing import prepare
from research.qwen.train.recipe import Recipe
from research.qwen.train.runner import run
recipe = Recipe(**{**json.loads(sys.argv[1]), **{name: Path(path) for name, path in json.loads(sys.argv[2]).items()}})
run(recipe)
peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
print(json.dumps([prepare(recipe).estimate.total, peak]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_estimate_against_the_peak_of_a_process(tmp_path: Path, demo_folder: Path, method: str) -> None:
    """Rows that fill the window: 8 x 512 tokens, some 300 MB above what an empty MindSpore takes."""
    words = "深度学习是机器学习的一种，" * 60
    talk = [{"from": "user", "value": "?"}, {"from": "assistant", "value": words}]
    data = tmp_path / "data.json"
    data.write_text(json.dumps([{"conversations": talk}] * 8), encoding="utf-8")
    values = {"method": method, "batch_size": 8, "accumulation": 1, "max_steps": 1, "max_length": 512}
    values |= {"device": "CPU", "recompute": False, "log_steps": 1}
    paths = {"model": str(demo_folder), "train_data": str(data), "output_dir": str(tmp_path / "out")}
    command = [sys.executable, "-c", MEASURE, json.dumps(values), json.dumps(paths)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    estimated, peak = json.loads(done.stdout.splitlines()[-1])
    assert 0.8 * peak < estimated < 1.25 * peak, (estimated >> 20, peak >> 20)


@pytest.mark.slow
@pytest.mark.parametrize("page", ["finetune.md", "finetune_zh.md"])
def test_the_tables_of_the_docs_are_those_computed(repository: Path, page: str) -> None:
    text = (repository / "docs" / page).read_text(encoding="utf-8").splitlines()
    for device, alone in (("ascend", True), ("ascend", False), ("cpu", True)):
        for cells in finetune_memory.rows([512, 2048], device, alone):
            assert f"| {' | '.join(cells)} |" in text, (device, cells)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_script_prints_a_table(capsys: pytest.CaptureFixture[str], language: str) -> None:
    assert finetune_memory.main(["--lengths", "1024", "--alone", "--language", language]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert ("not measured" if language == "en" else "未在 NPU 上实测") in lines[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[4:]]
    assert len(rows) == 8 and rows[3][2:4] == ["1", "143.1 M (1.9%)"]
    found = memory.estimate(SIZES["7b"], Recipe(max_length=1024), "ascend")
    assert float(rows[3][-1]) == round(found.total / 2**30, 1)
