"""QwenForCausalLM in MindFormers' registry: its interface, our model and our decoding loop."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
from mindformers import MindFormerModuleType, MindFormerRegister
from mindformers.generation.utils import GenerateOutput
from mindformers.models import LlamaConfig, PreTrainedModel
from mindspore import Parameter, Tensor
from numpy.typing import NDArray

from research.qwen.config import QwenConfig, disagreement
from research.qwen.decode.loop import Chunk, GenerationLoop
from research.qwen.errors import KernelError, PromptError, RequestError
from research.qwen.kernels.api import load_kernels
from research.qwen.mf import folders, generation
from research.qwen.mf.config import read_config
from research.qwen.mf.options import read_options, read_prompts
from research.qwen.mf.weights import AdaptedSource, ParameterSource, ZeroSource, initial_format
from research.qwen.model.loading import TensorSource, is_cache
from research.qwen.model.opening import backend_options, cache_spec
from research.qwen.model.precision import Precision
from research.qwen.model.quantise import Plan, quantised_source
from research.qwen.model.runtime import Runtime
from research.qwen.weights.adapters import is_adapter
from research.qwen.weights.names import check
from research.qwen.weights.readers import open_checkpoint

BACKEND = "QWEN_BACKEND"

log = logging.getLogger(__name__)


@MindFormerRegister.register(MindFormerModuleType.MODELS)
class QwenForCausalLM(PreTrainedModel):
    """First-generation Qwen behind MindFormers' model interface.

    Parameters carry the published names. ``generate`` is the engine's loop; called as a cell, the model takes the
    paged arguments of MindFormers' own runner.

    Args:
        config: a LlamaConfig, as ``LlamaConfig.from_pretrained(yaml)`` makes it, with Qwen's own keys in it
            (rotary_emb_base, kv_channels, use_dynamic_ntk, use_logn_attn, ...). ``checkpoint_name_or_path`` may be any
            checkpoint we read: a Hugging Face folder, .safetensors, .ckpt. Without one all weights are zero.
        backend: cpu, reference or ascend; None: environment variable QWEN_BACKEND, else MindSpore's device_target.
    Raises:
        ConfigError: an unknown key or a bad value. CheckpointError: weights that are missing or do not fit.
        KernelError: the device is not available here.
    """

    config_class = LlamaConfig
    base_model_prefix = "transformer"
    _support_list: list[str] = []

    def __init__(self, config: LlamaConfig, backend: str | None = None) -> None:
        super().__init__(config, auto_prefix=False)
        settings = read_config(config)
        run = settings.run
        self.shape, self.defaults, self.use_past = settings.shape, settings.generation, run.use_past
        self.chat_format = run.chat_format
        name = choose_backend(backend)
        precision = Precision(run.compute_dtype if name == "ascend" else None)
        self.kernels = load_kernels(name, **backend_options(name, precision, None))
        self.cache = cache_spec(self.shape, name, run.num_blocks, run.block_size)
        self.lock = threading.RLock()
        self._alphas: dict[int, float] = {}
        if config.checkpoint_name_or_path:
            self.load_checkpoint(config)
        else:
            self._install(ZeroSource(self.shape, initial_format(run.param_init_type, self.kernels)))
            self._empty = True

    # ---- weights ----

    def _install(self, source: TensorSource) -> None:
        """Build the layers for the number formats of a checkpoint and set their weights."""
        self.runtime = Runtime.load(self.shape, source, self.kernels, self.cache)
        self.model = self.runtime.model
        self.loop = GenerationLoop(self.runtime, use_cache=self.use_past)
        self._empty = False

    def load_checkpoint(self, config: LlamaConfig | str | os.PathLike[str]) -> None:
        """Load ``config.checkpoint_name_or_path`` (or a path): a Hugging Face or converted folder, a file, or an
        adapter's folder, which names its base.

        Raises CheckpointError if it is missing, damaged, or does not hold exactly this model's tensors.
        """
        path = config.checkpoint_name_or_path if isinstance(config, LlamaConfig) else config
        if path and is_adapter(Path(path)):
            self._install(AdaptedSource(Path(path), self.shape))
        elif path:
            checkpoint = open_checkpoint(Path(path))
            self._install(quantised_source(checkpoint, self.shape, Plan()))
            if (checkpoint.folder / "config.json").exists():
                different = disagreement(QwenConfig.from_folder(checkpoint.folder), self.shape)
                if different:
                    log.warning("%s: config.json beside it says otherwise: %s", path, different)

    def fuse_weight_from_ckpt(self, ckpt_dict: Mapping[str, Parameter]) -> dict[str, Parameter]:
        """Take the weights out of a dictionary MindFormers has read; called by its Trainer and load functions.

        MindFormers itself only warns about missing weights. The answer makes its own loading a matter of nothing: each
        parameter is there and is loaded with itself. Raises CheckpointError as ``load_checkpoint``.
        """
        source = ParameterSource(ckpt_dict)
        check(source, self.shape)
        self._install(source)
        return {parameter.name: parameter for parameter in self.get_parameters()}

    def parameters_and_names(
        self, name_prefix: str = "", expand: bool = True
    ) -> Iterator[tuple[str, Parameter]]:
        """Weights only: the KV cache is neither saved nor expected in a checkpoint."""
        for name, parameter in super().parameters_and_names(name_prefix, expand):
            if not is_cache(parameter.name):
                yield name, parameter

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_dir: str | os.PathLike[str],
        backend: str | None = None,
        **overrides: Any,
    ) -> QwenForCausalLM:
        """Load a folder of save_pretrained, a converted one (YAML and weights), or a Hugging Face folder.

        ``overrides`` are keys of the LlamaConfig, such as ``use_past=True``; an unknown one is a ConfigError.
        """
        return cls(folders.open_config(Path(pretrained_model_name_or_dir), overrides), backend)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        save_name: str = "mindspore_model",
        save_json: bool = False,
    ) -> None:
        """Write ``save_name``.ckpt and ``save_name``.yaml, both readable by from_pretrained, Trainer and
        run_qwen_7b.py; with ``save_json`` the published Hugging Face layout (config.json, model.safetensors)."""
        folders.save(self, Path(save_directory), save_name, save_json)

    # ---- generation ----

    def generate(
        self,
        input_ids: Any,
        generation_config: Any = None,
        logits_processor: Any = None,
        streamer: Any = None,
        seed: int | None = None,
        **options: Any,
    ) -> list[NDArray[np.int32]] | GenerateOutput:
        """Complete prompts: arguments and answers of MindFormers' ``generate``, decoding by the engine's loop.

        Args:
            input_ids: one prompt or a batch: lists of ids (right-padded or of different lengths), array or Tensor.
            generation_config: a GenerationConfig in place of the model's own defaults.
            logits_processor: a LogitsProcessorList, or callables (ids, scores (V,)) -> scores.
            streamer: gets the prompts, then per step an int, or for a batch one list of ids per row; then ``end``.
            seed: row i of a batch draws with seed + i.
            options: max_length, max_new_tokens, min_length, min_new_tokens, do_sample, temperature, top_k (0: off),
                top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty, eos_token_id, pad_token_id,
                stop_words_ids (sequences of ids; an answer ends after one, which stays in it),
                return_dict_in_generate, output_scores, output_logits. None follows the configuration.
        Returns:
            Per prompt an int32 array of prompt and new ids, without padding, the ending id included; or a
            GenerateOutput with these as ``sequences``, and ``scores`` and ``logits`` as one (B, V) array per step.
        Raises:
            PromptError, RequestError: before anything runs; the model stays usable.
        """
        try:
            chosen = read_options(
                self.defaults, generation_config, options, seed, self.use_past, self.runtime.vocab_size
            )
            prompts = read_prompts(input_ids, chosen.pad_id, self.runtime.vocab_size, self.runtime.max_length)
            if streamer is not None:
                streamer.put(generation.padded(prompts, chosen.pad_id))
            self._warn_if_empty()
            with self.lock:
                records = generation.run(self.loop, prompts, chosen, logits_processor, streamer)
        finally:
            if streamer is not None:
                streamer.end()  # also after an error: whoever reads the stream in another thread would wait forever
        sequences = [
            np.asarray([*prompt, *record.ids], np.int32)
            for prompt, record in zip(prompts, records, strict=True)
        ]
        if not chosen.as_dict:
            return sequences
        rows = self.runtime.vocab_size
        scores = generation.by_step([record.scores for record in records], rows) if chosen.scores else None
        logits = generation.by_step([record.logits for record in records], rows) if chosen.logits else None
        return GenerateOutput(sequences=sequences, scores=scores, logits=logits)

    def _warn_if_empty(self) -> None:
        """A model nobody loaded weights into answers with token 0 for ever: say so, once."""
        if self._empty:
            self._empty = False
            if (
                not self.model.transformer.ln_f.weight.asnumpy().any()
            ):  # mindspore may have loaded them behind our back
                log.warning(
                    "no checkpoint was loaded: all weights are zero, and so is the meaning of the answer"
                )

    # ---- the model as a cell ----

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        # The host side of a pass (tables, slots) cannot be part of a graph; the pass itself is one in any mode.
        return self.construct(*args, **kwargs)

    def construct(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        input_position: Tensor | None = None,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        input_embeds: Tensor | None = None,
        init_reset: Tensor | None = None,
        batch_valid_length: Tensor | None = None,
        batch_index: Tensor | None = None,
        zactivate_len: Tensor | None = None,
        block_tables: Tensor | None = None,
        slot_mapping: Tensor | None = None,
        prefix_keys_values: Tensor | None = None,
        llm_boost_inputs: Any = None,
        q_seq_lens: Tensor | None = None,
    ) -> Tensor:
        """One forward pass with the arguments of MindFormers' runner.

        Positions, mask and slots follow from lengths and block tables, so ``position_ids``, ``attention_mask``,
        ``slot_mapping`` and the arguments of static caches are accepted and not needed.

        Args:
            input_ids: (B, T) ids, right-padded; (B, 1) in a decoding step.
            batch_valid_length: (B,) or (1, B) tokens of each sequence after this pass.
            block_tables: (B, blocks) of the paged cache.
            q_seq_lens: (B,) new tokens of each sequence, which ``input_ids`` then holds one after another.
        Returns:
            (B, T, V) float32 logits without batch_valid_length, else (B, V): those of each sequence's last token.
        """
        for name, value in (
            ("labels", labels),
            ("input_embeds", input_embeds),
            ("prefix_keys_values", prefix_keys_values),
        ):
            if value is not None:
                raise RequestError(f"{name} is not supported in this version")
        ids = np.atleast_2d(_array(input_ids))
        if batch_valid_length is None:
            return self._plain_pass(ids)
        valid = _array(batch_valid_length).reshape(-1)
        runs = _split_runs(ids, valid, None if q_seq_lens is None else _array(q_seq_lens).reshape(-1))
        if block_tables is None:
            if any(len(run) != length for run, length in zip(runs, valid, strict=True)):
                raise RequestError(
                    "a decoding step needs block_tables: it is they that say where the cache is"
                )
            return Tensor.from_numpy(self._passes(runs, 1))
        chunks = [
            self._paged_chunk(run, int(length), table.tolist())
            for run, length, table in zip(runs, valid, _array(block_tables), strict=True)
        ]
        return Tensor.from_numpy(self.runtime.forward(chunks))

    def _plain_pass(self, ids: NDArray[np.int64]) -> Tensor:
        logits = self._passes(list(ids), ids.shape[1])
        return Tensor.from_numpy(logits.reshape(*ids.shape, -1))

    def _passes(self, runs: list[NDArray[np.int64]], logits: int) -> NDArray[np.float32]:
        """Whole sequences, each in cache blocks borrowed for the pass; (rows, V) of the last ``logits`` tokens."""
        out = []
        for run in runs:
            blocks = None
            with self.lock:
                if 0 < len(run) <= self.runtime.max_length:
                    blocks = self.loop.pool.alloc(-(-len(run) // self.runtime.block_size))
                if blocks is None:
                    raise PromptError(
                        f"a pass over {len(run)} tokens does not fit the KV cache of {self.runtime.max_length}"
                    )
                try:
                    alpha = self.runtime.rope_alpha(len(run))
                    out.append(self.runtime.forward([Chunk(run.tolist(), 0, blocks, alpha, logits)]))
                finally:
                    self.loop.pool.free(blocks)
        return np.concatenate(out)

    def _paged_chunk(self, run: NDArray[np.int64], length: int, table: list[int]) -> Chunk:
        """A run whose cache the caller manages. The NTK factor is chosen at its prefill and remembered by its first
        block, which belongs to no other sequence while it lives."""
        start = length - len(run)
        used = table[: -(-length // self.runtime.block_size)]
        if len(run) == 0 or len(used) * self.runtime.block_size < length or min(used) < 0:
            raise RequestError(f"block table {used} does not hold the {length} tokens of its sequence")
        if start == 0:
            self._alphas[used[0]] = self.runtime.rope_alpha(length)
        return Chunk(run.tolist(), start, used, self._alphas.get(used[0], 1.0), 1)

    # ---- what MindFormers' runner asks for ----

    def prepare_inputs_for_generation(self, input_ids: NDArray[Any], **state: Any) -> dict[str, Any]:
        """Inputs of one pass from MindFormers' padded (B, seq_length) array."""
        valid = np.asarray(state["valid_length_each_example"], np.int32)
        if state.get("prefill") is False:
            ids = input_ids[np.arange(len(valid)), valid - 1][:, None]
        else:
            ids = input_ids[:, : int(valid.max())]
        return {
            "input_ids": Tensor.from_numpy(np.ascontiguousarray(ids, np.int32)),
            "batch_valid_length": valid,  # GenerationMixin makes a Tensor of it
        }

    def prepare_inputs_for_predict_layout(self, input_ids: NDArray[Any], **state: Any) -> tuple[Any, ...]:
        """Positional inputs for MindFormers' checkpoint slicing."""
        return (Tensor.from_numpy(np.asarray(input_ids, np.int32)), *(None for _ in range(11)))

    def set_dynamic_inputs(self, **_state: Any) -> None:
        """Nothing to declare: the runtime's graph has dynamic shapes already."""

    def add_flags_custom(self, is_first_iteration: bool) -> None:
        """Nothing to switch: lengths say which pass it is."""


def choose_backend(name: str | None) -> str:
    """The backend asked for, else that of the environment, else that of MindSpore's device_target."""
    name = name or os.environ.get(BACKEND)
    if name:
        return name
    target = ms.get_context("device_target")
    backends = {"CPU": "cpu", "Ascend": "ascend"}
    if target not in backends:
        raise KernelError(f"device_target {target!r} is not supported; choose CPU or Ascend")
    return backends[target]


def _array(value: Any) -> NDArray[np.int64]:
    array = value.asnumpy() if hasattr(value, "asnumpy") else np.asarray(value)
    return array.astype(np.int64)


def _split_runs(
    ids: NDArray[np.int64], valid: NDArray[np.int64], q_lens: NDArray[np.int64] | None
) -> list[NDArray[np.int64]]:
    """The new tokens of each sequence."""
    if q_lens is None and len(ids) == len(valid):
        if ids.shape[1] == 1:
            return list(ids)
        return [row[:length] for row, length in zip(ids, valid, strict=True)]
    lengths = valid if q_lens is None else q_lens  # one after another in one row
    flat = ids.reshape(-1)
    if len(lengths) != len(valid) or int(lengths.sum()) > len(flat):
        raise RequestError(f"input_ids of shape {ids.shape} do not hold runs of {lengths.tolist()} tokens")
    return np.split(flat[: int(lengths.sum())], np.cumsum(lengths)[:-1])
