"""One prediction through MindFormers' Trainer, leaving no files behind and nothing but the result on stdout."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mindformers import MindFormerConfig, Trainer, build_context

from research.qwen.errors import RequestError
from research.qwen.kernels.devices import device_available
from research.qwen.mf.model import BACKEND
from research.qwen.mf.trainer import use_device


@dataclass(frozen=True)
class Plan:
    """What to run; paths exist and were checked. ``model_changes`` replaces values of the YAML's model_config."""

    config: Path
    checkpoint: Path
    vocab_file: Path
    prompts: str | list[str]
    device_target: str = "auto"
    device_id: int = 0
    backend: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    model_changes: Mapping[str, Any] = field(default_factory=dict)
    save_file: str | None = None


def predict(plan: Plan) -> list[dict[str, Any]]:
    """MindFormers' answer: ``[{'text_generation_text': [...]}]``, one entry per prompt.

    Raises:
        QwenError: every one names what is wrong; KernelError if the device is not there.
    """
    target = plan.device_target
    if target == "auto":
        target = "Ascend" if device_available() else "CPU"
    use_device(target, plan.device_id)
    with tempfile.TemporaryDirectory(prefix="qwen-predict-") as scratch, _backend(plan.backend):
        # A fresh config for every call: MindFormers writes into it.
        config = MindFormerConfig(str(plan.config))
        config.model.model_config.update(plan.model_changes)
        config.run_mode, config.use_parallel, config.output_dir = "predict", False, scratch
        config.processor.tokenizer.vocab_file = str(plan.vocab_file)
        config.context.update({"device_target": target, "device_id": plan.device_id})
        if target == "Ascend":
            build_context(config)  # memory limits and the like; on CPU it would only bind threads
        trainer = Trainer(args=config, task="text_generation")
        results: list[dict[str, Any]] = trainer.predict(
            input_data=plan.prompts,
            predict_checkpoint=str(plan.checkpoint),
            save_file=_save_file(plan.save_file, scratch),
            **plan.options,
        )
    return results


@contextmanager
def _backend(name: str | None) -> Iterator[None]:
    """MindFormers builds the model, so the choice reaches it through the environment; for this call only."""
    before = os.environ.get(BACKEND)
    if name is not None:
        os.environ[BACKEND] = name
    try:
        yield
    finally:
        if name is not None:
            os.environ.pop(BACKEND)
            if before is not None:
                os.environ[BACKEND] = before


def _save_file(named: str | None, scratch: str) -> str:
    if named is None:
        return os.path.join(scratch, "result.txt")
    folder = os.path.dirname(os.path.abspath(named))
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        raise RequestError(f"--save_file {named}: the folder {folder} does not exist or is not writable")
    return named
