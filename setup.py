"""Packaging: metadata, pinned dependencies and the data files of the package."""

import re
from pathlib import Path

from setuptools import find_namespace_packages, setup

ROOT = Path(__file__).resolve().parent


def version() -> str:
    """The version as text, so that building imports nothing of the package."""
    source = (ROOT / "research" / "qwen" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"', source, re.MULTILINE)
    if found is None:
        raise SystemExit("setup.py: no __version__ in research/qwen/__init__.py")
    return found.group(1)


def long_description() -> str:
    """README.md, or nothing in a tree without it."""
    readme = ROOT / "README.md"
    return readme.read_text(encoding="utf-8") if readme.is_file() else ""


TORCH = "torch==2.13.0"

setup(
    name="qwen-mindspore",
    version=version(),
    description="First-generation Qwen (1.8B, 7B, 14B, 72B) on MindSpore and MindFormers, Ascend and CPU",
    long_description=long_description(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    # `research` has no __init__.py: a namespace other projects of the same layout can share.
    packages=find_namespace_packages(
        include=["research.qwen", "research.qwen.*"], exclude=["*.__pycache__", "*.__pycache__.*"]
    ),
    package_data={
        "research.qwen": ["demo/*.json", "demo/*.md", "demo/model/*"],
        "research.qwen.kernels": ["csrc/*"],
    },
    # The MindSpore wheel carries CPython 3.11 binaries only.
    python_requires=">=3.11,<3.12",
    install_requires=[
        # A matched pair, and the newest that installs whole from a package index; both lean on the other's
        # internals, so neither moves alone.
        "mindspore==2.9.0",
        "mindformers==1.9.0",
        "numpy>=1.26.4,<2",  # MindSpore is built against NumPy 1
        "tiktoken>=0.14,<1",
        "PyYAML>=6.0.3,<7",
        "tqdm>=4.67,<5",
    ],
    extras_require={
        "convert": [TORCH],  # only for checkpoints in .bin; safetensors need nothing more
        "test": [
            TORCH,
            "pytest==9.2.0",
            "hypothesis==6.170.15",
            "ruff==0.17.5",
            "mypy==2.4.1",
            "types-PyYAML==6.0.12.20261113",
            "dashscope==2.0.2",  # ships the published vocabulary file, qwen.tiktoken
            "transformers==4.57.1",  # judge of the Qwen2 export; also what MindFormers pins
            "Jinja2>=3.1.6,<4",
        ],
        # Named from the start, filled when the part that needs them arrives.
        "serve": [],
        "finetune": [],
        "eval": [],
    },
    entry_points={"console_scripts": ["qwen = research.qwen.cli:main"]},
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3.11",
        "Operating System :: POSIX :: Linux",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    zip_safe=False,
)
