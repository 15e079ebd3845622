"""Models of this surface, loaded once. Imports MindFormers (10 s) only when a test asks for it."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.fixtures_util import golden_folder, model_folder


@pytest.fixture(scope="session")
def mf(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The package that registers our classes; MindFormers' log files go where nobody has to clean up."""
    os.environ.setdefault("LOCAL_DEFAULT_PATH", str(tmp_path_factory.mktemp("mindformers-log")))
    import research.qwen.mf

    return research.qwen.mf


@pytest.fixture(scope="session")
def small(mf: Any) -> SimpleNamespace:
    """The golden model of 1024 ids: model, golden arrays, and prompts without their continuation."""
    model = mf.QwenForCausalLM.from_pretrained(model_folder("st_new_bf16"), do_sample=False)
    golden = np.load(golden_folder("st_new_bf16") / "golden.npz")
    prompts = [golden[f"prompt{i}_ids"].tolist() for i in range(3)]
    return SimpleNamespace(model=model, golden=golden, prompts=prompts)


@pytest.fixture(scope="session")
def full(mf: Any) -> SimpleNamespace:
    """The golden model with the published vocabulary, and the tokenizer."""
    model = mf.QwenForCausalLM.from_pretrained(model_folder("full_vocab_bf16"), do_sample=False)
    return SimpleNamespace(model=model, tokenizer=mf.QwenTokenizer())


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The full-vocabulary model as convert_weight.py leaves it: q.ckpt, q.yaml and their companions."""
    from research.qwen.weights.command import main

    target = tmp_path_factory.mktemp("converted") / "q.ckpt"
    source = str(model_folder("full_vocab_bf16"))
    assert main(["--torch_ckpt_dir", source, "--mindspore_ckpt_path", str(target)]) == 0
    return target
