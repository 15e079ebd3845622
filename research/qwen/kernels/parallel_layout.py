"""How a model in training is laid over devices, and the rules such a layout has to keep.

Pure: no MindSpore. The strategies themselves are set on the cells of ``ascend_training``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from research.qwen.config import QwenConfig
from research.qwen.errors import ConfigError

BANDS = ("q", "k", "v")


@dataclass(frozen=True)
class ParallelLayout:
    """Sizes of the device grid: ``data`` x ``model`` x ``stages`` devices.

    data: copies of the model, each with its own rows. model: devices that share every matrix. stages: parts of the
    stack of layers. micro_batches: pieces a batch is fed through the stages in. whole_embedding: every device of a
    ``model`` group holds all rows of the embedding. optimizer: parameters, gradients and Adam's moments are divided
    over the ``data`` copies.
    """

    data: int = 1
    model: int = 1
    stages: int = 1
    micro_batches: int = 1
    whole_embedding: bool = True
    optimizer: bool = False

    @property
    def devices(self) -> int:
        """Number of devices the layout is for."""
        return self.data * self.model * self.stages

    def settings(self) -> dict[str, Any]:
        """MindSpore's ``set_auto_parallel_context`` for the step graph; of its seven inputs a device gets its rows."""
        rows = self.data
        found: dict[str, Any] = {
            "parallel_mode": "semi_auto_parallel",
            "dataset_strategy": (*[(rows,)] * 3, *[(rows, 1, 1)] * 3, (rows, 1)),
            "pipeline_stages": self.stages,
            "gradients_mean": False,
        }
        if self.optimizer:
            found |= {
                "enable_parallel_optimizer": True,
                "parallel_optimizer_config": {"parallel_optimizer_threshold": 0},
            }
        return found

    def data_rank(self, rank: int) -> int:
        """Which copy of the model a process belongs to, so which rows it reads; stages count slowest, then copies."""
        return rank % (self.data * self.model) // self.model

    def check(self, config: QwenConfig, devices: int, rows: int) -> None:
        """ConfigError unless the layout fits the model, the number of devices and a batch of ``rows`` per step.

        ``rows`` are those of all data copies together.
        """
        if self.devices != devices:
            raise ConfigError(
                f"parallel_config: data_parallel {self.data} x model_parallel {self.model} x pipeline_stage "
                f"{self.stages} = {self.devices} devices, but {devices} processes were started"
            )
        for what, size in (
            ("num_heads", config.num_heads),
            ("hidden_size", config.hidden_size),
            ("MLP width", config.mlp_width),
            ("vocab_size", config.vocab_size),
        ):
            if size % self.model:
                raise ConfigError(
                    f"parallel_config.model_parallel {self.model} does not divide {what} {size}"
                )
        if self.stages > config.num_layers:
            raise ConfigError(
                f"pipeline_stage {self.stages} exceeds the {config.num_layers} layers of the model"
            )
        if self.stages > 1 and self.micro_batches < self.stages:
            raise ConfigError(
                f"micro_batch_num {self.micro_batches} is below pipeline_stage {self.stages}; stages would idle"
            )
        if rows % (self.data * self.micro_batches):
            raise ConfigError(
                f"a step of {rows} rows cannot be divided into data_parallel {self.data} x micro_batch_num "
                f"{self.micro_batches}"
            )
        if self.optimizer and self.data == 1:
            raise ConfigError(
                "enable_parallel_optimizer needs data_parallel above 1: it divides over the copies"
            )

    def stage_of(self, layer: int, layers: int) -> int:
        """Stage of a layer: as even as possible, earlier stages get what is left over.

        The first stage also holds the embedding and the last one the output matrix.
        """
        each, more = divmod(layers, self.stages)
        stage = 0
        end = each + (stage < more)
        while layer >= end:
            stage += 1
            end += each + (stage < more)
        return stage


def published_name(name: str) -> tuple[str, int | None]:
    """Published name of a parameter, and which band (0 q, 1 k, 2 v) of that tensor it is, None for the whole.

    ``c_attn.q.weight`` is the first third of ``c_attn.weight``, ``c_attn.lora_B.v.weight`` the last of
    ``c_attn.lora_B.weight``.
    """
    parts = name.split(".")
    if len(parts) > 2 and parts[-2] in BANDS and "c_attn" in parts:
        return ".".join([*parts[:-2], parts[-1]]), BANDS.index(parts[-2])
    return name, None


def bands(tensor: NDArray[Any]) -> list[NDArray[Any]]:
    """The rows of q, k and v of c_attn's weight, bias or lora_B."""
    return np.split(tensor, len(BANDS))
