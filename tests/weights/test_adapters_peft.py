"""peft as judge: it loads our adapters and we load its, and both mean the same matrices.

The published modelling code is not at hand; a tree of torch modules with its names is what peft looks at.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from research.qwen.config import QwenConfig
from research.qwen.weights.adapters import load_adapter, save_adapter
from research.qwen.weights.merging import merge
from research.qwen.weights.readers import open_checkpoint
from tests.fixtures_util import model_folder
from tests.lora_fixtures import TARGETS, random_adapter

pytestmark = [pytest.mark.torch, pytest.mark.slow]

BASE = model_folder("bin_sharded_fp32")
MATRICES = ("attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2", "mlp.c_proj")


def tree() -> Any:
    """Modules named as the published ones, with the weights of BASE."""
    import torch
    from torch import nn

    class Tree(nn.Module):
        def __init__(self, config: QwenConfig) -> None:
            super().__init__()
            hidden, width = config.hidden_size, config.mlp_width
            shapes = (
                (hidden, 3 * hidden),
                (hidden, hidden),
                (hidden, width),
                (hidden, width),
                (width, hidden),
            )
            layers = []
            for _ in range(config.num_layers):
                layer = nn.ModuleDict({"attn": nn.Module(), "mlp": nn.Module()})
                for name, (n_in, n_out) in zip(MATRICES, shapes, strict=True):
                    part, leaf = name.split(".")
                    setattr(layer[part], leaf, nn.Linear(n_in, n_out, bias=leaf == "c_attn"))
                layers.append(layer)
            wte = nn.Embedding(config.vocab_size, hidden)
            self.transformer = nn.ModuleDict({"wte": wte, "h": nn.ModuleList(layers)})
            self.lm_head = nn.Linear(hidden, config.vocab_size, bias=False)
            self.config = SimpleNamespace(model_type="qwen", to_dict=lambda: {"model_type": "qwen"})
            self.config.get = lambda key, default=None: default

        def prepare_inputs_for_generation(self) -> None:
            """Asked for by peft's causal wrapper; never called here."""

    config, checkpoint = QwenConfig.from_folder(BASE), open_checkpoint(BASE)
    made = Tree(config)
    state = made.state_dict()
    made.load_state_dict({name: torch.from_numpy(np.array(checkpoint.read(name))) for name in state})
    return made


def merged_by_peft(model: Any) -> dict[str, np.ndarray]:
    whole = model.merge_and_unload()
    return {name: value.detach().numpy() for name, value in whole.state_dict().items()}


def assert_merged(folder: Path, want: dict[str, np.ndarray], work: Path) -> None:
    """What our merge of the adapter in a folder writes is what peft's gives."""
    merge(BASE, folder, work)
    got = open_checkpoint(work)
    for name, array in want.items():
        assert np.abs(got.read(name) - array).max() < 1e-6, name


@pytest.mark.parametrize("changes", [{}, {"rslora": True}, {"modules_to_save": ("wte", "lm_head")}])
def test_peft_loads_ours(changes: dict[str, Any], tmp_path: Path) -> None:
    from peft import PeftConfig, PeftModel

    adapter = random_adapter(QwenConfig.from_folder(BASE), **changes)
    save_adapter(tmp_path / "ours", adapter, str(BASE))
    read = PeftConfig.from_pretrained(str(tmp_path / "ours"))
    assert (read.r, read.lora_alpha, set(read.target_modules)) == (4, 8, set(TARGETS))
    model = PeftModel.from_pretrained(tree(), str(tmp_path / "ours"))
    loaded = {
        name.replace(".default", "").replace(".modules_to_save", "").removeprefix("base_model.model."): value
        for name, value in model.state_dict().items()
    }
    for name, array in adapter.arrays().items():
        assert np.array_equal(loaded[name].numpy(), array), name
    assert_merged(tmp_path / "ours", merged_by_peft(model), tmp_path / "merged")


@pytest.mark.parametrize("safe", [True, False])
def test_we_load_pefts(safe: bool, tmp_path: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    asked = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["c_attn", "attn.c_proj", "w1", "w2"],
        rank_pattern={"w1": 2},
        modules_to_save=["wte", "lm_head"] if safe else None,
        task_type="CAUSAL_LM",
        init_lora_weights=False,  # random halves, not zero
    )
    model = get_peft_model(tree(), asked)
    model.save_pretrained(str(tmp_path / "theirs"), safe_serialization=safe)
    name = "adapter_model.safetensors" if safe else "adapter_model.bin"
    assert (tmp_path / "theirs" / name).exists()
    adapter = load_adapter(tmp_path / "theirs")
    assert len(adapter.updates()) == 8 and adapter.updates()["transformer.h.0.mlp.w1"].rank == 2
    assert adapter.config.modules_to_save == (("wte", "lm_head") if safe else ())
    assert_merged(tmp_path / "theirs", merged_by_peft(model), tmp_path / "merged")
    save_adapter(tmp_path / "again", adapter)
    assert {path.name for path in (tmp_path / "again").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors"
    }  # fmt: skip
    if safe:
        again, given = (tmp_path / where / name for where in ("again", "theirs"))
        assert again.stat().st_size == pytest.approx(given.stat().st_size, abs=200)
