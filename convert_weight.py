"""Convert checkpoints: see ``python convert_weight.py --help``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from research.qwen.cli.convert import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
