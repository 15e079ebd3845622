"""Three repairs of MindFormers' Trainer.predict, for our model only; everything else goes through unchanged.

- A second ``predict`` on one Trainer with another checkpoint or other options is silently answered with the first
  ones, because the pipeline is kept. Here the pipeline is made anew and the network kept as long as it is the same.
- ``top_k: 0`` in YAML (off) becomes 1 (greedy).
- Checkpoints go through our own reader: strict, without a second copy in memory, and any format we know.
"""

from __future__ import annotations

import copy
import functools
import os
from pathlib import Path
from typing import Any

import mindspore as ms
from mindformers.models import build_network
from mindformers.trainer.causal_language_modeling import CausalLanguageModelingTrainer

from research.qwen.errors import KernelError
from research.qwen.kernels.devices import ascend_problem
from research.qwen.mf.config import SET_BY_MINDFORMERS
from research.qwen.mf.model import QwenForCausalLM
from research.qwen.text.vocabulary import VOCAB_NAME


def repair_predict() -> None:
    """Install the repairs; a second call changes nothing."""
    original = CausalLanguageModelingTrainer.predict
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def predict(
        self: Any,
        config: Any = None,
        input_data: Any = None,
        network: Any = None,
        tokenizer: Any = None,
        **options: Any,
    ) -> Any:
        if not is_ours(config, network):
            return original(self, config, input_data, network, tokenizer, **options)
        use_device(_get(config, "context", "device_target"), _get(config, "context", "device_id") or 0)
        if _get(config, "run_mode") in ("train", "finetune"):
            config.run_mode = "predict"  # after training with the same Trainer; MindFormers would refuse
        path = _get(config, "checkpoint", "load_path")
        if options.get("top_k") is None:
            options["top_k"] = _get(config, "model", "model_config", "top_k") or 0
        if tokenizer is None:
            _find_vocabulary(config, path)
        self.pipeline_task = None
        if path:
            # Ours to load. Left in place it would also win over the predict_checkpoint of the next call.
            config.checkpoint.load_path = None
        network = _network(self, config, network, path)
        return original(self, config, input_data, network, tokenizer, **options)

    CausalLanguageModelingTrainer.predict = predict


def use_device(target: str | None, device_id: int = 0) -> None:
    """Tell MindSpore the device; None or "auto" leaves its own choice. KernelError if it is not there."""
    if target in (None, "", "auto"):
        return
    if target not in ("CPU", "Ascend"):
        raise KernelError(f"device_target {target!r} is not supported; choose CPU, Ascend or auto")
    if target == "Ascend":
        problem = ascend_problem()
        if problem:
            raise KernelError(f"device_target Ascend is not available here: {problem}; use CPU")
    if ms.get_context("device_target") != target:
        ms.set_device(target, device_id)


def is_ours(config: Any, network: Any) -> bool:
    """Whether a network, or what a configuration describes, is our model."""
    if network is not None:
        return isinstance(network, QwenForCausalLM)
    return bool(_get(config, "model", "arch", "type") == QwenForCausalLM.__name__)


def _get(config: Any, *path: str) -> Any:
    for part in path:
        config = config.get(part) if config else None
    return config


def _network(trainer: Any, config: Any, network: QwenForCausalLM | None, path: str | None) -> QwenForCausalLM:
    """The network with the weights of ``path``: the one given, the one of the last call, or a new one."""
    if network is not None:
        if path:
            network.load_checkpoint(path)
        return network
    section = copy.deepcopy(config.model)  # building writes into it
    model_config = section.model_config
    model_config.pop("pet_config", None)  # of training; an adapter's own config says what it is
    path = path or model_config.get("checkpoint_name_or_path")
    model_config.checkpoint_name_or_path = path
    ignored = {"batch_size", *SET_BY_MINDFORMERS}
    identity = repr(sorted((key, str(value)) for key, value in model_config.items() if key not in ignored))
    kept = getattr(trainer, "_qwen_network", None)
    if kept is not None and kept[0] == identity:
        kept[1].config.batch_size = model_config.get("batch_size") or 1  # the pipeline compares it
        return kept[1]
    trainer._qwen_network = None  # free the old weights before the new ones come
    built: QwenForCausalLM = build_network(section)
    trainer._qwen_network = (identity, built)
    return built


def _find_vocabulary(config: Any, path: str | None) -> None:
    """A vocabulary file beside the checkpoint, where the YAML names none or a relative one that is not here."""
    section = _get(config, "processor", "tokenizer")
    if not section:
        return
    named = section.get("vocab_file")
    if path and not (named and os.path.exists(named)):
        folder = Path(path) if os.path.isdir(path) else Path(path).parent
        beside = folder / (named or VOCAB_NAME)
        if beside.is_file():
            section.vocab_file = str(beside)
