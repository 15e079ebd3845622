"""First-generation Qwen on MindSpore / MindFormers. Importing this package loads nothing heavy."""

__version__ = "0.1.0"
