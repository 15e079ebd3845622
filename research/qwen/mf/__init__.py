"""The MindFormers surface. ``import research.qwen.mf`` registers QwenForCausalLM and QwenTokenizer for YAML files."""

from research.qwen.mf.quiet import import_mindformers

import_mindformers()  # before the modules below import it

from research.qwen.mf.finetune import repair_finetune  # noqa: E402
from research.qwen.mf.model import QwenForCausalLM  # noqa: E402
from research.qwen.mf.tokenizer import QwenTokenizer  # noqa: E402
from research.qwen.mf.trainer import repair_predict  # noqa: E402

repair_predict()
repair_finetune()

__all__ = ["QwenForCausalLM", "QwenTokenizer"]
