"""Entry of ``python -m research.qwen.cli``."""

import sys

from research.qwen.cli import main

if __name__ == "__main__":
    sys.exit(main())
