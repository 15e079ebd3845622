"""Qwen through MindFormers: ``python run_qwen_7b.py --config run_qwen_7b.yaml --run_mode predict|finetune ...``."""

import sys

from research.qwen.run_qwen_7b import main

if __name__ == "__main__":
    sys.exit(main())
